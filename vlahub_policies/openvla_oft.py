"""OpenVLA-OFT: a 7.5 B Vision-Language-Action model that predicts a whole chunk of actions in one forward pass.

    DINOv2 and SigLIP patches -> projector -> Llama-2 without a causal mask -> one hidden state per action number
    sequence: [BOS] [256 patches per image] [state, if used] [prompt, padded on the left] [T x D zero vectors] [</s>, if trained with it]

The state at the position *before* a zero vector predicts its action number, either as one of 256 bins (`head="tokens"`, the last 256 ids of the vocabulary:
what reinforcement learning needs) or, all together, by an L1 regression head (`head="l1"`). Attention is bidirectional and positions skip padding, so where
the padding stands changes nothing. Module names are those of the published checkpoints.

A published folder says neither how many images and actions the model was trained with nor how its pixels were prepared. `RECIPES` does, by name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlahub import hub
from vlahub.catalog import suggest
from vlahub.distributed import is_sharded
from vlahub.interface import Field, Interface
from vlahub.observation import Observation, to_torch, views
from vlahub.policy import Evaluation, Policy, Sample, Trace
from vlahub_policies.openvla_oft_folders import Published, choose_statistics, read_tokenizer
from vlahub_policies.parts import lora, resize, robots
from vlahub_policies.parts.capture import Captured
from vlahub_policies.parts.filling import filled
from vlahub_policies.parts.jpeg import jpeg_round_trip
from vlahub_policies.parts.llama import Llama, LlamaConfig, call
from vlahub_policies.parts.randomness import fresh_seeds, uniform
from vlahub_policies.parts.vit import DINOV2_LARGE, SIGLIP_SO400M, VisionTransformer, VitConfig, unused_keys

BINS = 256
IGNORED = -100
BOS, EOS = 1, 2


# ------------------------------------------------------------------------------------------------ configuration

Bounds = Literal["q99", "minmax"]


@dataclass(frozen=True)
class OpenVLAOFTConfig:
    interface: Interface
    statistics: dict[str, Any]  # {"action": {"q01", "q99", "min", "max", "mask"}, "proprio": the same without mask}, as in dataset_statistics.json
    unnorm_key: str = ""  # the data set that the statistics are of
    head: Literal["tokens", "l1"] = "tokens"
    horizon: int = 8
    execute: int = 8
    proprio: bool = False  # the state enters as one token after the patches
    film: bool = False  # the prompt modulates every vision block
    end_token: bool = True  # </s> follows the action positions
    whole_vocabulary: bool = False  # greedy over all ids (one outside the bins becomes an end bin), as moojink's evaluation does
    images: Literal["moojink", "rlinf", "robotwin"] = "rlinf"  # how pixels are prepared: see `prepare_images`
    bounds: Bounds = "q99"
    binary_gripper: bool = True  # grippers were trained on 0 (closed) .. 1 (open), unscaled; the env gets its own `open` or `closed`
    temperature: float = 1.6  # of sampling; greedy decoding ignores it
    value_head: bool = False
    value_level: Literal["chunk", "action"] = "chunk"  # one value per decision, or one per action of the chunk
    lora_rank: int = 0  # low-rank adapters on every linear layer of vision, projector and language model; 0: none, all weights train
    lora_alpha: float = 32.0
    freeze_vision: bool = False
    gradient_checkpointing: bool = False
    acceleration: Literal["off", "graph", "compile"] = (
        "graph"  # inference on a GPU: CUDA graphs, or also compiled layers (ten seconds at the first call of a shape)
    )
    max_prompt: int = 128  # tokens; a longer instruction is an error
    vocab_size: int = 32000  # of the tokenizer without <PAD>, whose id is this number; the bins are the last 256 ids below it
    image_size: int = 224
    patch: int = 14
    dino: VitConfig = DINOV2_LARGE
    siglip: VitConfig = SIGLIP_SO400M
    llama: LlamaConfig = field(default_factory=LlamaConfig)

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(OpenVLAOFTConfig).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"execute is {self.execute}; it must be between 1 and the horizon, {self.horizon}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive (deterministic decoding is predict / act)")
        for side, wanted in (("action", self.interface.action_dim), *([("proprio", self.interface.state_dim)] if self.proprio else [])):
            low, high = bounds_of(self.statistics, side, self.bounds)
            if len(low) != wanted or len(high) != wanted:
                raise ValueError(f"statistics[{side!r}] of {self.unnorm_key!r} have {len(low)} numbers, the interface {wanted}")


def bounds_of(statistics: Mapping[str, Any], side: str, bounds: Bounds) -> tuple[list[float], list[float]]:
    names = ("q01", "q99") if bounds == "q99" else ("min", "max")
    missing = [name for name in names if name not in statistics.get(side, {})]
    if missing:
        raise ValueError(f"statistics[{side!r}] lack {' and '.join(missing)}: actions could not be scaled back; give statistics=... of the training data")
    return statistics[side][names[0]], statistics[side][names[1]]


def _bounds_of_fields(fields: Mapping[str, tuple[Field, ...]]) -> dict[str, Any]:
    """Statistics that scale each number by its field's bounds."""
    statistics = {}
    for side, entries in fields.items():
        low, high = ([float(x) for entry in entries for x in np.broadcast_to(getattr(entry, end), entry.size)] for end in ("low", "high"))
        if side == "action" and not np.isfinite(low + high).all():
            raise ValueError("an action of this interface has no bounds to scale by; give tiny(statistics=...) of the training data")
        low, high = [max(x, -np.pi) for x in low], [min(x, np.pi) for x in high]
        statistics[side] = {"q01": low, "q99": high, "min": low, "max": high}
    return statistics


