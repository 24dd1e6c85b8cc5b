"""Filled discs and thick lines, pixel for pixel as OpenCV 4 draws them.

The world model was trained on maps drawn with OpenCV 4.x; OpenCV 5 draws thick lines differently (2.4 % of their pixels), and neither is needed here.
A thick line is a rectangle whose corners are in 1/65536 pixel, its outline, and a small disc at each end. All pixels are found with whole numbers, as there.
"""

from __future__ import annotations

import math

import numpy as np

BITS = 16  # fractional bits of a coordinate
ONE, HALF = 1 << BITS, 1 << (BITS - 1)


def disc_rows(radius: int) -> np.ndarray:
    """Half widths of the rows -radius..radius of a disc drawn by the midpoint rule."""
    half = np.zeros(radius + 1, np.int64)  # of row |y|
    x, y, error, grow, shrink = radius, 0, 0, 1, 2 * radius - 1
    while x >= y:
        half[y], half[x] = max(half[y], x), max(half[x], y)
        y, error, grow = y + 1, error + grow, grow + 2
        if error > 0:
            x, error, shrink = x - 1, error - shrink, shrink - 2
    return np.concatenate([half[:0:-1], half])


def disc(height: int, width: int, x: int, y: int, radius: int) -> np.ndarray:
    """[height, width] bool"""
    mask = np.zeros((height, width), bool)
    rows = np.arange(y - radius, y + radius + 1)
    inside = (rows >= 0) & (rows < height)
    columns = np.abs(np.arange(width) - x)
    mask[rows[inside]] = columns <= disc_rows(radius)[inside, None]
    return mask


def thick_line(height: int, width: int, start: tuple[int, int], end: tuple[int, int], thickness: int) -> np.ndarray:
    """[height, width] bool: pixels of the line from (x, y) `start` to `end`, thickness > 1."""
    mask = np.zeros((height, width), bool)
    (x0, y0), (x1, y1) = start, end
    dx, dy = float(x0 - x1), float(y1 - y0)
    length = math.sqrt(dx * dx + dy * dy)
    if length:
        reach = (thickness * HALF + (thickness & 1) * ONE * 0.5) / length
        across = (round(dy * reach), round(dx * reach))  # round half to even, as C's default
        sides = ((x0, y0, 1), (x0, y0, -1), (x1, y1, -1), (x1, y1, 1))
        corners = [(x * ONE + sign * across[0], y * ONE + sign * across[1]) for x, y, sign in sides]
        for before, corner in zip(corners[-1:] + corners, corners, strict=False):
            _outline(mask, before, corner)
        _fill_convex(mask, corners)
    radius = (thickness * HALF + HALF) >> BITS
    for x, y in (start, end):
        mask |= disc(height, width, x, y, radius)
    return mask


def _divide(a: int, b: int) -> int:
    """Whole division that rounds toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _clip(p: tuple[int, int], q: tuple[int, int], right: int, bottom: int) -> tuple[int, int, int, int] | None:
    """The part of a segment inside [0, right] x [0, bottom] (first cut at top and bottom, then at the sides), or None."""
    x1, y1, x2, y2 = *p, *q

    def side(x: int) -> int:
        return -1 if x < 0 else int(x > right)

    def band(y: int) -> int:
        return -1 if y < 0 else int(y > bottom)

    if band(y1) * band(y2) > 0 or side(x1) * side(x2) > 0:
        return None
    if band(y1):
        edge = 0 if y1 < 0 else bottom
        x1, y1 = x1 + int(float(edge - y1) * (x2 - x1) / (y2 - y1)), edge
    if band(y2):
        edge = 0 if y2 < 0 else bottom
        x2, y2 = x2 + int(float(edge - y2) * (x2 - x1) / (y2 - y1)), edge
    if side(x1) * side(x2) > 0:
        return None
    if side(x1):
        edge = 0 if x1 < 0 else right
        y1, x1 = y1 + int(float(edge - x1) * (y2 - y1) / (x2 - x1)), edge
    if side(x2):
        edge = 0 if x2 < 0 else right
        y2, x2 = y2 + int(float(edge - x2) * (y2 - y1) / (x2 - x1)), edge
    return x1, y1, x2, y2


def _outline(mask: np.ndarray, p: tuple[int, int], q: tuple[int, int]) -> None:
    """A one-pixel line between two points in 1/65536 pixel: one pixel per column, or per row if the line is steep."""
    height, width = mask.shape
    clipped = _clip(p, q, width * ONE - 1, height * ONE - 1)
    if clipped is None:
        return
    x1, y1, x2, y2 = clipped
    flat = abs(x2 - x1) > abs(y2 - y1)
    if not flat:
        x1, y1, x2, y2 = y1, x1, y2, x2  # from here on x is the axis along which the line advances by whole pixels
    if x2 < x1:
        x1, y1, x2, y2 = x2, y2, x1, y1
    slope = _divide((y2 - y1) * ONE, (x2 - x1) | 1)
    steps = np.arange(((x2 - x1) >> BITS) + 1)
    xs = np.append(((x1 + HALF) >> BITS) + steps, (x2 + HALF) >> BITS)
    ys = np.append((y1 + HALF + slope * steps) >> BITS, (y2 + HALF) >> BITS)
    if not flat:
        xs, ys = ys, xs
    inside = (xs >= 0) & (xs < width) & (ys >= 0) & (ys < height)
    mask[ys[inside], xs[inside]] = True


def _fill_convex(mask: np.ndarray, corners: list[tuple[int, int]]) -> None:
    """Fill a convex polygon with corners in 1/65536 pixel, row by row between its two chains of edges. Its lowest row is left to the outline."""
    height, width = mask.shape
    rows = [(y + HALF) >> BITS for _, y in corners]
    top = min(range(len(corners)), key=lambda i: corners[i][1])  # the first of the highest corners
    first, last = rows[top], min(max(rows) - 1, height - 1)
    first_seen = max(first, 0)
    if last < first_seen:
        return
    borders = np.stack([_chain(corners, rows, top, step, first_seen, last) for step in (1, -1)])
    left, right = (borders.min(axis=0) + HALF) >> BITS, (borders.max(axis=0) + HALF) >> BITS
    columns = np.arange(width)
    mask[first_seen : last + 1] |= (columns >= left[:, None]) & (columns <= right[:, None])


def _chain(corners: list[tuple[int, int]], rows: list[int], top: int, step: int, first: int, last: int) -> np.ndarray:
    """x (in 1/65536 pixel) of one side of a convex polygon at rows first..last, walking down from the top corner."""
    xs = np.empty(last - first + 1, np.int64)
    at, y = top, rows[top]
    for _ in corners:
        to = (at + step) % len(corners)
        if rows[to] > y:
            fall = rows[to] - y
            slope = _divide((corners[to][0] - corners[at][0]) * 2 + fall, 2 * fall)  # OpenCV's rounding: half up, then toward zero
            begin, end = max(y, first), min(rows[to], last + 1)
            xs[begin - first : max(end - first, 0)] = corners[at][0] + slope * np.arange(begin - y, end - y)
            y = rows[to]
        at = to
        if y > last:
            break
    return xs
