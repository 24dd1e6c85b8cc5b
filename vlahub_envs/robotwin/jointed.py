"""Objects with joints: pots with a lid, switches, microwaves. Generated stand-ins, or the official URDFs.

An object stands on its root link "base", which is z-up and looks along -x. The link that carries all the others is fixed to it, and is y-up and looks along +z,
as are the numbers in `objects.json`: corners of the closed object's box ("low", "high"), joints, and points, each with the link that it moves with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sapien
from sapien.physx import PhysxArticulation
from sapien.render import RenderMaterial
from sapien.wrapper.articulation_builder import ArticulationBuilder, LinkBuilder
from sapien.wrapper.urdf_loader import URDFLoader
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.assets import WALL, Brick, Model, ring
from vlahub_envs.robotwin.kinematics import pose, quaternion

BODY_IN_BASE = pose(rotation=Rotation.from_euler("xyz", (90, 0, -90), degrees=True))
Parts = dict[str, list[Brick]]  # link -> boxes, in the link's frame


@dataclass(frozen=True)
class JointedModel(Model):
    """One model of an object with joints. Size and centre are those of its base's frame, points are in the frames of `bearers`, link by link."""

    bearers: dict[str, tuple[str, ...]] | None = None  # "contact", "functional" -> the link of each point
    shift: np.ndarray | None = None  # [4, 4] where its base goes, from the pose that a task asks for: most stand on their base's origin
    record: dict | None = None  # a stand-in's measurements ...
    urdf: Path | None = None  # ... or the official file

    def builder(self) -> ArticulationBuilder:
        return build_standin(self.name, self.record) if self.urdf is None else parse(self.urdf, self.scale[0])


# ------------------------------------------------------------------------------------------------ stand-ins


def pot(record: dict) -> Parts:
    """A round hollow body with a handle on either side, and a lid with a knob that can be lifted by some millimetres."""
    low, high, body = np.array(record["low"]), np.array(record["high"]), record["body"]
    radius, z = (high[2] - low[2]) / 2, (high[2] + low[2]) / 2
    handles = [np.array(row[1:4]) for row in record["contact"]]
    brim = max(low[1] + 0.72 * (high[1] - low[1]), *(handle[1] + 0.006 for handle in handles))
    steel, dark, place = (0.62, 0.64, 0.68), (0.12, 0.12, 0.13), pose((0, 0, z))
    wall = ring((radius, low[1]), (radius, brim), steel)
    floor = Brick((0.7 * radius, WALL / 2, 0.7 * radius), pose((0, low[1] + WALL / 2, 0)), steel)
    parts = {body: [Brick(brick.half, place @ brick.place, brick.colour, 0.4) for brick in (*wall, floor)]}
    for handle, row in zip(handles, record["contact"], strict=True):
        frame = quaternion(*row[4:]).as_matrix()
        inwards = -frame[:, 1]  # from the hand to the pot
        end = low[0] if handle[0] < 0 else high[0]
        start = handle + inwards * (end - handle[0]) / inwards[0]  # where the line along which the hand comes meets the side of the box
        length = (abs(start[0]) - radius + 0.004) / abs(inwards[0])
        turn = Rotation.from_matrix(np.stack([inwards, frame[:, 2], np.cross(inwards, frame[:, 2])], axis=1))
        parts[body].append(Brick((length / 2, 0.005, 0.03), pose(start + inwards * length / 2, turn), dark))
    sliding = [joint for joint in record["joints"] if joint["axis"][1] == 1]
    lid = max(sliding, key=lambda joint: joint["limits"][1])
    for x, joint in zip((-0.03, 0, 0.03), record["joints"], strict=False):  # the lid; and on one pot two buttons above it, which nothing asks for
        if joint is lid:
            knob = (high[1] - brim - 0.006) / 2
            cover = [Brick((side * radius, 0.003, np.sqrt(0.9 - side**2) * radius), pose((0, brim + 0.003, z)), steel, 0.4) for side in (0.35, 0.67, 0.87)]
            parts[joint["child"]] = [*cover, Brick((0.012, knob, 0.012), pose((0, brim + 0.006 + knob, z)), dark)]
        else:
            parts[joint["child"]] = [Brick((0.004, 0.004, 0.004), pose((x, brim + 0.012, z)), dark)]
    return parts


