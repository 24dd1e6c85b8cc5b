"""The scripted expert: proves the task solvable, and makes demonstrations.

Its action is a smooth function of what can be seen (the tool, the fingers, the object, the tray), without memory, phases or noise: that is what a policy without
memory can learn from few demonstrations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from vlahub_envs.twin.layout import BASE, TABLE_TOP
from vlahub_envs.twin.objects import THINGS

if TYPE_CHECKING:
    from vlahub_envs.twin.simulation import Twin

GAIN = 0.4  # of the way left, per step: the arm lags by more than a step, and at 0.5 the tool begins to overshoot visibly
MAX_STEP, MAX_TURN = 0.06, 0.1  # m, rad
HOVER = 0.10  # m, how high above the grasp the tool comes, and how high it carries
NEAR, STEEP = 0.010, 3.0  # m; the tool sinks by STEEP m per m that it comes closer, and is down at a distance of NEAR
LOWEST = 0.012  # m, of the tool above the table: the fingertips reach 9 mm further
PER_RADIAN = 0.03  # m: how far a hand that is turned by a radian counts as away
LIFT = 0.03  # m, of the object off the table before it is carried sideways at full speed
PRESS = 0.006  # m below the tray's floor that the object is lowered towards, so that it touches it in spite of the drives' give


class PickAndPlace:
    """Args: `simulation`, a `Twin`."""

    def __init__(self, simulation: Twin):
        self.simulation = simulation

    def reset(self) -> None:
        pass

    def act(self) -> np.ndarray:
        """[1, 7]: the next action, from the present state."""
        cell = self.simulation.cell
        state = cell.state()[0].numpy().astype(float)
        tool, hand = state[:3], Rotation.from_euler("xyz", state[3:6])
        thing = THINGS[int(cell.thing[0])]
        centre, turned = in_base(cell.thing_pose[0].numpy())
        tray, _ = in_base(cell.tray.pose.raw_pose[0].numpy())
        axes = turned.as_matrix() * (np.array(thing.size) / 2)  # columns: half of each side
        low = centre[2] - np.abs(axes[2]).sum()  # its lowest point, seen as a box
        info = cell.evaluate()
        if info["is_grasped"][0]:
            yaw = state[5]
            offset = tray[:2] - centre[:2]
            away = np.linalg.norm(offset)
            lifted = np.clip((low + BASE[2] - TABLE_TOP) / LIFT, 0, 1)
            down = tray[2] - PRESS - low
            goal = tool + np.array([*(lifted * offset), down + np.clip(STEEP * (away - 2 * NEAR), 0, HOVER)])
            grip = -1.0
        else:
            yaw = grasp_yaw(thing.shape, axes)
            away = np.linalg.norm(centre[:2] - tool[:2]) + PER_RADIAN * abs(yaw - state[5])
            bottom = max(centre[2], LOWEST + TABLE_TOP - BASE[2])
            goal = np.array([*centre[:2], bottom + np.clip(STEEP * (away - NEAR), 0, HOVER)])
            grip = -1.0 if away < 1.5 * NEAR and tool[2] - bottom < NEAR else 1.0
        step = GAIN * (goal - tool)
        step *= min(1, MAX_STEP / max(np.linalg.norm(step), 1e-9))
        down = Rotation.from_euler("xyz", [np.pi, 0, yaw])
        turn = np.clip(GAIN * (hand.inv() * down).as_euler("xyz"), -MAX_TURN, MAX_TURN)
        return np.array([[*step, *turn, grip]], np.float32)


def in_base(pose: np.ndarray) -> tuple[np.ndarray, Rotation]:
    """A world pose [7] in the robot's base, which is turned by 180 degrees about z."""
    back = Rotation.from_quat([0, 0, 1, 0])
    return back.apply(pose[:3] - BASE), back * Rotation.from_quat(np.roll(pose[3:], -1))


def grasp_yaw(shape: str, axes: np.ndarray) -> float:
    """The hand's yaw, from -90 to 90 degrees, at which the fingers close on the object's shorter side. They move along the tool's y."""
    if shape == "round":
        return 0.0
    flat = [axis for axis in axes.T if abs(axis[2]) < np.linalg.norm(axis) / 2]  # what lies level: two, whichever way the box lies
    thin = min(flat, key=np.linalg.norm)
    yaw = np.arctan2(thin[1], thin[0]) - np.pi / 2
    return (yaw + np.pi / 2 + 1e-3) % np.pi - np.pi / 2 - 1e-3  # a tie at 90 degrees always falls to the same side
