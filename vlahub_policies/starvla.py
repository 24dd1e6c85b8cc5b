"""StarVLA QwenOFT: Qwen2.5-VL reads the views and a text that ends in one placeholder token per action; an MLP regresses the chunk from their hidden states.

    views [B, V, h, w, 3] -> vision tower -> image tokens --+
    prompt with `chunk` copies of the action token ---------+-> decoder, causal -> hidden [B, chunk, C] at the action tokens -> MLP -> actions [B, chunk, D]

One pass, no denoising, no autoregression. Since attention is causal, nothing behind the last action token can change an action, so the sequence ends there.
For reinforcement learning the regression is the mean of a Gaussian with a learned standard deviation per action dimension, in normalised action space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from vlahub import hub
from vlahub.interface import Interface
from vlahub.observation import Observation, views
from vlahub.policy import Evaluation, Policy, Sample, Trace, override
from vlahub_policies.parts import lora, pillow, qwen_text, randomness, robots
from vlahub_policies.parts.acceleration import MODES, Accelerated, Acceleration, compiled
from vlahub_policies.parts.filling import filled
from vlahub_policies.parts.flow import normal_entropy, normal_log_prob
from vlahub_policies.parts.heads import ValueHead
from vlahub_policies.parts.qwen_text import END, IMAGE, PAD, START, VISION_END, VISION_START
from vlahub_policies.parts.qwen_vl import (
    DecoderLayer,
    TextConfig,
    TextModel,
    VisionBlock,
    VisionConfig,
    VisionTower,
    constant,
    pack,
    patchify,
    positions_of,
    sizes_of,
)

ACTION_TOKEN = "🔍"  # one rare character that Qwen's vocabulary holds as one token

# ------------------------------------------------------------------------------------------------ actions

BOUNDS = {"min_max": ("min", "max"), "q99": ("q01", "q99")}  # which entries of the statistics scale an action


@dataclass(frozen=True)
class ActionCodec:
    """Between the network's numbers and the environment's, per action dimension.

    `scaled` dimensions are mapped from [-1, 1] to [low, high]. The others are grippers, regressed raw with 0 = closed and 1 = open; a gripper that the
    interface gives numbers for "open" and "closed" is switched to one of the two (`binary`) or moved between them.

    Two releases of the original differ in decoding: "1.2", behind the published results, clips to [-1, 1] and opens at exactly 0.5; "head" clips nothing and
    opens only above 0.5. And two in encoding: bounds of kind "min_max" map a constant dimension to 0, bounds "q99" leave it alone and clamp to 2.2.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    scaled: tuple[bool, ...]
    opened: tuple[float | None, ...]  # the environment's number for an open gripper; None where it has none
    closed: tuple[float | None, ...]
    bounds: Literal["min_max", "q99"] = "min_max"
    release: Literal["1.2", "head"] = "1.2"
    binary: bool = True

    @classmethod
    def of(cls, interface: Interface, statistics: Mapping[str, Any], **options: Any) -> ActionCodec:
        """From one entry of dataset_statistics.json (its "action" part)."""
        keys = BOUNDS[options.get("bounds", "min_max")]
        missing = [key for key in keys if key not in statistics]
        if missing:
            raise hub.CheckpointError(f"dataset_statistics.json has no {' and no '.join(missing)} for actions")
        low, high = (tuple(float(number) for number in statistics[key]) for key in keys)
        if len(low) != interface.action_dim:
            raise hub.CheckpointError(f"dataset_statistics.json describes {len(low)} action dimensions, the interface {interface.action_dim}")
        scaled = tuple(bool(entry) for entry in statistics.get("mask", [True] * len(low)))
        return cls(low, high, scaled, *_gripper_numbers(interface), **options)

    @property
    def dim(self) -> int:
        return len(self.low)

    @property
    def switches(self) -> tuple[bool, ...]:
        """Dimensions of which the environment sees one of two values."""
        return tuple(self.binary and not scaled and opened is not None for scaled, opened in zip(self.scaled, self.opened, strict=True))

    def decode(self, actions: torch.Tensor) -> torch.Tensor:
        """[..., D] from the network -> env units, float32."""
        return self.to_env(self.to_data(actions.float()))

    def to_data(self, actions: torch.Tensor) -> torch.Tensor:
        """Network -> the data set's units: positions unscaled, grippers 0 (closed) to 1 (open)."""
        low, high, scaled, _, _ = self._tables(actions)
        if self.release == "1.2":
            actions = actions.clamp(-1, 1)
        switches = constant(self.switches, torch.bool, actions.device)
        opening = (actions >= 0.5) if self.release == "1.2" else (actions > 0.5)
        return torch.where(scaled, 0.5 * (actions + 1) * (high - low) + low, torch.where(switches, opening.to(actions.dtype), actions))

    def to_env(self, data: torch.Tensor) -> torch.Tensor:
        _, _, scaled, opened, closed = self._tables(data)
        return torch.where(scaled | opened.isnan(), data, closed + (opened - closed) * data)

    def encode(self, actions: torch.Tensor) -> torch.Tensor:
        """[..., D] env units -> the network's targets."""
        actions = actions.float()
        low, high, scaled, opened, closed = self._tables(actions)
        data = torch.where(scaled | opened.isnan(), actions, (actions - closed) / (opened - closed))
        constant, span = high == low, torch.where(high == low, torch.ones_like(low), high - low)
        unit = 2 * (data - low) / span - 1
        if self.bounds == "min_max":
            unit = torch.where(constant, torch.zeros_like(unit), unit)
        else:
            unit = torch.where(constant, data, unit).clamp(-2.2, 2.2)
        return torch.where(scaled, unit, data)

    def _tables(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """low, high, scaled, opened, closed, each [D]; NaN stands for None."""
        numbers = (tuple(math.nan if entry is None else entry for entry in row) for row in (self.low, self.high, self.opened, self.closed))
        low, high, opened, closed = (constant(row, like.dtype, like.device) for row in numbers)
        return low, high, constant(self.scaled, torch.bool, like.device), opened, closed


def _gripper_numbers(interface: Interface) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """The environment's number for open, and for closed, of each action dimension; None where it is no gripper."""
    each = [entry for entry in interface.action for _ in range(entry.size)]
    return tuple(entry.open for entry in each), tuple(entry.closed for entry in each)


# ------------------------------------------------------------------------------------------------ prompt


def prompt(instruction: str, chunk: int, template: str | None = None, state: Sequence[float] | None = None) -> str:
    """What stands behind the images. A `template` (`CoT_prompt` of the training run) takes the whole request in place of its {instruction}."""
    if state is not None:
        bins = np.digitize(np.asarray(state), np.linspace(-1, 1, 257)[:-1]) - 1
        instruction = f"{instruction} [STATE] {' '.join(map(str, bins))} [ACTION]"
    request = f"{instruction} Please predict the next {chunk} robot actions: <action>{ACTION_TOKEN * chunk}<action>."
    return request if template is None else template.replace("{instruction}", request)


def conversation(text: str, views: int, tokens_per_view: int = 1) -> str:
    """Qwen's chat format: one user turn with all images first, and the opening of the answer."""
    pictures = f"{VISION_START}{IMAGE * tokens_per_view}{VISION_END}" * views
    return f"{START}system\nYou are a helpful assistant.{END}\n{START}user\n{pictures}{text}{END}\n{START}assistant\n"


# ------------------------------------------------------------------------------------------------ network


class _ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class ActionHead(nn.Module):
    """[..., C] hidden states -> [..., D] normalised actions, each token by itself; unbounded."""

    def __init__(self, width: int, action_dim: int, blocks: int = 2):
        super().__init__()
        inner = 2 * width
        self.layer_norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.mlp_resnet_blocks = nn.ModuleList([_ResidualBlock(inner) for _ in range(blocks)])
        self.layer_norm2 = nn.LayerNorm(inner)
        self.fc2 = nn.Linear(inner, action_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(self.layer_norm1(x.to(self.fc1.weight.dtype))).relu()
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


@dataclass(frozen=True)
class Config:
    interface: Interface
    codec: ActionCodec
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    horizon: int = 8  # actions per prediction, one placeholder token each
    execute: int = 8  # of which this many run before the next prediction
    image_size: tuple[int, int] = (224, 224)  # height, width that every view is resized to
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # as Pillow's Image.resize does it; training data was resized bicubically
    template: str | None = None  # the run's CoT_prompt
    max_text: int = 160  # tokens of text behind the images that a prompt may have; rollouts store this many
    acceleration: Literal["off", "graph", "compile"] = "graph"  # on CUDA, of predict and sample: a CUDA graph, of compiled layers if asked for
    log_std: float = -2.5  # where exploration starts: a standard deviation of 0.08 in normalised action space
    gripper_likelihood: Literal["switch", "gaussian"] = "switch"  # see QwenOFTPolicy._score
    value_head: bool = False
    freeze_vision: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # 0: no LoRA; else adapters in the decoder and, unless frozen, the vision tower, which themselves stay as they are
    lora_alpha: float = 16.0

    def __post_init__(self):
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"execute {self.execute} is not within 1 .. horizon {self.horizon}")
        if self.acceleration not in MODES:
            raise ValueError(f"acceleration {self.acceleration!r} is unknown; known are {', '.join(MODES)}")
        if self.vision.out != self.text.hidden:
            raise ValueError(f"the vision tower gives {self.vision.out} numbers per token, the decoder takes {self.text.hidden}")
        self.vision.grid(self.image_size)
        if self.codec.dim != self.interface.action_dim:
            raise ValueError(f"the codec scales {self.codec.dim} action dimensions, the interface has {self.interface.action_dim}")


def quick_layers(policy: nn.Module, mode: str) -> dict[type, Callable]:
    return {kind: compiled(kind) for kind in (DecoderLayer, VisionBlock)} if mode == "compile" else {}


class QwenOFTPolicy(Accelerated, Policy):
    family: ClassVar[str] = "starvla"
    Config: ClassVar[type] = Config
    fresh: ClassVar[tuple[str, ...]] = ("log_std", "value_head.*", "*.lora_down", "*.lora_up")

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.interface = config, tokenizer, config.interface
        self.horizon, self.execute = config.horizon, config.execute
        self.grid = config.vision.grid(config.image_size)  # patches
        self.merged = tuple(side // config.vision.merge for side in self.grid)  # tokens
        self.action_id, self.image_id, self.pad_id = (qwen_text.token(tokenizer, text) for text in (ACTION_TOKEN, IMAGE, PAD))
        self.visual = VisionTower(config.vision)
        self.language_model = TextModel(config.text)
        self.action_model = ActionHead(config.text.hidden, config.interface.action_dim)
        self.visual.gradient_checkpointing = self.language_model.gradient_checkpointing = config.gradient_checkpointing
        if config.freeze_vision:
            self.visual.requires_grad_(False)
        with torch.device("cpu"):  # with values even where the rest is built without: a checkpoint may lack what RL and LoRA add
            self.log_std = nn.Parameter(torch.full((config.interface.action_dim,), config.log_std))
            self.value_head = ValueHead(config.text.hidden) if config.value_head else None
            if config.lora_rank:
                for adapted in [self.language_model] if config.freeze_vision else [self.language_model, self.visual]:
                    adapted.requires_grad_(False)
                    lora.add(adapted, config.lora_rank, config.lora_alpha)
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.fast = Acceleration(self, self.decide, pack, quick_layers)

    def blocks(self) -> list[nn.Module]:
        return [self.language_model.embed_tokens, *self.visual.blocks, *self.language_model.layers]

    # -------------------------------------------------------------------------------------------- inputs

    def encode_text(self, text: str) -> tuple[list[int], torch.Tensor]:
        """The whole conversation of a prompt: ids [L], and positions [3, L]."""
        count = len(self.interface.cameras)
        ids = self.tokenizer.encode(conversation(text, count, self.merged[0] * self.merged[1]), add_special_tokens=False).ids
        return ids, positions_of(ids, self.image_id, [self.merged] * count)

    def _inputs(self, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [max] and positions [3, max] up to the last action token, padded on the right; kept, because instructions repeat for whole episodes."""
        if instruction not in self._encoded:
            ids, positions = self.encode_text(prompt(instruction, self.config.horizon, self.config.template))
            last = len(ids) - ids[::-1].index(self.action_id)
            pictures = len(ids) - ids[::-1].index(self.image_id)
            if ids[:last].count(self.action_id) < self.config.horizon:
                raise ValueError(f"the prompt of {instruction!r} has fewer than {self.config.horizon} action tokens")
            room = pictures + self.config.max_text
            if last > room:
                raise ValueError(
                    f"the instruction {instruction[:60]!r}... needs {last - pictures} text tokens, max_text is {self.config.max_text}; load the policy with a larger max_text"
                )
            if len(self._encoded) >= 4096:
                self._encoded.clear()
            padding = (0, room - last)
            pad = nn.functional.pad
            self._encoded[instruction] = pad(torch.tensor(ids[:last]), padding, value=self.pad_id), pad(positions[:, :last], padding)
        return self._encoded[instruction]

    def prepare(self, observation: Observation) -> Trace:
        images = []
        extras, wrists = self.interface.extras, self.interface.wrists
        for key, cameras in (("main_images", (self.interface.main,)), ("extra_view_images", extras), ("wrist_images", wrists)):  # the order of training
            given = views(observation, key)[:, : len(cameras)] if cameras and key in observation else None
            if cameras and (given is None or given.shape[1] < len(cameras)):
                names = ", ".join(camera.name for camera in cameras)
                raise ValueError(f"observation[{key!r}] has {0 if given is None else given.shape[1]} views, the policy needs {len(cameras)} ({names})")
            if given is not None:
                images.append(self._resize(given))
        rows = [self._inputs(text) for text in observation["task_descriptions"]]
        tokens, positions = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
        return {"images": torch.cat(images, 1), "tokens": tokens, "positions": positions}

    def _resize(self, images: Any) -> torch.Tensor:
        """uint8 [B, V, H, W, 3], numpy or torch -> [B, V, h, w, 3] on the policy's device."""
        images = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images).to(self.device)
        return pillow.resize(images.flatten(0, 1), self.config.image_size, self.config.resample).unflatten(0, images.shape[:2])

    # -------------------------------------------------------------------------------------------- forward

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, V, h, w, 3] -> [B, V * tokens, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            tokens = self.visual(patchify(images.flatten(0, 1), self.config.vision), self.grid)  # [B * V, tokens, C]
        return tokens.reshape(len(images), -1, tokens.shape[-1])

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """ids [B, L] padded on the right, positions [B, 3, L], image tokens [N, C] in the order of the batch -> final hidden states [B, L, C]."""
        x = self.language_model.embed_tokens(tokens)
        here = tokens == self.image_id
        index = (here.flatten().cumsum(0) - 1).clamp(min=0).reshape(tokens.shape)  # which image token belongs at each place
        x = torch.where(here[..., None], image_tokens[index].to(x.dtype), x)
        return self.language_model(x, positions)

    def queries(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, chunk, C] at the last `chunk` action tokens of each row, in order; earlier ones (from the task's text) do not count."""
        here = tokens == self.action_id
        place = here.cumsum(1) + self.config.horizon - here.sum(1, keepdim=True) - 1  # 0 .. chunk - 1 at the tokens wanted
        place = torch.where(here & (place >= 0), place, self.config.horizon)
        index = torch.zeros(len(tokens), self.config.horizon + 1, dtype=torch.long, device=tokens.device)
        index.scatter_(1, place, torch.arange(tokens.shape[1], device=tokens.device).expand_as(place))
        return hidden.gather(1, index[:, :-1, None].expand(-1, -1, hidden.shape[-1]))

    def forward(self, inputs: Trace) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prepared inputs -> the regression [B, horizon, D] float32 in normalised action space, and the value [B, 1] if there is a value head."""
        longest = int((inputs["tokens"] != self.pad_id).sum(1).max())
        length = min(-(-longest // 32) * 32, inputs["tokens"].shape[1])  # in steps of 32, so that few shapes occur
        given = {"images": inputs["images"], "tokens": inputs["tokens"][:, :length], "positions": inputs["positions"][..., :length]}
        done = self.fast(given)
        return done["mean"], done.get("value")

    def decide(self, inputs: Trace) -> Trace:
        """`forward` without a look at any value, so that it can be captured."""
        tokens = inputs["tokens"]
        queries = self.queries(tokens, self.hidden(tokens, inputs["positions"], self.embed_images(inputs["images"]).flatten(0, 1)))
        mean = self.action_model(queries).float()
        return {"mean": mean} if self.value_head is None else {"mean": mean, "value": self.value_head(queries.mean(1)).float()}

    # -------------------------------------------------------------------------------------------- the contract

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        return self.config.codec.decode(self.forward(inputs)[0])

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        mean, value = self.forward(inputs)
        seeds = randomness.fresh_seeds(len(mean)) if seeds is None else seeds
        actions = mean + self.log_std.float().exp() * randomness.normal(seeds, mean.shape[1:], device=mean.device)
        return Sample(self.config.codec.decode(actions), self._score(actions, mean)[0], value, {**inputs, "actions": actions})

    @torch.no_grad()
    def value(self, observation: Observation, seeds: torch.Tensor | None = None) -> torch.Tensor:
        value = self.forward(self.prepare(observation))[1]
        if value is None:
            raise ValueError("this starvla policy has no value head; load it with value_head=True")
        return value

    def evaluate(self, trace: Trace) -> Evaluation:
        mean, value = self.forward(trace)
        return Evaluation(*self._score(trace["actions"], mean), value)

    def _score(self, actions: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability, entropy), each [B, chunk, D] float32, of sampled normalised actions.

        A Gaussian everywhere except at grippers that the environment sees only as open or closed. Of those, the probability of what the environment saw is
        P(sample >= 0.5) or its complement: scoring the number behind the switch instead, as RLinf does ("gaussian"), adds noise that no reward depends on.
        """
        std = self.log_std.float().exp().expand_as(mean)
        log_prob, entropy = normal_log_prob(actions, mean, std), normal_entropy(std)
        switches = constant(self.config.codec.switches, torch.bool, mean.device)
        if self.config.gripper_likelihood == "gaussian" or not any(self.config.codec.switches):
            return log_prob, entropy
        margin = (mean - 0.5) / std
        opens, closes = torch.special.log_ndtr(margin), torch.special.log_ndtr(-margin)
        switch_entropy = -(opens.exp() * opens + closes.exp() * closes)
        return torch.where(switches, torch.where(actions >= 0.5, opens, closes), log_prob), torch.where(switches, switch_entropy, entropy)

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Mean absolute error over the chunk, grippers included; padded steps do not count."""
        observation = {key: value for key, value in batch.items() if key not in ("actions", "action_is_pad")}
        actions = torch.as_tensor(batch["actions"]).to(self.device)
        if actions.shape[1:] != (self.horizon, self.interface.action_dim):
            raise ValueError(f"batch['actions'] has shape {tuple(actions.shape)}, this policy is trained on [B, {self.horizon}, {self.interface.action_dim}]")
        error = (self.forward(self.prepare(observation))[0] - self.config.codec.encode(actions)).abs()
        if batch.get("action_is_pad") is None:
            return error.mean()
        real = ~torch.as_tensor(batch["action_is_pad"]).to(self.device)[..., None].expand_as(error)
        return (error * real).sum() / real.sum().clamp(min=1)

    # -------------------------------------------------------------------------------------------- making and saving

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """As the contract says; the model reads no state, and grippers stay unscaled."""
        names = BOUNDS[self.config.codec.bounds]
        low, high = (tuple(map(float, statistics["actions"][name])) for name in names)
        self.config = replace(self.config, codec=replace(self.config.codec, low=low, high=high))

    def side_files(self) -> dict[str, bytes]:
        return {qwen_text.TOKENIZER: qwen_text.to_bytes(self.tokenizer)}

    @classmethod
    def from_config(cls, config: Config, folder: Path | None = None) -> Self:
        if folder is None:
            raise ValueError("a starvla policy needs a tokenizer: from_config(config, folder with a tokenizer.json), or QwenOFTPolicy(config, tokenizer)")
        return cls(config, qwen_text.read_tokenizer(folder))

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        """The same model at about 1.4 million parameters, with fresh weights and a small tokenizer. It scales actions by the interface's bounds until `set_statistics` is called."""
        opened, closed = _gripper_numbers(interface)
        space = interface.action_space()
        low, high = (np.where(np.isfinite(side), side, unit).astype(float) for side, unit in ((space.low, -1.0), (space.high, 1.0)))
        tokenizer = qwen_text.tiny_tokenizer([conversation(prompt(text, 8), 1) for text in qwen_text.SENTENCES], [ACTION_TOKEN])
        sizes: dict[str, Any] = dict(
            interface=replace(interface, state=()),  # the model reads no state
            codec=ActionCodec(tuple(low.tolist()), tuple(high.tolist()), tuple(number is None for number in opened), opened, closed, binary=False),
            vision=VisionConfig(4, 96, 4, 192, patch=8, window=32, full_attention=(1, 3), out=128),  # 36 tokens a view
            # a base of a million gives the width axis frequencies that a grid of 4 x 4 tokens cannot tell apart
            text=TextConfig(tokenizer.get_vocab_size(), 4, 128, 4, 2, 32, 256, rope_base=30.0, rope_sections=(4, 6, 6)),
            image_size=(96, 96),
        )
        return cls(Config(**{**sizes, **overrides}), tokenizer).eval()

    @classmethod
    def from_published(
        cls,
        folder: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype | None,
        unnorm_key: str | None = None,
        base_vlm: str | Path | None = None,
        step: int | None = None,
        **options: Any,
    ) -> Self:
        """A training run of StarVLA as it is on the hub.

        Args:
            unnorm_key: the entry of dataset_statistics.json that scales the actions; only needed where there are several.
            base_vlm: folder or hub id of the Qwen2.5-VL base model, of which tokenizer and config.json are read; by default found from the run's config.yaml.
            step: which checkpoint of the run; by default the last one.
            options: entries of Config to override.
        """
        run = find_run(folder)
        record = hub.read_yaml(run / "config.yaml")
        framework = _entry(record, "framework.name") or _entry(record, "framework.framework_py")
        if framework != "QwenOFT":
            raise hub.CheckpointError(f"{run / 'config.yaml'} says framework {framework!r}; only QwenOFT is supported")
        weights, file = read_weights(run, step)
        shapes = {name: tuple(weights.shape(name) if isinstance(weights, hub.Weights) else weights[name].shape) for name in weights}
        base = qwen_text.find_base(str(_entry(record, "framework.qwenvl.base_vlm") or "Qwen/Qwen2.5-VL-3B-Instruct"), run, base_vlm)
        tokenizer = qwen_text.read_tokenizer(base)
        qwen_text.token(tokenizer, ACTION_TOKEN, base)
        config = override(read_run(run, record, shapes, base, unnorm_key, options.pop("interface", None)), **options)
        return filled(cls, config, tokenizer, weights, device, dtype or weights[EMBEDDING].dtype, rename=checkpoint_name, source=str(file))


# ------------------------------------------------------------------------------------------------ published layout

PREFIX = "qwen_vl_interface.model.model."
EMBEDDING = PREFIX + "language_model.embed_tokens.weight"


def checkpoint_name(name: str) -> str | None:
    """A published tensor name -> ours; None for the language-model head, a copy of the embedding that no action needs."""
    if name == "qwen_vl_interface.model.lm_head.weight":
        return None
    return name.removeprefix(PREFIX).replace("action_model.model.", "action_model.", 1)


def find_run(folder: Path) -> Path:
    """The run's folder: itself, or one that a download nested inside."""
    found = [path.parent for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml") for path in sorted(folder.glob(pattern))]
    if not found:
        raise hub.CheckpointError(f"{folder} holds no config.yaml, neither directly nor up to two folders down; it is no StarVLA run")
    nearest = [path for path in found if len(path.parts) == len(found[0].parts)]
    if len(nearest) > 1:
        raise hub.CheckpointError(f"{folder} holds several runs: {', '.join(str(path) for path in nearest)}; name one of them")
    return nearest[0]


def _entry(record: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(record, Mapping) or key not in record:
            return None
        record = record[key]
    return record


def read_weights(run: Path, step: int | None) -> tuple[Mapping[str, torch.Tensor], Path]:
    """The weights of the last step, by number (names sort steps_30000 behind steps_100000), or of the step asked for."""
    numbered = {}
    for file in sorted((run / "checkpoints").glob("steps_*_pytorch_model.*")):
        match = re.fullmatch(r"steps_(\d+)_pytorch_model\.(pt|safetensors)", file.name)
        if match:
            numbered[int(match[1])] = file
    final = next((file for suffix in ("pt", "safetensors") if (file := run / "final_model" / f"pytorch_model.{suffix}").exists()), None)
    if step is not None and step not in numbered:
        raise hub.CheckpointError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(numbered))) or 'none with a number'}")
    file = numbered[step] if step is not None else final or (numbered[max(numbered)] if numbered else None)
    if file is None:
        raise hub.CheckpointError(f"{run} has neither checkpoints/steps_*_pytorch_model.pt nor final_model/pytorch_model.pt")
    weights = hub.Weights([file]) if file.suffix == ".safetensors" else hub.read_pt(file)
    if EMBEDDING not in weights:
        raise hub.CheckpointError(f"{file} has no tensor {EMBEDDING}; it is no QwenOFT on Qwen2.5-VL")
    if any(".self_attn.q_norm." in name or ".deepstack_merger_list." in name for name in weights):
        raise hub.CheckpointError(f"{file} is a QwenOFT on Qwen3-VL, another network; only those on Qwen2.5-VL are supported")
    return weights, file


def read_run(
    run: Path, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: Path, unnorm_key: str | None, interface: Interface | None
) -> Config:
    """Everything but the weights of a run. Nothing is written back."""
    vision, text = sizes_of(shapes, PREFIX + "visual.", PREFIX + "language_model.", base)
    action = _entry(record, "framework.action_model") or {}
    horizon = action.get("action_horizon") or action.get("past_action_window_size", 0) + 1 + action.get("future_action_window_size", -1)
    if horizon < 1:
        raise hub.CheckpointError(f"{run / 'config.yaml'} has neither framework.action_model.action_horizon nor future_action_window_size")
    key, statistics = pick_statistics(run / "dataset_statistics.json", unnorm_key)
    dim = shapes["action_model.model.fc2.weight"][0]
    if interface is None:
        if key != "franka" or dim != 7:
            raise hub.CheckpointError(
                f"{run} was trained on {key!r} with {dim} action dimensions; say what they mean with interface=vlahub.interface.Interface(...)"
            )
        interface = replace(robots.LIBERO, state=(), optional_cameras=())
    data = _entry(record, "datasets.vla_data") or {}
    size = data.get("obs_image_size") or data.get("image_size") or [224, 224]  # (width, height)
    return Config(
        interface,
        ActionCodec.of(interface, statistics),
        vision,
        text,
        horizon=horizon,
        execute=horizon,
        image_size=(int(size[1]), int(size[0])),
        template=data.get("CoT_prompt"),
    )


def pick_statistics(file: Path, unnorm_key: str | None) -> tuple[str, Mapping[str, Any]]:
    """(key, its action statistics). One entry needs no key; several need one, and a wrong one is an error: another robot's scale moves the arm elsewhere."""
    if not file.exists():
        raise hub.CheckpointError(f"{file} is missing; without it the actions cannot be scaled to the robot")
    record = hub.read_json(file)
    known = ", ".join(map(repr, record))
    if unnorm_key is None and len(record) != 1:
        raise hub.CheckpointError(f"{file.name} has statistics of several data sets; pass unnorm_key= one of {known}")
    key = next(iter(record)) if unnorm_key is None else unnorm_key
    if key not in record:
        raise hub.CheckpointError(f"unnorm_key {key!r} is not in {file.name}; valid ones are {known}")
    if "action" not in record[key]:
        raise hub.CheckpointError(f"{file.name} has no action statistics of {key!r}")
    return key, record[key]["action"]
