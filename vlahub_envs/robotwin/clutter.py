"""Objects that the task does not need, strewn over the table: which, where, and what they keep away from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import Brick, Model, Official, Solid, StandIns
from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.room import TABLE_TOP
from vlahub_envs.robotwin.task import UPRIGHT

MOST, MOST_FAILURES = 10, 50  # objects, and places that were taken already, before it is enough
TABLE = np.array([0.6, 0.34])  # m: half of the area that an object's disc must lie in
SPREAD = np.array([0.59, 0.34])  # m: half of the area that its middle is drawn from
TALL = 0.05  # m: higher objects stand in the far half, out of the way of hands and cameras
PADDING = 0.06  # m around what the task needs, about half of a hand's width
DROP = 0.001  # m above the table, so that nothing starts inside it

# name -> (shape, colours to choose from by the model's number, {model: size}): what a scene of stand-ins is strewn with. The sizes are the official objects'.
_PALE = ((0.86, 0.83, 0.72), (0.62, 0.72, 0.75), (0.75, 0.6, 0.62))
_DEEP = ((0.4, 0.16, 0.2), (0.17, 0.27, 0.38), (0.22, 0.35, 0.25), (0.45, 0.36, 0.14))
_DARK = ((0.1, 0.1, 0.12), (0.2, 0.2, 0.23), (0.28, 0.25, 0.24))
_WARM = ((0.76, 0.53, 0.27), (0.62, 0.4, 0.2), (0.85, 0.68, 0.4))
DISTRACTORS: dict[str, tuple[str, Sequence[tuple[float, float, float]], dict[int, tuple[float, float, float]]]] = {
    "005_french-fries": ("box", _WARM, {0: (0.0706, 0.0962, 0.0327), 1: (0.0558, 0.0928, 0.0313)}),
    "006_hamburg": ("can", _WARM, {0: (0.0719, 0.0248, 0.0673), 1: (0.0695, 0.034, 0.0686), 2: (0.0673, 0.0392, 0.0706)}),
    "047_mouse": ("box", _DARK, {0: (0.0437, 0.0266, 0.0876), 1: (0.0445, 0.0314, 0.0781)}),
    "048_stapler": ("box", _DEEP, {0: (0.0229, 0.0483, 0.0964), 1: (0.0297, 0.0422, 0.0959), 4: (0.0331, 0.0505, 0.0965), 6: (0.0373, 0.0374, 0.0968)}),
    "057_toycar": ("box", _DEEP, {1: (0.0446, 0.0272, 0.0959), 2: (0.0478, 0.0465, 0.0962), 3: (0.0477, 0.0256, 0.0968), 4: (0.0537, 0.0497, 0.0962)}),
    "071_can": ("can", _DEEP, {0: (0.0711, 0.0965, 0.0712), 1: (0.0651, 0.0966, 0.0653), 2: (0.0726, 0.0964, 0.0726), 3: (0.0823, 0.0968, 0.0824)}),
    "073_rubikscube": ("box", _PALE, {1: (0.0583, 0.0583, 0.0583), 2: (0.0583, 0.0583, 0.0582)}),
    "075_bread": ("box", _WARM, {0: (0.0997, 0.035, 0.1011), 2: (0.058, 0.0374, 0.0513), 4: (0.0965, 0.0418, 0.0515), 6: (0.0678, 0.0259, 0.0636)}),
    "077_phone": ("box", _DARK, {0: (0.075, 0.0161, 0.1509), 1: (0.151, 0.0142, 0.0642), 2: (0.1509, 0.0157, 0.0746)}),
    "079_remotecontrol": ("box", _DARK, {0: (0.1935, 0.0209, 0.048), 1: (0.1935, 0.0221, 0.0573), 4: (0.0686, 0.0261, 0.1935)}),
    "080_pillbottle": ("can", _PALE, {1: (0.0742, 0.155, 0.0736), 5: (0.0823, 0.155, 0.0821)}),
    "081_playingcards": ("box", _DEEP, {0: (0.0602, 0.0217, 0.0967), 1: (0.0967, 0.0205, 0.0668)}),
    "086_woodenblock": ("box", _WARM, {1: (0.0713, 0.1018, 0.0713), 2: (0.1316, 0.1315, 0.0519), 3: (0.1507, 0.0522, 0.0379)}),
    "105_sauce-can": ("can", _DEEP, {0: (0.1002, 0.1162, 0.1002), 2: (0.1145, 0.116, 0.1145), 6: (0.0904, 0.1162, 0.0905)}),
    "107_soap": ("box", _PALE, {0: (0.0967, 0.0214, 0.0311), 1: (0.0963, 0.0218, 0.0483), 3: (0.0962, 0.0367, 0.0556)}),
    "112_tea-box": ("box", _DEEP, {0: (0.0962, 0.0719, 0.0719), 3: (0.0777, 0.0697, 0.0751), 5: (0.0777, 0.076, 0.0778)}),
    "113_coffee-box": ("box", _DEEP, {0: (0.0744, 0.0965, 0.0662), 3: (0.0592, 0.0771, 0.0565), 6: (0.0479, 0.0774, 0.054)}),
    "114_bottle": ("can", _PALE, {1: (0.0691, 0.2159, 0.0691), 2: (0.0859, 0.2274, 0.0859)}),
}
# Kinds that a sentence could mean as well: where the task has one of them, none of the others lies about.
ALIKE = (
    {"001_bottle", "114_bottle", "080_pillbottle"},
    {"002_bowl", "021_cup", "039_mug"},
    {"003_plate", "008_tray", "019_coaster"},
    {"071_can", "105_sauce-can"},
    {"112_tea-box", "113_coffee-box"},
)


def candidates(assets: StandIns | Official, used: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """name -> models that may lie about, in a scene whose task uses the objects `used`."""
    used = set(used)
    taken = used.union(*(group for group in ALIKE if group & used))
    known = {name: tuple(sizes) for name, (_, _, sizes) in DISTRACTORS.items()} if assets.name == "stand-in" else _stable(assets.folder)
    return {name: models for name, models in known.items() if name not in taken}


def _stable(folder: Path) -> dict[str, tuple[int, ...]]:
    """The numbered categories of the official release with the models that its metadata call stable."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("objects/[0-9][0-9][0-9]_*/model_data*.json")):
        number = re.fullmatch(r"model_data(\d+)", file.stem)
        if number and (file.parent / "visual" / f"base{number[1]}.glb").exists() and json.loads(file.read_text()).get("stable"):
            found.setdefault(file.parent.name, []).append(int(number[1]))
    return {name: tuple(sorted(models)) for name, models in found.items()}


