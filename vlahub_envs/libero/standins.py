"""Generated stand-ins for LIBERO's asset pack: every object, fixture, scene and texture that the BDDL files of the five suites name.

Each has the official bounding box, mass, joints, spawn height and the sites that the predicates read; its shape is built of boxes, as the official
collision shapes are, and of cylinders that only show: MuJoCo's contact of a thin cylinder with another can throw what rests on it into the air. Nothing reflects and no light casts a shadow, so a picture costs a fraction of one of the official meshes.

`files()` gives the whole pack as path -> content; the paths are those of the official release, because `libero` asks for them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

Vector = tuple[float, float, float]
WOOD, DARK_WOOD, WHITE, BLACK, STEEL, DARK = (0.62, 0.43, 0.26), (0.42, 0.27, 0.16), (0.92, 0.91, 0.88), (0.09, 0.09, 0.1), (0.62, 0.63, 0.65), (0.2, 0.2, 0.22)

# the official collision geoms' contact: stiff, and little sliding
CONTACT = 'friction="0.95 0.3 0.1" solref="0.001 1" solimp="0.998 0.998 0.001"'


@dataclass(frozen=True)
class Solid:
    """One convex part. `size` is MuJoCo's: half-sizes of a box; radius and half-height of a cylinder."""

    kind: str  # "box", "cylinder"
    size: tuple[float, ...]
    at: Vector
    quat: tuple[float, float, float, float] = (1, 0, 0, 0)  # wxyz
    colour: Vector | None = None  # None: the object's own
    collides: bool = True
    shows: bool = True

    @property
    def volume(self) -> float:
        return float(8 * np.prod(self.size)) if self.kind == "box" else float(2 * np.pi * self.size[0] ** 2 * self.size[1])


@dataclass(frozen=True)
class Site:
    """A named region that BDDL files and predicates refer to: a box, or the stove's glowing burner."""

    name: str
    at: Vector
    size: Vector
    quat: tuple[float, float, float, float] = (1, 0, 0, 0)
    kind: str = "box"
    rgba: str = "0 0 0 0"  # regions are invisible


@dataclass(frozen=True)
class Part:
    """A moving part of a fixture, with its joint."""

    name: str
    joint: str  # attributes of the <joint>, without its name
    joint_name: str
    solids: tuple[Solid, ...]
    sites: tuple[Site, ...]
    at: Vector = (0, 0, 0)
    mass: float = 0.5