def switch(record: dict) -> Parts:
    """A plate, or a box, and a rocker whose lower half stands out until it is pressed in."""
    low, high, (joint,) = np.array(record["low"]), np.array(record["high"]), record["joints"]
    _, y, z = joint["origin"]
    span = joint["limits"][1] - joint["limits"][0]
    half = max(0.025, abs(record["contact"][0][2] - y) + 0.014)  # of the rocker's height: the place to press, and more
    swing = half * np.sin(span / 2)
    thick = max(0.003, high[2] - z - swing)  # from the axis to the face
    front = max(low[2] + 0.002, z - swing - 0.001)  # behind the rocker at either end of its way
    middle = (high + low) / 2
    plate = Brick(((high[0] - low[0]) / 2, (high[1] - low[1]) / 2, (front - low[2]) / 2), pose((middle[0], middle[1], (front + low[2]) / 2)), (0.93, 0.93, 0.9))
    lean = Rotation.from_euler("x", -(joint["limits"][0] + joint["limits"][1]) / 2)
    rocker = Brick((0.02, half, thick / 2), pose(lean.apply([0, 0, thick / 2]), lean), (0.3, 0.5, 0.75))
    return {record["body"]: [plate], joint["child"]: [rocker]}


def microwave(record: dict) -> Parts:
    """A shell of five slabs, a panel with knobs, and a door that is hinged on the left, with an upright bar as its handle."""
    low, high = np.array(record["low"]), np.array(record["high"])
    hinge, *knobs = record["joints"]
    corner, grip, middle = np.array(hinge["origin"]), np.array(record["contact"][0][1:4]), np.array(record["contact"][3][1:4])
    bar = high[2] - corner[2]  # where the handle's front is, in the door's frame, ...
    face, thick, slab = bar - 0.03, 0.012, 0.008  # ... so far behind it the door's front, for fingers to fit between; how thick the door is, and the shell
    pale, dark = (0.86, 0.86, 0.84), (0.13, 0.13, 0.15)

    def block(a: Sequence[float], b: Sequence[float], colour: tuple[float, float, float]) -> Brick:
        return Brick(tuple((np.array(b) - a) / 2), pose((np.array(a) + b) / 2), colour)

    right, back = corner[0] + grip[0] + 0.014, corner[2] + face - thick - 0.002  # where the door ends, and the shell behind it
    shell = [
        block(low, (high[0], high[1], low[2] + slab), pale),
        block(low, (high[0], low[1] + slab, back), pale),
        block((low[0], high[1] - slab, low[2]), (high[0], high[1], back), pale),
        block(low, (low[0] + slab, high[1], back), pale),
        block((right + 0.002, low[1], low[2]), (high[0], high[1], corner[2] + face), pale),
    ]
    top, bottom = high[1] - corner[1], low[1] - corner[1]
    reach = max(0.045, abs(grip[1] - middle[1]) + 0.01)
    door = [
        block((0, bottom, face - thick), (right - corner[0], top, face), dark),
        block((grip[0] - 0.005, middle[1] - reach, bar - 0.012), (grip[0] + 0.005, middle[1] + reach, bar), pale),
        *(block((grip[0] - 0.005, y - 0.004, face), (grip[0] + 0.005, y + 0.004, bar), pale) for y in (middle[1] - reach + 0.004, middle[1] + reach - 0.004)),
    ]
    return {record["body"]: shell, hinge["child"]: door} | {knob["child"]: [block((-0.009, -0.009, -0.02), (0.009, 0.009, 0.005), dark)] for knob in knobs}


STANDINS: dict[str, Callable[[dict], Parts]] = {"044_microwave": microwave, "056_switch": switch, "060_kitchenpot": pot}


def standin(name: str, model_id: int, record: dict) -> JointedModel:
    points = {kind: [pose(row[1:4], quaternion(*row[4:])) for row in record.get(kind, ())] for kind in ("contact", "functional")}
    return JointedModel(
        name,
        model_id,
        **_extent(record["low"], record["high"]),
        points={kind: np.array(poses).reshape(-1, 4, 4) for kind, poses in points.items()},
        bearers={kind: tuple(row[0] for row in record.get(kind, ())) for kind in points},
        shift=pose((0, 0, record["up"])),
        record=record,
    )


def _extent(low: Sequence[float], high: Sequence[float]) -> dict[str, np.ndarray]:
    """Size and centre in the base's frame of a box that is given by its corners in the body's."""
    turn = BODY_IN_BASE[:3, :3]
    return {"size": np.abs(turn @ np.subtract(high, low)), "center": turn @ np.add(high, low) / 2}


def build_standin(name: str, record: dict) -> ArticulationBuilder:
    parts, builder = STANDINS[name](record), ArticulationBuilder()
    base = _link(builder, None, "base", [])
    base.set_joint_properties("fixed", [], sapien.Pose(), sapien.Pose())
    body = _link(builder, base, record["body"], parts[record["body"]])
    body.set_joint_name("base_joint")
    body.set_joint_properties("fixed", [], sapien.Pose(BODY_IN_BASE), sapien.Pose())
    for i, joint in enumerate(record["joints"]):
        link = _link(builder, body, joint["child"], parts[joint["child"]])
        link.set_joint_name(f"joint_{i}")
        along = Rotation.align_vectors([joint["axis"]], [[1, 0, 0]])[0]  # SAPIEN's joints turn about, and slide along, their x axis
        limits = [joint.get("limits", [-np.inf, np.inf])]
        kind = "revolute_unwrapped" if joint["type"] == "continuous" else joint["type"]
        link.set_joint_properties(kind, limits, sapien.Pose(pose(joint["origin"], along)), sapien.Pose(pose(rotation=along)))
    return builder