_ROBOTWIN_ENTRIES = dict(horizon=25, execute=25, images="robotwin", bounds="minmax", binary_gripper=False, max_prompt=512)

# What a published folder leaves open, per way of training: (what it is, entries of the config). from_pretrained's options override any entry.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "libero_l1": (
        "moojink's LIBERO checkpoints: two cameras, state, regression head",
        dict(interface=robots.LIBERO_TWO_CAMERAS, head="l1", proprio=True, images="moojink"),
    ),
    "libero_tokens": (
        "LIBERO with discrete actions and one camera by moojink's script, evaluated as it does (JPEG, Lanczos, centre crop, </s>)",
        dict(interface=robots.LIBERO_ONE_CAMERA, whole_vocabulary=True, images="moojink"),
    ),
    "libero_rlinf": ("RLinf's LIBERO checkpoints: discrete actions, one camera, no crop, no </s>", dict(interface=robots.LIBERO_ONE_CAMERA, end_token=False)),
    "robotwin_rlinf": (
        "RLinf's RoboTwin checkpoints: discrete actions, absolute joints of two arms, head camera",
        dict(interface=robots.ROBOTWIN_HEAD, **_ROBOTWIN_ENTRIES),
    ),
    "robotwin_rlinf_state": ("the same with the joint state as a token", dict(interface=robots.ROBOTWIN_HEAD_STATE, proprio=True, **_ROBOTWIN_ENTRIES)),
    "bridge_rlinf": (
        "RLinf's ManiSkill checkpoints: discrete actions of a WidowX arm on the Bridge table",
        dict(interface=robots.BRIDGE, end_token=False, temperature=1.0),
    ),
}


# ------------------------------------------------------------------------------------------------ pixels

# The published processor was written while torch's default type was bfloat16: these rounded constants are what was trained with, not ImageNet's 0.485...
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)


def prepare_images(images: torch.Tensor, how: str, size: int) -> torch.Tensor:
    """uint8 [N, H, W, 3] as a camera gives them -> uint8 [N, size, size, 3] as the checkpoint saw them.

    moojink: JPEG round trip, Lanczos, crop of the central 90 %.  rlinf: bicubic.  robotwin: crop of the central 90 %, aspect ratio not kept.
    """
    if how == "moojink":
        return resize.centre_crop(resize.lanczos(jpeg_round_trip(images), size), size)
    return resize.bicubic(images, size) if how == "rlinf" else resize.centre_crop(images, size)


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, V, size, size, 3] -> float32 [B, V * 6, size, size]: per view three channels for DINOv2, then three for SigLIP."""
    x = images.permute(0, 1, 4, 2, 3).float() / 255
    mean, std = _dino_constants(x.device)
    return torch.stack([(x - mean) / std, (x - 0.5) / 0.5], dim=2).flatten(1, 3)


@cache
def _dino_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(entry, device=device).view(3, 1, 1) for entry in (DINO_MEAN, DINO_STD))


# ------------------------------------------------------------------------------------------------ actions <-> bins


@cache
def bin_edges(device: torch.device | str = "cpu") -> torch.Tensor:
    # 256 edges, so only 255 centres. NumPy's, not torch's: they differ in the last bit, which decides about actions that lie on an edge
    return torch.from_numpy(np.linspace(-1, 1, BINS)).to(device)


def actions_to_bins(x: torch.Tensor) -> torch.Tensor:
    """Normalised actions -> bin 0..255, which is vocabulary id minus the first action id. The larger the bin, the smaller the action."""
    return BINS - torch.bucketize(x.double().clamp(-1, 1).contiguous(), bin_edges(x.device), right=True)


def bins_to_actions(bins: torch.Tensor) -> torch.Tensor:
    """The inverse, float64. There are 255 centres: bins 0 and 1 are the same number."""
    edges = bin_edges(bins.device)
    return ((edges[1:] + edges[:-1]) / 2)[(BINS - 1 - bins).clamp(0, BINS - 2)]


# ------------------------------------------------------------------------------------------------ prompt


def prompt(task: str) -> str:
    return f"In: What action should the robot take to {task.lower()}?\nOut: "  # the trailing space is a token of its own


def prompt_ids(tokenizer: Any, task: str) -> list[int]:
    """Ids of the whole prompt; a tokenizer that reads it otherwise than Llama's is refused."""
    ids = tokenizer.encode(prompt(task), add_special_tokens=False).ids
    space = tokenizer.token_to_id("▁")
    if space is None or ids[-1] != space:
        raise ValueError(f"the tokenizer does not end the prompt with the token of a space (▁, {space}) but with {ids[-1]}; it is not the one of this model")
    return [BOS, *ids]


