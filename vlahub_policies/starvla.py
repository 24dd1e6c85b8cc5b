"""StarVLA QwenOFT: Qwen2.5-VL reads the views and a text that ends in one placeholder token per action; an MLP regresses the chunk from their hidden states.

    views [B, V, h, w, 3] -> vision tower -> image tokens --+
    prompt with `chunk` copies of the action token ---------+-> decoder, causal -> hidden [B, chunk, C] at the action tokens -> MLP -> actions [B, chunk, D]

One pass, no denoising, no autoregression. Since attention is causal, nothing behind the last action token can change an action, so the sequence ends there.
For reinforcement learning the regression is the mean of a Gaussian with a learned standard deviation per action dimension, in normalised action space.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from vlahub_policies.parts import pillow, qwen_text, randomness
from vlahub_policies.parts.flow import normal_entropy, normal_log_prob
from vlahub_policies.parts.heads import ValueHead
from vlahub_policies.parts.qwen_text import END, IMAGE, PAD, START, VISION_END, VISION_START
from vlahub_policies.parts.qwen_vl import TextConfig, TextModel, VisionConfig, VisionTower, initialise, patchify, positions_of, read_config

ACTION_TOKEN = "🔍"  # one rare character that Qwen's vocabulary holds as one token

# ------------------------------------------------------------------------------------------------ actions


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
        keys = ("q01", "q99") if options.get("bounds") == "q99" else ("min", "max")
        missing = [key for key in keys if key not in statistics]
        if missing:
            raise hub.CheckpointError(f"dataset_statistics.json has no {' and no '.join(missing)} for actions")
        low, high = (tuple(float(number) for number in statistics[key]) for key in keys)
        if len(low) != interface.action_dim:
            raise hub.CheckpointError(f"dataset_statistics.json describes {len(low)} action dimensions, the interface {interface.action_dim}")
        grippers = [field for field in interface.action for _ in range(field.size)]
        return cls(
            low,
            high,
            tuple(bool(entry) for entry in statistics.get("mask", [True] * len(low))),
            tuple(field.open for field in grippers),
            tuple(field.closed for field in grippers),
            **options,
        )

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
        switches = torch.tensor(self.switches, device=actions.device)
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
        numbers = [[math.nan if entry is None else entry for entry in row] for row in (self.low, self.high, self.opened, self.closed)]
        low, high, opened, closed = torch.tensor(numbers, dtype=like.dtype, device=like.device)
        return low, high, torch.tensor(self.scaled, device=like.device), opened, closed


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
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    chunk: int = 8  # actions per prediction, one placeholder token each
    execute: int = 8  # of which this many run before the next prediction
    image_size: tuple[int, int] = (224, 224)  # height, width that every view is resized to
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # as Pillow's Image.resize does it; training data was resized bicubically
    template: str | None = None  # the run's CoT_prompt
    max_text: int = 160  # tokens of text behind the images that a prompt may have; rollouts store this many
    log_std: float = -2.5  # where exploration starts: a standard deviation of 0.08 in normalised action space
    gripper_likelihood: Literal["switch", "gaussian"] = "switch"  # see QwenOFTPolicy._score
    value_head: bool = False
    freeze_vision: bool = False
    gradient_checkpointing: bool = False


class QwenOFTPolicy(Policy):
    family: ClassVar[str] = "starvla"
    Config: ClassVar[type] = Config

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        if not 1 <= config.execute <= config.chunk:
            raise ValueError(f"execute must be between 1 and the chunk length {config.chunk}, not {config.execute}")
        if config.vision.out != config.text.hidden:
            raise ValueError(f"the vision tower gives {config.vision.out} numbers per token, the decoder takes {config.text.hidden}")
        cell = config.vision.patch * config.vision.merge
        if any(side % cell for side in config.image_size):
            raise ValueError(
                f"image_size {config.image_size} must be multiples of {cell}: patches of {config.vision.patch}, merged {config.vision.merge} by {config.vision.merge}"
            )
        self.config, self.tokenizer, self.interface = config, tokenizer, config.interface
        self.horizon, self.execute = config.chunk, config.execute
        self.grid = tuple(side // config.vision.patch for side in config.image_size)  # patches
        self.merged = tuple(side // config.vision.merge for side in self.grid)  # tokens
        self.action_id, self.image_id, self.pad_id = (qwen_text.token(tokenizer, text) for text in (ACTION_TOKEN, IMAGE, PAD))
        self.visual = VisionTower(config.vision)
        self.language_model = TextModel(config.text)
        self.action_model = ActionHead(config.text.hidden, config.interface.action_dim)
        self.log_std = nn.Parameter(torch.full((config.interface.action_dim,), config.log_std))
        self.value_head = ValueHead(config.text.hidden) if config.value_head else None
        self.visual.gradient_checkpointing = self.language_model.gradient_checkpointing = config.gradient_checkpointing
        if config.freeze_vision:
            self.visual.requires_grad_(False)
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    # -------------------------------------------------------------------------------------------- inputs

    def encode_text(self, text: str) -> tuple[list[int], torch.Tensor]:
        """The whole conversation of a prompt: ids [L], and positions [3, L]."""
        count = len(self.interface.cameras)
        ids = self.tokenizer.encode(conversation(text, count, self.merged[0] * self.merged[1]), add_special_tokens=False).ids
        return ids, positions_of(ids, self.image_id, [self.merged] * count)

    def _inputs(self, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [max] and positions [3, max] up to the last action token, padded on the right; kept, because instructions repeat for whole episodes."""
        if instruction not in self._encoded:
            ids, positions = self.encode_text(prompt(instruction, self.config.chunk, self.config.template))
            last = len(ids) - ids[::-1].index(self.action_id)
            pictures = len(ids) - ids[::-1].index(self.image_id)
            if ids[:last].count(self.action_id) < self.config.chunk:
                raise ValueError(f"the prompt of {instruction!r} has fewer than {self.config.chunk} action tokens")
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
        pictures = [views(observation, key) for key, wanted in self._cameras() if wanted]
        images = torch.cat([self._resize(images[:, :wanted]) for images, (_, wanted) in zip(pictures, [c for c in self._cameras() if c[1]], strict=True)], 1)
        rows = [self._inputs(text) for text in observation["task_descriptions"]]
        tokens, positions = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
        return {"images": images, "tokens": tokens, "positions": positions}

    def _cameras(self) -> tuple[tuple[str, int], ...]:
        """Observation keys in the order of the prompt's images, with how many views of each are used."""
        return (("main_images", 1), ("extra_view_images", len(self.interface.extras)), ("wrist_images", len(self.interface.wrists)))

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
        place = here.cumsum(1) + self.config.chunk - here.sum(1, keepdim=True) - 1  # 0 .. chunk - 1 at the tokens wanted
        place = torch.where(here & (place >= 0), place, self.config.chunk)
        index = torch.zeros(len(tokens), self.config.chunk + 1, dtype=torch.long, device=tokens.device)
        index.scatter_(1, place, torch.arange(tokens.shape[1], device=tokens.device).expand_as(place))
        return hidden.gather(1, index[:, :-1, None].expand(-1, -1, hidden.shape[-1]))

    def forward(self, inputs: Trace) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prepared inputs -> the regression [B, chunk, D] float32 in normalised action space, and the value [B, 1] if there is a value head."""
        longest = int((inputs["tokens"] != self.pad_id).sum(1).max())
        length = min(-(-longest // 32) * 32, inputs["tokens"].shape[1])  # in steps of 32, so that few shapes occur
        tokens, positions = inputs["tokens"][:, :length], inputs["positions"][..., :length]
        queries = self.queries(tokens, self.hidden(tokens, positions, self.embed_images(inputs["images"]).flatten(0, 1)))
        value = None if self.value_head is None else self.value_head(queries.mean(1)).float()
        return self.action_model(queries).float(), value

    # -------------------------------------------------------------------------------------------- the contract

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        return self.config.codec.decode(self(inputs)[0])

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        inputs = self.prepare(observation)
        mean, value = self(inputs)
        seeds = randomness.fresh_seeds(len(mean)) if seeds is None else seeds
        actions = mean + self.log_std.float().exp() * randomness.normal(seeds, mean.shape[1:], device=mean.device)
        return Sample(self.config.codec.decode(actions), self._score(actions, mean)[0], value, {**inputs, "actions": actions})

    @torch.no_grad()
    def value(self, observation: Observation) -> torch.Tensor:
        value = self(self.prepare(observation))[1]
        if value is None:
            raise ValueError("this starvla policy has no value head; load it with value_head=True")
        return value

    def evaluate(self, trace: Trace) -> Evaluation:
        mean, value = self(trace)
        return Evaluation(*self._score(trace["actions"], mean), value)

    def _score(self, actions: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability, entropy), each [B, chunk, D] float32, of sampled normalised actions.

        A Gaussian everywhere except at grippers that the environment sees only as open or closed. Of those, the probability of what the environment saw is
        P(sample >= 0.5) or its complement: scoring the number behind the switch instead, as RLinf does ("gaussian"), adds noise that no reward depends on.
        """
        std = self.log_std.float().exp().expand_as(mean)
        log_prob, entropy = normal_log_prob(actions, mean, std), normal_entropy(std)
        switches = torch.tensor(self.config.codec.switches, device=mean.device)
        if self.config.gripper_likelihood == "gaussian" or not switches.any():
            return log_prob, entropy
        margin = (mean - 0.5) / std
        opens, closes = torch.special.log_ndtr(margin), torch.special.log_ndtr(-margin)
        switch_entropy = -(opens.exp() * opens + closes.exp() * closes)
        return torch.where(switches, torch.where(actions >= 0.5, opens, closes), log_prob), torch.where(switches, switch_entropy, entropy)

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Mean absolute error over the chunk, grippers included; padded steps do not count."""
        observation = {key: value for key, value in batch.items() if key not in ("actions", "action_is_pad")}
        error = (self(self.prepare(observation))[0] - self.config.codec.encode(torch.as_tensor(batch["actions"]).to(self.device))).abs()
        if batch.get("action_is_pad") is None:
            return error.mean()
        real = ~torch.as_tensor(batch["action_is_pad"]).to(self.device)[..., None].expand_as(error)
        return (error * real).sum() / real.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ published layout


def checkpoint_name(name: str) -> str | None:
    """A published tensor name -> ours; None for the language-model head, a copy of the embedding that no action needs."""
    if name == "qwen_vl_interface.model.lm_head.weight":
        return None
    return name.removeprefix("qwen_vl_interface.model.model.").replace("action_model.model.", "action_model.", 1)


def published_sizes(shapes: Mapping[str, tuple[int, ...]], head: int = 128, vision_heads: int = 16) -> tuple[VisionConfig, TextConfig]:
    """The network's sizes from the shapes of its tensors; head widths, which shapes do not tell, are those of every Qwen2.5-VL."""
    text, vision = "qwen_vl_interface.model.model.language_model.", "qwen_vl_interface.model.model.visual."

    def count(prefix: str) -> int:
        return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix))

    vocab, hidden = shapes[text + "embed_tokens.weight"]
    layer, block = text + "layers.0.", vision + "blocks.0."
    return (
        VisionConfig(
            depth=count(vision + "blocks."),
            hidden=shapes[block + "norm1.weight"][0],
            heads=vision_heads,
            mlp=shapes[block + "mlp.up_proj.weight"][0],
            out=hidden,
        ),
        TextConfig(
            vocab=vocab,
            layers=count(text + "layers."),
            hidden=hidden,
            heads=shapes[layer + "self_attn.q_proj.weight"][0] // head,
            kv_heads=shapes[layer + "self_attn.k_proj.weight"][0] // head,
            head=head,
            mlp=shapes[layer + "mlp.up_proj.weight"][0],
        ),
    )
