"""The robot, and the dual arm "aloha-agilex": two 6-joint ARX arms with parallel grippers on a stand. `embodiments.py` has the others.

Its chain (joint names, origins, axes, limits) is the official robot's, so joint actions, hand poses and wrist cameras mean the same as there. The shapes are
boxes and cylinders, drawn here. With the official asset release the official URDF is loaded in place of this one; everything else stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sapien
from sapien.physx import PhysxArticulation
from sapien.wrapper.articulation_builder import ArticulationBuilder
from sapien.wrapper.urdf_loader import URDFLoader
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.kinematics import STARTS, Arm, pose

SIDES = ("left", "right")
PREFIX = {"left": "fl", "right": "fr"}  # "front left": the official robot has a second, undriven pair of arms at its rear
BASE = pose((0, -0.65, 0), Rotation.from_euler("z", 90, degrees=True))  # the robot faces +y, the table
STIFFNESS, DAMPING, LINK_MASS = 1000.0, 200.0, 1.0  # of every joint and link
GRIPPER_CLOSED, GRIPPER_SPAN = -0.01, 0.055  # finger target = -0.01 + 0.055 v: at v = 0 the fingers press on each other, or on what is between them
FINGER_LIMIT = 0.04765  # m
TCP = 0.12  # m from link6 to the point between the fingers that grasps are planned for

# parent -> child origin (x, y, z), (roll, pitch, yaw), axis; metres and radians
ARM_BASE = {"left": ((0.2305, 0.297, 0.782), (0, 0, 0.02)), "right": ((0.2315, -0.3063, 0.781), (0, 0, 0.01))}
ARM_JOINTS = (
    ((0, 0, 0.058), (0, 0, 0), (0, 0, 1)),
    ((0.025013, 0.00060169, 0.042), (0, 0, 0), (0, 1, 0)),
    ((-0.26396, 0.0044548, 0), (-3.1416, 0, -0.015928), (0, 1, 0)),
    ((0.246, -0.00025, -0.06), (0, 0, 0), (0, 1, 0)),
    ((0.06775, 0.0015, -0.0855), (0, 0, -0.015928), (0, 0, 1)),
    ((0.03095, 0, 0.0855), (-3.1416, 0, 0), (1, 0, 0)),
)
FINGER_JOINTS = (((0.08457, 0.0245, -0.0001), (0, 1, 0)), ((0.08457, -0.0245, -0.0001), (0, -1, 0)))
CAMERA_MOUNT = ((0.07, 0.032, 0.065), (0, 0.4, 0))  # on link6; the camera looks along its x

STEEL, GREY, BLACK, ORANGE = (0.5, 0.58, 0.7), (0.42, 0.44, 0.48), (0.09, 0.09, 0.1), (0.95, 0.45, 0.1)

# link number -> boxes and cylinders: (size or (radius, length), xyz, rpy, colour)
ARM_SHAPES = {
    0: [((0.055, 0.05), (0, 0, 0.015), (0, 0, 0), BLACK)],
    1: [((0.045, 0.06), (0, 0, 0.0), (0, 0, 0), STEEL), ((0.032, 0.1), (0.025, 0, 0.042), (1.5708, 0, 0), BLACK)],
    2: [((0.25, 0.05, 0.056), (-0.132, 0.002, 0), (0, 0, 0), STEEL), ((0.034, 0.08), (-0.264, 0.0045, 0), (1.5708, 0, 0), BLACK)],
    3: [((0.21, 0.044, 0.05), (0.11, 0, -0.027), (0, 0.239, 0), STEEL), ((0.028, 0.07), (0.246, 0, -0.06), (1.5708, 0, 0), BLACK)],
    4: [((0.06, 0.042, 0.042), (0.03, 0.001, -0.04), (0, 0.9, 0), STEEL), ((0.024, 0.05), (0.06775, 0.0015, -0.075), (0, 0, 0), BLACK)],
    5: [((0.04, 0.04, 0.09), (0.012, 0, 0.045), (0, 0, 0), STEEL)],
    6: [((0.026, 0.06), (0.02, 0, 0), (0, 1.5708, 0), BLACK), ((0.03, 0.11, 0.045), (0.06, 0, 0), (0, 0, 0), GREY), ((0.02, 0.02, 0.06), (0.045, 0.032, 0.04), (0, 0, 0), BLACK)],
}  # fmt: skip
STAND_SHAPES = [
    ((0.62, 0.5, 0.26), (-0.05, 0, 0.2), (0, 0, 0), GREY),  # chassis
    ((0.2, 0.3, 0.44), (-0.02, 0, 0.52), (0, 0, 0), STEEL),  # column
    ((0.22, 0.76, 0.05), (0.19, 0, 0.745), (0, 0, 0), BLACK),  # shoulder beam
    ((0.04, 0.05, 0.62), (0.02, 0, 1.06), (0, 0, 0), GREY),  # mast
    ((0.06, 0.12, 0.04), (0.1, 0.032, 1.385), (0, 0.93, 0), BLACK),  # head camera, behind its lens
]
FINGER_LENGTH = (-0.015, 0.071)  # along x from the finger's joint


def urdf() -> str:
    """The stand-in robot as URDF text."""

    def number(values) -> str:
        return " ".join(f"{value:.8g}" for value in values)

    def link(name: str, shapes, solid: bool = True) -> str:
        text = f'<link name="{name}"><inertial><mass value="{LINK_MASS:g}"/><inertia ixx="0.002" iyy="0.002" izz="0.002" ixy="0" ixz="0" iyz="0"/></inertial>'
        for i, (size, xyz, rpy, colour) in enumerate(shapes):
            shape = f'<box size="{number(size)}"/>' if len(size) == 3 else f'<cylinder radius="{size[0]:g}" length="{size[1]:g}"/>'
            place = f'<origin xyz="{number(xyz)}" rpy="{number(rpy)}"/><geometry>{shape}</geometry>'
            text += f'<visual>{place}<material name="{name}_{i}"><color rgba="{number(colour)} 1"/></material></visual>'
            text += f"<collision>{place}</collision>" if solid else ""
        return text + "</link>\n"

    def joint(name: str, kind: str, parent: str, child: str, xyz, rpy=(0, 0, 0), axis=None, limit=None) -> str:
        moving = f'<axis xyz="{number(axis)}"/><limit lower="{limit[0]:g}" upper="{limit[1]:g}" effort="100" velocity="100"/>' if axis else ""
        return (
            f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>'
            f'<origin xyz="{number(xyz)}" rpy="{number(rpy)}"/>{moving}</joint>\n'
        )

    text = '<robot name="aloha_agilex">\n' + link("footprint", STAND_SHAPES)
    for side, prefix in PREFIX.items():
        text += link(f"{prefix}_base_link", ARM_SHAPES[0]) + joint(f"{prefix}_base_joint", "fixed", "footprint", f"{prefix}_base_link", *ARM_BASE[side])
        parent = f"{prefix}_base_link"
        for i, (xyz, rpy, axis) in enumerate(ARM_JOINTS, start=1):
            text += link(f"{prefix}_link{i}", ARM_SHAPES[i])
            text += joint(f"{prefix}_joint{i}", "revolute", parent, f"{prefix}_link{i}", xyz, rpy, axis, (-10, 10))
            parent = f"{prefix}_link{i}"
        for i, (xyz, axis) in enumerate(FINGER_JOINTS, start=7):
            near, far = FINGER_LENGTH
            inner = -xyz[1]  # the inner faces of the two fingers meet at y = 0 of link6 when the joints stand at 0
            middle = inner + np.sign(xyz[1]) * 0.007
            shapes = [
                ((far - near - 0.026, 0.014, 0.022), ((near + far - 0.026) / 2, middle, 0), (0, 0, 0), GREY),
                ((0.026, 0.014, 0.022), (far - 0.013, middle, 0), (0, 0, 0), ORANGE),
            ]
            text += link(f"{prefix}_link{i}", shapes) + joint(
                f"{prefix}_joint{i}", "prismatic", parent, f"{prefix}_link{i}", xyz, (0, 0, 0), axis, (0, FINGER_LIMIT)
            )
        camera = ((0.02, 0.05, 0.025), (-0.02, 0, 0), (0, 0, 0), BLACK)
        text += link(f"{side}_camera", [camera], solid=False) + joint(f"{side}_camera_joint", "fixed", parent, f"{side}_camera", *CAMERA_MOUNT)
    return text + "</robot>\n"


@dataclass(frozen=True)
class Embodiment:
    """What differs between robots. Both arms are alike; the names of an arm's joints and links begin with its prefix."""

    name: str
    urdf: Callable[[], str]  # text of both arms as one robot
    base: np.ndarray  # [4, 4] world pose of its root link
    prefix: dict[str, str]  # side -> "fl_"
    hand: str  # the link whose pose counts as the hand's ...
    tool: np.ndarray  # ... with axes [4, 4] of its own: x towards what it grasps, y along which the fingers open, z to where a camera would sit
    fingers: tuple[str, str]  # joints, the same command for both
    home: tuple[float, ...]  # rad
    closed: float  # m: target of a finger at gripper value 0 ...
    span: float  # ... and how much more at 1
    tcp: float  # m along the hand's x to the point that grasps are planned for
    starts: Sequence[Sequence[float]] = STARTS  # of inverse kinematics
    wrist_turns: Sequence[Sequence[float]] = ()  # rad, what to add to the joints to hold nearly the same hand with the wrist on its other side

    @property
    def joints(self) -> int:
        """Per arm, without the gripper."""
        return len(self.home)


