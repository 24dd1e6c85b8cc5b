"""Vision transformers under the key names of timm: DINOv2 and SigLIP as OpenVLA uses them.

The feature of an image is the output of the second-to-last block, without the final norm. The last block, the final norm and SigLIP's pooling head are in
the published checkpoints but reach no output; they are not built (`unused_keys` names them, so that a loader can tell them from a misfit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlahub_policies.parts.llama import call


@dataclass(frozen=True)
class VitConfig:
    dim: int
    depth: int  # blocks in the checkpoint; the last one is not built
    heads: int
    mlp_dim: int
    prefix_tokens: int = 0  # DINOv2: 1 class token + 4 registers
    layer_scale: bool = False
    pool: bool = False  # the checkpoint has a pooling head (not built)


DINOV2_LARGE = VitConfig(dim=1024, depth=24, heads=16, mlp_dim=4096, prefix_tokens=5, layer_scale=True)
SIGLIP_SO400M = VitConfig(dim=1152, depth=27, heads=16, mlp_dim=4304, pool=True)  # 4304 = int(1152 * 3.7362)

EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # each [B, heads, N, dim / heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU for both towers; SigLIP's own tanh form is not what OpenVLA was trained with


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """A pre-norm block. With FiLM, the language sets a scale and a shift per channel between attention and MLP."""

    def __init__(self, config: VitConfig, film_dim: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=EPS)
        self.attn = Attention(config.dim, config.heads)
        self.ls1 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.dim, eps=EPS)
        self.mlp = Mlp(config.dim, config.mlp_dim)
        self.ls2 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        if film_dim is not None:
            self.scale = nn.Linear(film_dim, config.dim)
            self.shift = nn.Linear(film_dim, config.dim)

    def forward(self, x: torch.Tensor, language: torch.Tensor | None) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if language is not None:
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)  # [B, patches, dim]


class VisionTransformer(nn.Module):
    """Images [B, 3, size, size] -> patch features [B, patches, dim].

    Args:
        film_dim: width of the language embedding that modulates every block; None without FiLM.
    """

    def __init__(self, config: VitConfig, image_size: int, patch: int, film_dim: int | None = None):
        super().__init__()
        self.config = config
        if config.prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
            self.reg_token = nn.Parameter(torch.zeros(1, config.prefix_tokens - 1, config.dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2, config.dim) * 0.02)
        self.patch_embed = PatchEmbed(config.dim, patch)
        self.blocks = nn.ModuleList(Block(config, film_dim) for _ in range(config.depth - 1))
        self.gradient_checkpointing = False

    def forward(self, image: torch.Tensor, language: torch.Tensor | None = None, through: Callable = call) -> torch.Tensor:
        x = self.patch_embed(image) + self.pos_embed
        if self.config.prefix_tokens:  # class token and registers come after the positions are added: they have none
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, language, use_reentrant=False)
            else:
                x = through(block, x, language)
        return x[:, self.config.prefix_tokens :]


def unused_keys(config: VitConfig) -> list[str]:
    """Patterns of the published keys that no output depends on, relative to the tower."""
    return [f"blocks.{config.depth - 1}.*", "norm.*", *(["attn_pool.*"] if config.pool else [])]
