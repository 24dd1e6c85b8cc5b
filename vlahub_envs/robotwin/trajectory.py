"""From a chunk of joint actions to a drive target for every physics step: the time-optimal path under velocity and acceleration limits.

The chunk's waypoints are passed through without stopping; the chunk starts and ends at rest. Both arms share one clock, so that what the policy commands
together happens together. Each gripper goes from action to action in a straight line.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass

import numpy as np
import toppra
from toppra.algorithm import TOPPRA
from toppra.constraint import JointAccelerationConstraint, JointVelocityConstraint

TIMESTEP = 1 / 250  # s, one physics step
MAX_VELOCITY, MAX_ACCELERATION = 1.0, 1.0  # rad/s, rad/s^2, every arm joint
STILL = 1e-5  # rad: a smaller move is none
RECORD_EVERY = 15  # physics steps per recorded action of the demonstrations: 16.67 Hz
HOLD_IN_CHUNK = RECORD_EVERY  # physics steps of an action that moves no arm (a gripper closing), within a chunk
HOLD_ALONE = 50  # the same when every action is carried out by itself

logging.getLogger("toppra").setLevel(logging.ERROR)  # it warns of every path on which it has to try twice


@dataclass
class Motion:
    """Drive targets at S physics steps. Every action has at least one step."""

    joints: np.ndarray  # [S, 12]
    velocities: np.ndarray  # [S, 12]
    grippers: np.ndarray  # [S, 2]
    ends: np.ndarray  # [N] the number of steps after which action i is done; the last is S

    def __len__(self) -> int:
        return len(self.joints)


def plan(joints: np.ndarray, grippers: np.ndarray, hold: int = HOLD_IN_CHUNK) -> Motion:
    """The motion through the actions 1..N from the commanded state, row 0.

    Args:
        joints: [N + 1, 12] rad.
        grippers: [N + 1, 2].
        hold: physics steps of an action that moves no arm.
    """
    moves = np.abs(np.diff(joints, axis=0)).max(axis=1) > STILL  # [N]
    count = len(moves)
    positions, velocities, ends, i = [], [], [], 0
    while i < count:
        j = i + 1
        while j < count and moves[j] == moves[i]:
            j += 1
        done = ends[-1] if ends else 0
        if moves[i]:
            path, speed, steps = rest_to_rest(joints[i], joints[j]) if j == i + 1 else through(joints[i : j + 1])
        else:
            path, speed, steps = np.repeat(joints[i + 1 : j + 1], hold, axis=0), np.zeros(((j - i) * hold, joints.shape[1])), hold * np.arange(1, j - i + 1)
        positions.append(path)
        velocities.append(speed)
        ends.extend(done + steps)
        i = j
    ends = np.array(ends)
    starts = np.concatenate([[0], ends])
    clock = np.arange(1, ends[-1] + 1)
    gripper = np.stack([np.interp(clock, starts, grippers[:, side]) for side in range(2)], axis=1)
    return Motion(np.concatenate(positions), np.concatenate(velocities), gripper, ends)


def rest_to_rest(start: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along a straight joint line: a trapezoid of velocity, in closed form. -> positions [S, 12], velocities [S, 12], ends [1]."""
    distance = float(np.abs(goal - start).max())
    ramp = min(MAX_VELOCITY / MAX_ACCELERATION, math.sqrt(distance / MAX_ACCELERATION))  # s of speeding up, and again of slowing down
    top = ramp * MAX_ACCELERATION
    duration = distance / top + ramp
    time = _clock(duration)
    speeding, slowing = np.minimum(time, ramp), np.minimum(duration - time, ramp)
    speed = top * np.minimum(1, np.minimum(time, duration - time) / ramp)
    middle = np.clip(time - ramp, 0, duration - 2 * ramp)
    way = MAX_ACCELERATION * speeding**2 / 2 + top * middle + np.where(time > duration - ramp, top * ramp / 2 - MAX_ACCELERATION * slowing**2 / 2, 0)
    direction = (goal - start) / distance
    positions = start + way[:, None] * direction
    positions[-1] = goal
    return positions, speed[:, None] * direction, np.array([len(time)])


def through(waypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along the cubic spline through `waypoints` [M + 1, 12]. -> positions [S, 12], velocities [S, 12], ends [M]."""
    count, size = len(waypoints) - 1, waypoints.shape[1]
    path = toppra.SplineInterpolator(np.linspace(0, 1, count + 1), waypoints)
    limits = [JointVelocityConstraint(np.full(size, MAX_VELOCITY)), JointAccelerationConstraint(np.full(size, MAX_ACCELERATION))]
    planner = TOPPRA(limits, path, parametrizer="ParametrizeConstAccel")
    trajectory = planner.compute_trajectory()
    if trajectory is None:  # numerically degenerate (a path that doubles back on itself): stop at every waypoint instead
        parts = [rest_to_rest(a, b) for a, b in itertools.pairwise(waypoints)]
        return np.concatenate([p for p, _, _ in parts]), np.concatenate([v for _, v, _ in parts]), np.cumsum([n[0] for _, _, n in parts])
    time = _clock(trajectory.duration)
    positions, velocities = trajectory(time), trajectory(time, 1)
    positions[-1], velocities[-1] = waypoints[-1], 0
    # When is waypoint i passed? The path parameter grows with the square root of its squared speed, sampled on the planner's grid.
    grid, speed = planner.problem_data.gridpoints, planner.problem_data.sd_vec
    passed = np.concatenate([[0], np.cumsum(2 * np.diff(grid) / np.maximum(speed[1:] + speed[:-1], 1e-9))])
    ends = np.ceil(np.interp(np.arange(1, count + 1) / count, grid, passed) / TIMESTEP - 1e-6).astype(int)
    # Every action has a step of its own, even where two waypoints are passed within one.
    ends = np.clip(np.maximum.accumulate(ends - np.arange(count)) + np.arange(count), 1, None)
    ends = np.minimum(ends, len(time) - np.arange(count)[::-1])
    if ends[0] < 1:  # more actions than physics steps: a path too short for them
        extra = 1 - ends[0]
        positions = np.concatenate([positions, np.repeat(positions[-1:], extra, axis=0)])
        velocities = np.concatenate([velocities, np.zeros((extra, size))])
        ends = np.arange(1, count + 1)
    ends[-1] = len(positions)
    return positions, velocities, ends


def _clock(duration: float) -> np.ndarray:
    """The times of the physics steps of a motion; the last is its end."""
    return np.minimum(np.arange(1, max(1, math.ceil(duration / TIMESTEP - 1e-9)) + 1) * TIMESTEP, duration)
