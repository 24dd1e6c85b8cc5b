"""Policy: what every Vision-Language-Action family offers to evaluation and training.

    policy = vlahub.Policy.from_pretrained("robbyant/lingbot-vla-4b")       # or a folder, or a bundled "vlahub/..." id
    chunk = policy.act(observation)                                         # [T, D] (batched: [B, T, D]) actions in env units
    sample = policy.sample(observation)                                     # rollouts: actions, log_prob, value, trace
    evaluation = policy.evaluate(sample.trace)                              # training: log_prob, entropy, value of the same actions
    loss = policy.sft_loss(batch)                                           # supervised fine-tuning

A family subclasses `Policy` in one file of vlahub_policies/ and is registered with `vlahub.catalog.register_family`.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from vlahub import catalog, hub
from vlahub.interface import Interface
from vlahub.observation import Observation, batched, is_batched, validate

Trace = dict[str, torch.Tensor]


@dataclass
class Sample:
    """One exploratory decision per environment."""

    actions: torch.Tensor  # [B, T, D] env units, float32
    log_prob: torch.Tensor  # [B, T, D] where the model factorises so; otherwise [B, T] or [B]
    value: torch.Tensor | None  # [B, 1] per chunk or [B, T] per action; None without a value head
    trace: Trace  # all that `evaluate` needs: batch-first tensors, inputs already processed


class Evaluation(NamedTuple):  # a tuple, because FSDP looks for the outputs' gradients in tuples, lists and dicts
    """The same decisions under the present weights, with gradients."""

    log_prob: torch.Tensor  # as in Sample
    entropy: torch.Tensor  # [B, T, D], [B, T] or [B]; zeros where the noise is not learnt
    value: torch.Tensor | None


class Policy(nn.Module):
    """A VLA policy. Subclasses set `family` and `Config` and implement the abstract methods.

    Attributes:
        config: the family's dataclass; round-trips through config.json.
        interface: cameras, state and actions that it expects; compared with the environment's before anything runs.
        horizon: T, the number of actions that it predicts.
        execute: N <= T, how many of them run before it is asked again, unless the caller says otherwise.
    """

    family: ClassVar[str]
    Config: ClassVar[type]
    fresh: ClassVar[
        tuple[str, ...]
    ] = ()  # shell patterns of parameters that a checkpoint may lack (RL heads, adapters); built with values even under the meta device

    config: Any
    interface: Interface
    horizon: int
    execute: int

    # ------------------------------------------------------------------------------------------------ the contract

    @abstractmethod
    def prepare(self, observation: Observation) -> Trace:
        """A batched observation -> model inputs on the policy's device (images resized and normalised, text tokenised). Done once per decision."""

    @abstractmethod
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        """Deterministic actions [B, T, D] in env units from prepared inputs: greedy tokens, the mean, or the ODE from noise drawn from `seeds` [B, 2]."""

    @abstractmethod
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        """Exploratory actions with their log-probabilities and value. No gradients.

        All randomness of row i is a function of `seeds[i]` (episode seed, control step; see vlahub_policies.parts.randomness), so that a rollout does not
        depend on batch size or rank count; None draws seeds from torch's global generator.
        """

    @torch.no_grad()
    def value(self, observation: Observation, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """[B, 1] or [B, T]: the critic's estimate alone, where an episode was cut. `seeds` as in `sample`, because some critics look at noise too.
        Families override it where less than a whole sample suffices."""
        value = self.sample(observation, seeds).value
        if value is None:
            raise ValueError(f"this {self.family} policy has no value head; load it with value_head=True")
        return value

    @abstractmethod
    def evaluate(self, trace: Trace) -> Evaluation:
        """log_prob, entropy and value of a trace (any rows of it) under the present weights. On unchanged weights log_prob equals the sample's."""

    @abstractmethod
    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Scalar supervised loss. `batch`: a batched observation plus `actions` [B, T, D] in env units and, optionally, `action_is_pad` [B, T] bool.

        `seeds` [B, 2] as in `sample`: the noise and time that a flow policy trains on."""

    def blocks(self) -> list[nn.Module]:
        """The sub-modules that hold most of the weights and run one after another, the transformer layers: with --shard they are gathered one at a time.
        They run through forward(), or a method in `vlahub.distributed.ENTRY_POINTS`. The policy's own methods call self.forward(...) and not self(...), which
        would free weights that they still need. Without any blocks, sharding gathers the whole policy at once."""
        return []

    @abstractmethod
    def set_statistics(self, statistics: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Normalise by another dataset's statistics from here on: {"states": ..., "actions": ...}, each with mean, std, min, max, q01 and q99 in env units
        (`vlahub.dataset.Dataset.statistics`)."""

    @torch.no_grad()
    def act(self, observation: Observation, deterministic: bool = True, seeds: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """Actions for inference: [T, D] for a single observation, [B, T, D] for a batch.

        Args:
            observation: see `vlahub.observation`; numpy or torch.
            deterministic: True gives the same actions for the same observation and seeds, whatever else is in the batch. False samples as a rollout does.
            seeds: per environment (episode seed, control step), from which all noise is drawn; by default (0, 0), and fresh ones when sampling.
        """
        validate(observation)
        batch = batched(observation)
        count = len(batch["task_descriptions"])
        if seeds is not None and len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for a batch of {count} observations")
        rows = None if seeds is None else torch.as_tensor(np.asarray(seeds, np.int64))
        if deterministic:
            actions = self.predict(self.prepare(batch), torch.zeros(count, 2, dtype=torch.int64) if rows is None else rows)
        else:
            actions = self.sample(batch, rows).actions
        actions = actions.float().cpu().numpy()
        return actions if is_batched(observation) else actions[0]

    # ------------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        family: str | None = None,
        **options: Any,
    ) -> Policy:
        """Load a policy by bundled id, folder or hub repository, in our own format or in its family's published layout.

        Args:
            name: "vlahub/..." (bundled), a local folder, or "user/name" on the hub.
            device: where the weights go.
            dtype: of the weights; None keeps the family's default for the checkpoint.
            family: only needed where a folder looks like several families.
            options: entries of the family's Config to override (noise_level=..., execute=...), and what the layout leaves open (unnorm_key=...).
            revision, cache_dir, force_download, local_files_only, token: as in huggingface_hub.
        """
        folder = hub.resolve(name, revision=revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token)
        card = catalog.family_card(family or hub.family_of(folder))
        catalog.require(card.needs, card.extra, f"the {card.name} policy family")
        policy_class = catalog.load(card.policy)
        if not issubclass(policy_class, cls):
            raise hub.CheckpointError(f"{name} is a {card.name} policy, not a {cls.__name__}; load it with vlahub.Policy.from_pretrained")
        known = catalog.POLICIES.get(str(name))
        options = {**(known.options if known else {}), **options}
        record = hub.read_json(folder / hub.CONFIG) if (folder / hub.CONFIG).exists() else {}
        policy = (policy_class._from_own if "vlahub_family" in record else policy_class.from_published)(folder, device=device, dtype=dtype, **options)
        return policy.eval()

    @classmethod
    @abstractmethod
    def from_published(cls, folder: Path, *, device: torch.device | str, dtype: torch.dtype | None, **options: Any) -> Self:
        """Load the family's published layout, unedited."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, folder: Path | None = None) -> Self:
        """The policy with fresh weights; `folder` holds its side files (tokenizer). Called under the meta device when weights follow."""

    @classmethod
    def _from_own(cls, folder: Path, *, device: torch.device | str, dtype: torch.dtype | None, **options: Any) -> Self:
        record = hub.read_json(folder / hub.CONFIG)
        config = override(config_from_dict(cls.Config, record["config"]), **options)
        with torch.device("meta"):
            policy = cls.from_config(config, folder)
        if dtype is not None:
            policy.cast(dtype)
        hub.load_tensors(policy, hub.Weights(hub.safetensors_files(folder)), may_miss=cls.fresh, device=device, source=str(folder))
        return policy.to(device)  # what the checkpoint lacked

    def cast(self, dtype: torch.dtype) -> Self:
        """Change the dtype of the weights. Families that keep some parts in float32 override it."""
        return self.to(dtype)

    def side_files(self) -> dict[str, bytes]:
        """Files beside config and weights that from_config needs: the tokenizer, mostly."""
        return {}

    def save_pretrained(self, folder: str | Path, *, card: str | None = None, shard: str = "5GB", tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write config.json, model.safetensors (in shards where larger than `shard`), side files and README.md; `from_pretrained` reads them back.

        `tensors` stands in for the state dict where the parameters themselves are sharded over ranks (`vlahub.checkpoint` gathers them)."""
        from huggingface_hub import save_torch_state_dict

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # parameters that are views of one block look like duplicates to the writer
        state = {
            name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()
            for name, tensor in (self.state_dict() if tensors is None else tensors).items()
        }
        save_torch_state_dict(state, folder, max_shard_size=shard)
        for name, data in self.side_files().items():
            (folder / name).write_bytes(data)
        record = {"vlahub_family": self.family, "config": config_to_dict(self.config), "interface": self.interface.to_dict()}
        (folder / hub.CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        (folder / "README.md").write_text(card or self.model_card())
        return folder

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str = "Upload with vlahub", card: str | None = None
    ) -> str:
        """Upload to a model repository with a model card. Returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(repo)

    def model_card(self) -> str:
        def names(fields: Sequence[Any]) -> str:
            return ", ".join(f"{field.name}[{field.size}]" for field in fields) or "none"

        return (
            "---\nlibrary_name: vlahub\npipeline_tag: robotics\ntags: [vlahub, vla, robotics]\n---\n"
            f"# {type(self).__name__} ({self.family})\n\n"
            "```python\nimport vlahub\npolicy = vlahub.Policy.from_pretrained('THIS_REPOSITORY')\n```\n\n"
            f"| | |\n|---|---|\n| parameters | {sum(p.numel() for p in self.parameters()):,} |\n| cameras | {', '.join(self.interface.cameras)} |\n"
            f"| state | {names(self.interface.state)} |\n| action | {names(self.interface.action)} |\n| horizon, executed | {self.horizon}, {self.execute} |\n"
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def override(config: Any, **options: Any) -> Any:
    """A copy of a config dataclass with some entries replaced; unknown names are an error that suggests the nearest."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in options:
        if name not in known:
            raise TypeError(f"{type(config).__name__} has no entry {name!r}; {catalog.suggest(name, known)}")
    return dataclasses.replace(config, **options)


def config_to_dict(config: Any) -> dict:
    """A config dataclass (of numbers, strings, tuples, dicts and further dataclasses) as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(kind: type, record: Mapping[str, Any]) -> Any:
    """The inverse of config_to_dict. Nested dataclasses and tuples are rebuilt from the annotations; an `Interface` by its own from_dict."""
    import typing

    hints, entries = typing.get_type_hints(kind), {}
    unknown = sorted(record.keys() - hints.keys())
    if unknown:
        raise hub.CheckpointError(f"config.json has entries that {kind.__name__} does not know: {', '.join(unknown)}; it was written by another version")
    for name, value in record.items():
        hint = hints[name]
        options = [hint, *typing.get_args(hint)]
        nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if nested is not None and isinstance(value, Mapping):
            value = nested.from_dict(value) if hasattr(nested, "from_dict") else config_from_dict(nested, value)
        elif isinstance(value, list) and any(option is tuple or typing.get_origin(option) is tuple for option in options):
            value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
        entries[name] = value
    return kind(**entries)
