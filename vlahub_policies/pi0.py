"""pi0 and pi0.5: flow-matching policies on PaliGemma, in plain torch, with the published openpi names.

A prefix of image and text tokens runs through SigLIP and Gemma once per decision. A suffix of action tokens (pi0: with a state token in front) runs through a
smaller Gemma, the action expert, once per denoising step; its layer i attends to the keys and values of the prefix's layer i. The prefix never sees the suffix,
so training is the same two passes, and the prefix's pass can be skipped where it is frozen.

pi0.5 differs from pi0 in two places: time enters through adaptive norms of the expert instead of the action tokens, and there is no state token; the state stands
in the prompt as text, or nowhere (`state_in_prompt=False`, as for LIBERO).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F

from vlahub.hub import CheckpointError
from vlahub.interface import Interface
from vlahub.observation import Observation, batch_size, to_torch, views
from vlahub.policy import Evaluation, Policy, Sample, Trace
from vlahub_policies.parts import aloha, flow, images, lora, randomness, text
from vlahub_policies.parts.acceleration import Accelerated, Acceleration, Quick, compiled, through
from vlahub_policies.parts.gemma import Gemma, GemmaConfig, GemmaLayer, KeysValues, Siglip, SiglipConfig, bias_of, pack, rotation
from vlahub_policies.parts.heads import NoiseHead, ValueHead
from vlahub_policies.parts.normalize import Moments, Statistics, normalize, unnormalize
from vlahub_policies.parts.robots import LIBERO

# Forms of inference, each falling back to the one before it: plain; one CUDA graph per shape; with Triton kernels for Gemma; with the rest of the layers compiled.
# The last two are the quickest by far and cost seconds at the first call with each shape, so they are asked for.
ACCELERATIONS = ("off", "graph", "kernels", "compile")


@dataclass(frozen=True)
class Pi0Config:
    """Sizes, how inputs and outputs are prepared, and how the policy explores and trains. The defaults are pi0 as published for LIBERO."""

    pi05: bool = False
    vlm: GemmaConfig = field(default_factory=GemmaConfig)
    expert: GemmaConfig = field(default_factory=lambda: GemmaConfig(width=1024, mlp_dim=4096))
    vision: SiglipConfig = field(default_factory=SiglipConfig)
    vocab_size: int = 257152
    action_dim: int = 32  # the network's; actions and states are padded to it
    horizon: int = 50
    max_token_len: int = 48

    interface: Interface = LIBERO
    execute: int = 5
    statistics: Statistics | None = None
    quantile: bool = False  # normalise by the 1 % and 99 % quantiles instead of mean and standard deviation
    pad_first: bool = False  # pad states and actions to action_dim before they are normalised (Dexbotic, RLinf's Franka data), not after
    relative: tuple[int, ...] = ()  # action dimensions that the network predicts relative to the state at the start of the chunk
    aloha_units: bool = False  # turn Aloha's joint signs and gripper units into those of the pre-training data, and back (openpi's adapt_to_pi)
    state_in_prompt: bool = False  # pi0.5: write the state into the prompt
    resize: Literal["openpi", "lerobot", "dexbotic"] = "openpi"
    augment: bool = True  # train on cropped, turned and recoloured images, as openpi does

    denoising_steps: int = 10  # of predict, along the ODE
    noise_method: str = "flow_sde"  # of sample and evaluate; see vlahub_policies.parts.flow
    num_steps: int = 4  # of sample and evaluate
    noise_level: float = 0.5
    joint_logprob: bool = False
    noise_step: Literal["drawn", "last"] = "drawn"  # unless joint: which denoising step of a row explores
    noise_correlation: float = 0.0  # of the noise of neighbouring actions, 0 to below 1; 0.95 keeps paths smooth where a chunk is one motion
    start_noise: float = 1.0  # scale of the noise that denoising starts from, outside training; 0 starts from its mean, for smooth paths
    noise_range: tuple[float, float] = (0.08, 0.16)  # bounds of flow_noise's standard deviation
    value_head: bool = False
    value_from: Literal["actions", "prefix"] = "actions"  # the critic looks at the expert's action tokens, or at the language model's output
    value_hidden: tuple[int, ...] = (512, 256, 128)
    detach_critic_input: bool = True  # the critic does not train what it looks at

    train_expert_only: bool = True  # freeze SigLIP, projector and language model
    keep_prefix: bool = False  # keep the frozen prefix's keys and values in the trace: evaluate skips the prefix pass (10 MB per decision at full size in bf16)
    gradient_checkpointing: bool = False
    acceleration: Literal["off", "graph", "kernels", "compile"] = "graph"  # of predict and sample on CUDA; see ACCELERATIONS
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0

    def __post_init__(self):
        if (self.vlm.depth, self.vlm.num_kv_heads, self.vlm.head_dim) != (self.expert.depth, self.expert.num_kv_heads, self.expert.head_dim):
            raise ValueError("vlm and expert share keys and values: depth, num_kv_heads and head_dim must be equal")
        if max(self.interface.state_dim, self.interface.action_dim) > self.action_dim:
            raise ValueError(
                f"action_dim {self.action_dim} is smaller than the robot's state ({self.interface.state_dim}) or action ({self.interface.action_dim})"
            )
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"execute {self.execute} is not within 1 .. horizon {self.horizon}")
        if self.state_in_prompt and not self.pi05:
            raise ValueError("state_in_prompt is a form of pi0.5; pi0 has a state token")
        if self.relative and max(self.relative) >= self.action_dim:
            raise ValueError(f"relative names action dimension {max(self.relative)}, but there are {self.action_dim}")
        if self.aloha_units and (self.interface.state_dim, self.interface.action_dim) != (14, 14):
            raise ValueError("aloha_units needs the 14 numbers of an Aloha: two arms of 6 joints and a gripper")
        if self.keep_prefix and not self.train_expert_only:
            raise ValueError("keep_prefix needs train_expert_only: keys and values of a prefix that is trained go out of date")
        for name, choices in (
            ("resize", ("openpi", "lerobot", "dexbotic")),
            ("value_from", ("actions", "prefix")),
            ("acceleration", ACCELERATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known are {', '.join(choices)}")
        self.exploration  # noqa: B018 - it refuses what it does not know

    @property
    def exploration(self) -> flow.Exploration:
        return flow.Exploration(
            self.noise_method, self.num_steps, self.noise_level, self.joint_logprob, self.noise_step, self.noise_correlation, self.start_noise
        )

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        """About 1.7 million parameters and 64 tokens per camera: the same model at a size that trains on a CPU."""
        sizes: dict[str, Any] = dict(
            vlm=GemmaConfig(128, 4, 384, 4, 1, 32), expert=GemmaConfig(96, 4, 256, 4, 1, 32), vision=SiglipConfig(96, 256, 4, 4, 128, 16),
            vocab_size=len(text.bundled()), horizon=10, execute=5, value_hidden=(128, 64), train_expert_only=False, augment=False,
        )  # fmt: skip
        identity = Statistics.identity(interface.state_dim, interface.action_dim)
        return cls(**{**sizes, "interface": interface, "statistics": identity, "relative": (), **overrides})


@dataclass
class Prefix:
    """What the action expert needs of a decision's images and text."""

    kept: list[KeysValues]  # keys and values of each layer, [B, P, kv heads, head_dim]
    mask: torch.Tensor  # [B, P] bool, valid tokens
    out: torch.Tensor | None  # [B, P, width] after the final norm; None where nobody reads it, or keys and values came from a trace


