"""Images as each origin prepares them, without torchvision.

On the CPU Pillow resizes; elsewhere the same integer arithmetic runs in torch, so that a batch of pictures need not leave the accelerator. Both give the same bytes.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from vlahub_policies.parts import randomness

AUGMENTATION = 100  # stream of a row's seeds
BILINEAR, BICUBIC = "bilinear", "bicubic"


def resize(images: torch.Tensor, height: int, width: int, method: str = BILINEAR) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, height, width, 3], exactly as Pillow resizes (with anti-aliasing)."""
    if images.shape[1:3] == (height, width):
        return images
    if images.device.type == "cpu":
        from PIL import Image

        resample = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}[method]
        return torch.from_numpy(np.stack([np.asarray(Image.fromarray(image).resize((width, height), resample)) for image in images.numpy()]))
    return resize_in_torch(images, height, width, method)


def resize_in_torch(images: torch.Tensor, height: int, width: int, method: str = BILINEAR) -> torch.Tensor:
    """The arithmetic of Pillow's resize: columns first, then rows, fixed-point weights, rounded to bytes after each pass."""
    x = images.permute(0, 3, 1, 2).double()  # float64 holds the 30-bit fixed-point sums exactly, and has fast matrix products everywhere
    if width != images.shape[2]:
        x = _to_byte(x @ _weights(images.shape[2], width, method, images.device).T)
    if height != images.shape[1]:
        x = _to_byte(_weights(images.shape[1], height, method, images.device) @ x)
    return x.to(torch.uint8).permute(0, 2, 3, 1)


_FRACTION = 22  # bits of Pillow's fixed-point weights: 32 - 8 for the byte - 2 for the sign and overshoot


def _to_byte(sums: torch.Tensor) -> torch.Tensor:
    return torch.floor((sums + 2 ** (_FRACTION - 1)) / 2**_FRACTION).clamp(0, 255)


@lru_cache(maxsize=32)
def _weights(old: int, new: int, method: str, device: torch.device) -> torch.Tensor:
    """[new, old] float64 holding integers: the filter at each output position, stretched when shrinking so that no pixel is skipped."""

    def filter(x: float) -> float:
        x = abs(x)
        if method == BILINEAR:
            return max(0.0, 1.0 - x)
        a = -0.5  # Pillow's bicubic
        if x < 1.0:
            return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0

    stretch = max(old / new, 1.0)
    reach = {BILINEAR: 1.0, BICUBIC: 2.0}[method] * stretch
    table = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
        taps = [filter((column - centre + 0.5) / stretch) for column in range(first, last)]
        total = sum(taps)
        for column, tap in zip(range(first, last), taps, strict=True):
            exact = tap / total * 2**_FRACTION
            table[row, column] = math.trunc(exact + math.copysign(0.5, exact))
    return table.to(device)


def resize_with_pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """openpi: uint8 [N, H, W, 3] -> uint8 [N, size, size, 3], aspect kept, bilinear, centred on black."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    ratio = max(width / size, height / size)
    resized = resize(images, int(height / ratio), int(width / ratio))
    canvas = images.new_zeros(len(images), size, size, 3)
    top, left = (size - resized.shape[1]) // 2, (size - resized.shape[2]) // 2
    canvas[:, top : top + resized.shape[1], left : left + resized.shape[2]] = resized
    return canvas


def resize_float_with_pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """lerobot: float [N, 3, H, W] in [-1, 1] -> float [N, 3, size, size], aspect kept, bilinear without anti-aliasing, centred on black."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    ratio = max(width / size, height / size)
    rows, columns = int(height / ratio), int(width / ratio)
    resized = F.interpolate(images, (rows, columns), mode="bilinear", align_corners=False).clamp(-1, 1)
    top, left = (size - rows) // 2, (size - columns) // 2
    return F.pad(resized, (left, size - columns - left, top, size - rows - top), value=-1.0)


def pad_then_resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Dexbotic: uint8 [N, H, W, 3] -> uint8 [N, size, size, 3], first padded to a centred black square, then bicubic."""
    height, width = images.shape[1:3]
    side = max(height, width)
    square = images.new_zeros(len(images), side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = images
    return resize(square, size, size, BICUBIC)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]; float images are returned as they are."""
    return images.float() / 255.0 * 2.0 - 1.0 if images.dtype == torch.uint8 else images


def augment(pixels: torch.Tensor, seeds: randomness.Seeds, fixed: list[int]) -> torch.Tensor:
    """openpi's training augmentation of pixels [B, V, 3, H, W] in [-1, 1].

    Pictures of fixed cameras (their positions along V) are cropped to a random 95 % and turned by up to 5 degrees; all change brightness, contrast and saturation.
    Every picture draws its own numbers.
    """
    batch, cameras = pixels.shape[:2]
    draw = randomness.uniform(seeds, (cameras, 6), stream=AUGMENTATION, device=pixels.device)  # [B, V, 6]
    x = (pixels + 1) / 2
    moved = torch.zeros(cameras, dtype=torch.bool, device=pixels.device)
    moved[fixed] = True
    angle = torch.where(moved, (draw[..., 0] * 2 - 1) * math.radians(5), 0.0)
    side = torch.where(moved, 0.95, 1.0)
    shift = torch.where(moved[:, None], (draw[..., 1:3] * 2 - 1) * 0.05, 0.0)  # of the crop's centre, in half picture widths
    # where each output pixel is read, in coordinates from -1 to 1; what lies outside is black
    rows = [torch.stack([side * angle.cos(), -side * angle.sin(), shift[..., 0]], -1), torch.stack([side * angle.sin(), side * angle.cos(), shift[..., 1]], -1)]
    places = F.affine_grid(torch.stack(rows, -2).flatten(0, 1), (batch * cameras, 3, *x.shape[-2:]), align_corners=False)
    x = F.grid_sample(x.flatten(0, 1), places, align_corners=False).unflatten(0, (batch, cameras))
    brightness, contrast, saturation = ((low + (2 - 2 * low) * draw[..., i])[..., None, None, None] for i, low in ((3, 0.7), (4, 0.6), (5, 0.5)))
    x = x * brightness
    mean = x.mean((-3, -2, -1), keepdim=True)
    x = (x - mean) * contrast + mean
    grey = x.mean(-3, keepdim=True)
    x = grey + (x - grey) * saturation
    return x.clamp(0, 1) * 2 - 1
