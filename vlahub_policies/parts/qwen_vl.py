"""Qwen2.5-VL as two plain modules, the vision tower and the text decoder, with the published tensor names.

StarVLA QwenOFT and LingBot-VLA are built on the same 3B weights but run them differently (causal attention and three-dimensional rotary positions in the
one, joint attention with one-dimensional positions in the other), so attention and positions are left to the caller and the layers are shared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlahub.hub import CheckpointError, read_json
from vlahub_policies.parts.acceleration import Quick, through
from vlahub_policies.parts.packing import joined, lay_out, widen


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; defaults are those of every published Qwen2.5-VL."""

    depth: int = 32
    hidden: int = 1280
    heads: int = 16
    mlp: int = 3420
    patch: int = 14
    frames: int = 2  # a still image is shown twice: the patch kernel spans two video frames
    merge: int = 2  # 2 x 2 patches become one token of the decoder
    window: int = 112  # pixels; side of an attention window
    full_attention: tuple[int, ...] = (7, 15, 23, 31)  # blocks that see the whole image
    out: int = 2048  # the decoder's width

    @property
    def patch_numbers(self) -> int:
        return 3 * self.frames * self.patch**2

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches (vertically, horizontally) of an image of (height, width)."""
        cell = self.patch * self.merge
        if any(side % cell or side < cell for side in size):
            raise ValueError(f"image_size {tuple(size)} must be multiples of {cell}: patches of {self.patch} pixels, merged {self.merge} by {self.merge}")
        return tuple(side // self.patch for side in size)


@dataclass(frozen=True)
class TextConfig:
    """The decoder; defaults are those of Qwen2.5-VL-3B."""

    vocab: int = 151936
    layers: int = 36
    hidden: int = 2048
    heads: int = 16
    kv_heads: int = 2
    head: int = 128
    mlp: int = 11008
    eps: float = 1e-6
    rope_base: float = 1e6
    rope_sections: tuple[int, ...] = (16, 24, 24)  # of the head/2 frequencies: time, height, width


def read_config(record: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    """Qwen's config.json, as transformers 4 and 5 write it, as our two records."""
    kind = record.get("model_type")
    if kind != "qwen2_5_vl":
        raise CheckpointError(f"the base model's config.json says model_type {kind!r}; only qwen2_5_vl is supported")
    text, vision = {**record, **record.get("text_config", {})}, record["vision_config"]
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    heads = text["num_attention_heads"]
    return (
        VisionConfig(
            depth=vision["depth"],
            hidden=vision["hidden_size"],
            heads=vision["num_heads"],
            mlp=vision["intermediate_size"],
            patch=vision.get("patch_size", 14),
            frames=vision.get("temporal_patch_size", 2),
            merge=vision.get("spatial_merge_size", 2),
            window=vision["window_size"],
            full_attention=tuple(vision["fullatt_block_indexes"]),
            out=vision["out_hidden_size"],
        ),
        TextConfig(
            vocab=text["vocab_size"],
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            heads=heads,
            kv_heads=text["num_key_value_heads"],
            head=text.get("head_dim") or text["hidden_size"] // heads,
            mlp=text["intermediate_size"],
            eps=text["rms_norm_eps"],
            rope_base=float(text.get("rope_theta") or rope["rope_theta"]),
            rope_sections=tuple(rope["mrope_section"]),
        ),
    )


