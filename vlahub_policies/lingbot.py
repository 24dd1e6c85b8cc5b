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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlahub import hub
from vlahub.interface import Interface
from vlahub.observation import Observation, views
from vlahub.policy import Evaluation, Policy, Sample, Trace, override
from vlahub_policies.parts import flow, lora, pillow, qwen_text, randomness, robots
from vlahub_policies.parts.heads import NoiseHead, ValueHead
from vlahub_policies.parts.normalize import Statistics, normalize, unnormalize
from vlahub_policies.parts.qwen_text import PAD
from vlahub_policies.parts.qwen_vl import (
    GatedMLP,
    RMSNorm,
    SelfAttention,
    TextConfig,
    TextModel,
    VisionConfig,
    VisionTower,
    attention_bias,
    frequencies,
    initialise,
    joint_attention,
    patchify,
    read_config,
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

    def modulation(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, C] -> scale and shift [R, 1, C] float32."""
        return 1 + self.gamma(condition).float()[:, None], self.beta(condition).float()[:, None]

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
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """x [B, S, C]; `before` are the prefix's keys and values of this layer [B, G, P, d]."""
        first, second = modulation
        q, k, v = self.self_attn.qkv(self.input_layernorm(x, first), *rotary)
        k, v = (torch.cat([old, new], 2) for old, new in zip(before, (k, v), strict=True))
        x = x + self.self_attn.out(joint_attention(q, k, v, bias))
        return x + self.mlp(self.post_attention_layernorm(x, second))


class Expert(nn.Module):
    def __init__(self, config: ExpertConfig, text: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList([ExpertLayer(config, text) for _ in range(text.layers)])
        self.norm = RMSNorm(config.hidden, text.eps)


@dataclass
class Prefix:
    """What the suffix needs of the views and the instruction."""

    cache: list[tuple[torch.Tensor, torch.Tensor]]  # per layer: rotated keys, values [B, G, P, d]
    mask: torch.Tensor  # [B, P] bool, False at padding
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
        self.gradient_checkpointing = False

    def prefix(self, image_tokens: torch.Tensor, image_mask: torch.Tensor, tokens: torch.Tensor, text_mask: torch.Tensor, final: bool = False) -> Prefix:
        """image_tokens [B, V * n, C], image_mask [B, V] (False: camera absent), tokens and text_mask [B, T]. `final` also runs what only follows the last keys."""
        x = torch.cat([image_tokens, self.language_model.embed_tokens(tokens)], 1)
        mask = torch.cat([image_mask.repeat_interleave(image_tokens.shape[1] // image_mask.shape[1], 1), text_mask], 1)
        turn = rotary(mask.long().cumsum(1) - 1, self.text.head)
        bias = attention_bias(mask[:, None], 1, x.dtype)  # [B, 1, 1, P]: every token, padding included, sees all real ones
        bias = bias.expand(-1, -1, self.text.heads // self.text.kv_heads * mask.shape[1], -1)
        cache, layers = [], self.language_model.layers

        def run(index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            layer = layers[index]
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), *turn)
            # the last layer's output influences no action
            return layer.finish(x, joint_attention(q, k, v, bias)) if final or index < len(layers) - 1 else x, k, v

        for index in range(len(layers)):
            x, k, v = checkpoint(run, index, x, use_reentrant=False) if self.gradient_checkpointing and self.training else run(index, x)
            cache.append((k, v))
        return Prefix(cache, mask, self.language_model.norm(x) if final else None)

    def modulations(self, time: torch.Tensor) -> tuple[torch.Tensor, list[tuple]]:
        """t [R] -> time embedding [R, C] in the weights' type, and each expert layer's two (scale, shift) pairs [R, 1, C]."""
        weight = self.action_time_mlp_in.weight
        embedding = time_embedding(time, weight.shape[0]).to(weight.dtype)
        return embedding, [tuple(norm.modulation(embedding) for norm in (layer.input_layernorm, layer.post_attention_layernorm)) for layer in self.expert.layers]

    def suffix(self, prefix: Prefix, state: torch.Tensor, x_t: torch.Tensor, modulations: tuple[torch.Tensor, list[tuple]]) -> torch.Tensor:
        """state [B, width], x_t [B, H, width] -> the expert's features at the action tokens [B, H, C]; `velocity` reads them."""
        embedding, per_layer = modulations
        dtype = embedding.dtype
        actions = self.action_in_proj(x_t.to(dtype))
        actions = self.action_time_mlp_in(torch.cat([actions, embedding[:, None].expand_as(actions)], -1))
        x = torch.cat([self.state_proj(state.to(dtype))[:, None], self.action_time_mlp_out(F.silu(actions))], 1)  # [B, 1 + H, C]
        steps = torch.arange(x.shape[1], device=x.device)
        turn = rotary(prefix.mask.long().sum(1, keepdim=True) + steps, self.text.head)
        bias = attention_bias(attention_mask(prefix.mask, x_t.shape[1]), self.text.heads // self.text.kv_heads, dtype)
        for layer, modulation, before in zip(self.expert.layers, per_layer, prefix.cache, strict=True):
            arguments = (x, modulation, turn, before, bias)
            x = checkpoint(layer, *arguments, use_reentrant=False) if self.gradient_checkpointing and self.training else layer(*arguments)
        return self.expert.norm(x)[:, 1:]

    def velocity(self, features: torch.Tensor) -> torch.Tensor:
        return self.action_out_proj(features).float()


def checkpoint_name(name: str) -> str:
    """A published tensor name -> ours (the names of Qwen's modules before transformers 4.52)."""
    name = name.removeprefix("model.")
    for theirs, ours in (("qwenvl_with_expert.qwenvl.visual.", "visual."), ("qwenvl_with_expert.qwenvl.model.", "language_model."), ("qwenvl_with_expert.qwen_expert.model.", "expert.")):
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
    """"<bos>" is no special token of Qwen's: it becomes three ordinary tokens, in training as here."""
    return ("" if instruction.startswith("<bos>") else "<bos>") + instruction + ("" if instruction.endswith("\n") else "\n")


def encode_text(tokenizer: Tokenizer, text: str, length: int, pad: int) -> tuple[list[int], list[int]]:
    """(ids, mask), each cut or padded on the right to `length`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) > length:
        warnings.warn(f"the instruction {text[5:65]!r}... has {len(ids)} tokens and is cut to {length}, as in training; load the policy with a larger max_text to keep it", stacklevel=2)
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
    vision: VisionConfig = VisionConfig()  # noqa: RUF009  frozen, so sharing it is safe
    text: TextConfig = TextConfig()  # noqa: RUF009
    expert: ExpertConfig = ExpertConfig()  # noqa: RUF009
    chunk: int = 50  # actions per prediction
    execute: int = 50  # of which this many run before the next prediction
    image_size: tuple[int, int] = (224, 224)  # height, width that every view is squeezed to, as Pillow's bilinear resize does it
    max_text: int = 72  # tokens of the instruction; longer ones are cut
    num_steps: int = 10  # Euler steps of the sampler
    loss: Literal["l1", "mse"] = "l1"
    noise_method: str = "flow_sde"
    noise_level: float = 0.7
    joint_log_prob: bool = False
    value_head: bool = False
    freeze_vision: bool = False
    train_expert_only: bool = False  # nothing of Qwen is trained
    gradient_checkpointing: bool = False


class LingBotPolicy(Policy):
    family: ClassVar[str] = "lingbot"
    Config: ClassVar[type] = Config

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        if not 1 <= config.execute <= config.chunk:
            raise ValueError(f"execute must be between 1 and the chunk length {config.chunk}, not {config.execute}")
        cell = config.vision.patch * config.vision.merge
        if any(side % cell for side in config.image_size):
            raise ValueError(f"image_size {config.image_size} must be multiples of {cell} pixels")
        for name, columns, size in (("state", config.joints.state_columns, config.interface.state_dim), ("action", config.joints.action_columns, config.interface.action_dim)):
            if len(columns) != size:
                raise ValueError(f"joints.{name}_columns has {len(columns)} entries, the interface's {name} {size}")
        self.config, self.tokenizer, self.interface = config, tokenizer, config.interface
        self.horizon, self.execute = config.chunk, config.execute
        self.pad_id = qwen_text.token(tokenizer, PAD)
        self.grid = tuple(side // config.vision.patch for side in config.image_size)
        self.exploration = flow.Exploration(config.noise_method, config.num_steps, config.noise_level, config.joint_log_prob)
        self.model = Network(config.vision, config.text, config.expert, config.joints.width)
        self.value_head = ValueHead(config.expert.hidden) if config.value_head else None
        self.noise_head = NoiseHead(config.expert.hidden, config.joints.width) if config.noise_method == "flow_noise" else None
        self.model.gradient_checkpointing = self.model.visual.gradient_checkpointing = config.gradient_checkpointing
        if config.freeze_vision or config.train_expert_only:
            self.model.visual.requires_grad_(False)
        if config.train_expert_only:
            self.model.language_model.requires_grad_(False)
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

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

    def prefix(self, inputs: Trace) -> Prefix:
        longest = int(inputs["text_mask"].sum(1).max())
        length = min(-(-longest // 8) * 8, inputs["tokens"].shape[1])  # padding is masked everywhere, so it may as well be left out
        B = len(inputs["images"])
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and not (self.config.freeze_vision or self.config.train_expert_only)):
            tokens = self.model.visual(patchify(inputs["images"].flatten(0, 1), self.config.vision), self.grid)  # [B * V, n, C]
        with torch.set_grad_enabled(grad and not self.config.train_expert_only):
            return self.model.prefix(tokens.reshape(B, -1, tokens.shape[-1]), inputs["image_mask"], inputs["tokens"][:, :length], inputs["text_mask"][:, :length])

    def _denoise(self, prefix: Prefix, state: torch.Tensor) -> flow.Denoise:
        def denoise(x: torch.Tensor, time: torch.Tensor) -> flow.Denoised:
            shared = time[:1] if time.stride(0) == 0 else time  # one clock for the whole batch, or one per row
            features = self.model.suffix(prefix, state, x, self.model.modulations(shared))
            spread = None if self.noise_head is None else self.noise_head(features).float()
            value = None if self.value_head is None else self.value_head(features.mean(1)).float()
            return flow.Denoised(self.model.velocity(features), spread, value)

        return denoise

    @property
    def _shape(self) -> tuple[int, int]:
        return self.config.chunk, self.config.joints.width

    # -------------------------------------------------------------------------------------------- the contract

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        noise = randomness.normal(seeds, self._shape, flow.INITIAL, self.device)
        walk = flow.walk(self._denoise(self.prefix(inputs), inputs["state"]), noise, flow.euler(self.config.num_steps).to(self.device), None)
        return self.config.joints.actions_out(walk.chain[:, -1])

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        seeds = randomness.fresh_seeds(len(inputs["images"])) if seeds is None else seeds
        denoise = self._denoise(self.prefix(inputs), inputs["state"])
        actions, log_prob, value, trace = flow.explore(denoise, self._shape, seeds, self.exploration, self.device)
        return Sample(self.config.joints.actions_out(actions), self._columns(log_prob), value, {**inputs, **trace})

    def evaluate(self, trace: Trace) -> Evaluation:
        log_prob, entropy, value = flow.score(self._denoise(self.prefix(trace), trace["state"]), trace, self.exploration)
        return Evaluation(self._columns(log_prob), self._columns(entropy), value)

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, width] -> [B, H, D]: the channels that reach the environment, in its order. Noise on the others changes nothing it can see."""
        return x[..., list(self.config.joints.action_columns)]

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Flow matching over the channels that carry actions, grippers included; padded steps do not count."""
        inputs = self.prepare({key: value for key, value in batch.items() if key not in ("actions", "action_is_pad")})
        actions = self.config.joints.actions_in(torch.as_tensor(batch["actions"]).to(self.device))
        seeds = randomness.fresh_seeds(len(actions)) if seeds is None else seeds
        noise, time = randomness.normal(seeds, self._shape, flow.TRAINING_NOISE, self.device), flow.sample_time(seeds, self.device)
        x_t, target = flow.interpolate(actions, noise, time)
        velocity = self._denoise(self.prefix(inputs), inputs["state"])(x_t, time).velocity
        losses = flow_losses(velocity, target, self.config.joints.action_columns, self.config.loss)
        if batch.get("action_is_pad") is None:
            return losses.mean()
        real = ~torch.as_tensor(batch["action_is_pad"]).to(self.device)[..., None].expand_as(losses)
        return (losses * real).sum() / real.sum().clamp(min=1)
