"""What a JPEG round trip does to pixels, on the device that holds them.

OpenVLA's training data were stored as JPEG and its evaluation repeats the loss: libjpeg at quality 95 with halved chroma, decoded with the fast integer
inverse DCT and triangle upsampling (TensorFlow's default). Entropy coding loses nothing, so it is left out; every rounding of libjpeg-turbo is kept and the
result is equal bit by bit. Integers are carried in float64, exact far beyond the largest value here (2^31), because that is what GPUs multiply.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

# The tables of the JPEG standard, annex K, which libjpeg scales by the quality.
LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def jpeg_round_trip(images: torch.Tensor, quality: int = 95) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, H, W, 3] after encoding and decoding."""
    height, width = images.shape[1:3]
    y, cb, cr = _to_ycc(images)  # each [N, H, W], whole numbers in float64
    y = _through_dct(y, LUMA, quality)
    chroma = _through_dct(_halve(torch.cat([cb, cr])), CHROMA, quality)[:, :, : (width + 1) // 2]
    cb, cr = _double(chroma)[:, :height, :width].chunk(2)
    return _to_rgb(y, cb, cr)


def _fix(x: float, bits: int = 16) -> int:
    """A constant as libjpeg keeps it: a whole number of 2^-bits."""
    return round(x * (1 << bits))


def _to_ycc(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    r, g, b = images.double().unbind(-1)
    half, centre = 1 << 15, 128 << 16
    y = _fix(0.29900) * r + _fix(0.58700) * g + _fix(0.11400) * b + half
    cb = -_fix(0.16874) * r - _fix(0.33126) * g + _fix(0.5) * b + (centre + half - 1)
    cr = _fix(0.5) * r - _fix(0.41869) * g - _fix(0.08131) * b + (centre + half - 1)
    return tuple(torch.floor(plane / 65536) for plane in (y, cb, cr))


def _to_rgb(y: torch.Tensor, cb: torch.Tensor, cr: torch.Tensor) -> torch.Tensor:
    cb, cr, half = cb - 128, cr - 128, 1 << 15
    r = y + torch.floor((_fix(1.40200) * cr + half) / 65536)
    g = y + torch.floor((-_fix(0.34414) * cb - _fix(0.71414) * cr + half) / 65536)
    b = y + torch.floor((_fix(1.77200) * cb + half) / 65536)
    return torch.stack([r, g, b], dim=-1).clamp(0, 255).to(torch.uint8)


def _halve(plane: torch.Tensor) -> torch.Tensor:
    """Mean of 2x2 pixels; the rounding alternates along a row so that it does not brighten the picture. Odd sizes repeat their edge."""
    # libjpeg repeats the last input column to whole blocks, but the last *row* only to an even number (and to whole blocks after halving)
    plane = F.pad(plane[:, None], (0, -plane.shape[2] % 16, 0, plane.shape[1] % 2), mode="replicate")[:, 0]
    sums = plane[:, 0::2, 0::2] + plane[:, 0::2, 1::2] + plane[:, 1::2, 0::2] + plane[:, 1::2, 1::2]
    bias = 1.0 + (torch.arange(sums.shape[2], device=plane.device) % 2)
    return torch.floor((sums + bias) / 4)


def _double(plane: torch.Tensor) -> torch.Tensor:
    """Triangle upsampling by two: each new sample is 3/4 of the nearer old one and 1/4 of the farther, in both directions."""
    padded = F.pad(plane[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    middle, above, below = padded[:, 1:-1] * 3, padded[:, :-2], padded[:, 2:]
    rows = torch.stack([middle + above, middle + below], dim=2).flatten(1, 2)  # [N, 2h, w + 2], 4 times too large
    left = torch.floor((rows[..., 1:-1] * 3 + rows[..., :-2] + 8) / 16)
    right = torch.floor((rows[..., 1:-1] * 3 + rows[..., 2:] + 7) / 16)
    return torch.stack([left, right], dim=-1).flatten(2)


@cache
def _matrices(device: torch.device, luma: bool, quality: int) -> tuple[torch.Tensor, ...]:
    """(forward DCT, divisors, multipliers, and the three stages of the fast inverse), float64.

    Forward: libjpeg's accurate integer DCT rounds once per pass, so each pass is one matrix of 13-bit constants. Its 1-D outputs are 8 times a DCT in the end.
    Inverse: additions, nine terms of which five are multiplied by 8-bit constants and cut to whole numbers, additions.
    """
    even, odd = np.zeros((4, 4)), np.zeros((4, 4))
    c541, c765, c1847 = (_fix(x, 13) for x in (0.541196100, 0.765366865, 1.847759065))
    even[0], even[2] = (8192, 8192, 8192, 8192), (8192, -8192, -8192, 8192)  # outputs 0 and 4, of d0+d7, d1+d6, d2+d5, d3+d4
    even[1] = (c541 + c765, c541, -c541, -(c541 + c765))  # output 2
    even[3] = (c541, c541 - c1847, c1847 - c541, -c541)  # output 6
    names = (0.298631336, 0.390180644, 0.899976223, 1.175875602, 1.501321110, 1.961570560, 2.053119869, 2.562915447, 3.072711026)
    c0298, c0390, c0899, c1175, c1501, c1961, c2053, c2562, c3072 = (_fix(x, 13) for x in names)
    # outputs 1, 3, 5, 7 of d0-d7, d1-d6, d2-d5, d3-d4
    odd[0] = (c1501 - c0899 - c0390 + c1175, c1175, c1175 - c0390, c1175 - c0899)
    odd[1] = (c1175, c3072 - c2562 - c1961 + c1175, c1175 - c2562, c1175 - c1961)
    odd[2] = (c1175 - c0390, c1175 - c2562, c2053 - c2562 - c0390 + c1175, c1175)
    odd[3] = (c1175 - c0899, c1175 - c1961, c1175, c0298 - c0899 - c1961 + c1175)
    forward = np.zeros((8, 8))
    forward[0::2] = np.hstack([even, even[:, ::-1]])
    forward[1::2] = np.hstack([odd, -odd[:, ::-1]])

    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = np.clip(((LUMA if luma else CHROMA) * scale + 50) // 100, 1, 255)
    aan = np.array([1.0, *(np.sqrt(2) * np.cos(np.arange(1, 8) * np.pi / 16))])
    multipliers = (table * np.round(np.outer(aan, aan) * 16384) + 2048) // 4096

    first = np.zeros((9, 8))
    first[0, [0, 4]] = 1  # in0 + in4
    first[1, [0, 4]] = 1, -1
    first[2, [2, 6]] = 1
    first[3, [2, 6]] = 1, -1  # times sqrt(2)
    first[4, [1, 3, 5, 7]] = 1  # z11 + z13
    first[5, [1, 3, 5, 7]] = 1, -1, -1, 1  # z11 - z13, times sqrt(2)
    first[6, [1, 3, 5, 7]] = 1, -1, 1, -1  # z10 + z12, times 1.848
    first[7, [1, 7]] = 1, -1  # z12, times 1.082
    first[8, [3, 5]] = -1, 1  # z10, times -2.613
    factors = np.array([1, 1, 1, 362 / 256, 1, 362 / 256, 473 / 256, 277 / 256, -669 / 256])
    sum04, dif04, sum26, root26, z7, root, z5, p1082, p2613 = np.eye(9)
    t12 = root26 - sum26
    t0, t3, t1, t2 = sum04 + sum26, sum04 - sum26, dif04 + t12, dif04 - t12
    t6 = p2613 + z5 - z7
    t5 = root - t6
    t4 = p1082 - z5 + t5
    last = np.stack([t0 + z7, t1 + t6, t2 + t5, t3 - t4, t3 + t4, t2 - t5, t1 - t6, t0 - z7])
    return tuple(torch.as_tensor(matrix, dtype=torch.float64, device=device) for matrix in (forward, table * 8, multipliers, first, factors[:, None], last))


def _through_dct(plane: torch.Tensor, table: np.ndarray, quality: int) -> torch.Tensor:
    """What quantisation leaves of a plane [N, H, W] of 0..255."""
    forward, divisors, multipliers, first, factors, last = _matrices(plane.device, table is LUMA, quality)
    count, height, width = plane.shape
    plane = F.pad(plane[:, None], (0, -width % 8, 0, -height % 8), mode="replicate")[:, 0]
    rows, columns = plane.shape[1] // 8, plane.shape[2] // 8
    blocks = plane.view(count, rows, 8, columns, 8).transpose(2, 3).reshape(-1, 8, 8) - 128
    blocks = torch.floor((blocks @ forward.T + 1024) / 2048)  # rows first; 2 of the 13 bits are kept until the columns are done
    blocks = torch.floor((forward @ blocks + 16384) / 32768)
    blocks = blocks.sign() * torch.floor((blocks.abs() + torch.floor(divisors / 2)) / divisors)  # the quantised coefficients
    blocks = blocks * multipliers
    blocks = last @ torch.floor((first @ blocks) * factors)  # columns first, then rows
    blocks = (last @ torch.floor((first @ blocks.transpose(1, 2)) * factors)).transpose(1, 2)
    blocks = (torch.floor(blocks / 32) + 128).clamp(0, 255)
    return blocks.reshape(count, rows, columns, 8, 8).transpose(2, 3).reshape(count, rows * 8, columns * 8)[:, :height, :width]