ALOHA = Embodiment(
    name="aloha-agilex",
    urdf=urdf,
    base=BASE,
    prefix={side: f"{prefix}_" for side, prefix in PREFIX.items()},
    hand="link6",
    tool=np.eye(4),
    fingers=("joint7", "joint8"),
    home=(0.0,) * 6,
    closed=GRIPPER_CLOSED,
    span=GRIPPER_SPAN,
    tcp=TCP,
    # the wrist's joint below the hand or above it, half a turn of the last joint apart
    wrist_turns=[(0, 0, 0, pitch, 0, roll) for pitch in (0, np.pi, -np.pi) for roll in (np.pi, -np.pi)],
)


def build_bodies(builder: ArticulationBuilder, world: sapien.Scene, fixed: bool) -> PhysxArticulation:
    """The bodies that collide, in a physics world; what is seen of them is on the stage. `fixed`: the root link stays where it is."""
    looks = [link.visual_records for link in builder.link_builders]
    for link in builder.link_builders:
        link.visual_records = []
    articulation = builder.set_scene(world).build(fix_root_link=fixed)
    for link, records in zip(builder.link_builders, looks, strict=True):
        link.visual_records = records
    return articulation


class Robot:
    """The robot: drive targets in, drive targets and link poses out.

    The state that policies see is what was commanded last, as in the published data; the joints follow it through their drives.

    Args:
        kind: which robot. J below is its number of joints per arm.
        official: the official URDF; None takes the one of `kind`.
    """

    def __init__(self, kind: Embodiment = ALOHA, official: Path | None = None):
        self.kind, self.tcp, self.base = kind, kind.tcp, sapien.Pose(kind.base)
        text = kind.urdf() if official is None else official.read_text(encoding="utf-8")
        self.arms = {side: Arm(text, prefix + kind.hand, kind.base, kind.tool, kind.starts) for side, prefix in kind.prefix.items()}
        self.part = {"left": slice(0, kind.joints), "right": slice(kind.joints, 2 * kind.joints)}  # of `joints`
        self.home = np.array(kind.home * 2)  # [2 J]
        with tempfile.TemporaryDirectory() as folder:  # SAPIEN reads URDFs from files only
            file = official or Path(folder) / "robot.urdf"
            if official is None:
                file.write_text(text)
            loader = URDFLoader()
            loader.set_scene(sapien.Scene([sapien.physx.PhysxCpuSystem()]))  # for parsing only; the robot enters its worlds later
            (self.builder,), _, _ = loader.parse(str(file))
        self.builder.set_initial_pose(self.base)
        self.leave()

    def leave(self) -> None:
        self.joints, self.grippers = self.home.copy(), np.ones(2)  # commanded: [2 J] left arm, right arm; [2] 0 closed ... 1 open
        self.articulation, self.links, self.fingers = None, {}, {}

    def enter(self, world: sapien.Scene) -> None:
        """Stand in a physics world, at home, grippers open, at rest."""
        self.leave()
        self.articulation = articulation = build_bodies(self.builder, world, fixed=True)
        self.links = {link.name: link for link in articulation.links}
        for link in articulation.links:
            link.mass = LINK_MASS
            # The arms' shapes touch where they meet at a joint: one arm never collides with itself, but with everything else.
            bit = next((bit for bit, prefix in zip((2, 4), self.kind.prefix.values(), strict=True) if link.name.startswith(prefix)), 8)
            for shape in link.collision_shapes:
                groups = shape.get_collision_groups()
                shape.set_collision_groups([groups[0], groups[1], groups[2] | bit, groups[3]])
        joints = {joint.name: joint for joint in articulation.active_joints}
        self._arm_joints = [joints[name] for side in SIDES for name in self.arms[side].names]
        self._finger_joints = [[joints[self.kind.prefix[side] + name] for name in self.kind.fingers] for side in SIDES]
        self.fingers = {side: [joint.child_link for joint in pair] for side, pair in zip(SIDES, self._finger_joints, strict=True)}
        home = {joint.name: position for joint, position in zip(self._arm_joints, self.home.tolist(), strict=True)}
        home |= {joint.name: self.kind.closed + self.kind.span for pair in self._finger_joints for joint in pair}
        start = [home.get(joint.name, 0.0) for joint in articulation.active_joints]  # the official robot has wheels, too
        articulation.set_qpos(np.array(start, np.float32))
        for joint, position in zip(articulation.active_joints, start, strict=True):
            joint.set_drive_properties(STIFFNESS, DAMPING)
            joint.set_drive_target(position)
            joint.set_drive_velocity_target(0.0)

    def command(self, joints: np.ndarray, velocities: np.ndarray, grippers: np.ndarray) -> None:
        """Drive targets for the next physics step. joints [2 J] rad, velocities [2 J] rad/s, grippers [2]."""
        for joint, position, velocity in zip(self._arm_joints, joints.tolist(), velocities.tolist(), strict=True):
            joint.set_drive_target(position)
            joint.set_drive_velocity_target(velocity)
        for pair, value, before in zip(self._finger_joints, grippers.tolist(), self.grippers.tolist(), strict=True):
            if value != before:
                for joint in pair:
                    joint.set_drive_target(self.kind.closed + self.kind.span * value)
        self.joints, self.grippers = joints, grippers
        # gravity and Coriolis forces are fed forward, so that the drives only correct
        self.articulation.set_qf(self.articulation.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))

    @property
    def state(self) -> np.ndarray:
        """[2 J + 2]: left joints, left gripper, right joints, right gripper, as commanded."""
        return np.concatenate([part for side, value in zip(SIDES, self.grippers, strict=True) for part in (self.joints[self.part[side]], [value])])

    def gripper(self, side: str) -> float:
        """The commanded value of one gripper."""
        return float(self.grippers[SIDES.index(side)])

    def grasp_point(self, side: str) -> np.ndarray:
        """[3] the point between the fingers that grasps are planned for, where the physics has it."""
        hand = self.hand_as_it_is(side)
        return hand[:3, 3] + self.tcp * hand[:3, 0]

    def hand(self, side: str) -> np.ndarray:
        """World pose of the hand [4, 4] as commanded."""
        return self.arms[side].forward(self.joints[self.part[side]])

    def hand_as_it_is(self, side: str) -> np.ndarray:
        """World pose of the hand [4, 4], where the physics has it."""
        return self.links[self.kind.prefix[side] + self.kind.hand].entity.pose.to_transformation_matrix() @ self.kind.tool