def sizes_of(shapes: Mapping[str, tuple[int, ...]], vision: str, text: str, base: Path | None = None) -> tuple[VisionConfig, TextConfig]:
    """The sizes of a checkpoint whose tensor names begin with `vision` and `text`: from the base model's config.json, or, where there is none, from the shapes.

    Shapes do not tell the width of a head, the windows and the rotary base; those are then the ones that every published Qwen2.5-VL-3B and 7B has.
    A `model_type` is what tells Qwen's config.json from a policy's own. The vocabulary is always the checkpoint's: some bases carry further tokens.
    """
    vocab, hidden = shapes[text + "embed_tokens.weight"]
    record = read_json(base / "config.json") if base is not None and (base / "config.json").exists() else {}
    if "model_type" in record:
        sizes, words = read_config(record)
        return sizes, replace(words, vocab=vocab)

    def count(prefix: str) -> int:
        return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix))

    layer, block, head = text + "layers.0.", vision + "blocks.0.", TextConfig.head
    width, inner = (shapes[block + name][0] for name in ("norm1.weight", "mlp.up_proj.weight"))
    queries, keys, mlp = (shapes[layer + name][0] for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight"))
    return (
        VisionConfig(depth=count(vision + "blocks."), hidden=width, mlp=inner, out=hidden),
        TextConfig(vocab, count(text + "layers."), hidden, queries // head, keys // head, head, mlp),
    )


# ------------------------------------------------------------------------------------------------ shared pieces


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed, down = joined(self.gate_proj), self.down_proj
        if packed is None:
            return down(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = F.linear(x, *packed).chunk(2, -1)
        inner = F.silu(gate) * up
        wide = getattr(down, "wide", None)
        return F.linear(inner, wide[0], down.bias) if wide else down(inner)


def pack(module: nn.Module) -> None:
    """q/k/v and gate/up matrices of every attention and MLP as one block each, for inference."""
    for part in module.modules():
        if type(part) is SelfAttention:
            lay_out([part.q_proj, part.k_proj, part.v_proj])
        elif type(part) is GatedMLP and not any(type(layer) is not nn.Linear for layer in part.children()):
            # tensor cores want multiples of 8 numbers, and the vision tower's 3420 is none
            lay_out([part.gate_proj, part.up_proj], multiple=8)
            widen(part.down_proj, 8)


@functools.cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of numbers known in advance, made once per device: a copy from the host can be no part of a CUDA graph."""
    return torch.tensor(values, dtype=dtype, device=device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves paired; computed in float32 because cos and sin are."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def frequencies(count: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """[count] angles per unit of position, from 1 down to nearly 1 / base."""
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def joint_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Attention with an arbitrary mask. q [B, H, L, d]; k, v [B, G, S, d], each shared by H / G heads; bias from `attention_bias`.

    Heads that share keys are laid out as further query rows, so the keys are never copied H / G times.
    """
    B, H, L, d = q.shape
    return F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, d), k, v, attn_mask=bias).reshape(B, H, L, d)


def by_token(q: torch.Tensor, own: tuple, past: tuple | None = None) -> tuple:
    """What an attention kernel is given, heads behind tokens: q [B, L, H, d], past and own keys and values [B, S, G, d]."""
    turned = [None if pair is None else tuple(part.transpose(1, 2) for part in pair) for pair in (past, own)]
    return q.transpose(1, 2), *turned


def attention_bias(mask: torch.Tensor, heads_per_key: int, dtype: torch.dtype) -> torch.Tensor:
    """mask [B, L, S] bool, True = may attend -> what `joint_attention` adds to the scores, [B, 1, heads_per_key * L, S]. Built once for all layers."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return bias.repeat(1, heads_per_key, 1)[:, None]


# ------------------------------------------------------------------------------------------------ vision


class PatchEmbed(nn.Module):
    """The published weight is a 3-d convolution's, but its stride equals its kernel: a linear map of flattened patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(config.hidden, 3, config.frames, config.patch, config.patch))
        nn.init.normal_(self.proj.weight, std=config.patch_numbers**-0.5)
        with torch.no_grad():  # a fresh filter answers to differences inside a patch more than to its brightness, which all patches share
            self.proj.weight -= 0.8 * self.proj.weight.mean((2, 3, 4), keepdim=True)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        if patches.device.type == "cpu":  # the convolution adds up in the original's order, so that float32 results are equal to the bit
            cubes = patches.to(weight.dtype).reshape(-1, *weight.shape[1:])
            return F.conv3d(cubes, weight, stride=weight.shape[2:]).reshape(*patches.shape[:-1], -1)
        return F.linear(patches.to(weight.dtype), weight.flatten(1))  # on a GPU the plain product is faster


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, windows: int, mask: torch.Tensor | None) -> torch.Tensor:
        """x [N, L, C], in window order. `windows` > 1 cuts L into that many equal windows; `mask` [L, L] does the same for unequal ones."""
        N, L, C = x.shape
        q, k, v = self.qkv(x).reshape(N, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # 3 x [N, heads, L, d]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if windows > 1:
            q, k, v = (t.unflatten(2, (windows, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # [N * windows, heads, L / windows, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if windows > 1:
            out = out.unflatten(0, (N, windows)).transpose(1, 2).flatten(2, 3)
        return self.proj(out.transpose(1, 2).reshape(N, L, C))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.hidden), RMSNorm(config.hidden)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.hidden, config.mlp, bias=True)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, windows: int, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, windows, mask)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches -> one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.inner = config.hidden * config.merge**2
        self.ln_q = RMSNorm(config.hidden)
        self.mlp = nn.Sequential(nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, config.out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).reshape(*x.shape[:-2], -1, self.inner))


