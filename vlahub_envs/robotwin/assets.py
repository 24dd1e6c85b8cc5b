"""Objects and robots: from the official asset release if it is on this machine, else generated stand-ins of the same names, sizes and points.

`objects.json` holds the measurements of every object with a stand-in: size and centre of its box, and its contact and functional points as
x, y, z, qw, qx, qy, qz, all in metres in the object's own frame, which is y-up. In a contact frame +y points from the object towards the gripper.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub import assets as releases
from vlahub_envs.robotwin.kinematics import pose, quaternion
from vlahub_envs.robotwin.room import GRIPPY, PLAIN

ROBOT_URDF = "embodiments/aloha-agilex/urdf/arx5_description_isaac.urdf"
BACKGROUNDS = "background_texture"  # its folder of pictures
RELEASE = "objects.zip and embodiments.zip of the dataset TianxingChen/RoboTwin2.0"


@dataclass(frozen=True)
class Solid:
    """A body of revolution about y: its outline from bottom to top, as (radius, height). Convex."""

    outline: Sequence[tuple[float, float]]
    colour: tuple[float, float, float]
    metallic: float = 0.0

    def mesh(self, sides: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> vertices [V, 3], normals [V, 3], triangles [T, 3]. Each band of the outline has its own vertices, so that its edges stay sharp."""
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)
        ring = np.stack([np.sin(angle), np.zeros(sides), np.cos(angle)], axis=1)
        vertices, normals, triangles = [], [], []
        corners = [(0.0, self.outline[0][1]), *self.outline, (0.0, self.outline[-1][1])]
        for (r0, y0), (r1, y1) in itertools.pairwise(corners):
            start = 2 * sides * len(vertices)
            out, up = y1 - y0, r0 - r1  # the band's outward normal in the (radius, height) plane
            normal = (ring * out + [0, up, 0]) / np.hypot(out, up)
            vertices.append(np.concatenate([ring * r0 + [0, y0, 0], ring * r1 + [0, y1, 0]]))
            normals.append(np.concatenate([normal, normal]))
            i = np.arange(sides)
            j = (i + 1) % sides
            triangles.append(start + np.concatenate([np.stack([i, j, j + sides], 1), np.stack([i, j + sides, i + sides], 1)]))
        return np.concatenate(vertices), np.concatenate(normals), np.concatenate(triangles)


