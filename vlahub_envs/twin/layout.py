"""Where things stand: the cell's fixed poses, and what an episode draws. Metres and radians in the world's frame: z up, the robot looks along -x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

TABLE_TOP = 0.87
BASE = (0.3, 0.028, 0.87)  # of the robot, which is turned by 180 degrees about z: its x is 0.3 - x, its y 0.028 - y
HOME = (0.0, 0.259, 0.0, -2.289, 0.0, 2.515, np.pi / 4, 0.04, 0.015)  # 7 joints, 2 fingers; the tool then stands at (0.525, 0, 0.132) in the base's frame
INSTRUCTION = "Pick up the object on the table and place it into the white tray."


@dataclass(frozen=True)
class Camera:
    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]  # w, x, y, z; the camera looks along its x, its z is up
    fovy: float


FRONT = Camera((0.184, 0.200, 1.400), (0.2541, 0.3510, 0.1361, -0.8909), 0.81)  # "c19_front_view" of the real cell
NEAR, FAR = 0.1, 1000.0


def _grid(centre: tuple[float, float], half: tuple[float, float]) -> np.ndarray:
    """[36, 2]: 6 x 6 places."""
    side = np.linspace(-1, 1, 6)
    return np.array([[centre[0] + x * half[0], centre[1] + y * half[1]] for x in side for y in side])


OBJECT_PLACES = _grid((-0.098, -0.165), (0.1, 0.1))
TRAY_PLACES = _grid((-0.148, 0.06), (0.05, 0.075))
MIN_DISTANCE = 0.07
# [1246, 2]: (object place, tray place). Equal numbers are left out, as they are where both things share one grid
PAIRS = np.array([(i, j) for i in range(36) for j in range(36) if i != j and np.linalg.norm(OBJECT_PLACES[i] - TRAY_PLACES[j]) > MIN_DISTANCE])
YAWS = np.deg2rad([45, 0, 90, -45])


class Integers(Protocol):
    """What `draw` needs of a generator: numpy's RandomState, or one row of ManiSkill's batched one."""

    def randint(self, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Layout:
    """One episode's start."""

    thing: int  # number of the object
    place: tuple[float, float]  # of the object
    yaw: float  # of the object, without its own offset
    tray: tuple[float, float]


def draw(random: Integers, things: int) -> Layout:
    """A layout, uniformly from things x 1246 x 4."""
    thing, pair, yaw = (int(random.randint(0, count)) for count in (things, len(PAIRS), len(YAWS)))
    i, j = PAIRS[pair]
    return Layout(thing, tuple(map(float, OBJECT_PLACES[i])), float(YAWS[yaw]), tuple(map(float, TRAY_PLACES[j])))


def overlap(place: tuple[float, float], yaw: float, size: tuple[float, ...], tray: tuple[float, float], side: float, margin: float = 0.005) -> bool:
    """Does an object's footprint reach over the tray's, seen from above? Two rectangles are apart if their shadows are, along an axis of one of them."""
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    corners = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    object_corners = place + (corners * np.array(size[:2]) / 2) @ turn.T
    tray_corners = tray + corners * side / 2
    for axis in (*np.eye(2), *turn.T):
        a, b = object_corners @ axis, tray_corners @ axis
        if a.min() > b.max() + margin or b.min() > a.max() + margin:
            return False
    return True
