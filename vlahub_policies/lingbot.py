"""LingBot-VLA: Qwen2.5-VL reads the views and the instruction once; a smaller action expert beside it turns noise into a chunk of actions.

    views [B, 3, h, w, 3] -> vision tower --+
    instruction ----------------------------+-> prefix: 36 Qwen layers, bidirectional -> keys and values of every layer
    state [B, 75], noisy chunk [B, 50, 75] ----> suffix: 36 expert layers, attending to the prefix's keys and their own -> velocity [B, 50, 75]

Flow matching as in pi0 (t = 1 is noise), although its documentation speaks of autoregression: no token is ever decoded. Attention is joint, but no prefix token
looks at the suffix, so the prefix is run once and the suffix once per denoising step. Rotary positions are one-dimensional with base 10000 in both streams;
Qwen's own are not used. The expert's norms are modulated by the time embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from vlahub import hub
from vlahub.interface import Interface
from vlahub.observation import Observation, views
from vlahub.policy import Evaluation, Policy, Sample, Trace, override
from vlahub_policies.parts import flow, lora, pillow, qwen_text, randomness, robots
from vlahub_policies.parts.acceleration import MODES, Accelerated, Acceleration, Quick, compiled, through
from vlahub_policies.parts.filling import filled
from vlahub_policies.parts.heads import NoiseHead, ValueHead
from vlahub_policies.parts.normalize import Moments, Statistics, normalize, unnormalize
from vlahub_policies.parts.packing import joined, lay_out
from vlahub_policies.parts.qwen_text import PAD
from vlahub_policies.parts.qwen_vl import (
    DecoderLayer,
    GatedMLP,
    RMSNorm,
    SelfAttention,
    TextConfig,
    TextModel,
    VisionBlock,
    VisionConfig,
    VisionTower,
    attention_bias,
    by_token,
    frequencies,
    joint_attention,
    pack,
    patchify,
    sizes_of,
)

ROPE_BASE = 10000.0  # of both streams; Qwen's own base of a million and its three axes are not used

# ------------------------------------------------------------------------------------------------ network


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert; as many layers and heads as the decoder beside it."""

    hidden: int = 768
    mlp: int = 2752


class TimeNorm(nn.Module):
    """(1 + gamma(c)) RMSNorm(x) + beta(c), where c is the time embedding; in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gamma, self.beta = nn.Linear(width, width), nn.Linear(width, width)
        self.eps = eps
        for part in (*self.gamma.parameters(), *self.beta.parameters()):
            nn.init.zeros_(part)  # fresh norms start as plain ones

    def forward(self, x: torch.Tensor, modulation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        scale, shift = modulation
        return (scale * F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps) + shift).to(x.dtype)


class ExpertLayer(nn.Module):
    def __init__(self, config: ExpertConfig, text: TextConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden, text.heads, text.kv_heads, text.head)
        self.mlp = GatedMLP(config.hidden, config.mlp)
        self.input_layernorm = TimeNorm(config.hidden, text.eps)
        self.post_attention_layernorm = TimeNorm(config.hidden, text.eps)

    def forward(
        self,
        x: torch.Tensor,
        modulation: tuple,
        rotary: tuple[torch.Tensor, torch.Tensor],
        before: tuple[torch.Tensor, torch.Tensor],
        length: int,
        bias: torch.Tensor,
        attention: Callable | None = None,
    ) -> torch.Tensor:
        """x [B, S, C]; `before` are the prefix's keys and values of this layer [B, G, P, d], with or without room for the suffix behind them. `attention`: a kernel."""
        first, second = modulation
        q, k, v = self.self_attn.qkv(self.input_layernorm(x, first), *rotary)
        if attention is None:
            k, v = (_behind(old, new, bias.shape[-1], length) for old, new in zip(before, (k, v), strict=True))
            seen = self.self_attn.out(joint_attention(q, k, v, bias))
        else:
            seen = self.self_attn.o_proj(attention(*by_token(q, (k, v), tuple(old[:, :, :length] for old in before)), bias))
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x, second))


def _behind(old: torch.Tensor, new: torch.Tensor, slots: int, length: int) -> torch.Tensor:
    """The suffix's keys or values behind the prefix's `length` ones: written into the room left for them, or, where gradients forbid that, joined anew."""
    if old.shape[2] < slots:
        return torch.cat([old, new], 2)
    old[:, :, length : length + new.shape[2]] = new
    return old


class Expert(nn.Module):
    def __init__(self, config: ExpertConfig, text: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList([ExpertLayer(config, text) for _ in range(text.layers)])
        self.norm = RMSNorm(config.hidden, text.eps)

    def modulating(self) -> list[nn.Linear]:
        """gamma and beta of every time norm, in order: all read the same time embedding."""
        return [part for layer in self.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm) for part in (norm.gamma, norm.beta)]


@dataclass
class Prefix:
    """What the suffix needs of the views and the instruction."""

    cache: list[tuple[torch.Tensor, torch.Tensor]]  # per layer: rotated keys, values [B, G, P, d]; where nothing is trained, with room for the suffix
    mask: torch.Tensor  # [B, P] bool, False at padding
    turn: tuple[torch.Tensor, torch.Tensor]  # the suffix's rotary cos and sin
    bias: torch.Tensor  # the suffix's attention bias
    hidden: torch.Tensor | None = None  # [B, P, C] behind the final norm; only computed on request, since no action depends on it