@dataclass(frozen=True)
class Brick:
    """A box. `place` [4, 4] is its pose in the object's frame."""

    half: tuple[float, float, float]
    place: np.ndarray
    colour: tuple[float, float, float]
    metallic: float = 0.0

    def mesh(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> vertices [24, 3], normals [24, 3], triangles [12, 3]: four vertices a side, so that its edges stay sharp."""
        vertices, normals = [], []
        for axis, sign in itertools.product(range(3), (-1, 1)):
            out, u = np.eye(3)[axis] * sign, np.eye(3)[(axis + 1) % 3]
            v = np.cross(out, u)
            vertices.append([(out + a * u + b * v) * self.half for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
            normals.append([out] * 4)
        turn = self.place[:3, :3]
        triangles = (4 * np.arange(6)[:, None, None] + np.array([[0, 1, 2], [0, 2, 3]])).reshape(-1, 3)
        return np.concatenate(vertices) @ turn.T + self.place[:3, 3], np.concatenate(normals) @ turn.T, triangles


@dataclass(frozen=True)
class Model:
    """One model of an object: how it looks and collides, and its points."""

    name: str  # "050_bell"
    id: int
    size: np.ndarray  # [3]
    center: np.ndarray  # [3]
    points: dict[str, np.ndarray]  # "contact", "functional" -> [K, 4, 4] in the model's frame
    solids: tuple[Solid | Brick, ...] = ()  # a stand-in's parts ...
    visual: Path | None = None  # ... or the official files
    collision: Path | None = None
    scale: tuple[float, ...] = field(default=(1.0, 1.0, 1.0))
    friction: tuple[float, float, float] = PLAIN

    @property
    def key(self) -> tuple:
        """What looks the same has the same key."""
        return self.name, self.id, *self.size, *(self.solids[0].colour if self.solids else ())


def _points(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([pose(row[:3], quaternion(*row[3:])) for row in rows]).reshape(-1, 4, 4)


# ------------------------------------------------------------------------------------------------ primitives, the same with either asset set

# Four ways to take a box from above, a quarter turn apart. A contact frame's y points at the gripper, and its x to where the gripper's camera is.
FROM_ABOVE = tuple(Rotation.from_euler("z", 90 * k, degrees=True) * Rotation.from_euler("x", 90, degrees=True) for k in range(4))
# ... and from the side: the gripper in front of the box, to its right, behind it, to its left
FROM_SIDE = tuple(Rotation.from_euler("z", 90 * k, degrees=True) * Rotation.from_matrix([[0, 0, 1], [0, -1, 0], [1, 0, 0]]) for k in range(4))
DOWN = Rotation.from_quat([1, 0, 0, 0])  # z down, x kept: of a box's functional points, and of what they are put on


def box(half: tuple[float, float, float], colour: tuple[float, float, float], long: bool = False) -> Model:
    """A z-up box. Functional points: the middle of the bottom, of the top. Contact points: four from above; of a long one, four around it high up, four low down."""
    z = half[2]
    functional = [pose((0, 0, -z), DOWN), pose((0, 0, z), DOWN)]
    if long:
        contact = [pose((0, 0, height * z), turn) for height in (0.7, -0.7) for turn in FROM_SIDE]
    else:
        contact = [pose(rotation=turn) for turn in FROM_ABOVE]
    points = {"contact": np.array(contact), "functional": np.array(functional)}
    return Model("box", 0, 2 * np.array(half), np.zeros(3), points, solids=(Brick(half, np.eye(4), colour),), friction=GRIPPY)


# ------------------------------------------------------------------------------------------------ stand-ins


def bell(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Solid, ...]:
    """A desk bell: a base disc, a metal dome, and an 8 mm button on top that reaches exactly the object's height."""
    bottom, top, radius = center[1] - size[1] / 2, center[1] + size[1] / 2, size[0] / 2
    rim, crown = bottom + 0.15 * size[1], top - 0.008
    bow = np.linspace(0, 1.2, 9)  # the dome, not quite a quarter of an ellipse: it ends in a flat of radius 0.36 of its own
    dome = [(0.86 * radius * np.cos(a), rim + (crown - rim) * np.sin(a) / np.sin(bow[-1])) for a in bow]
    return (
        Solid([(radius, bottom), (radius, rim)], (0.12, 0.12, 0.13)),
        Solid(dome, (0.83, 0.68, 0.3), metallic=0.4),
        Solid([(0.009, crown), (0.009, top - 0.002), (0.006, top)], (0.75, 0.75, 0.78)),
    )


def disc(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Solid, ...]:
    bottom, top = center[1] - size[1] / 2, center[1] + size[1] / 2
    return (Solid([(size[0] / 2, bottom), (size[0] / 2, top)], (0.55, 0.36, 0.2)),)


WALL = 0.005  # m, of cups, bowls and plates


def ring(below: tuple[float, float], above: tuple[float, float], colour: tuple[float, float, float], count: int = 16) -> list[Brick]:
    """A wall around y from one (radius, height) to another: `count` boxes, whose outer sides have these radii."""
    (r0, y0), (r1, y1) = below, above
    slope = Rotation.from_euler("x", np.arctan2(r1 - r0, y1 - y0))  # a box's y runs up the wall, its z points out
    half = (max(r0, r1) * np.tan(np.pi / count), np.hypot(r1 - r0, y1 - y0) / 2, WALL / 2)
    middle = np.array([0, (y0 + y1) / 2, (r0 + r1) / 2]) - slope.apply([0, 0, WALL / 2])
    turns = [Rotation.from_euler("y", 2 * np.pi * k / count) for k in range(count)]
    return [Brick(half, pose(turn.apply(middle), turn * slope), colour) for turn in turns]


def vessel(size: np.ndarray, center: np.ndarray, contact: np.ndarray, colour: tuple[float, float, float]) -> tuple[Solid | Brick, ...]:
    """A round hollow body: a foot, a wall that widens up to two thirds of the height, then an upright one that fingers can hold."""
    bottom, top, radius = center[1] - size[1] / 2, center[1] + size[1] / 2, min(size[0], size[2]) / 2
    foot, knee = 0.65 * radius, bottom + 0.65 * size[1]
    floor = Solid([(foot, bottom), (foot, bottom + WALL)], colour)
    return (floor, *ring((foot, bottom), (radius, knee), colour), *ring((radius, knee), (radius, top), colour))


def plate(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Solid | Brick, ...]:
    """A disc with a rim that leans out, hollow down to 3 mm, where the functional point is."""
    colour, radius = (0.9, 0.92, 0.96), size[0] / 2
    return (Solid([(0.65 * radius, 0), (0.65 * radius, 0.003)], colour), *ring((0.65 * radius, 0), (radius, size[1] - 0.8 * WALL), colour, count=24))


def hammer(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Brick, ...]:
    """A handle along y, a head along z at its end. The face that strikes is the head's +z end."""
    low, high = center - size / 2, center + size / 2
    neck = high[1] - 0.036  # where the head begins, so that the strike point lies on its face
    head = Brick((size[0] / 2, 0.018, size[2] / 2), pose((center[0], neck + 0.018, center[2])), (0.35, 0.36, 0.4), metallic=0.5)
    return (Brick((0.012, (neck - low[1]) / 2, 0.013), pose((0, (neck + low[1]) / 2, 0)), (0.85, 0.55, 0.15)), head)


def bottle(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Solid, ...]:
    """A foot, a waist, a shoulder and a neck. The waist is where hands take it: at full width the larger bottles would not fit between the fingers."""
    bottom, height, radius = center[1] - size[1] / 2, size[1], min(size[0], size[2]) / 2
    parts = (
        ([(0.95, 0.0), (1.0, 0.03), (1.0, 0.2), (0.84, 0.27)], (0.2, 0.5, 0.75)),
        ([(0.84, 0.2), (0.84, 0.75)], (0.93, 0.93, 0.9)),
        ([(0.84, 0.67), (1.0, 0.72), (1.0, 0.77), (0.36, 0.9)], (0.2, 0.5, 0.75)),
        ([(0.36, 0.88), (0.36, 1.0)], (0.85, 0.3, 0.25)),
    )
    return tuple(Solid([(radius * wide, bottom + height * high) for wide, high in outline], colour) for outline, colour in parts)


def can(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Solid, ...]:
    """A foot of the measured width and an upright body that fits between the fingers."""
    bottom, top, radius = center[1] - size[1] / 2, center[1] + size[1] / 2, min(size[0], size[2]) / 2
    knee = bottom + 0.15 * size[1]
    body = min(radius, 0.036)
    return Solid([(radius, bottom), (radius, knee)], (0.5, 0.5, 0.53), 0.4), Solid([(body, knee), (body, top)], (0.78, 0.2, 0.16))


def shoe(size: np.ndarray, center: np.ndarray, contact: np.ndarray) -> tuple[Brick, ...]:
    """A sole, a heel part that hands take, a lower toe part. The toe points along +z."""
    low, high = center - size / 2, center + size / 2
    ankle = low[2] + 0.62 * size[2]  # the contact points, at z = 0, are behind it

    def part(y0: float, y1: float, z0: float, z1: float, width: float, colour: tuple[float, float, float]) -> Brick:
        return Brick((width * size[0] / 2, (y1 - y0) / 2, (z1 - z0) / 2), pose((center[0], (y0 + y1) / 2, (z0 + z1) / 2)), colour)

    sole, toe = low[1] + 0.2 * size[1], low[1] + 0.6 * size[1]
    return (
        part(low[1], sole, low[2], high[2], 1.0, (0.93, 0.93, 0.92)),
        part(sole, high[1], low[2], ankle, 0.8, (0.2, 0.24, 0.32)),
        part(sole, toe, ankle, high[2], 0.85, (0.75, 0.35, 0.2)),
    )


# name -> the parts, from size, centre and contact points
STANDINS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Solid | Brick, ...]]] = {
    "001_bottle": bottle,
    "002_bowl": partial(vessel, colour=(0.25, 0.55, 0.62)),
    "003_plate": plate,
    "019_coaster": disc,
    "020_hammer": hammer,
    "021_cup": partial(vessel, colour=(0.82, 0.45, 0.35)),
    "041_shoe": shoe,
    "050_bell": bell,
    "105_sauce-can": can,
}