def _link(builder: ArticulationBuilder, parent: LinkBuilder | None, name: str, bricks: Sequence[Brick]) -> LinkBuilder:
    link = builder.create_link_builder(parent)
    link.set_name(name)
    for brick in bricks:
        where = sapien.Pose(brick.place)
        link.add_box_collision(where, brick.half)
        link.add_box_visual(where, brick.half, RenderMaterial(base_color=[*brick.colour, 1], metallic=brick.metallic, roughness=0.5, specular=0.5))
    return link


# ------------------------------------------------------------------------------------------------ the official release


def official(name: str, model_id: int, folder: Path) -> JointedModel:
    """From the folder of one model."""
    record = json.loads((folder / "model_data.json").read_text())
    scale = float(record["scale"])
    box = json.loads((folder / "bounding_box.json").read_text())

    def points(key: str) -> np.ndarray:
        matrices = np.array([entry["matrix"] for entry in record.get(key, [])], float).reshape(-1, 4, 4)
        matrices[:, :3, 3] *= scale  # the file's positions are those before scaling
        return matrices

    keys = {"contact": "contact_points", "functional": "functional_points"}
    return JointedModel(
        name,
        model_id,
        **_extent(scale * np.array(box["min"]), scale * np.array(box["max"])),
        points={kind: points(key) for kind, key in keys.items()},
        bearers={kind: tuple(entry["base"] for entry in record.get(key, [])) for kind, key in keys.items()},
        scale=(scale,) * 3,
        shift=np.array(record.get("transform_matrix", np.eye(4)), float),
        urdf=folder / "mobility.urdf",
    )


def parse(urdf: Path, scale: float = 1.0) -> ArticulationBuilder:
    loader = URDFLoader()
    loader.scale = scale
    loader.load_multiple_collisions_from_file = True
    loader.set_scene(sapien.Scene([sapien.physx.PhysxCpuSystem()]))  # for parsing only; the object enters its worlds later
    (builder,), _, _ = loader.parse(str(urdf))
    return builder


# ------------------------------------------------------------------------------------------------ in a scene


@dataclass(frozen=True)
class LinkLooks:
    """What is drawn of one link."""

    key: tuple  # what looks the same has the same key
    builder: LinkBuilder


class Jointed:
    """An object with joints of the present episode. Its pose is its base's, which is z-up."""

    def __init__(self, name: str, model: JointedModel, articulation: PhysxArticulation, builder: ArticulationBuilder, fixed: bool):
        self.name, self.model, self.articulation, self.free = name, model, articulation, not fixed
        self.links = {link.name: link for link in articulation.links}
        self.body, self.entity = articulation.root, articulation.root.entity
        self.parts = [(LinkLooks((*model.key, link.name), link), self.links[link.name].entity) for link in builder.link_builders if link.visual_records]

    @property
    def asleep(self) -> bool:
        return bool(self.body.sleeping)

    @property
    def pose(self) -> np.ndarray:
        """[4, 4] in the world."""
        return self.entity.pose.to_transformation_matrix()

    @property
    def frame(self) -> np.ndarray:
        """[4, 4] of the model's measurements, in the world."""
        return self.pose @ BODY_IN_BASE

    @property
    def position(self) -> np.ndarray:
        return self.entity.pose.p

    def point(self, kind: str, index: int = 0) -> np.ndarray:
        """World pose [4, 4] of a "contact" or "functional" point."""
        return self.link(kind, index) @ self.model.points[kind][index]

    def link(self, kind: str, index: int = 0) -> np.ndarray:
        """World pose [4, 4] of the link that a point moves with."""
        return self.links[self.model.bearers[kind][index]].entity.pose.to_transformation_matrix()

    def joint(self, index: int = 0) -> float:
        """Where a joint stands, in rad or m."""
        return float(self.articulation.get_qpos()[self._order(index)])

    def limits(self, index: int = 0) -> np.ndarray:
        """[2] the least and the greatest that a joint can be."""
        return self.articulation.get_qlimits()[self._order(index)]

    def axis(self, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """A point [3] on the axis of a joint, and its direction [3], in the world."""
        where = self.articulation.active_joints[self._order(index)].get_global_pose().to_transformation_matrix()
        return where[:3, 3], where[:3, 0]

    def _order(self, index: int) -> int:
        return [joint.name for joint in self.articulation.active_joints].index(f"joint_{index}")
