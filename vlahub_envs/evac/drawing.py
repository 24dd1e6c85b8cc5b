"""Filled discs and thick lines, pixel for pixel as OpenCV 4 draws them, many at a time and on any device.

The world model was trained on maps drawn with OpenCV 4.x; OpenCV 5 draws thick lines differently (2.4 % of their pixels), and neither is needed here.
A thick line is a rectangle whose corners are in 1/65536 pixel, its outline, and a small disc at each end. All pixels are found with whole numbers, as there.

Shapes: n shapes on pictures of `size` = (H, W) pixels; masks [n, H, W] bool; points [n, 2] int64 (x, y).
"""

from __future__ import annotations

from functools import cache

import torch

BITS = 16  # fractional bits of a coordinate
ONE, HALF = 1 << BITS, 1 << (BITS - 1)

Size = tuple[int, int]


@cache
def disc_rows(radius: int) -> tuple[int, ...]:
    """Half widths of the rows -radius..radius of a disc drawn by the midpoint rule."""
    half = [0] * (radius + 1)  # of row |y|
    x, y, error, grow, shrink = radius, 0, 0, 1, 2 * radius - 1
    while x >= y:
        half[y], half[x] = max(half[y], x), max(half[x], y)
        y, error, grow = y + 1, error + grow, grow + 2
        if error > 0:
            x, error, shrink = x - 1, error - shrink, shrink - 2
    return (*half[:0:-1], *half)


def discs(size: Size, centres: torch.Tensor, radius: int) -> torch.Tensor:
    """Filled discs around `centres` [n, 2] -> masks [n, H, W]"""
    x, y = centres[:, :1], centres[:, 1:]
    row = torch.arange(size[0], device=centres.device) - y + radius  # [n, H] row of the disc in each row of the picture
    half = torch.tensor(disc_rows(radius), device=centres.device)[row.clamp(0, 2 * radius)]
    half = half.masked_fill((row < 0) | (row > 2 * radius), -1)  # a negative half width: nothing in this row
    return _spans(size, x - half, x + half)


def lines(size: Size, starts: torch.Tensor, ends: torch.Tensor, thickness: int) -> torch.Tensor:
    """Lines from `starts` to `ends` [n, 2], thickness > 1 -> masks [n, H, W]"""
    radius = (thickness * HALF + HALF) >> BITS
    mask = discs(size, starts, radius) | discs(size, ends, radius)
    along = (starts - ends).double()
    dx, dy = along[:, 0], -along[:, 1]
    length = (dx * dx + dy * dy).sqrt()
    factor = (thickness * HALF + (thickness & 1) * ONE * 0.5) / length.where(length > 0, 1.0)
    across = torch.stack([dy * factor, dx * factor], dim=1).round().long()  # half a thickness, at right angles; round half to even, as C's default
    corners = torch.stack([starts * ONE + across, starts * ONE - across, ends * ONE - across, ends * ONE + across], dim=1)  # [n, 4, 2]
    band = _outlines(size, corners.roll(1, dims=1), corners) | _fill_convex(size, corners)
    return mask | (band & (length > 0)[:, None, None])