class VisionTower(nn.Module):
    """Patches of images of one size -> tokens of the decoder."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing, self.quick = False, Quick()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config)
        self._layouts: dict[tuple, tuple] = {}

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """patches [N, h * w, 3 * frames * patch^2] as `patchify` orders them, grid (h, w) -> [N, h * w / merge^2, out]."""
        cell = self.config.merge**2
        order, inverse, cos, sin, windows, mask = self._layout(grid, patches.device)
        x = self.patch_embed(patches)
        x = x.unflatten(1, (-1, cell))[:, order].flatten(1, 2)
        for index, block in enumerate(self.blocks):
            here = (1, None) if index in self.config.full_attention else (windows, mask)
            x = through(self.quick, self.gradient_checkpointing, block, x, cos, sin, *here)
        return self.merger(x)[:, inverse]

    def _layout(self, grid: tuple[int, int], device: torch.device) -> tuple:
        """(window order of the merged tokens, its inverse, cos, sin [h * w, d / 2], number of equal windows or 1, mask or None), computed once per grid."""
        key = (grid, device)
        if key in self._layouts:
            return self._layouts[key]
        merge, (h, w) = self.config.merge, grid
        if h % merge or w % merge:
            raise ValueError(
                f"a grid of {h} x {w} patches cannot be merged by {merge} x {merge}; give images whose sides are multiples of {merge * self.config.patch}"
            )
        side = self.config.window // merge // self.config.patch  # merged tokens per window side
        rows, columns = torch.meshgrid(torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
        window = ((rows // side) * math.ceil(w / merge / side) + columns // side).flatten()  # [merged tokens] window number
        order = window.argsort(stable=True)
        sizes = window.bincount()
        # patches come merge x merge cell by cell, each cell row by row
        y, x = (
            t.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1, merge**2)[order].flatten()
            for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        )
        quarter = self.config.hidden // self.config.heads // 4
        angles = torch.cat([y[:, None] * frequencies(quarter, 10000.0), x[:, None] * frequencies(quarter, 10000.0)], -1)  # [h * w, d / 2]
        even = bool((sizes == sizes[0]).all())
        mask = None
        if not even:
            of = window[order].repeat_interleave(merge**2)
            mask = (of[:, None] == of).to(device)
        layout = (order.to(device), order.argsort().to(device), angles.cos().to(device), angles.sin().to(device), len(sizes) if even else 1, mask)
        self._layouts[key] = layout
        return layout


def patchify(images: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> normalised float32 [N, h * w, 3 * frames * patch^2]: cells of merge x merge patches, each patch channel, frame, row, column."""
    N, H, W, _ = images.shape
    p, m = config.patch, config.merge
    # CLIP's channel means and standard deviations, folded with the scale 1 / 255 exactly as Qwen's image processor folds them
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    mean, std = (constant(numbers, torch.float32, images.device) * 255.0 for numbers in clip)
    x = (images.float() - mean) / std
    x = x.reshape(N, H // p // m, m, p, W // p // m, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)  # [N, h/m, w/m, m, m, 3, p, p]
    return x.unsqueeze(6).expand(*x.shape[:6], config.frames, p, p).reshape(N, (H // p) * (W // p), -1)


# ------------------------------------------------------------------------------------------------ text


class SelfAttention(nn.Module):
    """Projections only: positions, masks and caches are the caller's."""

    def __init__(self, width: int, heads: int, kv_heads: int, head: int):
        super().__init__()
        self.head = head
        self.q_proj = nn.Linear(width, heads * head)
        self.k_proj = nn.Linear(width, kv_heads * head)
        self.v_proj = nn.Linear(width, kv_heads * head)
        self.o_proj = nn.Linear(heads * head, width, bias=False)

    def qkv(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, L, C] -> q [B, H, L, d], k and v [B, G, L, d]; q and k rotated."""
        packed, layers = joined(self.q_proj), (self.q_proj, self.k_proj, self.v_proj)
        parts = F.linear(x, *packed).split([layer.out_features for layer in layers], -1) if packed else [layer(x) for layer in layers]
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden, config.heads, config.kv_heads, config.head)
        self.mlp = GatedMLP(config.hidden, config.mlp)
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None = None, last: bool = False, attention: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, L, C] -> the next x, and this layer's rotated keys and values [B, G, L, d]. Causal unless `bias` says otherwise.

        `last` stops at the keys and values and returns x as it came. `attention`: a kernel for attention with a bias.
        """
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        if not last:
            if bias is None:
                seen = self.self_attn.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
            elif attention is None:
                seen = self.self_attn.out(joint_attention(q, k, v, bias))
            else:
                seen = self.self_attn.o_proj(attention(*by_token(q, (k, v)), bias))
            x = x + seen
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, k, v


class TextModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing, self.quick = False, Quick()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden**-0.5)  # fresh tokens as loud as fresh layers
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden, config.eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Causal pass. x [B, L, C] embeddings, positions [B, 3, L] -> [B, L, C] behind the final norm.

        Rows are padded on the right: a causal token never sees what follows it, so padding needs no mask.
        """
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            x, _, _ = through(self.quick, self.gradient_checkpointing, layer, x, cos, sin)
        return self.norm(x)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, 3, L] (time, height, width) -> cos, sin [B, 1, L, d / 2] float32; each frequency belongs to one of the three axes."""
        axes = constant(tuple(axis for axis, count in enumerate(self.config.rope_sections) for _ in range(count)), torch.long, positions.device)
        angles = positions.float()[:, axes].transpose(1, 2) * frequencies(self.config.head // 2, self.config.rope_base, positions.device)
        return angles.cos()[:, None], angles.sin()[:, None]


def positions_of(tokens: Sequence[int], image_token: int, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[3, len(tokens)] positions (time, height, width) of one unpadded row whose images have the given merged grids.

    Text advances by one on all three axes. An image keeps the time constant and spreads height and width; the text behind it continues at start + max(h, w).
    """
    columns, at, index, images = [], 0, 0, iter(grids)
    while index < len(tokens):
        if tokens[index] != image_token:
            columns.append(torch.full((3, 1), at))
            at, index = at + 1, index + 1
            continue
        h, w = next(images, (0, 0))
        if h * w == 0 or list(tokens[index : index + h * w]) != [image_token] * (h * w):
            raise ValueError(f"the image tokens from position {index} on do not match the images' grids {list(grids)}")
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        columns.append(at + torch.stack([torch.zeros(h * w, dtype=torch.long), y.flatten(), x.flatten()]))
        at, index = at + max(h, w), index + h * w
    return torch.cat(columns, 1)
