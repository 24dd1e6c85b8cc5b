"""The OpenCLIP image tower (ViT-H/14): a picture -> 257 tokens, which the image resampler turns into context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlahub_envs.evac.unet import attend, split_heads

SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own statistics
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """`embed_dim` and the text entries size weights that are in every checkpoint and that nothing reads."""

    width: int = 1280
    layers: int = 32
    head_width: int = 80
    patch: int = 14
    embed_dim: int = 1024
    text_width: int = 1024
    text_context: int = 77
    text_vocabulary: int = 49408


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=width**-0.5))
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, dim=-1)
        x = x + self.attn.out_proj(attend(*(split_heads(y, self.heads) for y in qkv)))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class VisionTower(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        width = config.width
        tokens = 1 + (SIZE // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)  # unused, like ln_post: the tokens are taken before both
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, width // config.head_width) for _ in range(config.layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[b, 3, 224, 224] normalised -> [b, 1 + patches, width], the class token first."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class ImageEmbedder(nn.Module):
    """The tower beside the leftovers of the text tower that published files carry."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        model = nn.Module()
        model.positional_embedding = nn.Parameter(torch.zeros(config.text_context, config.text_width))
        model.text_projection = nn.Parameter(torch.zeros(config.text_width, config.embed_dim))
        model.logit_scale = nn.Parameter(torch.zeros(()))
        model.visual = VisionTower(config)
        model.token_embedding = nn.Embedding(config.text_vocabulary, config.text_width)
        model.ln_final = nn.LayerNorm(config.text_width)
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], [b, 3, H, W] -> [b, tokens, width]"""
        return self.model.visual(clip_pixels(images).to(self.model.visual.conv1.weight.dtype))


def clip_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], any size -> 224 x 224 with CLIP's normalisation. Bicubic overshoot is not clamped.

    A picture that shrinks is first blurred, by a Gaussian whose width follows the factor."""
    factors = [size / SIZE for size in images.shape[-2:]]
    if max(factors) > 1:
        images = blur(images, [max((factor - 1) / 2, 0.001) for factor in factors])
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None] for values in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def blur(images: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """Separable Gaussian blur with reflected borders; `sigmas` for rows and columns."""
    channels = images.shape[1]
    for axis, sigma in enumerate(sigmas):
        size = int(max(4 * sigma, 3)) | 1  # odd
        offsets = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, 1, size, 1) if axis == 0 else (1, 1, 1, size))
        half = size // 2
        padded = F.pad(images, (0, 0, half, half) if axis == 0 else (half, half, 0, 0), mode="reflect")
        images = F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)
    return images
