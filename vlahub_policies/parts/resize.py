"""Image resizing as TensorFlow and torchvision do it, in torch, on the device that holds the images: uint8 [N, H, W, 3] -> uint8 [N, size, size, 3].

Libraries differ by a few grey levels in what they call the same filter, and a policy is trained with one of them. These follow the original operation by
operation, so that results are equal to the grey level.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F


def lanczos(images: torch.Tensor, size: int) -> torch.Tensor:
    """`tf.image.resize(method="lanczos3", antialias=True)`, rounded."""
    images = images.float()
    for axis in (1, 2):
        if images.shape[axis] != size:
            source, weights = _lanczos_taps(images.shape[axis], size, images.device)  # each [taps, size]
            shape = [1, 1, 1, 1]
            shape[axis] = size
            # one product after the other, in TensorFlow's order: float sums depend on it, and near .5 so does the grey level
            total = 0.0
            for index, weight in zip(source, weights, strict=True):
                total = total + images.index_select(axis, index) * weight.view(shape)
            images = total
    return images.round().clamp(0, 255).to(torch.uint8)


@cache
def _lanczos_taps(length: int, size: int, device: torch.device, radius: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels a resized pixel is made of, and how much of each. float32 throughout, as TensorFlow computes them."""
    f = np.float32
    inverse = f(1) / (f(size) / f(length))
    widen = max(inverse, f(1))  # antialiasing: the kernel grows with the reduction
    centre = (np.arange(size, dtype=f) + f(0.5)) * inverse
    first = np.clip(np.ceil(centre - radius * widen - f(0.5)), 0, length - 1).astype(int)
    last = np.clip(np.floor(centre + radius * widen - f(0.5)), 0, length - 1).astype(int)
    source = first[None] + np.arange((last - first).max() + 1)[:, None]
    x = np.abs((source.astype(f) + f(0.5) - centre) * (f(1) / widen))
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = radius * np.sin(f(np.pi) * x) * np.sin(f(np.pi) * x / radius) / (f(np.pi) * f(np.pi) * x * x)
    weights = np.where(x <= f(1e-3), f(1), weights)
    weights = np.where((x > radius) | (source > last), f(0), weights).astype(f)
    weights = weights * (f(1) / weights.sum(axis=0, dtype=f))
    return torch.from_numpy(np.minimum(source, length - 1)).to(device), torch.from_numpy(weights).to(device)


def bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    """torchvision's antialiased bicubic resize of a uint8 tensor (Pillow's differs by up to 3 grey levels)."""
    if images.shape[1:3] == (size, size):
        return images
    resized = F.interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def centre_crop(images: torch.Tensor, size: int, area: float = 0.9) -> torch.Tensor:
    """`tf.image.crop_and_resize` of the box with `area` of the picture: corners aligned, bilinear, cut (not rounded) to uint8."""
    height, width = images.shape[1:3]
    (top, bottom, dy), (left, right, dx) = (_bilinear_taps(length, size, area, images.device) for length in (height, width))
    images = images.float() * (1.0 / 255)
    dy, dx = dy[:, None, None], dx[:, None]
    above, below = images.index_select(1, top), images.index_select(1, bottom)
    above_left, above_right = above.index_select(2, left), above.index_select(2, right)
    below_left, below_right = below.index_select(2, left), below.index_select(2, right)
    above = above_left + (above_right - above_left) * dx
    below = below_left + (below_right - below_left) * dx
    # 255.5: TensorFlow's float -> uint8 conversion, which cuts off
    return ((above + (below - above) * dy).clamp(0, 1) * 255.5).to(torch.uint8)


@cache
def _bilinear_taps(length: int, size: int, area: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f = np.float32
    side = np.sqrt(f(area))
    low = (f(1) - side) / f(2)
    high = low + side
    step = (high - low) * f(length - 1) / f(size - 1)
    position = low * f(length - 1) + np.arange(size, dtype=f) * step
    first, last = np.floor(position).astype(int), np.ceil(position).astype(int)
    return tuple(torch.from_numpy(entry).to(device) for entry in (first, last, (position - first).astype(f)))
