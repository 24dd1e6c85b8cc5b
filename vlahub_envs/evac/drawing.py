"""Filled discs and thick lines, pixel for pixel as OpenCV 4 draws them.

The world model was trained on maps drawn with OpenCV 4.x; OpenCV 5 draws thick lines differently (2.4 % of their pixels), and neither is needed here.
A thick line is a rectangle whose corners are in 1/65536 pixel, its outline, and a small disc at each end. All pixels are found with whole numbers, as there.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

BITS = 16  # fractional bits of a coordinate
ONE, HALF = 1 << BITS, 1 << (BITS - 1)


@cache
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


class Stencil:
    """The pixels of one shape, as a mask over the part of the picture that it can touch."""

    def __init__(self, canvas: np.ndarray, xs: tuple[int, int], ys: tuple[int, int]):
        """xs, ys: first and last column and row that the shape can touch; what lies outside the canvas is cut off."""
        self.canvas = canvas
        self.height, self.width = canvas.shape[:2]
        self.left, self.top = max(xs[0], 0), max(ys[0], 0)
        self.right, self.bottom = max(min(xs[1], self.width - 1), self.left - 1), max(min(ys[1], self.height - 1), self.top - 1)  # one less: nothing to draw
        self.mask = np.zeros((self.bottom - self.top + 1, self.right - self.left + 1), bool)

    def spans(self, first: int, left: np.ndarray, right: np.ndarray) -> None:
        """Add columns left..right (inclusive) of the rows from `first` on."""
        skip, end = max(self.top - first, 0), max(self.bottom + 1 - first, 0)
        left, right = left[skip:end], right[skip:end]
        columns = np.arange(self.left, self.right + 1)
        begin = first + skip - self.top
        self.mask[begin : begin + len(left)] |= (columns >= left[:, None]) & (columns <= right[:, None])

    def points(self, xs: np.ndarray, ys: np.ndarray) -> None:
        inside = (xs >= self.left) & (xs <= self.right) & (ys >= self.top) & (ys <= self.bottom)
        self.mask[ys[inside] - self.top, xs[inside] - self.left] = True

    def disc(self, x: int, y: int, radius: int) -> None:
        half = disc_rows(radius)
        self.spans(y - radius, x - half, x + half)

    def paint(self, colour: object) -> None:
        region = self.canvas[self.top : self.bottom + 1, self.left : self.right + 1]
        np.copyto(region, np.asarray(colour, region.dtype), where=self.mask.reshape(*self.mask.shape, *[1] * (region.ndim - 2)))


def draw_disc(canvas: np.ndarray, x: int, y: int, radius: int, colour: object) -> None:
    """Paint a filled disc on canvas [height, width, ...]."""
    stencil = Stencil(canvas, (x - radius, x + radius), (y - radius, y + radius))
    stencil.disc(x, y, radius)
    stencil.paint(colour)


def draw_line(canvas: np.ndarray, start: tuple[int, int], end: tuple[int, int], thickness: int, colour: object) -> None:
    """Paint the line from (x, y) `start` to `end` on canvas [height, width, ...]; thickness > 1."""
    (x0, y0), (x1, y1) = start, end
    reach = thickness // 2 + 2  # a box that surely holds all of the line
    stencil = Stencil(canvas, (min(x0, x1) - reach, max(x0, x1) + reach), (min(y0, y1) - reach, max(y0, y1) + reach))
    dx, dy = float(x0 - x1), float(y1 - y0)
    length = math.sqrt(dx * dx + dy * dy)
    if length:
        factor = (thickness * HALF + (thickness & 1) * ONE * 0.5) / length
        across = (round(dy * factor), round(dx * factor))  # half a thickness, at right angles; round half to even, as C's default
        sides = ((x0, y0, 1), (x0, y0, -1), (x1, y1, -1), (x1, y1, 1))
        corners = [(x * ONE + sign * across[0], y * ONE + sign * across[1]) for x, y, sign in sides]
        for before, corner in zip(corners[-1:] + corners, corners, strict=False):
            _outline(stencil, before, corner)
        _fill_convex(stencil, corners)
    for x, y in (start, end):
        stencil.disc(x, y, (thickness * HALF + HALF) >> BITS)
    stencil.paint(colour)


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


def _outline(stencil: Stencil, p: tuple[int, int], q: tuple[int, int]) -> None:
    """A one-pixel line between two points in 1/65536 pixel: one pixel per column, or per row if the line is steep."""
    clipped = _clip(p, q, stencil.width * ONE - 1, stencil.height * ONE - 1)
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
    xs, ys = ((x1 + HALF) >> BITS) + steps, (y1 + HALF + slope * steps) >> BITS
    last = np.array([(x2 + HALF) >> BITS]), np.array([(y2 + HALF) >> BITS])
    for along, beside in ((xs, ys), last):
        stencil.points(*((along, beside) if flat else (beside, along)))


def _fill_convex(stencil: Stencil, corners: list[tuple[int, int]]) -> None:
    """Fill a convex polygon with corners in 1/65536 pixel, row by row between its two chains of edges. Its lowest row is left to the outline."""
    rows = [(y + HALF) >> BITS for _, y in corners]
    top = min(range(len(corners)), key=lambda i: corners[i][1])  # the first of the highest corners
    first, last = max(rows[top], stencil.top), min(max(rows) - 1, stencil.bottom)
    if last < first:
        return
    one, other = (_chain(corners, rows, top, step, first, last) for step in (1, -1))
    stencil.spans(first, (np.minimum(one, other) + HALF) >> BITS, (np.maximum(one, other) + HALF) >> BITS)


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
