"""The 25 objects and the tray: their sizes as published, and stand-ins of these sizes made of boxes and cylinders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Thing:
    """One object. Its origin is the middle of its box, the tray's the middle of its floor."""

    key: str  # its folder in the official release
    size: tuple[float, float, float]  # x, y, z at yaw 0
    density: float  # kg/m^3
    shape: Literal["block", "round"]  # stand-in: a box, or an upright cylinder
    colour: Colour
    end: Colour  # of a stand-in's last fifth: of its longest side, a cylinder's top
    yaw: float = 0.0  # added to the drawn one: the published meshes are turned in their own frames

    @property
    def name(self) -> str:
        return self.key.split("_")[1]

    @property
    def bottom(self) -> float:
        """z of a stand-in's lowest point in its own frame."""
        return 0.0 if self.key == "001_plate_simpler" else -self.size[2] / 2


def _thing(number: int, name: str, size: tuple, density: float, shape: Literal["block", "round"], colour: Colour, end: Colour, turn: float = 0.0) -> Thing:
    # two keys of the release do not follow the pattern NNN_name_1
    key = {0: "001_carrot_simpler"}.get(number, f"{number + 1:03d}_{name}_1")
    return Thing(key, size, density, shape, colour, end, np.deg2rad(turn))


_GREEN, _BROWN, _WHITE, _DARK = (0.2, 0.5, 0.18), (0.45, 0.28, 0.14), (0.9, 0.9, 0.88), (0.12, 0.12, 0.14)
THINGS: tuple[Thing, ...] = (
    _thing(0, "carrot", (0.118, 0.032, 0.041), 1044, "block", (0.95, 0.45, 0.1), _GREEN),
    _thing(1, "kitchen shovel", (0.057, 0.149, 0.021), 557, "block", (0.25, 0.25, 0.28), _BROWN, 45),
    _thing(2, "bread", (0.044, 0.045, 0.029), 526, "block", (0.8, 0.58, 0.3), (0.6, 0.38, 0.16)),
    _thing(3, "plastic bottle", (0.036, 0.122, 0.039), 1916, "block", (0.35, 0.6, 0.85), _WHITE, -45),
    _thing(4, "7up can", (0.033, 0.061, 0.033), 790, "block", (0.1, 0.62, 0.25), (0.75, 0.75, 0.78), -45),
    _thing(5, "zuchinni", (0.110, 0.031, 0.026), 715, "block", (0.22, 0.42, 0.14), (0.55, 0.62, 0.3)),
    _thing(6, "ketchup bottle", (0.021, 0.081, 0.021), 500, "block", (0.78, 0.1, 0.08), _WHITE, 45),
    _thing(7, "watering can", (0.112, 0.041, 0.049), 1591, "block", (0.2, 0.45, 0.7), (0.5, 0.7, 0.85)),
    _thing(8, "pipe", (0.035, 0.074, 0.035), 1116, "block", (0.4, 0.22, 0.1), _DARK),
    _thing(9, "toy bear", (0.043, 0.039, 0.056), 667, "block", (0.62, 0.42, 0.24), (0.82, 0.66, 0.45)),
    _thing(10, "fast food cup", (0.025, 0.025, 0.054), 500, "round", (0.85, 0.15, 0.12), _WHITE),
    _thing(11, "plant", (0.041, 0.043, 0.073), 1051, "round", (0.62, 0.32, 0.2), _GREEN),
    _thing(12, "banana", (0.108, 0.040, 0.018), 500, "block", (0.95, 0.82, 0.2), _BROWN),
    _thing(13, "hamburger", (0.049, 0.051, 0.041), 863, "round", (0.5, 0.26, 0.12), (0.85, 0.6, 0.28)),
    _thing(14, "golf ball", (0.031, 0.031, 0.031), 500, "round", _WHITE, (0.75, 0.75, 0.75)),
    _thing(15, "BBQ sauce", (0.053, 0.032, 0.077), 1057, "block", (0.42, 0.12, 0.06), (0.85, 0.7, 0.2)),
    _thing(16, "travel cup", (0.052, 0.086, 0.034), 1018, "block", (0.3, 0.32, 0.36), (0.7, 0.7, 0.72), 45),
    _thing(17, "pepper", (0.044, 0.045, 0.046), 835, "round", (0.85, 0.12, 0.1), _GREEN),
    _thing(18, "nonstop can", (0.035, 0.035, 0.085), 1248, "round", (0.15, 0.2, 0.55), (0.75, 0.75, 0.78)),
    _thing(19, "potato", (0.049, 0.074, 0.045), 1355, "block", (0.72, 0.56, 0.34), (0.6, 0.45, 0.26), -45),
    _thing(20, "baguette", (0.038, 0.139, 0.026), 1367, "block", (0.82, 0.6, 0.32), (0.68, 0.46, 0.2), -45),
    _thing(21, "champagne glass", (0.028, 0.028, 0.085), 500, "round", (0.7, 0.8, 0.82), (0.9, 0.85, 0.5)),
    _thing(22, "kitchen spoon", (0.050, 0.126, 0.017), 500, "block", (0.6, 0.6, 0.63), _BROWN, 45),
    _thing(23, "onion", (0.051, 0.062, 0.051), 1137, "block", (0.6, 0.25, 0.42), (0.8, 0.7, 0.5), 45),
    _thing(24, "cup", (0.059, 0.044, 0.037), 1018, "block", (0.85, 0.5, 0.45), _WHITE),
)
TRAY = Thing("001_plate_simpler", (0.110, 0.110, 0.006), 1003, "block", (0.93, 0.93, 0.92), (0.93, 0.93, 0.92))
NAMES = tuple(thing.name for thing in THINGS)


@dataclass(frozen=True)
class Part:
    """A box (half of its sizes) or an upright cylinder (radius, radius, half of its height)."""

    kind: Literal["box", "cylinder"]
    half: tuple[float, float, float]
    centre: tuple[float, float, float]
    colour: Colour


def parts(thing: Thing) -> Sequence[Part]:
    """The stand-in of an object: two parts that fill its box, or its upright cylinder."""
    axis = 2 if thing.shape == "round" else int(np.argmax(thing.size))
    kind = "cylinder" if thing.shape == "round" else "box"
    made = []
    for begin, end, colour in ((-0.5, 0.3, thing.colour), (0.3, 0.5, thing.end)):
        half, centre = np.array(thing.size) / 2, np.zeros(3)
        half[axis] *= end - begin
        centre[axis] = (begin + end) / 2 * thing.size[axis]
        if kind == "cylinder":
            half[:2] = half[:2].min()
        made.append(Part(kind, tuple(half), tuple(centre), colour))
    return made


def tray_parts() -> Sequence[Part]:
    """A floor of 2 mm inside a rim, within the published box; its origin is on its underside."""
    side, height = TRAY.size[0] / 2, TRAY.size[2]
    rim, floor = 0.004, 0.002
    inside = side - 2 * rim
    made = [Part("box", (side, side, floor / 2), (0, 0, floor / 2), TRAY.colour)]
    for sign in (-1, 1):
        offset, middle = sign * (side - rim), (height + floor) / 2
        made.append(Part("box", (rim, side, (height - floor) / 2), (offset, 0, middle), TRAY.colour))
        made.append(Part("box", (inside, rim, (height - floor) / 2), (0, offset, middle), TRAY.colour))
    return made
