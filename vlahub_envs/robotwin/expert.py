"""The scripted expert: it knows where everything is and runs the task's script, through the same 14 numbers per action as any policy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.robotwin.kinematics import pose
from vlahub_envs.robotwin.robot import SIDES, TCP
from vlahub_envs.robotwin.scene import Thing
from vlahub_envs.robotwin.simulation import RoboTwin
from vlahub_envs.robotwin.trajectory import RECORD_EVERY, rest_to_rest

GRIP_STEPS = 300  # physics steps of closing or opening: 200 to move, 100 to settle
TILTS = np.linspace(0, 0.9, 10)  # rad: if a grasp is out of reach, the hand tips over, about the axis that the fingers open along, to point more forwards


class Unreachable(RuntimeError):
    """The expert's script asks for a pose that the arm cannot take. The layout counts as unsolvable."""


class Hands:
    """Moves that scripts are made of. Each returns a chunk of actions [n, 14] in the simulation's own units, from the present commanded state."""

    def __init__(self, simulation: RoboTwin):
        self.simulation, self.robot = simulation, simulation.scene.robot

    def go(self, **poses: np.ndarray) -> np.ndarray:
        """One or both hands to world poses of link6, at once: `go(left=..., right=...)`. They start and end at rest together."""
        start, goal = self.robot.joints, self.robot.joints.copy()
        for side, target in poses.items():
            part = slice(0, 6) if side == "left" else slice(6, 12)
            solution = self.robot.arms[side].inverse(target, start[part])
            if not solution.reached:
                raise Unreachable(
                    f"the {side} hand cannot reach {np.round(target[:3, 3], 3).tolist()}: {solution.position_error:.3f} m, {solution.rotation_error:.2f} rad off"
                )
            goal[part] = solution.joints
        if np.abs(goal - start).max() < 1e-6:
            return self._actions(start[None], self.robot.grippers[None])
        path, _, _ = rest_to_rest(start, goal)
        rows = np.append(np.arange(RECORD_EVERY - 1, len(path) - 1, RECORD_EVERY), len(path) - 1)  # at the rate of the demonstrations, and the end itself
        return self._actions(path[rows], np.repeat(self.robot.grippers[None], len(rows), axis=0))

    def move(self, side: str, target: np.ndarray) -> np.ndarray:
        return self.go(**{side: target})

    def lift(self, side: str, height: float) -> np.ndarray:
        """Straight up, or down if negative, by `height` metres."""
        return self.shift(side, (0, 0, height))

    def shift(self, side: str, by: tuple[float, float, float]) -> np.ndarray:
        """By a displacement in the world."""
        return self.move(side, pose(by) @ self.robot.hand(side))

    def grip(self, side: str, value: float) -> np.ndarray:
        """Move one gripper to `value` (0 closed ... 1 open) and let it settle, the arms at rest."""
        count = GRIP_STEPS // RECORD_EVERY
        grippers = np.repeat(self.robot.grippers[None], count, axis=0)
        i = SIDES.index(side)
        grippers[:, i] += (value - grippers[:, i]) * np.minimum(1, np.arange(1, count + 1) / (count * 2 / 3))
        return self._actions(np.repeat(self.robot.joints[None], count, axis=0), grippers)

    def grasp_pose(self, side: str, thing: Thing, point: int = 0, back: float = 0.0) -> np.ndarray:
        """The pose of link6 [4, 4] that holds the object's contact point between the fingers, `back` metres back along the gripper.

        The first of ten that is within reach: as the contact frame says, then tipped over more and more.
        """
        contact = thing.point("contact", point)
        # gripper x = -y of the contact frame (towards the object), y = -z (the fingers open along it), z = +x
        straight = np.stack([-contact[:3, 1], -contact[:3, 2], contact[:3, 0]], axis=1)
        arm, start = self.robot.arms[side], self.robot.joints[:6] if side == "left" else self.robot.joints[6:]
        for tilt in TILTS:
            turn = Rotation.from_matrix(straight) * Rotation.from_euler("y", -tilt)
            target = pose(contact[:3, 3] - (TCP + back) * turn.as_matrix()[:, 0], turn)
            if arm.inverse(target, start).reached:
                return target
        raise Unreachable(f"the {side} hand cannot grasp {thing.name} at contact point {point}, at {np.round(contact[:3, 3], 3).tolist()}")

    def _actions(self, joints: np.ndarray, grippers: np.ndarray) -> np.ndarray:
        return self.simulation.encode(joints, grippers)


class ScriptedExpert:
    """The expert of whatever task the simulation runs."""

    def __init__(self, simulation: RoboTwin):
        self.simulation = simulation
        self._script: Iterator[np.ndarray] = iter(())

    def reset(self) -> None:
        self._script = self.simulation.task.expert(self.simulation.scene, Hands(self.simulation))

    def act(self) -> np.ndarray:
        """The next move of the script; when it is over (or out of reach), the robot stays where it is."""
        robot = self.simulation.scene.robot
        stay = self.simulation.encode(robot.joints[None], robot.grippers[None])
        try:
            return next(self._script, stay)
        except Unreachable:
            self._script = iter(())
            return stay
