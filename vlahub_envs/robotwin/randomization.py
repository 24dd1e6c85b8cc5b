"""What `randomization="randomized"` changes about a scene: the table's height, the lights, pictures on wall and table, clutter.

The figures are those of the benchmark's configuration demo_randomized. The task draws first and from the same numbers as in a clean scene, so a seed has one layout in
both; lights, backgrounds and clutter follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlahub.catalog import suggest

TEXTURE_SIZE = 256  # pixels: a picture on wall or table, seen from a metre away by cameras of a few hundred pixels
PICTURES = {"seen": 10_000, "unseen": 1_000}  # how many there are to draw from
FLICKER_STEPS = 15  # physics steps: how often flickering lights take new colours, once per frame of the demonstrations


@dataclass(frozen=True)
class Randomization:
    """How far a scene may differ from the clean one."""

    lights: bool = False  # colours of the directional light and of both point lights, uniform per channel
    flicker_rate: float = 0.0  # share of episodes whose lights change all the time
    background: bool = False  # pictures on wall and table
    clutter: bool = False  # up to ten objects that the task does not need
    plain_rate: float = 1.0  # share of episodes without a picture on the wall; the same for the table, and for scenes without clutter
    table_height: float = 0.0  # m: the table stands up to so much lower
    camera_offset: float = 0.0  # m: how far the head and the front camera may be off, in any direction


NAMED = {
    "clean": Randomization(),
    # camera_offset is 0 there too: upstream draws it and multiplies it away
    "randomized": Randomization(lights=True, flicker_rate=0.02, background=True, clutter=True, plain_rate=0.02, table_height=0.03),
}


def checked(value: str | Mapping[str, Any]) -> Randomization:
    """A name, or what differs from "clean": {"table_height": 0.03, "clutter": True, "plain_rate": 0}."""
    if isinstance(value, str):
        if value not in NAMED:
            raise ValueError(f"randomization must be 'clean' or 'randomized' (or a dict of what differs from clean), not {value!r}")
        return NAMED[value]
    if not isinstance(value, Mapping):
        raise ValueError(f"randomization must be 'clean', 'randomized' or a dict of what differs from clean, not {value!r}")
    defaults = {field.name: field.default for field in dataclasses.fields(Randomization)}
    for name, entry in value.items():
        if name not in defaults:
            raise ValueError(f"randomization has no entry {name!r}; {suggest(str(name), defaults)}")
        switch = isinstance(defaults[name], bool)
        if isinstance(entry, bool) != switch or (not switch and not (isinstance(entry, (int, float)) and 0 <= entry <= (1 if "rate" in name else 0.1))):
            wanted = "True or False" if switch else "a rate from 0 to 1" if "rate" in name else "metres, from 0 to 0.1"
            raise ValueError(f"randomization: {name} must be {wanted}, not {entry!r}")
    return Randomization(**value)


# ------------------------------------------------------------------------------------------------ lights


@dataclass(frozen=True)
class Lights:
    """Colours [3] of the ambient, the directional and the two point lights."""

    ambient: np.ndarray
    directional: np.ndarray
    points: tuple[np.ndarray, np.ndarray]


PLAIN_LIGHTS = Lights(np.full(3, 0.5), np.full(3, 0.5), (np.ones(3), np.ones(3)))


class Flicker:
    """Lights that take new colours all the time, the ambient one by a random walk. A function of the seed and the episode's clock, however often one looks."""

    def __init__(self, seed: int):
        self.seed = seed

    def at(self, step: int) -> Lights:
        """The colours after so many physics steps."""
        random = np.random.default_rng([self.seed, 15])  # apart from the layout's generator
        frames = random.uniform(size=(step // FLICKER_STEPS + 1, 4, 3))
        walk = np.abs((0.5 + 0.1 * (2 * frames[:, 0] - 1).cumsum(axis=0) + 1) % 2 - 1)  # turned back at 0 and 1
        _, directional, *points = frames[-1]
        return Lights(walk[-1], directional, tuple(points))


def draw_lights(random: np.random.RandomState) -> Lights:
    directional, *points = random.uniform(0, 1, (3, 3))
    return Lights(PLAIN_LIGHTS.ambient, directional, tuple(points))


# ------------------------------------------------------------------------------------------------ backgrounds


def draw_backgrounds(random: np.random.RandomState, which: str, plain_rate: float) -> dict[str, int | None]:
    """The number of the picture on the wall and on the table; None is plain."""
    numbers = [int(random.randint(0, PICTURES[which])) for _ in range(2)]
    plain = [random.uniform() < plain_rate for _ in range(2)]
    return {name: None if none else number for name, number, none in zip(("wall", "table"), numbers, plain, strict=True)}


@lru_cache(maxsize=16)
def picture(which: str, number: int, folder: Path | None) -> np.ndarray:
    """[S, S, 4] uint8. From the release's folder `background_texture`, or generated."""
    if folder is not None:
        file = folder / which / f"{number}.png"
        if not file.exists():
            raise FileNotFoundError(
                f"the official background pictures lack {file}; delete their folder and run `vlahub assets robotwin-backgrounds --download` again"
            )
        return np.asarray(Image.open(file).convert("RGBA").resize((TEXTURE_SIZE, TEXTURE_SIZE)))
    random = np.random.default_rng([number, 0 if which == "seen" else 1])
    x, y = np.meshgrid(*2 * [np.linspace(0, 1, TEXTURE_SIZE, endpoint=False)])
    turn, scale = random.uniform(0, np.pi), random.uniform(4, 30)
    across, along = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    blotches = _noise(random, int(random.integers(3, 24)))
    patterns = (
        lambda: np.sin(2 * np.pi * scale * across),  # stripes
        lambda: np.sign(np.sin(2 * np.pi * scale * across) * np.sin(2 * np.pi * scale * along)),  # checks
        lambda: 4 * blotches - 2,  # stone
        lambda: np.sin(2 * np.pi * (scale * across + 3 * blotches)),  # wood
        lambda: np.where(_noise(random, TEXTURE_SIZE // 2) > random.uniform(0.6, 0.9), 1.0, -1.0),  # speckles
    )
    share = 0.5 + 0.5 * np.clip(patterns[random.integers(len(patterns))](), -1, 1)
    one, other = random.uniform(0, 1, (2, 3))
    colour = share[..., None] * one + (1 - share[..., None]) * other + 0.06 * (_noise(random, TEXTURE_SIZE) - 0.5)[..., None]
    opaque = np.ones((TEXTURE_SIZE, TEXTURE_SIZE, 1))
    return np.round(255 * np.clip(np.concatenate([colour, opaque], axis=-1), 0, 1)).astype(np.uint8)


def _noise(random: np.random.Generator, cells: int) -> np.ndarray:
    """[S, S] in 0 to 1: random values on a grid of `cells`, smooth in between."""
    grid = random.uniform(0, 1, (cells, cells)).astype(np.float32)
    return np.clip(np.asarray(Image.fromarray(grid).resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BICUBIC)), 0, 1)