@dataclass(frozen=True)
class Thing:
    """One object or fixture. `size` and `low` are the official collision box: its extent and lower corner in the body's frame."""

    folder: str
    size: Vector
    low: Vector
    bottom: float  # z of `bottom_site`: an object is spawned with this point 1 cm above the surface
    shape: Callable[[Thing], list[Solid]]
    colour: Vector
    mass: float = 0.0  # kg; 0: by a density of 100 kg/m3, the official one
    top: float = 0.05
    sites: tuple[Site, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def half(self) -> np.ndarray:
        return np.array(self.size) / 2

    @property
    def centre(self) -> np.ndarray:
        return np.array(self.low) + self.half

    @property
    def high(self) -> np.ndarray:
        return np.array(self.low) + np.array(self.size)


def box(low: Vector, high: Vector, **options) -> Solid:
    low, high = np.array(low, float), np.array(high, float)
    return Solid("box", tuple((high - low) / 2), tuple((low + high) / 2), **options)


# ------------------------------------------------------------------------------------------------ shapes


def block(thing: Thing) -> list[Solid]:
    """A packet, or a book: one box, with a label on its upper half that only shows."""
    label = 0.6 * thing.half
    upright = int(np.argmin(thing.size))
    label[upright] = thing.half[upright] + 0.0005
    return [Solid("box", tuple(thing.half), tuple(thing.centre)), Solid("box", tuple(label), tuple(thing.centre), colour=WHITE, collides=False)]


UPRIGHT = {0: (0.70710678, 0, 0.70710678, 0), 1: (0.70710678, 0.70710678, 0, 0), 2: (1, 0, 0, 0)}  # turns a cylinder's axis from z to that axis


def round_(radius: float, axis: int, low: float, high: float, centre, **options) -> list[Solid]:
    """A cylinder along `axis` that shows, and an octagonal prism around it that collides: four boxes, each with two of its faces."""
    at = np.array(centre, float)
    at[axis] = (low + high) / 2
    half = np.array([radius, radius * np.tan(np.pi / 8), (high - low) / 2])
    solids = [Solid("cylinder", (radius, half[2]), tuple(at), UPRIGHT[axis], collides=False, **options)]
    for angle in np.pi / 4 * np.arange(4):
        turn = np.array([np.cos(angle / 2), 0, 0, np.sin(angle / 2)])
        solids.append(Solid("box", tuple(half), tuple(at), tuple(_multiply(np.array(UPRIGHT[axis]), turn)), shows=False))
    return solids


def can(thing: Thing) -> list[Solid]:
    """A tin along its longest side: a cylinder, and a ring of a label that only shows."""
    axis = int(np.argmax(thing.size))
    radius = min(thing.size[i] for i in range(3) if i != axis) / 2
    low, high = thing.low[axis], thing.high[axis]
    length = high - low
    return [
        *round_(radius, axis, low, high, thing.centre, colour=STEEL),
        Solid("cylinder", (radius + 0.0005, 0.38 * length), tuple(thing.centre), UPRIGHT[axis], collides=False),
    ]


def bottle(thing: Thing) -> list[Solid]:
    """A bottle along its longest side: a flat body, a shoulder, a neck with a cap."""
    axis = int(np.argmax(thing.size))
    low, high, length = thing.low[axis], thing.high[axis], thing.size[axis]
    body, shoulder = thing.half.copy(), 0.7 * thing.half
    body[axis], shoulder[axis] = 0.31 * length, 0.06 * length
    at, above = thing.centre.copy(), thing.centre.copy()
    at[axis], above[axis] = low + 0.31 * length, low + 0.68 * length
    neck = 0.35 * min(thing.size[i] for i in range(3) if i != axis)
    return [
        Solid("box", tuple(body), tuple(at)),
        Solid("box", tuple(shoulder), tuple(above)),
        *round_(neck, axis, low + 0.74 * length, high, thing.centre, colour=WHITE),
    ]


def carton(thing: Thing) -> list[Solid]:
    """A drinks carton along its longest side: a box with a narrower ridge."""
    axis = int(np.argmax(thing.size))
    low, high, length = thing.low[axis], thing.high[axis], thing.size[axis]
    body, ridge, band = thing.half.copy(), thing.half.copy(), thing.half + 0.0005
    body[axis], ridge[axis], band[axis] = 0.4 * length, 0.1 * length, 0.12 * length
    ridge[(axis + 1) % 3] *= 0.35
    at, above, middle = thing.centre.copy(), thing.centre.copy(), thing.centre.copy()
    at[axis], above[axis], middle[axis] = low + 0.4 * length, high - 0.1 * length, low + 0.35 * length
    return [
        Solid("box", tuple(body), tuple(at)),
        Solid("box", tuple(ridge), tuple(above), colour=WHITE),
        Solid("box", tuple(band), tuple(middle), colour=WHITE, collides=False),
    ]


def _ring(centre: np.ndarray, radius: tuple[float, float], low: float, high: float, thick: float, count: int = 16, **options) -> list[Solid]:
    """A wall of `count` boxes around z whose outer face leads from radius[0] at `low` to radius[1] at `high`."""
    lean = np.arctan2(radius[1] - radius[0], high - low)
    outer = max(radius)
    half = (thick / 2, outer * np.tan(np.pi / count), (high - low) / 2 / np.cos(lean) - thick / 2 * abs(np.sin(lean)) / np.cos(lean))
    solids = []
    for angle in 2 * np.pi * np.arange(count) / count:
        # the corners of the outer face reach the radius, not its middle, so that the ring stays within the bounding box
        middle = (sum(radius) / 2) * np.cos(np.pi / count) - thick / 2
        at = centre + np.array([middle * np.cos(angle), middle * np.sin(angle), 0.0])
        at[2] = (low + high) / 2
        turn, tilt = np.array([np.cos(angle / 2), 0, 0, np.sin(angle / 2)]), np.array([np.cos(lean / 2), 0, np.sin(lean / 2), 0])
        solids.append(Solid("box", half, tuple(at), tuple(_multiply(turn, tilt)), **options))
    return solids


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w, v, x, u = a[0], a[1:], b[0], b[1:]
    return np.concatenate([[w * x - v @ u], w * u + x * v + np.cross(v, u)])


def bowl(thing: Thing) -> list[Solid]:
    """A round base and a leaning wall that the gripper can take by the rim.

    What collides has a narrower foot than what shows: some initial states begin with a packet's corner beside it, under the wall."""
    radius, low, high = min(thing.half[:2]), thing.low[2], thing.high[2]
    shown = [*round_(0.48 * radius, 2, low, low + 0.008, thing.centre), *_ring(thing.centre, (0.52 * radius, radius), low + 0.002, high, 0.005)]
    kink = low + 0.25 * (high - low)  # above it both are the same
    at_kink = radius * (0.52 + 0.48 * (kink - low - 0.002) / (high - low - 0.002))
    return [
        *(replace(solid, collides=False) for solid in shown if solid.shows),
        *(solid for solid in round_(0.41 * radius, 2, low, low + 0.008, thing.centre) if solid.collides),
        *_ring(thing.centre, (0.43 * radius, 0.45 * radius), low + 0.002, kink, 0.005, shows=False),
        *_ring(thing.centre, (at_kink, radius), kink, high, 0.005, shows=False),
    ]


def ramekin(thing: Thing) -> list[Solid]:
    """A shallow dish: a bowl that stands on it stands on its floor. In a deep one the bowl's wall would jam in the rim, and both be lifted together."""
    radius, low, high = min(thing.half[:2]), thing.low[2], thing.high[2]
    return [*round_(0.85 * radius, 2, low, high - 0.008, thing.centre), *_ring(thing.centre, (0.88 * radius, radius), low + 0.002, high, 0.006)]


def plate(thing: Thing) -> list[Solid]:
    radius, low, high = min(thing.half[:2]), thing.low[2], thing.high[2]
    base = round_(0.62 * radius, 2, low, low + 0.006, thing.centre)
    rim = _ring(thing.centre, (0.6 * radius, radius), low + 0.003, high, 0.005)
    line = Solid("cylinder", (0.4 * radius, 0.0032), (thing.centre[0], thing.centre[1], low + 0.0034), colour=(0.72, 0.25, 0.2), collides=False)
    return [*base, line, *rim]


def mug(thing: Thing) -> list[Solid]:
    """An open cup, with its handle on the longer side (+x)."""
    radius, low, high = thing.half[1], thing.low[2], thing.high[2]
    centre = np.array([thing.low[0] + radius, thing.centre[1], 0.0])
    base = round_(0.92 * radius, 2, low, low + 0.008, centre)
    wall, tall = centre[0] + 0.9 * radius, high - low
    handle = [
        box((wall, centre[1] - 0.006, high - 0.25 * tall), (thing.high[0], centre[1] + 0.006, high - 0.15 * tall)),
        box((wall, centre[1] - 0.006, low + 0.2 * tall), (thing.high[0], centre[1] + 0.006, low + 0.3 * tall)),
        box((thing.high[0] - 0.01, centre[1] - 0.006, low + 0.3 * tall), (thing.high[0], centre[1] + 0.006, high - 0.25 * tall)),
    ]
    return [*base, *_ring(centre, (radius, radius), low, high, 0.006), *handle]


def two_coloured_mug(thing: Thing) -> list[Solid]:
    """White outside below, yellow above: its rim half is painted."""
    solids = mug(thing)
    radius, low, high = thing.half[1], thing.low[2], thing.high[2]
    centre = np.array([thing.low[0] + radius, thing.centre[1], 0.0])
    paint = _ring(centre, (radius + 0.0006, radius + 0.0006), (low + high) / 2, high, 0.0072, colour=(0.93, 0.76, 0.2), collides=False)
    return [*solids, *paint]


def tub(thing: Thing) -> list[Solid]:
    """A floor and four walls: a basket, a tray."""
    (x0, y0, z0), (x1, y1, z1), t = thing.low, thing.high, 0.008
    return [
        box((x0, y0, z0), (x1, y1, z0 + t)),
        box((x0, y0, z0 + t), (x0 + t, y1, z1)),
        box((x1 - t, y0, z0 + t), (x1, y1, z1)),
        box((x0 + t, y0, z0 + t), (x1 - t, y0 + t, z1)),
        box((x0 + t, y1 - t, z0 + t), (x1 - t, y1, z1)),
    ]


def pan(thing: Thing) -> list[Solid]:
    """A frying pan: its handle along +x."""
    radius, low, high = thing.half[1], thing.low[2], thing.high[2]
    centre = np.array([thing.low[0] + radius, thing.centre[1], 0.0])
    base = round_(0.9 * radius, 2, low, low + 0.01, centre)
    grip = box((centre[0] + 0.93 * radius, centre[1] - 0.011, high - 0.016), (thing.high[0], centre[1] + 0.011, high), colour=BLACK)
    return [*base, *_ring(centre, (0.9 * radius, radius), low, high - 0.004, 0.006), grip]


def moka(thing: Thing) -> list[Solid]:
    """Two stacked drums, a lid, a handle along -y, a spout along +y."""
    radius, low, high = 0.9 * thing.half[0], thing.low[2], thing.high[2]
    tall, (x, y) = high - low, (thing.centre[0], thing.high[1] - 0.055)
    return [
        *round_(radius, 2, low, low + 0.4 * tall, (x, y, 0)),
        *round_(0.75 * radius, 2, low + 0.4 * tall, low + 0.5 * tall, (x, y, 0)),
        *round_(0.95 * radius, 2, low + 0.5 * tall, low + 0.9 * tall, (x, y, 0)),
        *round_(0.25 * radius, 2, low + 0.9 * tall, high, (x, y, 0), colour=BLACK),
        box((x - 0.009, thing.low[1], low + 0.45 * tall), (x + 0.009, thing.low[1] + 0.018, high - 0.12 * tall), colour=BLACK),
        box((x - 0.009, thing.low[1] + 0.018, high - 0.24 * tall), (x + 0.009, y - 0.8 * radius, high - 0.12 * tall), colour=BLACK),
        box((thing.low[0], y - 0.008, low + 0.05 * tall), (thing.high[0], y + 0.008, low + 0.15 * tall)),
        box((x - 0.01, y + 0.8 * radius, high - 0.25 * tall), (x + 0.01, thing.high[1], high - 0.13 * tall)),
    ]


def wine(thing: Thing) -> list[Solid]:
    radius, low, high = min(thing.half[:2]), thing.low[2], thing.high[2]
    tall = high - low
    return [
        *round_(radius, 2, low, low + 0.62 * tall, thing.centre),
        *round_(0.7 * radius, 2, low + 0.62 * tall, low + 0.7 * tall, thing.centre),
        *round_(0.38 * radius, 2, low + 0.7 * tall, high, thing.centre, colour=(0.5, 0.08, 0.1)),
        Solid("cylinder", (radius + 0.0005, 0.15 * tall), (thing.centre[0], thing.centre[1], low + 0.3 * tall), colour=WHITE, collides=False),
    ]


def rack(thing: Thing) -> list[Solid]:
    """A wine rack: two side frames, and rails between them that hold a bottle lying back at the top."""
    (x0, y0, z0), (x1, y1, z1), t = thing.low, thing.high, 0.012
    sides = [box((x, y0, z0), (x + t, y1, z0 + t)) for x in (x0, x1 - t)]
    posts = [box((x, y1 - t, z0 + t), (x + t, y1, z1)) for x in (x0, x1 - t)]
    fronts = [box((x, y0, z0 + t), (x + t, y0 + t, z0 + 0.2)) for x in (x0, x1 - t)]
    # The region leans back by the angle of its quaternion (63 degrees about x); two shelves at that slope carry the bottle.
    lean = 2 * np.arctan2(-0.519, 0.855)
    slope = (np.cos(lean / 2), np.sin(lean / 2), 0, 0)
    normal = np.array([0, -np.sin(lean), np.cos(lean)])
    shelf = np.array([0, -0.08, 0.2174]) - 0.006 * normal
    deck = Solid("box", (thing.half[0] - t, 0.06, 0.005), tuple(shelf), slope)
    rails = [box((x0 + t, y, z), (x1 - t, y + t, z + t)) for y, z in ((y1 - t, z0 + 0.05), (y1 - t, z1 - t))]
    return [*sides, *posts, *fronts, deck, *rails]


def caddy(thing: Thing) -> list[Solid]:
    """A desk caddy: two wide compartments at the ends, a deep and a shallow one in the middle."""
    (x0, y0, z0), (x1, y1, z1), t = thing.low, thing.high, 0.006
    inner = 0.078  # half-width of the middle
    middle, low_front = 0.0, 0.075
    return [
        box((x0, y0, z0), (x1, y1, z0 + t)),
        box((x1 - t, y0, z0 + t), (x1, y1, z1)),
        box((x0, y0, z0 + t), (x0 + t, -inner, 0.126)),
        box((x0, inner, z0 + t), (x0 + t, y1, 0.126)),
        box((x0, -inner, z0 + t), (x0 + t, inner, low_front)),
        *(box((x0 + t, y - t / 2, z0 + t), (x1 - t, y + t / 2, 0.126)) for y in (y0 + t / 2, -inner, inner, y1 - t / 2)),
        box((middle, -inner + t / 2, z0 + t), (middle + t, inner - t / 2, 0.126)),
    ]


def shelf(thing: Thing) -> list[Solid]:
    """Two boards on two sides, and a back strip."""
    (x0, y0, z0), (x1, y1, z1), t = thing.low, thing.high, 0.012
    return [
        box((x0, y0, z0), (x0 + t, y1, z1 - t)),
        box((x1 - t, y0, z0), (x1, y1, z1 - t)),
        box((x0, y0, z1 - t), (x1, y1, z1)),
        box((x0 + t, y0, 0.088), (x1 - t, y1, 0.1)),
        box((x0 + t, y1 - 0.008, 0.1), (x1 - t, y1, 0.13)),
    ]


def carcass(thing: Thing) -> list[Solid]:
    """A cabinet without its three drawers: sides, back, top, bottom and a flat front strip above."""
    (x0, y0, z0), (x1, y1, z1), t, wall = thing.low, thing.high, 0.006, 0.016
    front = y0 + 0.012  # the drawers' handles reach further
    return [
        box((x0, front, z0), (x0 + wall, y1, z1)),
        box((x1 - wall, front, z0), (x1, y1, z1)),
        box((x0 + wall, y1 - t, z0), (x1 - wall, y1, z1)),
        box((x0 + wall, front, z1 - t), (x1 - wall, y1 - t, z1)),
        box((x0 + wall, front, z0), (x1 - wall, y1 - t, z0 + 0.003)),
    ]


def stove_base(thing: Thing) -> list[Solid]:
    """A flat hob. Its top is 2 mm above the cooking region's origin, so that what stands on it counts as on it."""
    (x0, y0, z0), (x1, y1, _) = thing.low, thing.high
    return [
        box((x0, y0, z0), (x1, y1, 0.0)),
        *round_(0.075, 2, z0, 0.002, (0.15, 0, 0), colour=BLACK),
        Solid("cylinder", (0.03, 0.0012), (0.15, 0, 0.0012), colour=STEEL, collides=False),
    ]


def oven(thing: Thing) -> list[Solid]:
    """A microwave oven's shell, open to the front (-y), where the door hangs."""
    (x0, y0, z0), (x1, y1, z1), t = thing.low, thing.high, 0.01
    front, panel = y0 + 0.045, x1 - 0.075  # the control panel is to the right of the door
    return [
        box((x0, front, z0), (x1, y1, z0 + t)),
        box((x0, front, z1 - t), (x1, y1, z1)),
        box((x0, front, z0 + t), (x0 + t, y1, z1 - t)),
        box((panel, front, z0 + t), (x1, y1, z1 - t)),
        box((x0 + t, y1 - t, z0 + t), (panel, y1, z1 - t)),
        box((panel + 0.012, front - 0.002, z0 + 0.1), (x1 - 0.012, front, z1 - 0.03), colour=DARK, collides=False),
    ]


# ------------------------------------------------------------------------------------------------ moving parts


def _drawer(name: str, region: str, z: float) -> Part:
    """A tray with a front and a handle. It opens towards -y by up to 16 cm."""
    x0, x1, y0, y1, t = -0.1025, 0.1095, -0.095, 0.09, 0.005
    low, high = z - 0.034, z + 0.026
    solids = (
        box((x0, y0, low), (x1, y1, low + t)),
        box((x0, y1 - t, low + t), (x1, y1, high - 0.012)),
        box((x0, y0 + t, low + t), (x0 + t, y1 - t, high - 0.012)),
        box((x1 - t, y0 + t, low + t), (x1, y1 - t, high - 0.012)),
        box((x0, y0, low + t), (x1, y0 + t, high)),
        box((-0.03, -0.109, z - 0.002), (0.03, -0.103, z + 0.006), colour=DARK),
        *(box((x - 0.003, -0.103, z - 0.002), (x + 0.003, y0, z + 0.006), colour=DARK) for x in (-0.027, 0.027)),
    )
    site = Site(region, (0.0033, 0.0113, z), (0.0299, 0.0756, 0.1022), (0.707, 0, 0.707, 0))
    joint = 'type="slide" axis="0 1 0" range="-0.16 0.01" limited="true" damping="50"'
    return Part(f"drawer_{region.split('_')[0]}", joint, name, solids, (site,), mass=3.0)


DRAWERS = (_drawer("top_level", "top_region", 0.1856), _drawer("middle_level", "middle_region", 0.1169), _drawer("bottom_level", "bottom_region", 0.047))

KNOB = Part(
    "knob",
    'type="hinge" axis="0 0 1" range="-0.005 2.1" limited="true" damping="1"',
    "button",
    # a bar on a short round base, lying along x when off; a half turn against the clock is on
    (*round_(0.022, 2, 0.001, 0.017, (0, 0, 0)), Solid("box", (0.026, 0.005, 0.0165), (0, 0, 0.0335), colour=BLACK)),
    (Site("knob", (0, 0, 0.03), (0.005, 0.005, 0.005)),),
    at=(-0.018, 0, 0),
    mass=0.1,
)

DOOR = Part(
    "door",
    'type="hinge" axis="0 0 1" range="-2.094 0" limited="true" damping="0.5"',
    "microjoint",
    # hinged at its left edge, it swings out to the front; the handle is at its right edge
    (
        box((0.002, -0.012, 0.012), (0.26, 0, 0.176), colour=DARK),
        box((0.24, -0.044, 0.03), (0.25, -0.034, 0.158), colour=STEEL),
        *(box((0.24, -0.034, z), (0.25, -0.012, z + 0.01), colour=STEEL) for z in (0.03, 0.148)),
    ),
    (Site("door", (0.13, -0.006, 0.094), (0.005, 0.005, 0.005)),),
    at=(-0.17, -0.108, 0),
    mass=1.0,
)

# ------------------------------------------------------------------------------------------------ the table of things

SCANNED, HOPE, TURBO, ARTICULATED = "stable_scanned_objects", "stable_hope_objects", "turbosquid_objects", "articulated_objects"
CONTAIN = {"quat": (0.707, 0, 0.707, 0)}
_CABINET = Thing(
    ARTICULATED,
    (0.255, 0.221, 0.218),
    (-0.123, -0.109, 0.005),
    -0.045,
    carcass,
    WOOD,
    top=0.045,
    sites=(Site("top_side", (0.0035, 0.0157, 0.2215), (0.1253, 0.0944, 0.0015)),),
    parts=DRAWERS,
)

THINGS: dict[str, Thing] = {
    "akita_black_bowl": Thing(SCANNED, (0.107, 0.107, 0.051), (-0.054, -0.054, 0.002), -0.06, bowl, BLACK, 0.061),
    "alphabet_soup": Thing(HOPE, (0.062, 0.076, 0.062), (-0.031, -0.039, -0.035), -0.04, can, (0.75, 0.16, 0.14), 0.054),
    "basket": Thing(
        SCANNED,
        (0.170, 0.157, 0.141),
        (-0.084, -0.079, 0.004),
        -0.06,
        tub,
        (0.72, 0.55, 0.33),
        1.0,
        sites=(Site("contain_region", (0, 0, 0.0718), (0.0611, 0.0611, 0.0695)),),
    ),
    "bbq_sauce": Thing(HOPE, (0.047, 0.029, 0.107), (-0.024, -0.015, -0.055), -0.06, bottle, (0.35, 0.11, 0.07), 0.024),
    "black_book": Thing(TURBO, (0.029, 0.110, 0.134), (-0.015, -0.067, 0.002), -0.06, block, BLACK, 0.156),
    "butter": Thing(HOPE, (0.076, 0.040, 0.017), (-0.038, -0.020, -0.009), -0.02, block, (0.94, 0.83, 0.35), 0.010),
    "chefmate_8_frypan": Thing(SCANNED, (0.356, 0.204, 0.058), (-0.097, -0.103, 0.001), -0.06, pan, DARK, 0.203),
    "chocolate_pudding": Thing(HOPE, (0.080, 0.046, 0.027), (-0.041, -0.023, -0.013), -0.06, block, (0.36, 0.2, 0.12), 0.022),
    "cookies": Thing(HOPE, (0.062, 0.083, 0.019), (-0.031, -0.041, -0.009), -0.06, block, (0.82, 0.42, 0.12), 0.019),
    "cream_cheese": Thing(HOPE, (0.081, 0.043, 0.018), (-0.041, -0.021, -0.009), -0.025, block, (0.2, 0.38, 0.72), 0.012),
    "desk_caddy": Thing(
        TURBO,
        (0.151, 0.434, 0.167),
        (-0.075, -0.217, 0.001),
        -0.06,
        caddy,
        DARK_WOOD,
        1.642,
        sites=(
            Site("left_contain_region", (0.0063, 0.145, 0.0656), (0.062, 0.0622, 0.0605)),
            Site("right_contain_region", (0.0063, -0.145, 0.0656), (0.062, 0.0622, 0.0605)),
            Site("back_contain_region", (0.0336, 0, 0.0856), (0.0278, 0.0622, 0.0605)),
            Site("front_contain_region", (-0.031, 0, 0.0405), (0.0278, 0.036, 0.0622)),
        ),
    ),
    "flat_stove": Thing(
        ARTICULATED,
        (0.297, 0.190, 0.070),
        (-0.052, -0.095, -0.020),
        -0.045,
        stove_base,
        (0.75, 0.76, 0.78),
        top=0.045,
        sites=(
            Site("cook_region", (0.15, 0, 0), (0.075, 0.075, 0.0025)),
            Site("burner", (0.15, 0, 0.0022), (0.0625, 0.0012, 0), kind="cylinder", rgba="1 0.1 0.05 0"),
        ),
        parts=(KNOB,),
    ),
    "glazed_rim_porcelain_ramekin": Thing(SCANNED, (0.089, 0.089, 0.042), (-0.045, -0.044, 0.001), -0.06, ramekin, WHITE, 0.038),
    "ketchup": Thing(HOPE, (0.056, 0.146, 0.037), (-0.028, -0.072, -0.018), -0.06, bottle, (0.78, 0.1, 0.08), 0.049),
    "microwave": Thing(
        ARTICULATED,
        (0.345, 0.263, 0.188),
        (-0.172, -0.152, 0.0),
        -0.06,
        oven,
        WHITE,
        top=0.06,
        sites=(Site("heating_region", (0, 0.01, 0.096), (0.12, 0.0835, 0.08)), Site("top_side", (0, 0.01, 0.2), (0.12, 0.0835, 0.005))),
        parts=(DOOR,),
    ),
    "milk": Thing(HOPE, (0.053, 0.131, 0.053), (-0.026, -0.070, -0.026), -0.06, carton, (0.3, 0.5, 0.8), 0.069),
    "moka_pot": Thing(TURBO, (0.081, 0.148, 0.152), (-0.041, -0.056, -0.066), -0.06, moka, STEEL, 0.131),
    "new_salad_dressing": Thing(HOPE, (0.053, 0.146, 0.036), (-0.027, -0.023, -0.018), -0.06, bottle, (0.55, 0.68, 0.2), 0.046),
    "orange_juice": Thing(HOPE, (0.053, 0.131, 0.053), (-0.027, -0.070, -0.026), -0.06, carton, (0.95, 0.55, 0.1), 0.068),
    "plate": Thing(SCANNED, (0.138, 0.137, 0.019), (-0.068, -0.068, -0.003), -0.06, plate, WHITE, 0.030),
    "porcelain_mug": Thing(TURBO, (0.125, 0.096, 0.106), (-0.065, -0.049, 0.002), -0.06, mug, WHITE, 0.121),
    "red_coffee_mug": Thing(TURBO, (0.123, 0.093, 0.133), (-0.061, -0.047, -0.002), -0.06, mug, (0.75, 0.1, 0.1), 0.124),
    "salad_dressing": Thing(HOPE, (0.053, 0.146, 0.036), (-0.027, -0.073, -0.018), -0.06, bottle, (0.45, 0.6, 0.15), 0.045),
    "tomato_sauce": Thing(HOPE, (0.062, 0.076, 0.062), (-0.031, -0.039, -0.034), -0.06, can, (0.85, 0.3, 0.2), 0.054),
    "white_bowl": Thing(SCANNED, (0.081, 0.081, 0.034), (-0.041, -0.041, 0.001), -0.06, bowl, WHITE, 0.022),
    "white_cabinet": replace(_CABINET, colour=WHITE),
    "white_yellow_mug": Thing(TURBO, (0.140, 0.106, 0.103), (-0.071, -0.053, -0.0), -0.06, two_coloured_mug, WHITE, 0.121),
    "wine_bottle": Thing(TURBO, (0.043, 0.044, 0.157), (-0.021, -0.022, 0.001), -0.06, wine, (0.08, 0.22, 0.12), 0.051),
    "wine_rack": Thing(
        TURBO,
        (0.269, 0.254, 0.330),
        (-0.134, -0.124, -0.002),
        -0.06,
        rack,
        DARK_WOOD,
        0.616,
        sites=(Site("top_region", (0, -0.08, 0.2174), (0.1009, 0.022, 0.0025), (0.855, -0.519, 0, 0)),),
    ),
    "wooden_cabinet": _CABINET,
    "wooden_tray": Thing(
        TURBO,
        (0.297, 0.166, 0.082),
        (-0.142, -0.088, -0.001),
        -0.06,
        tub,
        WOOD,
        0.515,
        sites=(Site("contain_region", (0.0086, -0.0047, 0.0426), (0.0404, 0.0784, 0.1355), **CONTAIN),),
    ),
    "wooden_two_layer_shelf": Thing(
        TURBO,
        (0.352, 0.191, 0.210),
        (-0.171, -0.079, 0.0),
        -0.06,
        shelf,
        WOOD,
        2.321,
        sites=(
            Site("top_side", (0.005, 0.0157, 0.2069), (0.1756, 0.0944, 0.0015)),
            Site("top_region", (0.0054, 0.0169, 0.1367), (0.0674, 0.0856, 0.1509), **CONTAIN),
            Site("bottom_region", (0.0056, 0.0169, 0.0141), (0.0353, 0.0856, 0.1558), **CONTAIN),
        ),
    ),
    "yellow_book": Thing(TURBO, (0.024, 0.098, 0.122), (-0.010, -0.049, 0.002), -0.06, block, (0.9, 0.75, 0.15), 0.108),
}


# ------------------------------------------------------------------------------------------------ MuJoCo's XML


def _numbers(values) -> str:
    return " ".join(f"{float(value):.6g}" for value in values)


def _geoms(solids: tuple[Solid, ...] | list[Solid], colour: Vector, mass: float) -> str:
    """Each solid as a collision geom (group 0, with its share of the mass) and as what one sees of it (group 1)."""
    total = sum(solid.volume for solid in solids if solid.collides)
    lines = []
    for solid in solids:
        shape = f'type="{solid.kind}" size="{_numbers(solid.size)}" pos="{_numbers(solid.at)}" quat="{_numbers(solid.quat)}"'
        if solid.collides:
            weight = f'mass="{mass * solid.volume / total:.6g}"' if mass else 'density="100"'
            lines.append(f'<geom {shape} {weight} {CONTACT} group="0" rgba="0.8 0.8 0.8 0"/>')
        if solid.shows:
            lines.append(f'<geom {shape} mass="0" contype="0" conaffinity="0" group="1" rgba="{_numbers(solid.colour or colour)} 1"/>')
    return "\n".join(lines)


def _sites(sites: tuple[Site, ...]) -> str:
    return "\n".join(
        f'<site name="{site.name}" type="{site.kind}" pos="{_numbers(site.at)}" size="{_numbers(site.size)}" quat="{_numbers(site.quat)}" rgba="{site.rgba}"/>'
        for site in sites
    )


def thing_xml(name: str) -> str:
    """One object in the form that robosuite's MujocoXMLObject reads: a body `object`, beside it three sites that tell its extent."""
    thing = THINGS[name]
    parts = "\n".join(
        f"""<body name="{part.name}" pos="{_numbers(part.at)}">
<joint name="{part.joint_name}" {part.joint}/>
{_geoms(part.solids, tuple(0.93 * c for c in thing.colour), part.mass)}
{_sites(part.sites)}
</body>"""
        for part in thing.parts
    )
    return f"""<mujoco model="{name}">
<worldbody>
<body>
<body name="object">
{_geoms(thing.shape(thing), thing.colour, thing.mass)}
{_sites(thing.sites)}
{parts}
</body>
<site name="bottom_site" pos="0 0 {thing.bottom}" size="0.005" rgba="0 0 0 0"/>
<site name="top_site" pos="0 0 {thing.top}" size="0.005" rgba="0 0 0 0"/>
<site name="horizontal_radius_site" pos="{min(thing.half[:2]):.4g} 0 0" size="0.005" rgba="0 0 0 0"/>
</body>
</worldbody>
</mujoco>
"""


# ------------------------------------------------------------------------------------------------ scenes and textures

_LEGS = "\n".join(
    f'<geom name="table_leg{i}_visual" type="cylinder" size="0.025 0.4" contype="0" conaffinity="0" group="1" rgba="0.35 0.35 0.37 1"/>' for i in range(1, 5)
)
_TABLE = f"""<body name="table" pos="0 0 0.875">
<geom name="table_collision" type="box" size="0.5 0.6 0.025" friction="0.6 0.005 0.0001" group="0"/>
<geom name="table_visual" type="box" size="0.5 0.6 0.025" contype="0" conaffinity="0" group="1" material="top"/>
<site name="table_top" pos="0 0 0.025" size="0.001" rgba="0 0 0 0"/>
{_LEGS}
</body>"""


def _slab(body: str, low: Vector, high: Vector) -> str:
    """A table whose body stays at the world's origin."""
    solid = box(low, high)
    shape = f'type="box" size="{_numbers(solid.size)}" pos="{_numbers(solid.at)}"'
    return f"""<body name="{body}">
<geom {shape} friction="1 0.005 0.0001" group="0"/>
<geom {shape} contype="0" conaffinity="0" group="1" material="top"/>
</body>"""


# scene -> its work surface, what this is made of, and how far away the walls stand. Tops: 0.90 m, 0.885 (study), 0.437 (living room), the floor itself.
SCENES = {
    "libero_tabletop_base_style": (_TABLE, "table_light"),
    "libero_kitchen_tabletop_base_style": (_TABLE, "table_wood"),
    "libero_study_base_style": (_slab("study_table", (-0.62, -0.7, 0.845), (0.38, 0.7, 0.885)), "table_dark"),
    "libero_living_room_tabletop_base_style": (_slab("living_room_table", (-0.35, -0.8, 0.413), (0.35, 0.8, 0.437)), "table_wood"),
    "libero_floor_base_style": ('<body name="floor"/>', "table_light"),
}


def scene_xml(name: str) -> str:
    surface, material = SCENES[name]
    walls = "\n".join(
        f'<geom name="wall_{side}" type="plane" pos="{pos}" quat="{quat}" size="5 3 0.01" contype="0" conaffinity="0" group="1" material="wall"/>'
        for side, pos, quat in (
            ("back", "-2.2 0 1.5", "0.5 0.5 0.5 0.5"),
            ("left", "0 3 1.5", "0.70710678 0.70710678 0 0"),
            ("right", "0 -3 1.5", "0.70710678 -0.70710678 0 0"),
        )
    )
    return f"""<mujoco model="{name}">
<asset>
<texture name="texplane" type="2d" file="../textures/light-gray-floor-tile.png"/>
<texture name="tex-wall" type="2d" file="../textures/light-gray-plaster.png"/>
<texture name="tex-top" type="2d" file="../textures/{material}.png"/>
<material name="floorplane" texture="texplane" texrepeat="4 4" texuniform="true" specular="0" shininess="0" reflectance="0"/>
<material name="wall" texture="tex-wall" texrepeat="1 1" texuniform="true" specular="0" shininess="0" reflectance="0"/>
<material name="top" texture="tex-top" texrepeat="2 2" texuniform="true" specular="0.1" shininess="0.1" reflectance="0"/>
</asset>
<worldbody>
<geom name="floor" type="plane" size="3 3 0.125" condim="3" group="1" material="floorplane"/>
{walls}
{surface}
<light pos="1 1 3" dir="-0.3 -0.3 -1" diffuse="0.5 0.5 0.5" specular="0.2 0.2 0.2" directional="true" castshadow="false"/>
<light pos="-1 -1 3" dir="0.3 0.3 -1" diffuse="0.4 0.4 0.4" specular="0.1 0.1 0.1" directional="true" castshadow="false"/>
</worldbody>
</mujoco>
"""


def _texture(base: Vector, grain: float, tile: int = 0, planks: int = 0) -> bytes:
    """128 x 128 pixels of a colour with grain, as tiles with joints or as planks with streaks along them."""
    random, size = np.random.default_rng(0), 128
    noise = random.normal(0, grain, (size, size, 1))
    if planks:
        width = size // planks
        streaks = random.normal(0, 2 * grain, (size, 1, 1)) + np.repeat(random.normal(0, 2 * grain, (planks, 1, 1)), width, axis=0)[:size]
        noise = noise + streaks
    image = np.clip(np.array(base) + noise, 0, 1)
    if tile:
        image[::tile] *= 0.8
        image[:, ::tile] *= 0.8
    if planks:
        image[:: size // planks] *= 0.7
    buffer = io.BytesIO()
    Image.fromarray((255 * image).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


TEXTURES = {
    "light-gray-floor-tile": lambda: _texture((0.78, 0.78, 0.77), 0.01, tile=64),
    "light-gray-plaster": lambda: _texture((0.83, 0.83, 0.82), 0.012),
    "gray_ceramic_tile": lambda: _texture((0.6, 0.6, 0.61), 0.012, tile=32),
    "yellow_linen_wall_texture": lambda: _texture((0.9, 0.84, 0.66), 0.02),
    "seamless_wood_planks_floor": lambda: _texture((0.55, 0.38, 0.24), 0.01, planks=8),
    "table_light": lambda: _texture((0.82, 0.78, 0.7), 0.012, planks=4),
    "table_wood": lambda: _texture((0.68, 0.51, 0.34), 0.012, planks=4),
    "table_dark": lambda: _texture((0.4, 0.28, 0.2), 0.01, planks=4),
}


@cache
def files() -> dict[str, bytes]:
    """The whole pack: path below the assets folder -> content."""
    pack = {}
    for name, thing in THINGS.items():
        path = f"{thing.folder}/{name}.xml" if thing.folder == ARTICULATED else f"{thing.folder}/{name}/{name}.xml"
        pack[path] = thing_xml(name).encode()
    pack |= {f"scenes/{name}.xml": scene_xml(name).encode() for name in SCENES}
    return pack | {f"textures/{name}.png": draw() for name, draw in TEXTURES.items()}