def left_padded(rows: list[list[int]], length: int, pad: int) -> torch.Tensor:
    """Prompts -> [B, length]: BOS in front, then padding, then the rest."""
    for row in rows:
        if len(row) > length:
            raise ValueError(f"an instruction has {len(row)} tokens with its prompt, more than max_prompt = {length}; shorten it or raise max_prompt")
    return torch.tensor([[row[0], *[pad] * (length - len(row)), *row[1:]] for row in rows])


# ------------------------------------------------------------------------------------------------ network


class VisionBackbone(nn.Module):
    def __init__(self, config: OpenVLAOFTConfig):
        super().__init__()
        film_dim = config.llama.hidden_size if config.film else None
        self.featurizer = VisionTransformer(config.dino, config.image_size, config.patch, film_dim)
        self.fused_featurizer = VisionTransformer(config.siglip, config.image_size, config.patch, film_dim)

    def forward(self, pixels: torch.Tensor, language: torch.Tensor | None = None, through: Callable = call) -> torch.Tensor:
        """[B, 6 V, size, size] -> [B, V * patches, dino + siglip]. `language` [B, dim]: the mean prompt embedding, with FiLM."""
        batch = len(pixels)
        pixels = pixels.unflatten(1, (-1, 6)).flatten(0, 1)  # [B * V, 6, size, size]
        if language is not None:
            language = language.repeat_interleave(len(pixels) // batch, dim=0)
        # in a CUDA graph the towers of few pictures run side by side: alone, neither fills the GPU (one picture: 2.5 for 3.5 ms; 64: slower)
        if len(pixels) <= 4 and pixels.is_cuda and torch.cuda.is_current_stream_capturing():
            here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                siglip = self.fused_featurizer(pixels[:, 3:], language, through)
            dino = self.featurizer(pixels[:, :3], language, through)
            here.wait_stream(beside)
        else:
            dino, siglip = self.featurizer(pixels[:, :3], language, through), self.fused_featurizer(pixels[:, 3:], language, through)
        features = torch.cat([dino, siglip], dim=-1)
        return features.unflatten(0, (batch, -1)).flatten(1, 2)


class Projector(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(into, 4 * into)
        self.fc2 = nn.Linear(4 * into, out)
        self.fc3 = nn.Linear(out, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(into, out)
        self.fc2 = nn.Linear(out, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class MlpResNet(nn.Module):
    def __init__(self, into: int, hidden: int, out: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(into)
        self.fc1 = nn.Linear(into, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """Hidden states [B, T * D, dim] -> normalised actions [B, T, D]; the D states of a step are read together."""

    def __init__(self, dim: int, action_dim: int):
        super().__init__()
        self.action_dim = action_dim
        self.model = MlpResNet(action_dim * dim, dim, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model(hidden.unflatten(1, (-1, self.action_dim)).flatten(2))


class ValueHead(nn.Module):
    """Values [B, outputs] from the hidden state of the last prompt token [B, dim]."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, outputs, bias=False))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.mlp[0].bias)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


@cache
def _compiler() -> Callable:
    return torch.compile(call, dynamic=False)


def _compiled(layer: nn.Module, *inputs: Any) -> torch.Tensor:
    # four kinds of layer for each shape; the default limit of 8 forms would fall back to eager in silence at the third shape
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        return _compiler()(layer, *inputs)


class OpenVLAOFT(Policy):
    family, Config = "openvla_oft", OpenVLAOFTConfig
    fresh = ("value_head.*", "*.lora_down", "*.lora_up")

    def __init__(self, config: OpenVLAOFTConfig, tokenizer: Any = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.interface, self.horizon, self.execute = config.interface, config.horizon, config.execute
        self.action_dim = config.interface.action_dim
        self.views = len(config.interface.cameras)
        self.slots = self.horizon * self.action_dim  # action positions in the sequence
        self._prompts: dict[str, list[int]] = {}
        self._scales: tuple[Any, dict] = (None, {})
        self._graphs: tuple[tuple, dict[Any, Captured]] | None = None
        dim = config.llama.hidden_size
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config.dino.dim + config.siglip.dim, dim)
        self.language_model = Llama(config.llama)
        self.proprio_projector = ProprioProjector(config.interface.state_dim, dim) if config.proprio else None
        self.action_head = L1Head(dim, self.action_dim) if config.head == "l1" else None
        with torch.device("cpu"):  # `fresh` parts get values even where the rest is built without (the meta device), since a checkpoint may lack them
            outputs = 1 if config.value_level == "chunk" else self.horizon
            self.value_head = ValueHead(dim, outputs) if config.value_head else None
            if config.lora_rank:
                self.requires_grad_(False)
                for part in (self.vision_backbone, self.projector, self.language_model):
                    lora.add(part, config.lora_rank, config.lora_alpha)
                for part in (self.proprio_projector, self.action_head, self.value_head):
                    if part is not None:
                        part.requires_grad_(True)
        if config.freeze_vision:
            self.vision_backbone.requires_grad_(False)
        for part in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer, self.language_model.model):
            part.gradient_checkpointing = config.gradient_checkpointing

    def blocks(self) -> list[nn.Module]:
        vision, words = self.vision_backbone, self.language_model.model
        return [words.embed_tokens, *vision.featurizer.blocks, *vision.fused_featurizer.blocks, *words.layers]

    # -------------------------------------------------------------------------------------------- making and loading

    @classmethod
    def from_config(cls, config: OpenVLAOFTConfig, folder: Path | None = None) -> Self:
        return cls(config, read_tokenizer(folder) if folder is not None else None)

    @classmethod
    def tiny(cls, interface: Interface, **overrides: Any) -> Self:
        """The same model at about two million parameters, with fresh weights and a small tokenizer, for any interface.

        Without `statistics`, actions are scaled by the interface's bounds, states by theirs (where they have none: by pi, which holds joints and metres).
        """
        interface = dataclasses.replace(interface, optional_cameras=())  # the number of images is part of the network's sequence
        if "statistics" not in overrides:
            overrides["statistics"] = _bounds_of_fields({"action": interface.action, "proprio": interface.state})
        config = OpenVLAOFTConfig(**{**TINY, "interface": interface, "proprio": bool(interface.state), **overrides})
        policy = cls(config, tiny_tokenizer(config.vocab_size))
        for name, parameter in policy.named_parameters():
            if name.endswith("scale_factor"):  # the published start, 1e-5, needs a long pre-training to be heard
                nn.init.ones_(parameter)
            elif name.endswith(("embed_tokens.weight", "cls_token", "reg_token")):
                nn.init.normal_(parameter, std=0.02)
        return policy.eval()

    @classmethod
    def from_published(
        cls,
        folder: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype | None,
        recipe: str | None = None,
        base: str | Path | None = None,
        unnorm_key: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a published folder, unedited, in bfloat16 unless `dtype` says otherwise.

        Args:
            recipe: how it was trained (see RECIPES); known ids bring it along.
            base: for a folder that holds only an adapter: the model that it was trained on, if adapter_config.json does not lead there.
            unnorm_key: the data set whose statistics scale the actions; only needed where dataset_statistics.json has several.
            options: entries of OpenVLAOFTConfig that override the recipe's.
        """
        config, weights = read_published(folder, recipe, base, unnorm_key, options)
        tokenizer = read_tokenizer(folder if (folder / "tokenizer.json").exists() else weights.root)
        return filled(cls, config, tokenizer, weights, device, dtype or torch.bfloat16, may_ignore=unused(config), source=str(folder))

    def cast(self, dtype: torch.dtype) -> Self:
        """Weights to `dtype`; adapters stay float32, where an optimizer's small steps survive."""
        for name, parameter in self.named_parameters():
            if not name.endswith((".lora_down", ".lora_up")):
                parameter.data = parameter.data.to(dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None}  # CUDA graphs cannot be copied; a copy captures its own

    def side_files(self) -> dict[str, bytes]:
        return {} if self.tokenizer is None else {"tokenizer.json": self.tokenizer.to_str().encode()}

    # -------------------------------------------------------------------------------------------- forward

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, state: torch.Tensor | None = None, padded: bool = True, through: Callable = call
    ) -> torch.Tensor:
        """Hidden states [B, T * D + 1, dim] after the final norm, from the last prompt token to the last action position.

        The first T * D of them predict the action numbers; the last one predicts </s> in training.

        Args:
            pixels: [B, 6 V, size, size], normalised.
            ids: [B, L] prompts as `left_padded` gives them.
            state: [B, D_state], normalised; only with config.proprio.
            padded: False promises that no row of `ids` is padded; attention without a mask is faster.
            through: runs one layer; `call`, or a compiled form of it.
        """
        dtype = self.projector.fc1.weight.dtype
        words = self.language_model.model.embed_tokens(ids)
        end = self.language_model.model.embed_tokens(ids.new_full((len(ids), 1), EOS)) if self.config.end_token else words[:, :0]
        language = None
        if self.config.film:  # the mean over the prompt as it was trained: with BOS and </s>, without padding
            real = (ids != self.config.vocab_size)[..., None]
            language = ((words * real).sum(1) + end.sum(1)) / (real.sum(1) + end.shape[1])
        x = [words[:, :1], self.projector(self.vision_backbone(pixels.to(dtype), language, through))]
        if self.proprio_projector is not None:
            x.append(self.proprio_projector(state.to(dtype))[:, None])
        x = torch.cat([*x, words[:, 1:], words.new_zeros(len(ids), self.slots, words.shape[-1]), end], dim=1)
        first = x.shape[1] - end.shape[1] - self.slots - 1
        return self.language_model.model(x, *self.layout(ids, x.shape[1], padded), slice(first, first + self.slots + 1), through)

    def layout(self, ids: torch.Tensor, length: int, padded: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(position numbers [B, S], which skip padding; which positions of the sequence are real [B, S] bool, None if all are)."""
        if not padded:
            return torch.arange(length, device=ids.device)[None], None
        real = ids != self.config.vocab_size
        tail = self.slots + self.config.end_token
        patches = length - ids.shape[1] - tail
        keep = torch.cat([real[:, :1], real.new_ones(len(ids), patches), real[:, 1:], real.new_ones(len(ids), tail)], dim=1)
        return keep.cumsum(1) - 1, keep

    def trimmed(self, ids: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, bool]:
        """Prompts without the padding that all rows share (prompts of different lengths: up to a multiple of tokens), and whether any is left."""
        lengths = (ids != self.config.vocab_size).sum(1)
        shortest, longest = torch.stack([lengths.min(), lengths.max()]).tolist()
        kept = longest if shortest == longest else min(-(-longest // multiple) * multiple, ids.shape[1])
        return torch.cat([ids[:, :1], ids[:, ids.shape[1] - kept + 1 :]], dim=1), shortest < kept

    def hidden(self, inputs: Trace) -> torch.Tensor:
        """The hidden states of prepared inputs: see `forward`."""
        captured = self._captured()
        # a graph per shape: batches of mixed prompts share a few
        ids, padded = self.trimmed(inputs["ids"], multiple=8 if captured else 1)
        given = {"ids": ids, **{name: inputs[name] for name in ("images", "states") if name in inputs}}
        if captured:
            return captured[padded](given)["hidden"]
        return self._network(given, padded)["hidden"]

    def _network(self, given: Trace, padded: bool, through: Callable = call) -> Trace:
        return {"hidden": self.forward(pixel_values(given["images"]), given["ids"], given.get("states"), padded, through)}

    def _captured(self) -> dict[Any, Captured]:
        """The network with and without padding, and the image preparation, as CUDA graphs; empty where they do not apply."""
        head = self.language_model.lm_head.weight
        if self.config.acceleration == "off" or self.device.type != "cuda" or torch.is_grad_enabled() or is_sharded(self):  # sharded weights move
            return {}
        # a graph reads the addresses that it was captured with; these weights move whenever all do (a cast, a load, merged adapters)
        first = self.language_model.model.layers[0].self_attn.q_proj.weight
        captured_for = (head.data_ptr(), first.data_ptr(), self.config.acceleration, self.config.images)
        if self._graphs is None or self._graphs[0] != captured_for:
            through = _compiled if self.config.acceleration == "compile" else call
            graphs = {padded: Captured(partial(self._network, padded=padded, through=through)) for padded in (False, True)}
            graphs["images"] = Captured(lambda given: {"images": prepare_images(given["images"], self.config.images, self.config.image_size)})
            self._graphs = (captured_for, graphs)
        return self._graphs[1]

    def bin_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T * D (+ 1), dim] -> float32 [B, T, D, 256] over the bins alone."""
        rows = slice(self.config.vocab_size - BINS, self.config.vocab_size)
        head = self.language_model.lm_head
        if type(head) is nn.Linear:  # the other 31808 rows are not needed
            logits = F.linear(hidden[:, : self.slots], head.weight[rows])
        else:  # with an adapter
            logits = head(hidden[:, : self.slots])[..., rows]
        return logits.float().unflatten(1, (self.horizon, self.action_dim))

    # -------------------------------------------------------------------------------------------- the contract

    def prepare(self, observation: Observation) -> Trace:
        """images uint8 [B, V, size, size, 3]; ids int64 [B, max_prompt]; states float32 [B, D_state], normalised, if the policy uses them."""
        roles = {"main_images": (self.interface.main,), "wrist_images": self.interface.wrists, "extra_view_images": self.interface.extras}
        pictures = []
        for key, cameras in roles.items():
            if not cameras:
                continue
            if key not in observation:
                raise ValueError(f"observation[{key!r}] is missing; this policy was trained with {', '.join(self.interface.cameras)}")
            stack = views(to_torch({key: observation[key]}, self.device), key)
            if stack.shape[1] < len(cameras):
                raise ValueError(f"observation[{key!r}] has {stack.shape[1]} views; this policy needs {len(cameras)} ({', '.join(c.name for c in cameras)})")
            pictures.append(stack[:, : len(cameras)])
        if len({stack.shape[2:] for stack in pictures}) == 1:  # one size: one pass over all views
            pictures = [torch.cat(pictures, dim=1)]
        pictures = [self._prepare_images(stack.flatten(0, 1)).unflatten(0, stack.shape[:2]) for stack in pictures]
        inputs = {"images": torch.cat(pictures, dim=1), "ids": self.tokenise(observation["task_descriptions"])}
        if self.config.proprio:
            states = to_torch({"states": observation["states"]}, self.device)["states"]
            if states.shape[-1] != self.interface.state_dim:
                wanted = ", ".join(f"{entry.name}[{entry.size}]" for entry in self.interface.state)
                raise ValueError(f"observation['states'] has {states.shape[-1]} numbers, this policy was trained with {wanted}; vlahub.check finds an adapter")
            inputs["states"] = self.normalised(states, "proprio").float()
        return inputs

    def _prepare_images(self, images: torch.Tensor) -> torch.Tensor:
        captured = self._captured()
        return captured["images"]({"images": images})["images"] if captured else prepare_images(images, self.config.images, self.config.image_size)

    def tokenise(self, tasks: list[str]) -> torch.Tensor:
        if self.tokenizer is None:
            raise ValueError("this policy has no tokenizer; load it with from_pretrained, or set policy.tokenizer")
        for task in tasks:
            if task not in self._prompts:
                self._prompts[task] = prompt_ids(self.tokenizer, task)
        return left_padded([self._prompts[task] for task in tasks], self.config.max_prompt, self.config.vocab_size).to(self.device)

    @torch.no_grad()
    def predict(self, inputs: Trace, seeds: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(inputs)
        if self.action_head is not None:
            return self.to_env(self.action_head(hidden[:, : self.slots]))
        if self.config.whole_vocabulary:
            ids = self.language_model.lm_head(hidden[:, : self.slots]).argmax(-1).unflatten(1, (self.horizon, self.action_dim))
            bins = ids - (self.config.vocab_size - BINS)
        else:
            bins = self.bin_logits(hidden).argmax(-1)
        return self.to_env(bins_to_actions(bins))

    @torch.no_grad()
    def sample(self, observation: Observation, seeds: torch.Tensor | None = None) -> Sample:
        self._require_tokens("sampling")
        inputs = self.prepare(observation)
        seeds = fresh_seeds(len(inputs["ids"])) if seeds is None else seeds
        hidden = self.hidden(inputs)
        log_probs = F.log_softmax(self.bin_logits(hidden) / self.config.temperature, dim=-1)  # [B, T, D, 256]
        # inverse of the cumulative distribution at one uniform number per token; rounding must not lead past the last bin
        u = uniform(seeds, (self.horizon, self.action_dim, 1), device=self.device)
        bins = (log_probs.exp().cumsum(-1) <= u).sum(-1).clamp(max=BINS - 1)
        log_prob = log_probs.gather(-1, bins[..., None]).sum(-1)
        value = None if self.value_head is None else self.value_head(hidden[:, 0]).float()
        return Sample(self.to_env(bins_to_actions(bins)), log_prob, value, {**inputs, "bins": bins})

    @torch.no_grad()
    def value(self, observation: Observation, seeds: torch.Tensor | None = None) -> torch.Tensor:
        if self.value_head is None:
            raise ValueError("this policy has no value head; load it with value_head=True")
        return self.value_head(self.hidden(self.prepare(observation))[:, 0]).float()

    def evaluate(self, trace: Trace) -> Evaluation:
        self._require_tokens("evaluating a trace")
        hidden = self.hidden(trace)
        log_probs = F.log_softmax(self.bin_logits(hidden) / self.config.temperature, dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        value = None if self.value_head is None else self.value_head(hidden[:, 0]).float()
        # sum, not [..., 0]: sharded training wants no views as results
        return Evaluation(log_probs.gather(-1, trace["bins"][..., None]).sum(-1), entropy, value)

    def sft_loss(self, batch: Mapping[str, Any], seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy over the whole vocabulary (with </s>, where the sequence has it), or the mean absolute error of the L1 head. Draws nothing."""
        actions = torch.as_tensor(batch["actions"]).to(self.device)
        if actions.shape[1:] != (self.horizon, self.action_dim):
            raise ValueError(f"batch['actions'] has shape {list(actions.shape)}, expected [B, {self.horizon}, {self.action_dim}]")
        pad = batch.get("action_is_pad")
        weight = torch.ones_like(actions[..., :1]) if pad is None else (~torch.as_tensor(pad).to(self.device)).to(actions.dtype)[..., None]
        return self.loss(self.hidden(self.prepare(batch)), self.from_env(actions), weight)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`target`: normalised actions [B, T, D]; `weight` [B, T, 1]: 0 for steps after the end of an episode."""
        weight = weight.expand_as(target)
        if self.action_head is not None:
            return ((self.action_head(hidden[:, : self.slots]).float() - target).abs() * weight).sum() / weight.sum()
        ids = (actions_to_bins(target) + self.config.vocab_size - BINS).masked_fill(weight == 0, IGNORED).flatten(1)
        if self.config.end_token:
            ids = F.pad(ids, (0, 1), value=EOS)
        logits = self.language_model.lm_head(hidden[:, : ids.shape[1]]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=IGNORED)

    def _require_tokens(self, what: str) -> None:
        if self.action_head is not None:
            raise ValueError(
                f"{what} needs a distribution over actions, and this checkpoint has an L1 regression head: its vocabulary was not trained on actions. "
                "Reinforcement learning starts from a checkpoint trained on discrete tokens (recipes libero_rlinf, libero_tokens, robotwin_rlinf)"
            )

    # -------------------------------------------------------------------------------------------- scales

    def _bounds(self, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(low, high, which numbers are scaled) float64."""
        if self._scales[0] is not self.config:
            self._scales = (self.config, {})
        kept = self._scales[1]
        if (side, device) not in kept:
            low, high = bounds_of(self.config.statistics, side, self.config.bounds)
            mask = self.config.statistics[side].get("mask") or [True] * len(low)
            low, high = (torch.tensor(entry, dtype=torch.float64, device=device) for entry in (low, high))
            kept[side, device] = (low, high, torch.tensor(mask, device=device))
        return kept[side, device]

    def set_statistics(self, statistics: Mapping[str, Mapping[str, Any]]) -> None:
        action = dict(statistics["actions"])
        binary = {column for column, _ in self._binary_grippers()}  # these are trained on 0 and 1, whatever the env's units
        action["mask"] = [column not in binary for column in range(self.action_dim)]
        self.config = dataclasses.replace(self.config, statistics={"action": action, "proprio": dict(statistics["states"])}, unnorm_key="")

    def normalised(self, x: torch.Tensor, side: str) -> torch.Tensor:
        """Data in its own units -> [-1, 1], float64. A number that never changed becomes 0; numbers outside the mask stay as they are."""
        low, high, mask = self._bounds(side, x.device)
        scaled = (2 * (x.double() - low) / (high - low + 1e-8) - 1).clamp(-1, 1)
        if side == "action":
            scaled = torch.where(low == high, 0.0, scaled)
        return torch.where(mask, scaled, x.double())

    def unnormalised(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised actions -> the units of the training data, float64."""
        low, high, mask = self._bounds("action", x.device)
        return torch.where(mask, 0.5 * (x.double() + 1) * (high - low + 1e-8) + low, x.double())

    def to_env(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised actions [B, T, D] -> env units, float32. A binary gripper becomes the env's `open` above 0.5 and `closed` below."""
        x = self.unnormalised(x)
        for column, entry in self._binary_grippers():
            x[..., column] = (entry.open + entry.closed) / 2 + torch.sign(2 * x[..., column] - 1) * (entry.open - entry.closed) / 2
        return x.float()

    def from_env(self, actions: torch.Tensor) -> torch.Tensor:
        """The inverse for training data: env units -> normalised, float64."""
        x = actions.double().clone()
        for column, entry in self._binary_grippers():
            x[..., column] = (x[..., column] - entry.closed) / (entry.open - entry.closed)
        return self.normalised(x, "action")

    def _binary_grippers(self) -> list[tuple[int, Field]]:
        if not self.config.binary_gripper:
            return []
        columns, start = [], 0
        for entry in self.interface.action:
            if entry.open is not None and entry.closed is not None:
                columns += [(start + i, entry) for i in range(entry.size)]
            start += entry.size
        return columns


# ------------------------------------------------------------------------------------------------ tiny policies

TINY: dict[str, Any] = dict(
    dino=VitConfig(dim=80, depth=3, heads=4, mlp_dim=320, prefix_tokens=5, layer_scale=True),
    siglip=VitConfig(dim=80, depth=3, heads=4, mlp_dim=320),
    llama=LlamaConfig(vocab_size=704, hidden_size=144, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4),
    vocab_size=640, image_size=64, patch=8, bounds="minmax", binary_gripper=False, temperature=1.0, max_prompt=96,
)  # fmt: skip

# What a small tokenizer learns its pieces from; any other text falls back to bytes.
WORDS = """pick up the red green blue yellow black white bowl plate cup mug can bottle box block cube bell button drawer cabinet stove basket pot pan book
 put place it on in into onto next to left right front back of top bottom middle and both from with between open close turn push pull press lift move stack
 click hand over shake hang rotate grab take go target point object arm gripper table tray alarm clock cream cheese butter soup sauce milk wine moka microwave"""


def tiny_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of Llama's kind (spaces are ▁, unknown characters bytes, ids 0, 1, 2 = <unk>, <s>, </s>) that leaves the last 256 ids to actions."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    sentences = [prompt(" ".join(WORDS.split()[i : i + 3])) for i in range(len(WORDS.split()))]
    pieces = [sentence.replace(" ", "▁").replace("\n", "") for sentence in sentences]
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(
        [part for piece in pieces for part in re.findall(r"▁?[^▁]+|▁", piece)],
        trainers.BpeTrainer(vocab_size=vocab_size - BINS - len(reserved), show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = {piece: i for i, piece in enumerate([*reserved, *sorted(learned["vocab"], key=learned["vocab"].get)])}
    if len(vocab) > vocab_size - BINS:
        raise ValueError(f"vocab_size {vocab_size} leaves no room for {len(vocab)} pieces and {BINS} actions")
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


# ------------------------------------------------------------------------------------------------ published files


def unused(config: OpenVLAOFTConfig) -> list[str]:
    """Patterns of the published keys that reach no output and are not built."""
    towers = {"featurizer": config.dino, "fused_featurizer": config.siglip}
    return [f"vision_backbone.{name}.{pattern}" for name, vit in towers.items() for pattern in unused_keys(vit)]


def read_published(
    folder: Path, recipe: str | None, base: str | Path | None, unnorm_key: str | None, options: dict[str, Any]
) -> tuple[OpenVLAOFTConfig, Published]:
    """The config of a published folder: what its files say, what its recipe says, and what the caller overrides."""
    weights = Published(folder, base)
    has = {name: file is not None for name, file in weights.components.items()}
    has["proprio_projector"] |= "proprio_projector.fc1.weight" in weights
    if recipe is None and has["action_head"] and has["proprio_projector"]:
        recipe = "libero_l1"  # the only way in which regression checkpoints with a state were published; other sizes fail below
    if recipe == "robotwin_rlinf" and has["proprio_projector"]:
        recipe = "robotwin_rlinf_state"
    if recipe not in RECIPES:
        known = "".join(f"\n  - {name}: {what}" for name, (what, _) in RECIPES.items())
        asked = f"there is no recipe {recipe!r}" if recipe else f"the files of {folder} do not say how it was trained"
        raise hub.CheckpointError(f"{asked}; give recipe=... to from_pretrained. Recipes:{known}")
    if "statistics" not in options:
        source = folder if (folder / "dataset_statistics.json").exists() else weights.root
        options = {**options, **dict(zip(("unnorm_key", "statistics"), choose_statistics(source, unnorm_key), strict=True))}
    config = {"film": has["vision_backbone"], **RECIPES[recipe][1], **options}
    for name, wanted in (("action_head", config.get("head") == "l1"), ("proprio_projector", config.get("proprio", False))):
        if has[name] != wanted:
            files = f"{name}--*_checkpoint.pt"
            what = f"brings {files}, which recipe {recipe!r} does not use" if has[name] else f"lacks {files}, which recipe {recipe!r} needs"
            raise hub.CheckpointError(f"{folder} {what}; choose another recipe of {', '.join(RECIPES)}")
    for name in (name for name in weights if name == "value_head.mlp.4.weight"):  # a checkpoint that RL saved with its critic
        config |= {"value_head": True, "value_level": "chunk" if weights.shape(name)[0] == 1 else "action"}
    unknown = config.keys() - {entry.name for entry in dataclasses.fields(OpenVLAOFTConfig)}
    if unknown:
        raise TypeError(f"OpenVLAOFTConfig has no entry {sorted(unknown)[0]!r}; {suggest(sorted(unknown)[0], OpenVLAOFTConfig.__dataclass_fields__)}")
    return OpenVLAOFTConfig(**config), weights