def _spans(size: Size, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Columns left..right (inclusive) [n, H] of each row -> masks [n, H, W]"""
    columns = torch.arange(size[1], device=left.device)
    return (columns >= left[..., None]) & (columns <= right[..., None])


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whole division that rounds toward zero."""
    return torch.div(a, b, rounding_mode="trunc")


def _cut(
    edge: torch.Tensor, x: torch.Tensor, y: torch.Tensor, to_x: torch.Tensor, to_y: torch.Tensor, where: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move (x, y) along its segment to x = edge, in floating point as OpenCV does, `where` it is to be moved."""
    run = torch.where(where, to_x - x, 1)
    moved = y + ((edge - x).double() * (to_y - y).double() / run.double()).trunc().long()
    return torch.where(where, edge, x), torch.where(where, moved, y)


def _clip(size: Size, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of segments [..., 2] inside the picture (first cut at top and bottom, then at the sides), and which of them have one."""
    bottom, right = size[0] * ONE - 1, size[1] * ONE - 1
    (x1, y1), (x2, y2) = p.unbind(-1), q.unbind(-1)

    def beyond(value: torch.Tensor, highest: int) -> torch.Tensor:
        return (value > highest).long() - (value < 0).long()

    def edge(value: torch.Tensor, highest: int) -> torch.Tensor:
        return torch.where(value < 0, 0, highest)

    exists = (beyond(y1, bottom) * beyond(y2, bottom) <= 0) & (beyond(x1, right) * beyond(x2, right) <= 0)
    y1, x1 = _cut(edge(y1, bottom), y1, x1, y2, x2, exists & (beyond(y1, bottom) != 0))
    y2, x2 = _cut(edge(y2, bottom), y2, x2, y1, x1, exists & (beyond(y2, bottom) != 0))
    exists = exists & (beyond(x1, right) * beyond(x2, right) <= 0)
    x1, y1 = _cut(edge(x1, right), x1, y1, x2, y2, exists & (beyond(x1, right) != 0))
    x2, y2 = _cut(edge(x2, right), x2, y2, x1, y1, exists & (beyond(x2, right) != 0))
    return x1, y1, x2, y2, exists


def _outlines(size: Size, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """One-pixel lines between points [n, e, 2] in 1/65536 pixel, e for each mask [n, H, W]: one pixel per column, or per row if the line is steep."""
    height, width = size
    x1, y1, x2, y2, exists = _clip(size, p, q)
    flat = (x2 - x1).abs() > (y2 - y1).abs()
    # from here on a is the axis along which the line advances by whole pixels
    a1, b1, a2, b2 = (torch.where(flat, one, other) for one, other in ((x1, y1), (y1, x1), (x2, y2), (y2, x2)))
    forward = a1 <= a2
    a1, b1, a2, b2 = (torch.where(forward, one, other) for one, other in ((a1, a2), (b1, b2), (a2, a1), (b2, b1)))
    slope = _divide((b2 - b1) * ONE, (a2 - a1) | 1)
    steps = torch.arange(max(height, width) + 1, device=p.device)
    a = ((a1 + HALF) >> BITS)[..., None] + steps  # [n, e, steps]
    b = ((b1 + HALF)[..., None] + slope[..., None] * steps) >> BITS
    found = exists[..., None] & (steps <= ((a2 - a1) >> BITS)[..., None])
    a = torch.cat([a, ((a2 + HALF) >> BITS)[..., None]], dim=-1)  # and the last point
    b = torch.cat([b, ((b2 + HALF) >> BITS)[..., None]], dim=-1)
    found = torch.cat([found, exists[..., None]], dim=-1)
    column, row = torch.where(flat[..., None], a, b), torch.where(flat[..., None], b, a)
    found = found & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    first = torch.arange(len(p), device=p.device).view(-1, 1, 1) * (height * width)
    nowhere = len(p) * height * width  # one element more than the masks have
    mask = torch.zeros(nowhere + 1, dtype=torch.bool, device=p.device)
    mask[torch.where(found, first + row * width + column, nowhere).flatten()] = True
    return mask[:-1].view(-1, height, width)


def _fill_convex(size: Size, corners: torch.Tensor) -> torch.Tensor:
    """Fill convex polygons with corners [n, k, 2] in 1/65536 pixel, row by row between their two chains of edges. The lowest row is left to the outline."""
    n, k, _ = corners.shape
    rows = (corners[..., 1] + HALF) >> BITS  # [n, k]
    top = (corners[..., 1] * k + torch.arange(k, device=corners.device)).argmin(1)  # the first of the highest corners
    row = torch.arange(size[0], device=corners.device).expand(n, -1)  # [n, H]
    one, other = (_chain(corners[..., 0], rows, top, step, row) for step in (1, -1))
    left, right = (torch.minimum(one, other) + HALF) >> BITS, (torch.maximum(one, other) + HALF) >> BITS
    filled = (row >= rows.amin(1, keepdim=True)) & (row < rows.amax(1, keepdim=True))
    return _spans(size, left, right.masked_fill(~filled, -1))


def _chain(xs: torch.Tensor, rows: torch.Tensor, top: torch.Tensor, step: int, row: torch.Tensor) -> torch.Tensor:
    """x (in 1/65536 pixel) of one side of each convex polygon in the picture's rows [n, H], walking down from the top corner."""
    k = xs.shape[1]

    def of(values: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        return values.gather(1, corner[:, None])  # [n, 1]

    found = torch.zeros_like(row)
    at, y = top, of(rows, top)
    for _ in range(k):
        to = (at + step) % k
        fall = of(rows, to) - y
        slope = _divide((of(xs, to) - of(xs, at)) * 2 + fall, 2 * fall.clamp(min=1))  # OpenCV's rounding: half up, then toward zero
        found = torch.where((row >= y) & (row < y + fall), of(xs, at) + slope * (row - y), found)
        at, y = to, y + fall.clamp(min=0)
    return found