@cache
def _measurements() -> dict:
    return json.loads((importlib.resources.files(__package__) / "objects.json").read_text())


class StandIns:
    """Generated objects and the generated robot. Needs no file."""

    name = "stand-in"

    def robot_urdf(self) -> Path | None:
        return None

    def model(self, name: str, model_id: int) -> Model:
        record = _measurements()[name][str(model_id)]
        if "joints" in record:
            from vlahub_envs.robotwin import jointed  # it builds on this module

            return jointed.standin(name, model_id, record)
        size, center = np.array(record["size"]), np.array(record["center"])
        points = {kind: _points(record.get(kind, ())) for kind in ("contact", "functional")}
        return Model(name, model_id, size, center, points, solids=STANDINS[name](size, center, points["contact"]))


# ------------------------------------------------------------------------------------------------ the official release


class Official:
    """The unzipped official release: `objects/` and `embodiments/` under `folder`."""

    name = "official"

    def __init__(self, folder: Path):
        self.folder = folder

    def robot_urdf(self) -> Path:
        return self.folder / ROBOT_URDF

    def missing(self, names: Sequence[str]) -> list[str]:
        """What of the release is not here, of the robot and the objects `names`."""
        return [entry for entry in (ROBOT_URDF, *(f"objects/{name}" for name in names)) if not (self.folder / entry).exists()]

    def model(self, name: str, model_id: int) -> Model:
        folder = self.folder / "objects" / name
        variants = sorted((entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()), key=lambda entry: int(entry.name))
        if variants:  # an object with joints: one folder per model, which are counted in the order of their numbers
            from vlahub_envs.robotwin import jointed  # it builds on this module

            if model_id >= len(variants):
                raise FileNotFoundError(
                    f"the official assets lack number {model_id} of {name}: {folder} has {len(variants)} models; {releases.how_to_get('robotwin')}"
                )
            return jointed.official(name, model_id, variants[model_id])
        record_file = folder / f"model_data{model_id}.json"
        files = {kind: folder / kind / f"base{model_id}.glb" for kind in ("visual", "collision")}
        for file in (record_file, *files.values()):
            if not file.exists():
                raise FileNotFoundError(f"the official assets lack {file}; {releases.how_to_get('robotwin')}")
        record = json.loads(record_file.read_text())
        scale = np.broadcast_to(np.asarray(record["scale"], float), 3)

        def points(key: str) -> np.ndarray:
            matrices = np.array(record.get(key, []), float).reshape(-1, 4, 4)
            matrices[:, :3, 3] *= scale  # the file's positions are those before scaling
            return matrices

        return Model(
            name,
            model_id,
            size=np.asarray(record["extents"], float) * scale,
            center=np.asarray(record["center"], float) * scale,
            points={"contact": points("contact_points_pose"), "functional": points("functional_matrix")},
            visual=files["visual"],
            collision=files["collision"],
            scale=tuple(scale),
        )