def rotary(positions: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] -> cos, sin [B, 1, L, head / 2] float32."""
    angles = positions[..., None].float() * frequencies(head // 2, ROPE_BASE, positions.device)
    return angles.cos()[:, None], angles.sin()[:, None]


def attention_mask(prefix: torch.Tensor, chunk: int) -> torch.Tensor:
    """prefix [B, P] bool -> [B, 1 + chunk, P + 1 + chunk] bool: the state sees the prefix and itself, actions see everything."""
    own = torch.ones(1 + chunk, 1 + chunk, dtype=torch.bool, device=prefix.device)
    own[0, 1:] = False
    return torch.cat([prefix[:, None].expand(-1, 1 + chunk, -1), own.expand(len(prefix), -1, -1)], 2)


def time_embedding(time: torch.Tensor, width: int) -> torch.Tensor:
    """[R] -> [R, width]: sines, then cosines. pi0's embedding, but in float32 throughout: the shortest period is 0.004, so the rounding shows (6e-5) and was trained."""
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, width // 2, device=time.device)
    angle = (1.0 / period * 2 * math.pi) * time[:, None]
    return torch.cat([angle.sin(), angle.cos()], -1)


class Network(nn.Module):
    """The published network; tensor names as published, shortened by their common prefixes (`checkpoint_name`)."""

    def __init__(self, vision: VisionConfig, text: TextConfig, expert: ExpertConfig, width: int):
        super().__init__()
        self.text, self.width = text, width
        self.visual = VisionTower(vision)
        self.language_model = TextModel(text)
        self.expert = Expert(expert, text)
        self.state_proj = nn.Linear(width, expert.hidden)
        self.action_in_proj = nn.Linear(width, expert.hidden)
        self.action_out_proj = nn.Linear(expert.hidden, width)
        self.action_time_mlp_in = nn.Linear(2 * expert.hidden, expert.hidden)
        self.action_time_mlp_out = nn.Linear(expert.hidden, expert.hidden)
        self.gradient_checkpointing, self.quick = False, Quick()

    def prefix(
        self,
        image_tokens: torch.Tensor,
        image_mask: torch.Tensor,
        tokens: torch.Tensor,
        text_mask: torch.Tensor,
        horizon: int,
        *,
        in_place: bool = False,
        final: bool = False,
    ) -> Prefix:
        """image_tokens [B, V * n, C], image_mask [B, V] (False: camera absent), tokens and text_mask [B, T]; `horizon` actions will follow.

        `in_place`, for inference, leaves room behind the keys for those of the suffix. `final` also runs what only follows the last keys.
        """
        x = torch.cat([image_tokens, self.language_model.embed_tokens(tokens)], 1)
        mask = torch.cat([image_mask.repeat_interleave(image_tokens.shape[1] // image_mask.shape[1], 1), text_mask], 1)
        turn = rotary(mask.long().cumsum(1) - 1, self.text.head)
        group, length = self.text.heads // self.text.kv_heads, mask.shape[1]
        bias = attention_bias(mask[:, None], 1, x.dtype).expand(-1, -1, group * length, -1)  # every token, padding included, sees all real ones
        # kernels want a multiple of 16 keys; the slots behind the suffix are masked
        room = 0 if not in_place else -(-(length + 1 + horizon) // 16) * 16 - length
        cache, layers = [], self.language_model.layers

        for index, layer in enumerate(layers):
            # no action depends on what the last layer makes of its own keys
            x, k, v = through(self.quick, self.gradient_checkpointing, layer, x, *turn, bias, not final and index == len(layers) - 1)
            cache.append((F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))) if room else (k, v))
        hidden = self.language_model.norm(x) if final else None
        return self.context(cache, mask, horizon, hidden)

    def context(self, cache: list[tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor, horizon: int, hidden: torch.Tensor | None = None) -> Prefix:
        """What `horizon` actions behind a prefix need besides its keys and values, made once for all layers and steps."""
        seen = attention_mask(mask, horizon)
        seen = F.pad(seen, (0, max(cache[0][0].shape[2] - seen.shape[-1], 0)))  # room in the cache that the suffix leaves empty
        turn = rotary(mask.long().sum(1, keepdim=True) + torch.arange(1 + horizon, device=mask.device), self.text.head)
        bias = attention_bias(seen, self.text.heads // self.text.kv_heads, self.action_in_proj.weight.dtype)
        return Prefix(cache, mask, turn, bias, hidden)

    def modulations(self, time: torch.Tensor) -> tuple[torch.Tensor, list[tuple]]:
        """t [R] -> time embedding [R, C] in the weights' type, and each expert layer's two (scale, shift) pairs [R, 1, C] float32."""
        weight = self.action_time_mlp_in.weight
        embedding = time_embedding(time, weight.shape[0]).to(weight.dtype)
        layers = self.expert.modulating()
        packed = joined(layers[0])
        rows = F.linear(embedding, *packed).chunk(len(layers), -1) if packed else [layer(embedding) for layer in layers]
        pairs = [(1 + gamma.float()[:, None], beta.float()[:, None]) for gamma, beta in zip(rows[::2], rows[1::2], strict=True)]
        return embedding, list(zip(pairs[::2], pairs[1::2], strict=True))

    def suffix(self, prefix: Prefix, state: torch.Tensor, x_t: torch.Tensor, modulations: tuple[torch.Tensor, list[tuple]]) -> torch.Tensor:
        """state [B, width], x_t [B, H, width] -> the expert's features at the action tokens [B, H, C]; `velocity` reads them."""
        embedding, per_layer = modulations
        dtype = embedding.dtype
        actions = self.action_in_proj(x_t.to(dtype))
        actions = self.action_time_mlp_in(torch.cat([actions, embedding[:, None].expand_as(actions)], -1))
        x = torch.cat([self.state_proj(state.to(dtype))[:, None], self.action_time_mlp_out(F.silu(actions))], 1)  # [B, 1 + H, C]
        length = prefix.mask.shape[1]
        for layer, modulation, before in zip(self.expert.layers, per_layer, prefix.cache, strict=True):
            x = through(self.quick, self.gradient_checkpointing, layer, x, modulation, prefix.turn, before, length, prefix.bias)
        return self.expert.norm(x)[:, 1:]

    def velocity(self, features: torch.Tensor) -> torch.Tensor:
        return self.action_out_proj(features).float()


def pack_all(policy: nn.Module) -> None:
    """Lay out what reads the same input in one block each, for inference."""
    pack(policy)
    lay_out(policy.model.expert.modulating())


def checkpoint_name(name: str) -> str:
    """A published tensor name -> ours (the names of Qwen's modules before transformers 4.52)."""
    name = name.removeprefix("model.")
    for theirs, ours in (
        ("qwenvl_with_expert.qwenvl.visual.", "visual."),
        ("qwenvl_with_expert.qwenvl.model.", "language_model."),
        ("qwenvl_with_expert.qwen_expert.model.", "expert."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# ------------------------------------------------------------------------------------------------ states and actions

# Where the 14 numbers of a RoboTwin robot (left arm 6, left gripper, right arm 6, right gripper) stand among the network's 75 channels.
# "unified" is the released checkpoint's: a 14-wide slot for both arms, then the grippers. "interleaved" is that of the first example post-training.
LAYOUTS: dict[str, tuple[int, ...]] = {"unified": (0, 1, 2, 3, 4, 5, 14, 6, 7, 8, 9, 10, 11, 15), "interleaved": tuple(range(14))}
NORMALISATIONS = {"bounds_99_woclip": True, "bounds_99": True, "meanstd": False}  # name in the run's yaml -> quantiles (else mean and standard deviation)


@dataclass(frozen=True)
class Joints:
    """Between the environment's vectors and the network's `width` channels: normalise, then put each number at its channel; the rest is zero."""

    statistics: Statistics  # in the environment's order
    state_columns: tuple[int, ...]
    action_columns: tuple[int, ...]
    width: int = 75
    quantile: bool = True

    def state_in(self, state: torch.Tensor) -> torch.Tensor:
        """[..., S] -> [..., width] float32."""
        return self._spread(normalize(state, self.statistics.state, self.quantile), self.state_columns)

    def actions_in(self, actions: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., width] float32."""
        return self._spread(normalize(actions, self.statistics.actions, self.quantile), self.action_columns)

    def actions_out(self, actions: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., D] float32 in env units; the other channels mean nothing."""
        return unnormalize(actions[..., list(self.action_columns)], self.statistics.actions, self.quantile).float()

    def _spread(self, x: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
        out = torch.zeros(*x.shape[:-1], self.width, device=x.device)
        out[..., list(columns)] = x.float()
        return out


def robotwin_statistics(record: Mapping[str, Any], norm_type: str) -> Statistics:
    """The `norm_stats` of a LingBot statistics file (arms and grippers apart) -> per dimension in RoboTwin's order."""
    moments = []
    for side in ("observation.state", "action"):
        parts = []
        for part, size in (("arm.position", 12), ("effector.position", 2)):
            found = record.get(f"{side}.{part}")
            if found is None:
                raise hub.CheckpointError(f"the statistics have no {side}.{part}; they have {', '.join(record)}")
            if any(len(numbers) != size for numbers in found.values()):
                raise hub.CheckpointError(f"the statistics of {side}.{part} are not {size} numbers wide")
            parts.append(found)
        arms, grippers = parts
        order = [*range(6), 12, *range(6, 12), 13]
        moments.append({name: [(list(arms[name]) + list(grippers[name]))[i] for i in order] for name in arms})
    return Statistics.from_dict({key: _moments(record, norm_type) for key, record in zip(("state", "actions"), moments, strict=True)})


def _moments(record: Mapping[str, Any], norm_type: str) -> dict[str, Any]:
    if norm_type not in NORMALISATIONS:
        raise hub.CheckpointError(f"norm_type {norm_type!r} is not supported; known are {', '.join(NORMALISATIONS)}")
    names = ("q01", "q99") if NORMALISATIONS[norm_type] else ("mean", "std")
    missing = [name for name in names if name not in record]
    if missing:
        raise hub.CheckpointError(f"norm_type {norm_type!r} needs {' and '.join(names)}, but the statistics have no {' and no '.join(missing)}")
    return {name: record[name] for name in names}


# ------------------------------------------------------------------------------------------------ text


def prompt(instruction: str) -> str:
    """ "<bos>" is no special token of Qwen's: it becomes three ordinary tokens, in training as here."""
    return ("" if instruction.startswith("<bos>") else "<bos>") + instruction + ("" if instruction.endswith("\n") else "\n")


def encode_text(tokenizer: Tokenizer, text: str, length: int, pad: int) -> tuple[list[int], list[int]]:
    """(ids, mask), each cut or padded on the right to `length`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) > length:
        warnings.warn(
            f"the instruction {text[5:65]!r}... has {len(ids)} tokens and is cut to {length}, as in training; load the policy with a larger max_text to keep it",
            stacklevel=2,
        )
    ids = ids[:length]
    return ids + [pad] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


def flow_losses(velocity: torch.Tensor, target: torch.Tensor, columns: Sequence[int], kind: Literal["l1", "mse"]) -> torch.Tensor:
    """[B, H, width] twice -> [B, H, len(columns)], the channels that carry actions."""
    error = (target - velocity)[..., list(columns)]
    return error.abs() if kind == "l1" else error.square()


# ------------------------------------------------------------------------------------------------ policy


@dataclass(frozen=True)
class Config:
    interface: Interface
    joints: Joints
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    horizon: int = 50  # actions per prediction
    execute: int = 50  # of which this many run before the next prediction
    image_size: tuple[int, int] = (224, 224)  # height, width that every view is squeezed to, as Pillow's bilinear resize does it
    max_text: int = 72  # tokens of the instruction; longer ones are cut
    acceleration: Literal["off", "graph", "compile"] = "graph"  # on CUDA, of predict and sample: a CUDA graph, of compiled layers if asked for
    loss: Literal["l1", "mse"] = "l1"

    denoising_steps: int = 10  # of predict, along the ODE
    noise_method: str = "flow_sde"  # of sample and evaluate; see vlahub_policies.parts.flow
    num_steps: int = 10  # of sample and evaluate
    noise_level: float = 0.7
    joint_logprob: bool = False
    noise_step: Literal["drawn", "last"] = "drawn"  # unless joint: which denoising step of a row explores
    noise_correlation: float = 0.0  # of the noise of neighbouring actions, 0 to below 1; 0.9 keeps paths smooth where a chunk is one motion
    start_noise: float = 1.0  # scale of the noise that denoising starts from, outside training; 0 starts from its mean, for smooth paths
    value_head: bool = False
    value_hidden: tuple[int, ...] = (512, 256, 128)

    freeze_vision: bool = False
    train_expert_only: bool = True  # nothing of Qwen is trained; the expert, the projections and the heads are
    keep_prefix: bool = False  # keep the frozen prefix's keys and values in the trace: evaluate skips Qwen (8 MB per decision at full size in bf16)
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # 0: no LoRA; else adapters in the expert and, unless frozen, the decoder, which themselves stay as they are
    lora_alpha: float = 16.0

    def __post_init__(self):
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"execute {self.execute} is not within 1 .. horizon {self.horizon}")
        if self.acceleration not in MODES:
            raise ValueError(f"acceleration {self.acceleration!r} is unknown; known are {', '.join(MODES)}")
        if self.vision.out != self.text.hidden:
            raise ValueError(f"the vision tower gives {self.vision.out} numbers per token, the decoder takes {self.text.hidden}")
        self.exploration  # noqa: B018 - it refuses what it does not know
        if self.keep_prefix and not self.train_expert_only:
            raise ValueError("keep_prefix needs train_expert_only: keys and values of a prefix that is trained go out of date")
        self.vision.grid(self.image_size)
        sides = (("state", self.joints.state_columns, self.interface.state_dim), ("action", self.joints.action_columns, self.interface.action_dim))
        for name, columns, size in sides:
            if len(columns) != size:
                raise ValueError(f"joints.{name}_columns has {len(columns)} entries, the interface's {name} {size}")
            if len(set(columns)) < size or not all(0 <= column < self.joints.width for column in columns):
                raise ValueError(f"joints.{name}_columns must be different numbers from 0 to {self.joints.width - 1}, not {columns}")

    @property
    def exploration(self) -> flow.Exploration:
        return flow.Exploration(
            self.noise_method, self.num_steps, self.noise_level, self.joint_logprob, self.noise_step, self.noise_correlation, self.start_noise
        )


def quick_layers(policy: nn.Module, mode: str) -> dict[type, Callable]:
    """Compiled layers; in bf16 with our attention kernel, which serves the heads that share keys at once."""
    if mode != "compile":
        return {}
    kernel = {}
    if policy.model.action_in_proj.weight.dtype == torch.bfloat16:
        from vlahub_policies.parts import kernels

        kernel = {"attention": kernels.attend_opaque}
    return {VisionBlock: compiled(VisionBlock), DecoderLayer: compiled(DecoderLayer, **kernel), ExpertLayer: compiled(ExpertLayer, **kernel)}


class LingBotPolicy(Accelerated, Policy):
    family: ClassVar[str] = "lingbot"
    Config: ClassVar[type] = Config
    fresh: ClassVar[tuple[str, ...]] = ("value_head.*", "noise_head.*", "*.lora_down", "*.lora_up")

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.interface = config, tokenizer, config.interface
        self.horizon, self.execute = config.horizon, config.execute
        self.pad_id = qwen_text.token(tokenizer, PAD)
        self.grid = config.vision.grid(config.image_size)
        self.model = model = Network(config.vision, config.text, config.expert, config.joints.width)
        model.gradient_checkpointing = model.visual.gradient_checkpointing = config.gradient_checkpointing
        if config.freeze_vision or config.train_expert_only:
            model.visual.requires_grad_(False)
        if config.train_expert_only:
            model.language_model.requires_grad_(False)
        with torch.device("cpu"):  # with values even where the rest is built without: a checkpoint may lack what RL and LoRA add
            self.value_head = ValueHead(config.expert.hidden, config.value_hidden) if config.value_head else None
            self.noise_head = NoiseHead(config.expert.hidden, config.joints.width) if config.noise_method == "flow_noise" else None
            if config.lora_rank:
                for adapted in [model.expert] if config.train_expert_only else [model.expert, model.language_model]:
                    adapted.requires_grad_(False)
                    lora.add(adapted, config.lora_rank, config.lora_alpha)
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.fast = Acceleration(self, self.denoise_all, pack_all, quick_layers)

    def blocks(self) -> list[nn.Module]:
        # without the expert's layers: their norms are asked for their modulations from outside
        return [self.model.language_model.embed_tokens, *self.model.visual.blocks, *self.model.language_model.layers]

    # -------------------------------------------------------------------------------------------- inputs

    def _text(self, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        if instruction not in self._encoded:
            if len(self._encoded) >= 4096:
                self._encoded.clear()
            ids, mask = encode_text(self.tokenizer, prompt(instruction), self.config.max_text, self.pad_id)
            self._encoded[instruction] = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
        return self._encoded[instruction]

    def prepare(self, observation: Observation) -> Trace:
        count = len(observation["task_descriptions"])
        images, present = [], []
        for key, cameras in (("main_images", [self.interface.main]), ("wrist_images", self.interface.wrists), ("extra_view_images", self.interface.extras)):
            given = self._resize(views(observation, key)[:, : len(cameras)]) if cameras and key in observation else None
            have = 0 if given is None else given.shape[1]
            for camera in cameras[have:]:
                if camera.name not in self.interface.optional_cameras:
                    raise ValueError(f"observation[{key!r}] has {have} views, the policy needs {', '.join(c.name for c in cameras)}")
            if given is not None:
                images.append(given)
            if len(cameras) > have:
                images.append(torch.zeros(count, len(cameras) - have, *self.config.image_size, 3, dtype=torch.uint8, device=self.device))
            present += [True] * have + [False] * (len(cameras) - have)
        tokens, text_mask = (torch.stack(part).to(self.device) for part in zip(*(self._text(text) for text in observation["task_descriptions"]), strict=True))
        state = torch.as_tensor(observation["states"]).to(self.device)
        return {
            "images": torch.cat(images, 1),
            "image_mask": torch.tensor(present, device=self.device).expand(count, -1).contiguous(),
            "tokens": tokens,
            "text_mask": text_mask,
            "state": self.config.joints.state_in(state),
        }

    def _resize(self, images: Any) -> torch.Tensor:
        images = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images).to(self.device)
        return pillow.resize(images.flatten(0, 1), self.config.image_size, "bilinear").unflatten(0, images.shape[:2])

    # -------------------------------------------------------------------------------------------- forward

    def trimmed(self, inputs: Trace) -> Trace:
        """Without the text padding that no row of this batch needs; it is masked everywhere, so nothing else changes."""
        longest = int(inputs["text_mask"].sum(1).max())
        length = min(-(-longest // 8) * 8, inputs["tokens"].shape[1])  # in steps of 8, so that few shapes occur
        return {**inputs, "tokens": inputs["tokens"][:, :length], "text_mask": inputs["text_mask"][:, :length]}

    def encode(self, inputs: Trace) -> Prefix:
        """Trimmed inputs -> what the expert attends to. No gradients through what is frozen."""
        config, grad = self.config, torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and not (config.freeze_vision or config.train_expert_only)):
            tokens = self.model.visual(patchify(inputs["images"].flatten(0, 1), config.vision), self.grid)  # [B * V, n, C]
        tokens = tokens.reshape(len(inputs["images"]), -1, tokens.shape[-1])
        with torch.set_grad_enabled(grad and not config.train_expert_only):
            return self.model.prefix(tokens, inputs["image_mask"], inputs["tokens"], inputs["text_mask"], self.horizon, in_place=not grad)

    def denoised(self, features: torch.Tensor) -> flow.Denoised:
        """What the heads make of the expert's features [B, H, C]."""
        spread = None if self.noise_head is None else self.noise_head(features).float()
        value = None if self.value_head is None else self.value_head(features.mean(1)).float()
        return flow.Denoised(self.model.velocity(features), spread, value)

    def denoise_all(self, inputs: Trace) -> Trace:
        """Trimmed inputs, x [B, H, width] at t = 1, the schedule's tables and its noise -> the whole walk. Looks at no value, so that it can be captured."""
        plan = flow.Schedule(*(inputs[name] for name in ("time", "keep", "move", "spread")))
        prefix = self.encode(inputs)
        embedding, per_layer = self.model.modulations(plan.time)  # of all steps at once: they do not depend on the batch
        steps = iter(range(len(plan.time)))  # walk asks for the steps in order

        def denoise(x: torch.Tensor, time: torch.Tensor) -> flow.Denoised:
            row = next(steps)
            here = embedding[row : row + 1], [[tuple(part[row : row + 1] for part in norm) for norm in layer] for layer in per_layer]
            return self.denoised(self.model.suffix(prefix, inputs["state"], x, here))

        walk = flow.walk(denoise, inputs["x"], plan, inputs.get("noise"))
        done = {name: tensor for name, tensor in vars(walk).items() if tensor is not None}
        return done | self._prefix_to_trace(prefix) if self.config.keep_prefix and "noise" in inputs else done

    def _run(self, inputs: Trace, x: torch.Tensor, plan: flow.Schedule, noise: torch.Tensor | None) -> tuple[flow.Walk, Trace]:
        """The walk, and what of the prefix goes into the trace."""
        given = {**self.trimmed(inputs), "x": x, **vars(plan.to(self.device)), **({} if noise is None else {"noise": noise})}
        done = self.fast(given)
        return flow.Walk(*(done.pop(name, None) for name in ("chain", "spread", "mean", "value"))), done

    def _prefix_to_trace(self, prefix: Prefix) -> Trace:
        """Keys and values [B, layers, G, P, d] and mask [B, P], padded to the longest instruction so that traces of different calls can be joined."""
        views = len(self.interface.cameras) * self.grid[0] * self.grid[1] // self.config.vision.merge**2
        length, full = prefix.mask.shape[1], views + self.config.max_text
        keys, values = (F.pad(torch.stack([pair[i][:, :, :length] for pair in prefix.cache], 1), (0, 0, 0, full - length)) for i in (0, 1))
        return {"prefix_keys": keys, "prefix_values": values, "prefix_mask": F.pad(prefix.mask, (0, full - length))}

    # -------------------------------------------------------------------------------------------- the contract

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        noise = flow.initial(self.config.exploration, seeds, self._shape, self.device)
        walk, _ = self._run(inputs, noise, flow.euler(self.config.denoising_steps), None)
        return self.config.joints.actions_out(walk.chain[:, -1])

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        seeds = randomness.fresh_seeds(len(inputs["images"])) if seeds is None else seeds
        kept: Trace = {}

        def run(x: torch.Tensor, plan: flow.Schedule, noise: torch.Tensor | None) -> flow.Walk:
            walk, of_prefix = self._run(inputs, x, plan, noise)
            kept.update(of_prefix)
            return walk

        actions, log_prob, value, trace = flow.explore(run, self._shape, seeds, self.config.exploration, self.device)
        return Sample(self.config.joints.actions_out(actions), self._columns(log_prob), value, {**inputs, **trace, **kept})

    def evaluate(self, trace: Trace) -> Evaluation:
        log_prob, entropy, value = flow.score(self._denoise(trace), trace, self.config.exploration)
        return Evaluation(self._columns(log_prob), self._columns(entropy), value)

    def _denoise(self, inputs: Trace) -> flow.Denoise:
        if "prefix_keys" in inputs:
            cache = list(zip(inputs["prefix_keys"].unbind(1), inputs["prefix_values"].unbind(1), strict=True))
            prefix = self.model.context(cache, inputs["prefix_mask"], self.horizon)
        else:
            prefix = self.encode(self.trimmed(inputs))
        return lambda x, time: self.denoised(self.model.suffix(prefix, inputs["state"], x, self.model.modulations(time)))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.horizon, self.config.joints.width

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, width] -> [B, H, D]: the channels that reach the environment, in its order. Noise on the others changes nothing it can see."""
        return x[..., list(self.config.joints.action_columns)]

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Flow matching over the channels that carry actions, grippers included; padded steps do not count."""
        inputs = self.prepare({key: value for key, value in batch.items() if key not in ("actions", "action_is_pad")})
        actions = torch.as_tensor(batch["actions"]).to(self.device)
        if actions.shape[1:] != (self.horizon, self.interface.action_dim):
            raise ValueError(f"batch['actions'] has shape {tuple(actions.shape)}, this policy is trained on [B, {self.horizon}, {self.interface.action_dim}]")
        actions = self.config.joints.actions_in(actions)
        seeds = randomness.fresh_seeds(len(actions)) if seeds is None else seeds
        noise, time = randomness.normal(seeds, self._shape, flow.TRAINING_NOISE, self.device), flow.sample_time(seeds, self.device)
        x_t, target = flow.interpolate(actions, noise, time)
        velocity = self._denoise(inputs)(x_t, time).velocity
        losses = flow_losses(velocity, target, self.config.joints.action_columns, self.config.loss)
        if batch.get("action_is_pad") is None:
            return losses.mean()
        real = ~torch.as_tensor(batch["action_is_pad"]).to(self.device)[..., None].expand_as(losses)
        return (losses * real).sum() / real.sum().clamp(min=1)

    # -------------------------------------------------------------------------------------------- making and saving

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        state, actions = (Moments(**{name: tuple(statistics[of][name]) for name in ("mean", "std", "q01", "q99")}) for of in ("states", "actions"))
        self.config = replace(self.config, joints=replace(self.config.joints, statistics=Statistics(state, actions)))

    def side_files(self) -> dict[str, bytes]:
        return {qwen_text.TOKENIZER: qwen_text.to_bytes(self.tokenizer)}

    @classmethod
    def from_config(cls, config: Config, folder: Path | None = None) -> Self:
        if folder is None:
            raise ValueError("a lingbot policy needs a tokenizer: from_config(config, folder with a tokenizer.json), or LingBotPolicy(config, tokenizer)")
        return cls(config, qwen_text.read_tokenizer(folder))

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        """The same model at about 1.6 million parameters, with fresh weights and a small tokenizer. It takes states and actions as they are until `set_statistics` is called."""
        tokenizer = qwen_text.tiny_tokenizer([prompt(text) for text in qwen_text.SENTENCES])
        state, action = interface.state_dim, interface.action_dim
        identity = Statistics.identity(state, action)
        sizes: dict[str, Any] = dict(
            interface=interface,
            joints=Joints(identity, tuple(range(state)), tuple(range(action)), max(state, action), quantile=False),
            vision=VisionConfig(4, 96, 4, 192, patch=8, window=32, full_attention=(1, 3), out=128),  # 36 tokens a view
            text=TextConfig(tokenizer.get_vocab_size(), 4, 128, 4, 2, 32, 256, rope_sections=(4, 6, 6)),
            expert=ExpertConfig(64, 160),
            horizon=10,
            execute=5,
            image_size=(96, 96),
            num_steps=4,
            value_hidden=(128, 64),
            train_expert_only=False,
        )
        return cls(Config(**{**sizes, **overrides}), tokenizer).eval()

    @classmethod
    def from_published(
        cls,
        folder: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype | None,
        base_vlm: str | Path | None = None,
        norm_stats: str | Path | None = None,
        layout: str | None = None,
        **options: Any,
    ) -> Self:
        """A released or self-trained LingBot-VLA folder as it is.

        Args:
            base_vlm: folder or hub id of Qwen2.5-VL-3B, of which tokenizer and config.json are read; by default found from the run's yaml.
            norm_stats: the statistics file. Released folders only name it: it stands in assets/norm_stats/ of the LingBot-VLA source repository.
            layout: "unified" (released RoboTwin checkpoints) or "interleaved"; by default read from the statistics and the yaml.
            options: entries of Config to override.
        """
        model = find_model(folder)
        settings = Settings.of(model)
        weights = hub.Weights(hub.safetensors_files(model))
        check_kind(model, settings, weights)
        base = qwen_text.find_base(str(settings.get("tokenizer_path", "Qwen/Qwen2.5-VL-3B-Instruct")), model, base_vlm)
        config = override(read_model(model, settings, weights, base, norm_stats, layout, options), **options)
        words, dtype = qwen_text.read_tokenizer(base), dtype or torch.bfloat16  # files are float32; the original serves in bfloat16
        return filled(cls, config, words, weights, device, dtype, rename=lambda name: f"model.{checkpoint_name(name)}", source=str(model))


# ------------------------------------------------------------------------------------------------ published layout

YAML = "lingbotvla_cli.yaml"
QWEN = "model.qwenvl_with_expert.qwenvl."
EMBEDDING = QWEN + "model.embed_tokens.weight"


def find_model(folder: Path) -> Path:
    """The folder with weights and config.json: itself, one that a download nested inside, or the last checkpoint of a training run."""
    for places in ([folder], sorted(folder.glob("*")), sorted(folder.glob("*/*"))):
        found = [path for path in places if path.is_dir() and (path / hub.CONFIG).exists() and any(path.glob("*.safetensors"))]
        if len(found) == 1:
            return found[0]
        if found:
            raise hub.CheckpointError(f"{folder} holds several models: {', '.join(str(path) for path in found)}; name one of them")
    steps = {int(path.parent.name.removeprefix("global_step_")): path for path in folder.glob("**/global_step_*/hf_ckpt") if path.parent.name[12:].isdigit()}
    if steps:
        return steps[max(steps)]
    raise hub.CheckpointError(
        f"{folder} holds no folder with {hub.CONFIG} and *.safetensors, neither directly, nested, nor as checkpoints/global_step_*/hf_ckpt"
    )


@dataclass(frozen=True)
class Settings:
    """What config.json and lingbotvla_cli.yaml say. Where both do, config.json counts, as in the original, and a warning names the difference."""

    config: Mapping[str, Any]
    yaml: Mapping[str, Any]  # its sections model, data and train, joined

    @classmethod
    def of(cls, model: Path) -> Settings:
        # released folders have it beside the weights, training runs three folders up from hf_ckpt
        file = next((place / YAML for place in (model, *list(model.resolve().parents)[:3]) if (place / YAML).exists()), None)
        if file is None:
            raise hub.CheckpointError(
                f"{model} has no {YAML}, neither beside the weights nor up to three folders above; it comes with every LingBot-VLA checkpoint"
            )
        record = hub.read_yaml(file)
        joined = {key: value for section in ("model", "data", "train") for key, value in (record.get(section) or {}).items()}
        return cls(hub.read_json(model / hub.CONFIG), joined)

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.config and name in self.yaml and self.config[name] != self.yaml[name]:
            warnings.warn(f"{name} is {self.config[name]!r} in {hub.CONFIG} and {self.yaml[name]!r} in {YAML}; {hub.CONFIG} counts", stacklevel=2)
        return self.config.get(name, self.yaml.get(name, default))


def check_kind(model: Path, settings: Settings, weights: hub.Weights) -> None:
    """Refuse what this network is not."""
    if EMBEDDING not in weights:
        raise hub.CheckpointError(f"{model} has no tensor {EMBEDDING}; it is no LingBot-VLA")
    if any("depth_align_head" in name for name in weights):
        raise hub.CheckpointError(
            f"{model} is a depth model: its query tokens are not part of the checkpoint, so it cannot be reproduced; take the model without -depth"
        )
    for name, needed in (
        ("adanorm_time", True),
        ("old_adanorm", True),
        ("norm_qkv", False),
        ("vlm_causal", False),
        ("separate_time_proj", False),
        ("final_norm_adanorm", False),
    ):
        if settings.get(name, needed) != needed:
            raise hub.CheckpointError(f"{model} was trained with {name}={settings.get(name)!r}; only {needed} is supported, as in every released checkpoint")


def read_model(
    model: Path, settings: Settings, weights: hub.Weights, base: Path, norm_stats: str | Path | None, layout: str | None, options: dict[str, Any]
) -> Config:
    """Everything but the weights. Takes `interface` out of the options. Nothing is written back."""
    shapes = {name: weights.shape(name) for name in weights}
    vision, text = sizes_of(shapes, QWEN + "visual.", QWEN + "model.", base)
    width = weights.shape("model.state_proj.weight")[1]
    expert = "model.qwenvl_with_expert.qwen_expert.model.layers.0.mlp.up_proj.weight"
    mlp, hidden = weights.shape(expert)
    interface = options.pop("interface", None)
    joints, robot = read_joints(model, settings, norm_stats, layout, width, interface)
    size = settings.get("resize_imgs_with_padding") or settings.get("img_size") or 224
    size = (size, size) if isinstance(size, int) else size
    chunk = settings.get("chunk_size", 50)
    loss = {"L1_fm": "l1", "fm": "mse"}.get(settings.get("loss_type", "fm"))
    if loss is None:
        raise hub.CheckpointError(f"loss_type {settings.get('loss_type')!r} is unknown; known are L1_fm and fm")
    return Config(
        robot,
        joints,
        vision,
        text,
        ExpertConfig(hidden, mlp),
        horizon=chunk,
        execute=min(settings.get("n_action_steps", chunk), chunk),
        image_size=(int(size[0]), int(size[1])),
        max_text=settings.get("tokenizer_max_length", 72),
        loss=loss,
        denoising_steps=settings.get("num_steps", 10),
    )


def read_joints(
    model: Path, settings: Settings, chosen: str | Path | None, layout: str | None, width: int, interface: Interface | None
) -> tuple[Joints, Interface]:
    """Statistics and channel layout, and the robot they are of."""
    named = settings.get("norm_stats_file")
    if chosen is not None:
        places = [Path(chosen)]
    elif named is None:
        raise hub.CheckpointError(f"{YAML} names no norm_stats_file; pass norm_stats= with the statistics file that the model was trained with")
    else:
        above = [model, *list(model.resolve().parents)[:3]]
        places = [Path(named), *(place / part for place in above for part in (named, Path(named).name) if not Path(part).is_absolute())]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"the statistics file {str(chosen or named)!r} was not found (looked at {', '.join(map(str, places))}); it stands in assets/norm_stats/ of the "
            "LingBot-VLA source repository: pass norm_stats= with its path"
        )
    record = hub.read_json(file)
    record = record.get("norm_stats", record)
    norm_type = settings.get("norm_type", "bounds_99_woclip")
    if "action.arm.position" in record:
        statistics, layout, robot = robotwin_statistics(record, norm_type), layout or "unified", robots.ROBOTWIN
    else:
        names = [next((name for name in choices if name in record), None) for choices in (("observation.state", "state"), ("action", "actions"))]
        if None in names:
            raise hub.CheckpointError(f"{file} has no statistics of state and action; it has {', '.join(record)}")
        robot, layout = interface or robots.ROBOTWIN, layout or "interleaved"
        sides = zip(("state", "actions"), names, (robot.state_dim, robot.action_dim), strict=True)
        statistics = Statistics.from_dict({key: {k: v[:size] for k, v in _moments(record[name], norm_type).items()} for key, name, size in sides})
    robot = interface or robot
    if layout not in LAYOUTS:
        raise hub.CheckpointError(f"layout {layout!r} is unknown; known are {', '.join(LAYOUTS)}")
    state, action = (LAYOUTS[layout] if layout == "unified" else tuple(range(size)) for size in (robot.state_dim, robot.action_dim))
    for of, moments, size in (("state", statistics.state, robot.state_dim), ("action", statistics.actions, robot.action_dim)):
        found = len(moments.q01 or moments.mean)
        if found != size:
            raise hub.CheckpointError(f"{file} has {found} numbers per {of}, the interface {size}; pass interface= for another robot than RoboTwin's")
    return Joints(statistics, state, action, width, NORMALISATIONS[norm_type]), robot
