"""Pillow's `Image.resize`, bit for bit, on any device and for whole batches.

Policies were trained on frames that Pillow had resized on the CPU. A device's own interpolation differs by a few grey levels, which is enough to move actions;
Pillow itself would cost more time than the network at batch 64. Its arithmetic is integer arithmetic, so matrix products in float64 repeat it exactly.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from PIL import Image

Kernel = Literal["bilinear", "bicubic"]
BITS = 22  # Pillow keeps its weights with 22 binary digits: 32 less 8 for the pixel and 2 for overshoot


def resize(images: torch.Tensor, size: tuple[int, int], kernel: Kernel) -> torch.Tensor:
    """uint8 [N, H, W, C] -> uint8 [N, *size, C], size = (height, width)."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"resize needs uint8 images [N, H, W, C], not {images.dtype} {list(images.shape)}")
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    if images.device.type == "cpu":  # here Pillow itself is quicker
        resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[kernel]
        return torch.from_numpy(np.stack([np.asarray(Image.fromarray(image).resize(size[::-1], resample)) for image in images.numpy()]))
    return resize_by_products(images, size, kernel)


def resize_by_products(images: torch.Tensor, size: tuple[int, int], kernel: Kernel) -> torch.Tensor:
    """`resize` as matrix products, for images that lie on a GPU."""
    (H, W), (h, w) = images.shape[1:3], size
    # columns first, then rows, rounding to whole grey levels in between, as Pillow does
    if W != w:
        images = _to_grey_levels(torch.einsum("nhwc,vw->nhvc", images.double(), weights(W, w, kernel, images.device)))
    if H != h:
        images = _to_grey_levels(torch.einsum("nhwc,uh->nuwc", images.double(), weights(H, h, kernel, images.device)))
    return images


def _to_grey_levels(scaled: torch.Tensor) -> torch.Tensor:
    return ((scaled + 2 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255).to(torch.uint8)  # division by a power of two is exact


@functools.lru_cache(maxsize=32)
def weights(old: int, new: int, kernel: Kernel, device: torch.device) -> torch.Tensor:
    """[new, old] whole numbers in float64: the share of each old pixel in each new one, times 2^22."""
    scale = old / new
    stretch = max(scale, 1.0)  # when shrinking, the kernel grows with the scale, so that every pixel counts
    support = {"bilinear": 1.0, "bicubic": 2.0}[kernel] * stretch
    table = torch.zeros(new, old, dtype=torch.float64, device="cpu")
    for i in range(new):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old)
        row = [_shape((j - centre + 0.5) / stretch, kernel) for j in range(first, last)]
        total = sum(row)
        for j, share in zip(range(first, last), row, strict=True):
            scaled = share / total * 2**BITS
            table[i, j] = math.floor(scaled + 0.5) if scaled >= 0 else math.ceil(scaled - 0.5)
    return table.to(device)


def _shape(x: float, kernel: Kernel) -> float:
    x = abs(x)
    if kernel == "bilinear":
        return max(1.0 - x, 0.0)
    a = -0.5  # Pillow's choice; many libraries take -0.75
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
