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
from functools import cache
from pathlib import Path

import numpy as np

from vlahub_envs.robotwin.kinematics import pose, quaternion

REPOSITORY = "TianxingChen/RoboTwin2.0"  # dataset on the Hugging Face hub
ROBOT_URDF = "embodiments/aloha-agilex/urdf/arx5_description_isaac.urdf"
HOW_TO_GET = (
    f"get the release with `hf download {REPOSITORY} objects.zip embodiments.zip --repo-type dataset --local-dir DIR`, unzip both in DIR/robotwin, "
    "and set VLAHUB_ASSETS=DIR (or pass assets='DIR/robotwin')"
)


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
class Model:
    """One model of an object: how it looks and collides, and its points."""

    name: str  # "050_bell"
    id: int
    size: np.ndarray  # [3]
    center: np.ndarray  # [3]
    points: dict[str, np.ndarray]  # "contact", "functional" -> [K, 4, 4] in the model's frame
    solids: tuple[Solid, ...] = ()  # a stand-in's parts ...
    visual: Path | None = None  # ... or the official files
    collision: Path | None = None
    scale: tuple[float, ...] = field(default=(1.0, 1.0, 1.0))


def _points(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([pose(row[:3], quaternion(*row[3:])) for row in rows]).reshape(-1, 4, 4)


# ------------------------------------------------------------------------------------------------ stand-ins


def bell(size: np.ndarray, center: np.ndarray) -> tuple[Solid, ...]:
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


STANDINS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[Solid, ...]]] = {"050_bell": bell}


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
        size, center = np.array(record["size"]), np.array(record["center"])
        points = {kind: _points(record.get(kind, ())) for kind in ("contact", "functional")}
        return Model(name, model_id, size, center, points, solids=STANDINS[name](size, center))


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
        record_file = folder / f"model_data{model_id}.json"
        files = {kind: folder / kind / f"base{model_id}.glb" for kind in ("visual", "collision")}
        for file in (record_file, *files.values()):
            if not file.exists():
                raise FileNotFoundError(f"the official assets lack {file}; {HOW_TO_GET}")
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


def default_folder() -> Path:
    """Where the official release is looked for: `robotwin` in $VLAHUB_ASSETS, or in ~/.cache/vlahub/assets."""
    return Path(os.environ.get("VLAHUB_ASSETS") or Path.home() / ".cache" / "vlahub" / "assets").expanduser() / "robotwin"


def find(assets: str | os.PathLike, names: Sequence[str]) -> StandIns | Official:
    """The asset set for the objects `names`. One set serves the whole scene: the two are never mixed.

    Args:
        assets: "auto" (the official release if it is complete, else stand-ins), "official", "stand-in", or the folder of the official release.
    """
    if assets == "stand-in":
        return StandIns()
    official = Official(default_folder() if assets in ("auto", "official") else Path(assets).expanduser())
    missing = official.missing(names)
    if not missing:
        return official
    if assets == "auto":
        return StandIns()
    if assets != "official" and not official.folder.is_dir():
        raise FileNotFoundError(
            f"assets={str(assets)!r} is no folder; it must be 'auto', 'official', 'stand-in' or the folder of the official release: {HOW_TO_GET}"
        )
    raise FileNotFoundError(f"the official RoboTwin assets are not (all) in {official.folder}: {', '.join(missing)} missing; {HOW_TO_GET}")