@dataclass
class Timing:
    """What the suffix needs of the time, precomputable for all steps of a schedule."""

    embedding: torch.Tensor  # [N, width] float32
    modulations: list[torch.Tensor] | None  # pi0.5: [N, 1, 3 width] for each norm of the expert

    def at(self, row: int) -> Timing:
        keep = slice(row, row + 1)
        return Timing(self.embedding[keep], None if self.modulations is None else [modulation[keep] for modulation in self.modulations])


OPENPI_TOP = ("paligemma_with_expert.", "action_", "state_proj.", "time_mlp_", "value_head.", "noise_head.")
EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING_ALIAS = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
UNUSED = (
    "paligemma_with_expert.gemma_expert.lm_head.weight",  # a text head that the expert never runs
    "noise_head.logvar_min",  # RLinf's buffers; here they are `noise_range` of the config
    "noise_head.logvar_max",
)


class PaliGemma(nn.Module):
    def __init__(self, config: Pi0Config):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.vision_model = Siglip(config.vision)
        self.model.multi_modal_projector = nn.Module()
        self.model.multi_modal_projector.linear = nn.Linear(config.vision.hidden_size, config.vlm.width)
        self.model.language_model = Gemma(config.vlm)
        # The text embedding. The published files store it, tied as it is, under the output head's name.
        self.lm_head = nn.Embedding(config.vocab_size, config.vlm.width)


