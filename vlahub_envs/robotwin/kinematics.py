"""Forward and inverse kinematics of one arm, read from its URDF, in numpy.

A pose is a 4x4 homogeneous matrix. Rotations in actions are roll, pitch, yaw about the fixed world axes x, y, z (`euler_xyz`):
R = Rz(yaw) Ry(pitch) Rx(roll).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

ROTATION_WEIGHT = 0.1  # metres per radian: how inverse kinematics trades a turned hand against a displaced one when it cannot have both
POSITION_TOLERANCE, ROTATION_TOLERANCE = 1e-3, 1e-2  # m, rad: within these a pose counts as reached


def pose(position=(0, 0, 0), rotation: Rotation | None = None) -> np.ndarray:
    """[4, 4] from a position and a rotation."""
    matrix = np.eye(4)
    matrix[:3, 3] = position
    if rotation is not None:
        matrix[:3, :3] = rotation.as_matrix()
    return matrix


def quaternion(w: float, x: float, y: float, z: float) -> Rotation:
    """A rotation from w, x, y, z in any length."""
    return Rotation.from_quat([x, y, z, w])


def pose_of_euler(values: np.ndarray) -> np.ndarray:
    """[6] x, y, z, roll, pitch, yaw -> [4, 4]."""
    return pose(values[:3], Rotation.from_euler("xyz", values[3:6]))


def euler_of_pose(matrix: np.ndarray) -> np.ndarray:
    """[4, 4] -> [6] x, y, z, roll, pitch, yaw. At a pitch of 90 degrees roll and yaw share one freedom; yaw is then 0."""
    r = matrix[:3, :3]
    flat = math.hypot(r[0, 0], r[1, 0])  # cos(pitch)
    if flat > 1e-6:
        roll, yaw = math.atan2(r[2, 1], r[2, 2]), math.atan2(r[1, 0], r[0, 0])
    else:
        roll, yaw = math.atan2(-r[1, 2], r[1, 1]), 0.0
    return np.array([*matrix[:3, 3], roll, math.atan2(-r[2, 0], flat), yaw])


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Angles in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


@dataclass
class Solution:
    joints: np.ndarray  # [6]
    position_error: float  # m
    rotation_error: float  # rad

    @property
    def reached(self) -> bool:
        return self.position_error < POSITION_TOLERANCE and self.rotation_error < ROTATION_TOLERANCE


# Where inverse kinematics starts again if the present posture leads nowhere: hands of a six-joint arm in front of the robot, to both sides, high and low
STARTS = tuple(
    (turn, shoulder, elbow, shoulder - elbow, 0, 0) for shoulder, elbow in ((0.8, 0.8), (1.6, 1.2), (2.4, 1.6), (1.2, 2.0)) for turn in (0, -0.8, 0.8)
)


class Arm:
    """A chain of revolute joints from the URDF's root to the link `tip`.

    Args:
        urdf: the URDF's text.
        tip: name of the last link.
        base: [4, 4] world pose of the root link.
        tool: [4, 4] what counts as the tip, in the link's frame.
        starts: postures from which inverse kinematics tries again.
    """

    def __init__(self, urdf: str, tip: str, base: np.ndarray, tool: np.ndarray | None = None, starts: Sequence[Sequence[float]] = STARTS):
        above = {joint.find("child").get("link"): joint for joint in ElementTree.fromstring(urdf).iter("joint") if joint.find("child") is not None}
        chain = []
        while tip in above:
            chain.append(above[tip])
            tip = above[tip].find("parent").get("link")
        fixed, self.names, origins, axes, limits = base, [], [], [], []
        for joint in reversed(chain):
            fixed = fixed @ _origin(joint)
            if joint.get("type") in ("revolute", "continuous"):
                axis = np.array([float(x) for x in joint.find("axis").get("xyz").split()])
                self.names.append(joint.get("name"))
                origins.append(fixed)
                axes.append(axis / np.linalg.norm(axis))
                limits.append(_limits(joint))
                fixed = np.eye(4)
        self.count = len(self.names)
        self.origins = np.stack(origins)  # [6, 4, 4] joint i in the frame of joint i - 1; the first in the world
        self.end = fixed if tool is None else fixed @ tool  # [4, 4] the tip in the frame of the last joint
        self.axes = np.stack(axes)  # [6, 3] in the joint's own frame
        self.low, self.high = np.array(limits).T  # [6] rad; infinite for joints that turn freely
        self.length = sum(float(np.linalg.norm(origin[:3, 3])) for origin in (*self.origins[1:], self.end))  # m, of the chain: no further does the tip get
        x, y, z = self.axes.T
        zero = np.zeros(self.count)
        self._cross = np.stack([np.stack([zero, -z, y], -1), np.stack([z, zero, -x], -1), np.stack([-y, x, zero], -1)], -2)  # [6, 3, 3]
        self._cross_squared = self._cross @ self._cross
        self._starts = np.array(starts, float)

    def forward(self, joints: np.ndarray) -> np.ndarray:
        """[6] -> world pose of the tip, [4, 4]."""
        return self._frames(joints)[-1] @ self.end

    def _frames(self, joints: np.ndarray) -> list[np.ndarray]:
        """World poses of the joints, each turned by its angle."""
        turn = np.zeros((self.count, 4, 4))
        turn[:, 3, 3] = 1
        sine, cosine = np.sin(joints)[:, None, None], np.cos(joints)[:, None, None]
        turn[:, :3, :3] = np.eye(3) + sine * self._cross + (1 - cosine) * self._cross_squared  # Rodrigues' formula
        steps = self.origins @ turn
        frames = [steps[0]]
        for step in steps[1:]:
            frames.append(frames[-1] @ step)
        return frames

    def joint_positions(self, joints: np.ndarray) -> np.ndarray:
        """[6] -> where the joints are in the world, [6, 3]."""
        return np.stack(self._frames(joints))[:, :3, 3]

    def too_far(self, target: np.ndarray) -> bool:
        """Is `target` [4, 4] further from the first joint than the stretched arm is long?"""
        return bool(np.linalg.norm(target[:3, 3] - self.origins[0][:3, 3]) > self.length)

    def jacobian(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> world pose of the tip [4, 4]; its velocity per joint velocity [6, joints], linear above angular, both in world axes."""
        frames = np.stack(self._frames(joints))
        tip = frames[-1] @ self.end
        axes = (frames[:, :3, :3] @ self.axes[..., None])[..., 0]  # [joints, 3] in the world
        return tip, np.concatenate([np.cross(axes, tip[:3, 3] - frames[:, :3, 3]), axes], axis=1).T

    def inverse(self, target: np.ndarray, start: np.ndarray) -> Solution:
        """The joints that bring the tip to `target` [4, 4], as near to `start` as the search finds; out of reach, those of the nearest pose.

        Damped least squares from `start`, then from a fixed list of postures: the same question always has the same answer.
        """
        best, best_cost = None, np.inf
        for attempt in (np.asarray(start, float), *self._starts):
            joints, cost = self._descend(target, attempt)
            if cost < best_cost - 1e-9:
                best, best_cost = joints, cost
            if self.solution(target, best).reached:
                break
        return self.solution(target, np.where(np.isinf(self.high), wrapped(best), best))  # a joint that turns freely has an equivalent within half a turn

    def solution(self, target: np.ndarray, joints: np.ndarray) -> Solution:
        tip = self.forward(joints)
        turn = Rotation.from_matrix(target[:3, :3] @ tip[:3, :3].T).magnitude()
        return Solution(joints, float(np.linalg.norm(target[:3, 3] - tip[:3, 3])), float(turn))

    def _descend(self, target: np.ndarray, joints: np.ndarray, iterations: int = 60) -> tuple[np.ndarray, float]:
        """Levenberg-Marquardt on the weighted pose error. -> joints, cost."""

        def error(tip: np.ndarray) -> np.ndarray:
            turn = Rotation.from_matrix(target[:3, :3] @ tip[:3, :3].T).as_rotvec()
            return np.concatenate([target[:3, 3] - tip[:3, 3], ROTATION_WEIGHT * turn])

        damping = 1e-3
        tip, jacobian = self.jacobian(joints)
        residual = error(tip)
        cost = residual @ residual
        for _ in range(iterations):
            if cost < 1e-12:
                break
            jacobian[3:] *= ROTATION_WEIGHT
            gradient = jacobian.T @ residual
            step = np.linalg.solve(jacobian.T @ jacobian + damping * np.eye(self.count), gradient)
            step *= min(1.0, 0.5 / np.abs(step).max())  # half a radian at most: beyond it the linear model says nothing
            step = np.clip(joints + step, self.low, self.high) - joints
            candidate_tip, candidate_jacobian = self.jacobian(joints + step)
            candidate = error(candidate_tip)
            if candidate @ candidate < cost:
                gained = cost - candidate @ candidate
                joints, residual, jacobian, cost = joints + step, candidate, candidate_jacobian, candidate @ candidate
                damping = max(damping / 5, 1e-8)
                if gained < 1e-14:
                    break
            else:
                jacobian[3:] /= ROTATION_WEIGHT
                damping *= 10
                if damping > 1e3:
                    break
        return joints, float(cost)


def _limits(joint: ElementTree.Element) -> tuple[float, float]:
    limit = joint.find("limit")
    low, high = (-np.inf, np.inf) if limit is None else (float(limit.get("lower", "-inf")), float(limit.get("upper", "inf")))
    return (low, high) if high - low < 2 * np.pi else (-np.inf, np.inf)


def _origin(joint: ElementTree.Element) -> np.ndarray:
    origin = joint.find("origin")
    if origin is None:
        return np.eye(4)
    xyz, rpy = ([float(x) for x in origin.get(key, "0 0 0").split()] for key in ("xyz", "rpy"))
    return pose(xyz, Rotation.from_euler("xyz", rpy))