def backgrounds(assets: StandIns | Official, which: str) -> Path | None:
    """The official background pictures, beside the objects or where their own download went. None with stand-ins, whose pictures are generated."""
    if assets.name == "stand-in":
        return None
    for folder in (assets.folder, *releases.folders("robotwin-backgrounds")):
        if (folder / BACKGROUNDS / which).is_dir():
            return folder / BACKGROUNDS
    raise FileNotFoundError(
        f"the official assets in {assets.folder} lack {BACKGROUNDS}/{which}, from which a randomized background is drawn; {releases.how_to_get('robotwin-backgrounds')}"
    )


def missing(folder: Path) -> list[str]:
    """What of the release `folder` lacks, of all that the tasks need."""
    return Official(folder).missing(tuple(_measurements()))


def missing_backgrounds(folder: Path) -> list[str]:
    return [f"{BACKGROUNDS}/{which}" for which in ("seen", "unseen") if not (folder / BACKGROUNDS / which).is_dir()]


def find(assets: str | os.PathLike, names: Sequence[str]) -> StandIns | Official:
    """The asset set for the objects `names`. One set serves the whole scene: the two are never mixed.

    Args:
        assets: "auto" (the official release if it is complete, else stand-ins), "official", "stand-in", or the folder of the official release.
    """
    if assets == "stand-in":
        return StandIns()
    chosen = releases.folders("robotwin") if assets in ("auto", "official") else [Path(assets).expanduser()]
    gone = {folder: Official(folder).missing(names) for folder in chosen if folder.is_dir()}
    for folder, lacking in gone.items():
        if not lacking:
            return Official(folder)
    if assets == "auto":
        return StandIns()
    if assets != "official" and not gone:
        raise FileNotFoundError(
            f"assets={str(assets)!r} is no folder; it must be 'auto', 'official', 'stand-in' or the folder of the official release ({RELEASE}): "
            f"{releases.how_to_get('robotwin')}"
        )
    where = "; ".join(f"{folder} {releases.complaint(lacking)}" for folder, lacking in gone.items()) or f"{chosen[0]} does not exist"
    raise FileNotFoundError(f"the official RoboTwin assets ({RELEASE}) are not complete on this machine ({where}); {releases.how_to_get('robotwin')}")
