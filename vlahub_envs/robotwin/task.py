"""What a RoboTwin task is: where its objects go, when it is solved, what one says to ask for it, how a scripted expert does it.

A task is one file in `tasks/`: a subclass of `Task` with four short methods and its sentences. See `tasks/click_bell.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from vlahub_envs.robotwin.expert import Hands
    from vlahub_envs.robotwin.instructions import Sentences
    from vlahub_envs.robotwin.scene import Scene

OPEN, CLOSED = 0.8, 0.2  # a gripper is open above, closed below: of the commanded value, never of the fingers
SPAWN_HEIGHT = 0.741


UPRIGHT = Rotation.from_quat([0.5, 0.5, 0.5, 0.5])  # stands a y-up object up


def both_open(scene: Scene) -> bool:
    """Are both grippers commanded open? Most tasks ask for it, also of the hand that never moved."""
    return bool((scene.robot.grippers > OPEN).all())


def planar(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two positions, seen from above."""
    return float(np.hypot(*(np.asarray(a)[:2] - np.asarray(b)[:2])))


def side_of(position: np.ndarray) -> str:
    """The arm that is on the side of a position."""
    return "left" if position[0] < 0 else "right"


class Draws:
    """The random numbers of one layout, drawn as upstream draws them: numpy's legacy generator, one number after the other, the unused ones included."""

    def __init__(self, seed: int, table_height: float = 0.0, camera_offset: float = 0.0):
        self.random = np.random.RandomState(seed)
        self.lowered = self.random.uniform(-table_height, 0)  # m, <= 0: how the table stands. Drawn also where it always stands at its usual height
        self.offsets = {}  # m [3]: how far the two fixed cameras are off, by a direction and a length. Drawn also where the length is 0
        for name in ("head", "front"):
            direction = self.random.randn(3)
            self.offsets[name] = direction / np.linalg.norm(direction) * self.random.uniform(0, camera_offset)

    def choice(self, values: Sequence[int]) -> int:
        return int(self.random.choice(values, 1)[0])

    def uniform(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def place(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: float | tuple[float, float] = SPAWN_HEIGHT,
        base: Rotation | None = None,
        turn: tuple[float, float, float] | None = None,
        redraw_while: Callable[[np.ndarray], bool] = lambda position: False,
        near_in_the_middle: bool = False,
    ) -> sapien.Pose:
        """A pose, uniform within limits.

        Args:
            x, y: limits of the position. `z`: its height, or limits of it.
            base: the orientation to start from; upright for a y-up object by default.
            turn: half ranges of three Euler angles in the object's own frame, drawn even where one is 0. None draws none.
            redraw_while: draw again while this holds for the position.
            near_in_the_middle: within 0.15 m of the middle line, draw y again until it is not beyond 0, where neither arm reaches well.
        """
        base = UPRIGHT if base is None else base
        while True:
            position = np.array([self.random.uniform(*x), self.random.uniform(*y), 0])
            while near_in_the_middle and abs(position[0]) < 0.15 and position[1] > 0:
                position[1] = self.random.uniform(y[0], 0)
            position[2] = self.random.uniform(*(z if isinstance(z, tuple) else (z, z)))
            if turn is not None:
                angles = [self.random.uniform(-limit, limit) for limit in turn]
            if not redraw_while(position):
                break
        rotation = base if turn is None else base * Rotation.from_euler("xyz", angles)
        return sapien.Pose(position, np.roll(rotation.as_quat(), 1))


class Task:
    """One task. An instance belongs to one simulation; `place` starts an episode and may keep what the others need on `self`."""

    step_limit: int  # control steps per episode
    objects: dict[str, tuple[int, ...]]  # name of each object that may appear -> its models
    sentences: Sentences
    keep_free: tuple[tuple[float, float, float], ...] = ()  # x, y, radius in m: where clutter must not stand, besides around the objects

    def place(self, scene: Scene, draws: Draws) -> dict[str, str]:
        """Put the objects in. -> what the sentences' placeholders stand for: upper-case letters "050_bell/base0", lower-case ones "left" or "right"."""
        raise NotImplementedError

    def solved(self, scene: Scene) -> bool:
        """Is the task solved at this physics step? Asked after every one of them; the first yes counts."""
        raise NotImplementedError

    def expert(self, scene: Scene, hands: Hands) -> Iterator[np.ndarray]:
        """Solve it: chunks of actions, each planned from the state that the one before has led to."""
        raise NotImplementedError
