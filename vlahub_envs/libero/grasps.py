"""Where a parallel gripper can take something, read from the collision geometry of the compiled model.

Lines are laid through an object along the direction in which the fingers close. Where they leave matter, a finger has a face to press on. A grasp is a
stretch of matter that fits between the open fingers, at a place that the arm reaches without touching anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.libero.scene import Scene

# of the Panda's hand, in m
OPENING = 0.08  # between the open fingers
TIP = 0.0095  # the fingers end so far beyond the grip site, which the controller moves
FINGER = 0.012  # thick
SIDE = 0.006  # the pads reach so far to both sides, and a little further
CLEARANCE = 0.006  # between an open finger and what it is to grasp
DEPTHS = (0.035, 0.028, 0.021, 0.015, 0.011, 0.0075, 0.004, 0.002)  # of the grip site below the object's top; deeper holds better
SLANT = 0.003  # m by which a face may lean over the width of the pads
THIN = 0.002  # what is narrower than the pads holds as badly as a face that leans so much
SPACING = 0.01  # between the lines
BEFORE = 0.08  # m before a grasp, on the way to it
TRIED = 300  # grasps, the cheapest first
EASY = 0.7  # m from the robot's foot up to which the arm is not nearly straight
LONGEST = 0.95  # m from the shoulder to the grip site, with everything straight
SPARE = 0.2  # rad that joints stay away from their ends
ELBOW = (-2.8, -1.0)  # rad: at -0.47 the wrist is straight away from the shoulder; beyond, the elbow bends the wrong way and the arm is stuck
ELSEWHERE = 0.02  # m from where it slipped
SAME_FACE = 0.003  # matter across a gap as narrow as this counts as one piece


Pose = tuple[np.ndarray, np.ndarray]  # position [3] and rotation [3, 3]


@dataclass(frozen=True)
class Grasp:
    """A pose of the grip site: its z axis points out of the hand, its x axis is the one along which the fingers close."""

    position: np.ndarray  # [3]
    rotation: np.ndarray  # [3, 3]
    depth: float  # of the grip site below the object's top, as the hand sees it
    cost: float

    @property
    def pose(self) -> Pose:
        return self.position, self.rotation


class Matter:
    """The collision geoms of some bodies as boxes: exact for boxes, of which LIBERO's objects are made; around anything else."""

    def __init__(self, scene: Scene, bodies: np.ndarray):
        model, data = scene.model, scene.data
        solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        self.geoms = np.flatnonzero(solid & np.isin(model.geom_bodyid, bodies) & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE))
        self.axes = data.geom_xmat[self.geoms].reshape(-1, 3, 3)
        self.centres = data.geom_xpos[self.geoms] + np.einsum("nij,nj->ni", self.axes, model.geom_aabb[self.geoms, :3])
        self.halves = model.geom_aabb[self.geoms, 3:]

    def extent(self, direction: np.ndarray) -> tuple[float, float]:
        """How far all of it reaches along a unit vector, lowest and highest."""
        middles, reach = self.centres @ direction, np.abs(self.axes.transpose(0, 2, 1) @ direction * self.halves).sum(axis=1)
        return float((middles - reach).min()), float((middles + reach).max())

    def bounds(self) -> np.ndarray:
        """[n, 2, 3]: the lowest and highest corner of each geom in the world."""
        reach = np.einsum("nij,nj->ni", np.abs(self.axes), self.halves)
        return np.stack([self.centres - reach, self.centres + reach], axis=1)

    def _crossed(self, start: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a line enters and leaves each box, as distances from `start`; it misses a box that it would leave first."""
        origin = np.einsum("nji,nj->ni", self.axes, start - self.centres)
        slope = direction @ self.axes
        slope = np.where(np.abs(slope) < 1e-9, 1e-9, slope)
        middle, reach = -origin / slope, self.halves / np.abs(slope)
        return (middle - reach).max(axis=1), (middle + reach).min(axis=1)

    def along(self, start: np.ndarray, direction: np.ndarray) -> list[tuple[float, float]]:
        """The stretches of matter on a line, as distances from `start`."""
        enter, leave = self._crossed(start, direction)
        stretches: list[tuple[float, float]] = []
        for i in np.argsort(enter):
            if enter[i] > leave[i]:
                continue
            if stretches and enter[i] <= stretches[-1][1] + SAME_FACE:
                stretches[-1] = (stretches[-1][0], max(stretches[-1][1], float(leave[i])))
            else:
                stretches.append((float(enter[i]), float(leave[i])))
        return stretches

    def between(self, start: np.ndarray, direction: np.ndarray, low: float, high: float) -> bool:
        """Is there matter on a line between two distances from `start`?"""
        enter, leave = self._crossed(start, direction)
        return bool(((enter <= leave) & (enter < high) & (leave > low)).any())


def candidates(matter: Matter, centre: np.ndarray, rotation: np.ndarray, turn: float, depths: Sequence[float] = DEPTHS) -> Iterator[Grasp]:
    """Grasps with one orientation of the hand, which is `turn` rad away from the easiest."""
    closing, aside, out = rotation.T
    nearest = -matter.extent(-out)[1]  # of the object's points along `out`, the first that the hand meets
    low, high = matter.extent(aside)
    middle = aside @ centre
    steps = np.arange(np.ceil((low - middle) / SPACING), np.floor((high - middle) / SPACING) + 1)
    # and through the middle of each part: a handle is narrower than the space between lines
    through = np.unique(np.concatenate([middle + SPACING * steps, matter.centres @ aside]).round(3))
    for depth in depths:
        for v in through:
            at = (nearest + depth) * out + v * aside
            lines = [matter.along(at + side * aside, closing) for side in (-SIDE, 0.0, SIDE)]
            for low_face, high_face in lines[1]:
                # the same piece of matter on the lines to both sides; a slanting face would turn the object between the fingers
                sides = [next((face for face in line if face[0] < high_face and face[1] > low_face), None) for line in (lines[0], lines[2])]
                beside = [face for line in (lines[0], lines[2]) for face in line if face[0] < high_face + OPENING / 2 and face[1] > low_face - OPENING / 2]
                if not beside:
                    faces, slant = np.array([(low_face, high_face)]), THIN
                elif None in sides:
                    continue
                else:
                    faces = np.array([(low_face, high_face), *sides])
                    slant = float(np.abs(faces[1] - faces[2]).max())
                first, last = faces[:, 0].min(), faces[:, 1].max()
                if slant > SLANT or last - first > OPENING - 2 * CLEARANCE:
                    continue
                position = at + (first + last) / 2 * closing
                away = np.linalg.norm((position - centre)[:2] if abs(out[2]) > 0.5 else position - centre)
                cost = 0.5 * turn + 150 * slant + 8 * away + 5 * (DEPTHS[0] - depth)
                yield Grasp(position, rotation, depth, cost)


class Arm:
    """A copy of the world in which the arm tries postures."""

    def __init__(self, scene: Scene):
        self.scene, self.model = scene, scene.model
        self.data = mujoco.MjData(scene.model)
        robot = scene.env.robots[0]
        self.site = self.model.site("gripper0_grip_site").id
        self.joints, self.speeds = np.array(robot._ref_joint_pos_indexes), np.array(robot._ref_joint_vel_indexes)
        # near the end of a joint, and with the elbow nearly straight, the controller cannot lead the hand as asked
        self.range = self.model.jnt_range[[self.model.joint(name).id for name in robot.robot_joints]] + [SPARE, -SPARE]
        self.range[3] = ELBOW
        self.home = np.array(robot.init_qpos)
        self.shoulder, self.wrist = (self.model.joint(robot.robot_joints[i]).id for i in (1, 5))
        names = [self.model.body(i).name for i in range(self.model.nbody)]
        self.own = np.array([name.startswith(("robot0_link", "robot0_right_hand", "gripper0_")) for name in names])

    def reaches(self, position: np.ndarray, rotation: np.ndarray, play: float) -> bool:
        """Is there a posture of the arm, fingers open, with the grip site there, that touches nothing, nor with the hand `play` metres beside it?"""
        data = self.data
        if np.linalg.norm(position - self.scene.data.xanchor[self.shoulder]) > LONGEST:
            return False
        data.qpos[:] = self.scene.data.qpos
        data.qpos[self.joints], data.qpos[self.scene.fingers] = self.home, (OPENING / 2, -OPENING / 2)
        across = np.zeros((6, self.model.nv))
        for _ in range(60):
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            present = data.site_xmat[self.site].reshape(3, 3)
            error = np.concatenate([position - data.site_xpos[self.site], Rotation.from_matrix(rotation @ present.T).as_rotvec()])
            mujoco.mj_jacSite(self.model, data, across[:3], across[3:], self.site)
            jacobian = across[:, self.speeds]
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-3 * np.eye(6))
            if np.abs(error).max() < 1e-3:
                break
            data.qpos[self.joints] = np.clip(data.qpos[self.joints] + np.clip(inverse @ error, -0.3, 0.3), *self.range.T)
        else:
            return False
        posture = data.qpos[self.joints].copy()
        if (posture <= self.range[:, 0]).any() or (posture >= self.range[:, 1]).any():
            return False  # on its way there the controller would have turned that joint even further
        for shift in ((0, 0), (play, 0), (-play, 0), (0, play), (0, -play)):
            data.qpos[self.joints] = posture + inverse @ np.append(rotation[:, :2] @ shift, np.zeros(3))
            mujoco.mj_fwdPosition(self.model, data)
            pairs = self.model.geom_bodyid[np.array([contact.geom for contact in data.contact], int).reshape(-1, 2)]
            if (self.own[pairs[:, 0]] ^ self.own[pairs[:, 1]]).any():
                return False
        return True


def find(
    arm: Arm,
    bodies: np.ndarray,
    centre: np.ndarray,
    orientations: list[tuple[np.ndarray, float]],
    after: Callable[[np.ndarray, np.ndarray], Pose],
    depths: Sequence[float] = DEPTHS,
    avoid: Sequence[np.ndarray] = (),
) -> Grasp | None:
    """The cheapest grasp of `bodies` within reach.

    Args:
        centre: [3] better near this point: the centre of mass.
        orientations: of the hand, each with its distance in rad from the easiest.
        depths: of the grip site below the object's top, to be tried.
        after: where the hand will be, from where it grasps, when the object is in its place. Grasps with which it can open there come first.
        avoid: points [3] near which not to grasp.
    """
    matter, others = Matter(arm.scene, bodies), Matter(arm.scene, np.setdiff1d(np.flatnonzero(~arm.own), bodies))
    everything = Matter(arm.scene, np.flatnonzero(~arm.own))
    foot = arm.scene.data.xpos[arm.model.body("robot0_base").id]

    def cost(grasp: Grasp) -> float:
        return grasp.cost + 25 * max(0.0, float(np.linalg.norm((grasp.position - foot)[:2])) - EASY)

    def fitting() -> Iterator[Grasp]:
        for grasp in sorted((grasp for rotation, turn in orientations for grasp in candidates(matter, centre, rotation, turn, depths)), key=cost):
            # the fingers meet in the middle of the hand; what is off the middle is pushed there, so that a finger has room outside
            for shift in (0.0, 0.012, -0.012, 0.024, -0.024):
                shifted = replace(grasp, position=grasp.position + shift * grasp.rotation[:, 0])
                if any(np.linalg.norm(shifted.position - point) < ELSEWHERE for point in avoid):
                    continue
                if _fingers_fit(everything, *shifted.pose) and _alone(others, *shifted.pose):
                    yield shifted

    tried = list(itertools.islice(fitting(), TRIED))
    for play in (CLEARANCE, CLEARANCE / 3):
        spare = None
        for grasp in tried:
            before = grasp.position - BEFORE * grasp.rotation[:, 2]
            if arm.reaches(*grasp.pose, play) and arm.reaches(before, grasp.rotation, play):
                if arm.reaches(*after(*grasp.pose), play):
                    return grasp
                spare = spare or grasp
        if spare is not None:
            return spare
    return None


def _fingers_fit(everything: Matter, position: np.ndarray, rotation: np.ndarray) -> bool:
    """Is nothing where the open fingers will be, nor behind them? A quick test before the exact one."""
    closing, _, out = rotation.T
    for finger in (-1, 1):
        middle = position + finger * (OPENING / 2 + FINGER / 2) * closing
        if everything.between(middle, out, -BEFORE, TIP):
            return False
    return True


def _alone(others: Matter, position: np.ndarray, rotation: np.ndarray) -> bool:
    """Is nothing else between the open fingers?"""
    closing, aside, out = rotation.T
    for forwards in (0.0, TIP):
        for side in (-SIDE, SIDE):
            if others.between(position + forwards * out + side * aside, closing, -OPENING / 2, OPENING / 2):
                return False
    return True