def model_of(assets: StandIns | Official, name: str, model_id: int) -> Model:
    if assets.name != "stand-in":
        return assets.model(name, model_id)
    shape, colours, sizes = DISTRACTORS[name]
    size, colour = np.array(sizes[model_id]), colours[model_id % len(colours)]
    if shape == "box":
        solid = Brick(tuple(size / 2), np.eye(4), colour)
    else:
        radius = min(size[0], size[2]) / 2
        solid = Solid([(radius, -size[1] / 2), (radius, size[1] / 2)], colour)
    return Model(name, model_id, size, np.zeros(3), {}, solids=(solid,))


def footprint(model: Model, where: np.ndarray) -> tuple[float, float, float]:
    """x, y, radius of the disc on the table that the model's box [4, 4] stands on or hangs over."""
    corners = model.center + model.size / 2 * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    middle = (where[:3, :3] @ model.center + where[:3, 3])[:2]
    around = (corners @ where[:3, :3].T + where[:3, 3])[:, :2]
    return (*middle, float(np.linalg.norm(around - middle, axis=1).max()))


def strew(
    random: np.random.RandomState,
    assets: StandIns | Official,
    names: dict[str, tuple[int, ...]],
    keep_free: Iterable[tuple[float, float, float]],
) -> list[tuple[Model, sapien.Pose]]:
    """Models and where they stand on a table of the usual height.

    Args:
        random: the layout's generator.
        names: what may lie about, as `candidates` gives it.
        keep_free: x, y, radius of discs that nothing may reach into.
    """
    taken = [(x, y, radius + PADDING) for x, y, radius in keep_free]
    found, failures = [], 0
    while names and len(found) < MOST and failures < MOST_FAILURES:
        name = sorted(names)[random.randint(len(names))]
        model = model_of(assets, name, names[name][random.randint(len(names[name]))])
        tall = model.size[1] > TALL
        x, y = random.uniform(-SPREAD[0], SPREAD[0]), random.uniform(0 if tall else -SPREAD[1], SPREAD[1])
        turn = UPRIGHT * Rotation.from_euler("y", random.uniform(-np.pi, np.pi))
        where = pose((x, y, TABLE_TOP + DROP + model.size[1] / 2 - model.center[1]), turn)
        disc = footprint(model, where)
        outside = (np.abs(disc[:2]) + disc[2] > TABLE).any()
        if outside or any(np.hypot(disc[0] - other[0], disc[1] - other[1]) < disc[2] + other[2] for other in taken):
            failures += 1
            continue
        taken.append(disc)
        found.append((model, sapien.Pose(where)))
    return found