def in_float32(method: Callable) -> Callable:
    """Keep autocast out of a method: time features and flow heads are float32 in the originals, and bf16 would round t's features away."""

    @functools.wraps(method)
    def run(self: Pi0Policy, *args: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args)

    return run


class Pi0Policy(Accelerated, Policy):
    family: ClassVar[str] = "pi0"
    Config: ClassVar[type] = Pi0Config
    fresh: ClassVar[tuple[str, ...]] = ("value_head.*", "noise_head.*", "*.lora_down", "*.lora_up")

    def __init__(self, config: Pi0Config, tokenizer: text.Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.interface, self.horizon, self.execute = config.interface, config.horizon, config.execute
        width = config.expert.width
        self.paligemma_with_expert = nn.Module()
        self.paligemma_with_expert.paligemma = PaliGemma(config)
        self.paligemma_with_expert.gemma_expert = nn.Module()
        self.paligemma_with_expert.gemma_expert.model = Gemma(config.expert, adaptive=config.pi05)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        self.add_fresh()
        self.quick = Quick()
        self.fast = Acceleration(self, self.denoise_all, pack, quick_layers, ACCELERATIONS)

    @property
    def paligemma(self) -> PaliGemma:
        return self.paligemma_with_expert.paligemma

    @property
    def language_model(self) -> Gemma:
        return self.paligemma.model.language_model

    @property
    def expert(self) -> Gemma:
        return self.paligemma_with_expert.gemma_expert.model

    def blocks(self) -> list[nn.Module]:
        towers = [self.paligemma.model.vision_tower.vision_model.encoder.layers, self.language_model.layers]
        if not self.config.pi05:  # adaptive norms are asked for their modulations from outside their layers
            towers.append(self.expert.layers)
        return [self.paligemma.lm_head, *(layer for tower in towers for layer in tower)]

    # ------------------------------------------------------------------------------------------------ the network

    def embed_prefix(
        self, pixels: torch.Tensor, tokens: torch.Tensor, token_mask: torch.Tensor, image_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels [B, V, 3, H, W] in [-1, 1], tokens [B, L] -> tokens of both [B, P, width] and their mask [B, P]. P = V * tokens per image + L."""
        batch, cameras = pixels.shape[:2]
        seen = self.paligemma.model.vision_tower.vision_model(pixels.flatten(0, 1), self._through)
        seen = self.paligemma.model.multi_modal_projector.linear(seen).unflatten(0, (batch, cameras)).flatten(1, 2)
        read = self.paligemma.lm_head(tokens) * math.sqrt(self.config.vlm.width)
        present = torch.ones(batch, cameras, dtype=torch.bool, device=pixels.device) if image_mask is None else image_mask
        mask = torch.cat([present.repeat_interleave(self.config.vision.tokens, dim=1), token_mask], dim=1)
        return torch.cat([seen, read.to(seen.dtype)], dim=1), mask

    def encode_prefix(
        self, pixels: torch.Tensor, tokens: torch.Tensor, token_mask: torch.Tensor, image_mask: torch.Tensor | None = None, wanted: bool = True
    ) -> Prefix:
        """`wanted`: whether anybody reads the prefix's output, beside its keys and values."""
        embedded, mask = self.embed_prefix(pixels, tokens, token_mask, image_mask)
        visible = mask[:, None, :] & mask[:, :, None]  # one block: every valid token sees every other
        turn = rotation(_positions(mask), self.config.vlm.head_dim)
        out, kept = self.language_model(embedded, turn, bias_of(visible, embedded.dtype), through=self._through, wanted=wanted)
        return Prefix(kept, mask, out)

    @in_float32
    def timing(self, time: torch.Tensor) -> Timing:
        """[N] -> Timing of N rows."""
        embedding = flow.time_embedding(time, self.config.expert.width)
        return Timing(embedding, self.expert.modulations(self.time_condition(embedding)) if self.config.pi05 else None)

    def time_condition(self, embedding: torch.Tensor) -> torch.Tensor:
        """pi0.5: [N, width] -> the condition of every adaptive norm."""
        hidden = F.silu(self.time_mlp_in(embedding.to(self.time_mlp_in.weight.dtype)))
        return F.silu(self.time_mlp_out(hidden))

    @in_float32
    def embed_suffix(self, state: torch.Tensor, x: torch.Tensor, timing: Timing) -> torch.Tensor:
        """state [B, A], x [B, H, A], timing of B rows or 1 -> [B, H, width], pi0: [B, 1 + H, width] with the state first."""
        x = x.to(self.action_in_proj.weight.dtype)
        actions = self.action_in_proj(x)
        if self.config.pi05:
            return actions
        time = timing.embedding.to(actions.dtype)[:, None].expand(len(x), x.shape[1], -1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([actions, time], dim=-1))))
        return torch.cat([self.state_proj(state.to(x.dtype))[:, None], actions], dim=1)

    def block_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Which block each suffix token belongs to; the prefix is block 0. A token sees its own block and earlier ones."""
        states = 0 if self.config.pi05 else 1
        return 1 + (torch.arange(states + self.config.horizon, device=device) >= states).long() * states

    def suffix_layout(self, prefix: Prefix) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(rotation of the suffix's positions, what its tokens see), the same at every denoising step."""
        blocks = self.block_ids(prefix.mask.device)
        own = (blocks[None, :] <= blocks[:, None]).expand(len(prefix.mask), -1, -1)
        visible = torch.cat([prefix.mask[:, None, :].expand(-1, len(blocks), -1), own], dim=2)  # [B, S, P + S]
        positions = prefix.mask.sum(1, keepdim=True) + torch.arange(len(blocks), device=prefix.mask.device)
        return rotation(positions, self.config.expert.head_dim), bias_of(visible, self._compute_dtype)

    def expert_features(self, prefix: Prefix, state: torch.Tensor, x: torch.Tensor, timing: Timing, layout: tuple | None = None) -> torch.Tensor:
        """Output of the expert at the action tokens, after its final norm: [B, H, width] float32."""
        turn, bias = self.suffix_layout(prefix) if layout is None else layout
        run = self.expert if torch.is_grad_enabled() else functools.partial(self.quick.get(Gemma, Gemma.__call__), self.expert)
        features, _ = run(self.embed_suffix(state, x, timing), turn, bias, prefix.kept, timing.modulations, self._through)
        return features[:, -self.config.horizon :].float()

    @in_float32
    def velocity(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H, width] -> v [B, H, A] float32"""
        return self.action_out_proj(features.to(self.action_out_proj.weight.dtype)).float()

    @in_float32
    def denoised(self, features: torch.Tensor) -> flow.Denoised:
        """What the heads make of the expert's features."""
        spread = self.noise_head(features) if self.config.noise_method == "flow_noise" else None
        value = self._value(features, None) if self.config.value_head and self.config.value_from == "actions" else None
        return flow.Denoised(self.velocity(features), spread, value)

    def _value(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The critic on the mean over (valid) tokens: [B, S, width] -> [B, 1]"""
        if self.config.detach_critic_input:
            features = features.detach()
        pooled = features.float().mean(1) if mask is None else (features.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.value_head(pooled)

    def _denoise(self, prefix: Prefix, state: torch.Tensor) -> flow.Denoise:
        layout = self.suffix_layout(prefix)
        return lambda x, t: self.denoised(self.expert_features(prefix, state, x, self.timing(t), layout))

    def _through(self, layer: nn.Module, *inputs: Any) -> Any:
        return through(self.quick, self.config.gradient_checkpointing, layer, *inputs)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.expert.layers[0].mlp.down_proj.weight.dtype

    # ------------------------------------------------------------------------------------------------ inputs and outputs

    def prepare(self, observation: Observation) -> Trace:
        """A batched observation -> images [B, V, ...], tokens [B, L] and their mask, the normalised state [B, A], and the state in the robot's units."""
        config, count = self.config, batch_size(observation)
        observation = to_torch(observation, self.device)
        if self.interface.state and observation["states"].shape[1] != self.interface.state_dim:
            raise ValueError(f"observation['states'] has {observation['states'].shape[1]} numbers, this policy expects {self.interface.state_dim}")
        raw = observation["states"][:, : self.interface.state_dim]
        raw = aloha.state_to_pi(raw) if config.aloha_units else raw
        state = self._normalize(raw, "state")
        if config.state_in_prompt:
            native = state[:, : self.interface.state_dim].cpu().numpy()
            rows = self.tokenizer.prompts_with_state(observation["task_descriptions"], native)
        else:
            rows = [self.tokenizer.prompt(task) for task in observation["task_descriptions"]]
        tokens, token_mask = (tensor.to(self.device) for tensor in text.pad(rows, config.max_token_len))
        seen = torch.cat([self._resize(view.flatten(0, 1)).unflatten(0, (count, -1)) for view in self._views(observation)], dim=1)
        return {"images": seen, "tokens": tokens, "token_mask": token_mask, "state": state, "raw_state": raw}

    def _views(self, observation: Observation) -> list[torch.Tensor]:
        """The pictures of each key, [B, V, H, W, 3]. A camera that is absent takes no tokens, which equals masking it."""
        found = []
        for key, cameras in (("main_images", (self.interface.main,)), ("wrist_images", self.interface.wrists), ("extra_view_images", self.interface.extras)):
            given = views(observation, key) if cameras and key in observation else None
            for camera in cameras[0 if given is None else given.shape[1] :]:
                if camera.name not in self.interface.optional_cameras:
                    raise ValueError(f"observation[{key!r}] lacks the camera {camera.name!r}, which this policy needs")
            if given is not None:
                found.append(given[:, : len(cameras)])
        return found

    def _resize(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> [N, 3, size, size], uint8, or float32 in [-1, 1] where the origin resizes floats."""
        size = self.config.vision.image_size
        if self.config.resize == "lerobot":
            return images.resize_float_with_pad(images.to_pixels(pictures.permute(0, 3, 1, 2)), size)
        resized = images.resize_with_pad(pictures, size) if self.config.resize == "openpi" else images.pad_then_resize(pictures, size)
        return resized.permute(0, 3, 1, 2).contiguous()

    def _moments(self, of: Literal["state", "actions"]) -> Moments:
        if self.config.statistics is None:
            raise CheckpointError("this policy has no normalisation statistics; set them with policy.set_statistics(...)")
        return getattr(self.config.statistics, of)

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Sequence[float]]] | Statistics) -> None:
        """As the contract says, or `Statistics`, which also describe relative actions (`vlahub_policies.parts.normalize.statistics_of(states, actions - states)`)."""
        if not isinstance(statistics, Statistics):
            own = [i for i in self.config.relative if i < self.interface.action_dim]
            if own:
                raise ValueError(
                    f"this policy predicts action dimensions {own} relative to the state, and how those differences spread does not follow from statistics of "
                    "states and actions apart; load it with relative=(), or set a Statistics of the differences"
                )
            statistics = Statistics.of_dataset(statistics)
        for what, moments, size in (("states", statistics.state, self.interface.state_dim), ("actions", statistics.actions, self.interface.action_dim)):
            if len(moments.mean or moments.q01 or ()) < size:
                raise ValueError(f"the statistics cover {len(moments.mean or moments.q01 or ())} {what}, the robot has {size}")
        self.config = dataclasses.replace(self.config, statistics=statistics)

    def _normalize(self, x: torch.Tensor, of: Literal["state", "actions"]) -> torch.Tensor:
        """[..., D] in the robot's units -> [..., A] float32"""
        widen = (0, self.config.action_dim - x.shape[-1])
        x = F.pad(x, widen) if self.config.pad_first else x
        return F.pad(normalize(x, self._moments(of), self.config.quantile).float(), (0, self.config.action_dim - x.shape[-1]))

    def _from_robot(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """actions [B, T, D] and state [B, S] in the robot's units -> what the network is trained on, [B, T, A]."""
        actions = aloha.actions_to_pi(actions) if self.config.aloha_units else actions
        width = self.config.action_dim if self.config.pad_first else actions.shape[-1]
        actions = F.pad(actions, (0, width - actions.shape[-1]))
        offset = self._offset(state)[:, None, :width]
        return self._normalize(actions - offset, "actions")

    def _to_robot(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """x [B, H, A] and state [B, S] in the robot's units -> actions [B, H, D] in the robot's units."""
        actions = unnormalize(x, self._moments("actions"), self.config.quantile) + self._offset(state)[:, None]
        actions = actions[..., : self.interface.action_dim].float()
        return aloha.actions_from_pi(actions) if self.config.aloha_units else actions

    def _offset(self, state: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, A]: the state at the dimensions whose actions are relative to it, 0 elsewhere."""
        wide = F.pad(state, (0, self.config.action_dim - state.shape[-1]))
        mask = torch.zeros(self.config.action_dim, device=state.device)
        mask[list(self.config.relative)] = 1.0
        return wide * mask

    # ------------------------------------------------------------------------------------------------ acting

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        noise = flow.initial(self.config.exploration, seeds, (self.horizon, self.config.action_dim), self.device)
        taken, _ = self._run(inputs, noise, flow.euler(self.config.denoising_steps), None)
        return self._to_robot(taken.chain[:, -1], inputs["raw_state"])

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        seeds = randomness.fresh_seeds(len(inputs["tokens"])) if seeds is None else seeds
        of_prefix: Trace = {}

        def run(x: torch.Tensor, plan: flow.Schedule, noise: torch.Tensor | None) -> flow.Walk:
            taken, prefix = self._run(inputs, x, plan, noise)
            of_prefix.update(prefix)
            return taken

        x, log_prob, value, chain = flow.explore(run, (self.horizon, self.config.action_dim), seeds, self.config.exploration, self.device)
        value = of_prefix.pop("prefix_value", value)
        actions = self._to_robot(x, inputs["raw_state"])
        return Sample(actions, log_prob[..., : actions.shape[-1]], value, {**inputs, **chain, **of_prefix})

    @torch.no_grad()
    def value(self, observation: Observation, seeds: torch.Tensor | None = None) -> torch.Tensor:
        if self.config.value_head and self.config.value_from == "prefix":
            inputs = self._trim(self.prepare(observation))
            return self._prefix_value(self._encode(inputs), inputs)
        return super().value(observation, seeds)

    def _run(self, inputs: Trace, x: torch.Tensor, plan: flow.Schedule, noise: torch.Tensor | None) -> tuple[flow.Walk, Trace]:
        """The prefix once, then every step of the schedule: the walk, and what `evaluate` needs of the prefix."""
        given = {name: tensor for name, tensor in self._trim(inputs).items() if name in ("images", "tokens", "token_mask", "state")}
        given |= {"x": x, **vars(plan.to(self.device)), **({} if noise is None else {"noise": noise})}
        done = self.fast(given)
        return flow.Walk(*(done.pop(name, None) for name in ("chain", "spread", "mean", "value"))), done

    def denoise_all(self, inputs: Trace) -> Trace:
        """`_run` as plain tensor work without a look at any value, so that it can be captured."""
        plan = flow.Schedule(*(inputs[name] for name in ("time", "keep", "move", "spread")))
        prefix = self._encode(inputs)
        denoise = self._denoise(prefix, inputs["state"])
        if self._compute_dtype != torch.float32:  # in float32 every row has its own timing, as in `evaluate`, so that log-probabilities repeat to 1e-5
            timing, layout = self.timing(plan.time), self.suffix_layout(prefix)
            steps = iter(range(len(plan.time)))  # walk asks for the steps in order

            def denoise(x: torch.Tensor, t: torch.Tensor) -> flow.Denoised:
                return self.denoised(self.expert_features(prefix, inputs["state"], x, timing.at(next(steps)), layout))

        taken = flow.walk(denoise, inputs["x"], plan, inputs.get("noise"))
        done = {name: tensor for name, tensor in vars(taken).items() if tensor is not None}
        if "noise" in inputs:
            done |= self._prefix_to_trace(prefix, inputs["images"].shape[1]) if self.config.keep_prefix else {}
            done |= {"prefix_value": self._prefix_value(prefix, inputs)} if self.config.value_from == "prefix" and self.config.value_head else {}
        return done

    def _encode(self, inputs: Trace) -> Prefix:
        wanted = self.config.value_head and self.config.value_from == "prefix"
        return self.encode_prefix(images.to_pixels(inputs["images"]), inputs["tokens"], inputs["token_mask"], wanted=wanted)

    def _trim(self, inputs: Trace) -> Trace:
        """Without the padding that no row of this batch needs. Padded tokens are seen by nobody, so nothing else changes."""
        longest = int(inputs["token_mask"].sum(1).max())
        length = min(-(-longest // 16) * 16, inputs["tokens"].shape[1])  # multiples of 16: few different shapes
        return {**inputs, "tokens": inputs["tokens"][:, :length], "token_mask": inputs["token_mask"][:, :length]}

    # ------------------------------------------------------------------------------------------------ training

    def evaluate(self, trace: Trace) -> Evaluation:
        if "prefix_keys" in trace:
            prefix = self._prefix_from_trace(trace)
        else:
            inputs = self._trim(trace)
            prefix = self._frozen_encode(inputs)
        log_prob, entropy, value = flow.score(self._denoise(prefix, trace["state"]), trace, self.config.exploration)
        of_prefix = self._prefix_value(prefix, trace)
        dims = self.interface.action_dim
        return Evaluation(log_prob[..., :dims], entropy[..., :dims], value if of_prefix is None else of_prefix)

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Mean squared error of the velocity over the chunk and all dimensions of the network, padded ones included, as the originals train.

        Steps that `action_is_pad` marks are left out.
        """
        observation = {key: value for key, value in batch.items() if key not in ("actions", "action_is_pad")}
        inputs = self.prepare(observation)
        actions = torch.as_tensor(batch["actions"], device=self.device)
        if actions.shape[1:] != (self.horizon, self.interface.action_dim):
            raise ValueError(f"batch['actions'] has shape {tuple(actions.shape)}, this policy is trained on [B, {self.horizon}, {self.interface.action_dim}]")
        seeds = randomness.fresh_seeds(len(actions)) if seeds is None else seeds
        if self.config.augment and self.training:
            inputs["images"] = images.augment(images.to_pixels(inputs["images"]), seeds, self._fixed_cameras(inputs["images"].shape[1]))
        target = self._from_robot(actions.float(), inputs["raw_state"])
        noise = randomness.normal(seeds, target.shape[1:], flow.TRAINING_NOISE, self.device)
        loss = self.flow_loss(self._frozen_encode(self._trim(inputs)), inputs["state"], target, noise, flow.sample_time(seeds, self.device))
        if batch.get("action_is_pad") is None:
            return loss.mean()
        real = ~torch.as_tensor(batch["action_is_pad"], device=self.device)
        return (loss.mean(-1) * real).sum() / real.sum().clamp(min=1)

    def _fixed_cameras(self, count: int) -> list[int]:
        """Positions of the cameras that are not on a wrist, among `count` pictures."""
        wrists = min(len(self.interface.wrists), count - 1)
        return [i for i in range(count) if not 1 <= i <= wrists]

    def flow_loss(self, prefix: Prefix, state: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """actions and noise [B, H, A], time [B] -> squared errors of the velocity [B, H, A]"""
        x, wanted = flow.interpolate(actions, noise, time)
        return (self.velocity(self.expert_features(prefix, state, x, self.timing(time))) - wanted).square()

    def _frozen_encode(self, inputs: Trace) -> Prefix:
        """The prefix, without a gradient where nothing in it trains."""
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.paligemma.parameters())
        with torch.set_grad_enabled(trains):
            return self._encode(inputs)

    def _prefix_value(self, prefix: Prefix, inputs: Trace) -> torch.Tensor | None:
        if not (self.config.value_head and self.config.value_from == "prefix"):
            return None
        if prefix.out is None:
            return self.value_head(inputs["prefix_pooled"])
        return self._value(prefix.out, prefix.mask)

    def _prefix_to_trace(self, prefix: Prefix, cameras: int) -> Trace:
        """Keys and values [B, depth, P, kv heads, head_dim], padded to the longest prompt so that traces of different calls can be joined."""
        short = cameras * self.config.vision.tokens + self.config.max_token_len - prefix.mask.shape[1]
        keys, values = (F.pad(torch.stack([pair[i] for pair in prefix.kept], 1), (0, 0, 0, 0, 0, short)) for i in (0, 1))
        kept = {"prefix_keys": keys, "prefix_values": values, "prefix_mask": F.pad(prefix.mask, (0, short))}
        if self.config.value_head and self.config.value_from == "prefix":
            kept["prefix_pooled"] = (prefix.out.float() * prefix.mask[..., None]).sum(1) / prefix.mask.sum(1, keepdim=True)
        return kept

    def _prefix_from_trace(self, trace: Trace) -> Prefix:
        return Prefix(list(zip(trace["prefix_keys"].unbind(1), trace["prefix_values"].unbind(1), strict=True)), trace["prefix_mask"], None)

    def add_fresh(self) -> None:
        """What reinforcement learning and LoRA add to a pretrained policy. On the CPU even when the rest is built without values: a checkpoint may lack it."""
        config = self.config
        with torch.device("cpu"):
            if config.value_head:
                self.value_head = ValueHead(config.expert.width if config.value_from == "actions" else config.vlm.width, config.value_hidden)
            if config.noise_method == "flow_noise":
                self.noise_head = NoiseHead(config.expert.width, config.action_dim, *config.noise_range)
            if config.train_expert_only:
                self.paligemma.requires_grad_(False)
            if config.lora_rank:
                for adapted in [self.expert] if config.train_expert_only else [self.expert, self.language_model]:
                    adapted.requires_grad_(False)
                    lora.add(adapted, config.lora_rank, config.lora_alpha)

    def cast(self, dtype: torch.dtype) -> Self:
        """Transformers in `dtype`; patch and position embeddings, Gemma's norms, and the flow and RL heads stay float32, as the originals run."""
        self.fast.release()
        for name, parameter in self.paligemma_with_expert.named_parameters():
            keep = any(
                part in name for part in ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm", "model.norm.", "lora_")
            )
            parameter.data = parameter.data.to(torch.float32 if keep and dtype != torch.float64 else dtype)
        if dtype == torch.float64:
            self.to(dtype)
        return self

    # ------------------------------------------------------------------------------------------------ making and saving

    @staticmethod
    def rename(name: str) -> str | None:
        """A tensor's name in the files of openpi, RLinf and lerobot -> its name here; None for what no forward pass reads."""
        bare = name.removeprefix("model.")  # lerobot's own saves have it
        name = bare if bare.startswith(OPENPI_TOP) else name
        return None if name in UNUSED else EMBEDDING if name == EMBEDDING_ALIAS else name

    @classmethod
    def from_published(cls, folder: Path, *, device: torch.device | str, dtype: torch.dtype | None, **options: Any) -> Self:
        from vlahub_policies import pi0_folders

        return pi0_folders.load(cls, folder, device=device, dtype=dtype, **options)

    @classmethod
    def published_entries(cls, config: Mapping[str, Any], robot: str, pi05: bool, action_dim: int) -> dict[str, Any]:
        """What a published folder's config.json and robot say about the entries of Config."""
        from vlahub_policies import pi0_folders

        return pi0_folders.entries_of(config, robot, pi05)

    @classmethod
    def from_config(cls, config: Pi0Config, folder: Path | None = None) -> Self:
        if folder is None:
            raise ValueError(
                "a pi0 policy needs a tokenizer: from_config(config, folder with a tokenizer.model or tokenizer.json), or Pi0Policy(config, tokenizer)"
            )
        return cls(config, text.find(folder, fits=config.vocab_size))

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        """A small policy with random weights for a robot; it takes states and actions as they are until `set_statistics` is called."""
        policy = cls(cls.Config.tiny(interface, **overrides), text.bundled())
        policy.initialise()
        return policy

    def initialise(self) -> None:
        """Fresh weights, for training from nothing: signals keep their scale from layer to layer, and the adaptive norms start closed."""
        for name, layer in self.paligemma_with_expert.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith(".dense"):
                closing = name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))  # 2 depth of them add up in the residual stream
                nn.init.normal_(layer.weight, std=(layer.in_features * (2 * self.config.vlm.depth if closing else 1)) ** -0.5)
        for name in ("action_time_mlp_in", "action_time_mlp_out", "time_mlp_in", "time_mlp_out"):
            if hasattr(self, name):
                layer = getattr(self, name)
                nn.init.normal_(layer.weight, std=1.7 * layer.in_features**-0.5)  # silu shrinks what passes through it
        nn.init.normal_(self.paligemma.lm_head.weight, std=self.config.vlm.width**-0.5)  # Gemma multiplies it by sqrt(width)
        nn.init.normal_(self.paligemma.model.vision_tower.vision_model.embeddings.position_embedding.weight, std=0.02)

    def side_files(self) -> dict[str, bytes]:
        return {self.tokenizer.file: self.tokenizer.model}


def quick_layers(policy: Pi0Policy, mode: str) -> dict[type, Callable]:
    """In bf16 Triton kernels for Gemma, and compiled layers around them. SigLIP stays plain: compiled it is no quicker at batch 1 and a fifth slower at 64."""
    if mode == "graph" or policy._compute_dtype != torch.bfloat16:
        return {}
    from vlahub_policies.parts import kernels

    layer = compiled(GemmaLayer, attention=kernels.attend_opaque) if mode == "compile" else functools.partial(GemmaLayer.forward, attention=kernels.attend)
    return {Gemma: kernels.stack, GemmaLayer: layer}


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Padding takes no position."""
    return mask.long().cumsum(1) - 1
