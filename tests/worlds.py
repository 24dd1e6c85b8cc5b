"""A small real task for tests: push a point to a coloured target. Fast, seeded, with every contract feature that the engine and the baselines touch."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlahub.catalog import EnvCard
from vlahub.interface import Camera, Field, Interface
from vlahub.observation import Observation
from vlahub.simulation import Outcomes, check_options

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
REACH = 0.1  # the target's radius; the square is [-1, 1] x [-1, 1]
SPEED = 0.2  # metres that an action of 1 moves


class PointWorld:
    """Args: `size` of the square image, `wrists` and `extras` more views, `cost` seconds of physics per step, `trouble` what option {"trouble": step} does then,
    `told` whether the state holds the target too, for policies that do not look at pictures."""

    max_steps, tasks, trials, assets = 20, len(COLOURS), None, "none"

    def __init__(self, size: int = 24, wrists: int = 0, extras: int = 0, cost: float = 0.0, trouble: str = "crash", told: bool = False):
        self.size, self.cost, self.trouble, self.told = size, cost, trouble, told
        cameras = [Camera(name, size, size) for name in ("top", *(f"wrist{i}" for i in range(wrists)), *(f"extra{i}" for i in range(extras)))]
        self.interface = Interface(
            main=cameras[0],
            wrists=tuple(cameras[1 : 1 + wrists]),
            extras=tuple(cameras[1 + wrists :]),
            state=tuple(Field(name, 2, "m", frame="world", low=-1, high=1) for name in ("position", "target")[: 1 + told]),
            action=(Field("step", 2, "1", reference="delta", frame="world", low=-1, high=1),),
            control_hz=10,
        )
        self.renders = 0  # how many pictures were drawn, for tests that count them
        self.position = self.target = np.zeros(2, np.float32)

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        check_options(options, {"task": "0-2, the target's colour", "trial": "number of the layout", "trouble": "control step at which to misbehave"})
        rng = np.random.default_rng([seed, options.get("trial", 0)])
        self.task = int(options.get("task", rng.integers(self.tasks)))
        if not 0 <= self.task < self.tasks:
            raise ValueError(f"task {self.task} is out of range; this environment has tasks 0 to {self.tasks - 1}")
        self.position, self.target = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        self.trouble_at, self.steps = options.get("trouble"), 0
        return {"task": self.task, "trial": options.get("trial", 0)}

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        rewards, successes = [], []
        for action in actions:
            self.steps += 1
            if self.trouble_at == self.steps:
                self._misbehave()
            if self.cost:
                time.sleep(self.cost)
            self.position = np.clip(self.position + SPEED * action, -1, 1).astype(np.float32)
            success = bool(np.linalg.norm(self.position - self.target) < REACH)
            rewards.append(float(success))
            successes.append(success)
            if watch:
                watch()
            if success:
                break
        return Outcomes(np.array(rewards, np.float32), np.array(successes))

    def _misbehave(self) -> None:
        if self.trouble == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.trouble == "hang":
            time.sleep(3600)
        raise RuntimeError("the world fell apart")

    def observe(self) -> Observation:
        image = self._draw()
        observation: Observation = {"main_images": image}
        if self.interface.wrists:
            wrists = np.stack([np.roll(image, i + 1, axis=0) for i in range(len(self.interface.wrists))])
            observation["wrist_images"] = wrists if len(wrists) > 1 else wrists[0]
        if self.interface.extras:
            observation["extra_view_images"] = np.stack([np.roll(image, i + 1, axis=1) for i in range(len(self.interface.extras))])
        state = np.concatenate([self.position, self.target]) if self.told else self.position.copy()
        return {**observation, "states": state, "task_descriptions": f"go to the {list(COLOURS)[self.task]} target"}

    def _draw(self) -> np.ndarray:
        self.renders += 1
        image = np.full((self.size, self.size, 3), 30, np.uint8)
        for point, colour in ((self.target, list(COLOURS.values())[self.task]), (self.position, (255, 255, 255))):
            x, y = ((point + 1) / 2 * (self.size - 3)).astype(int)
            image[y : y + 3, x : x + 3] = colour
        return image

    def render(self) -> np.ndarray:
        return self._draw()

    def close(self) -> None:
        pass


class PointExpert:
    """Walks straight to the target."""

    def __init__(self, simulation: PointWorld):
        self.simulation = simulation

    def reset(self) -> None:
        pass

    def act(self) -> np.ndarray:
        return np.clip((self.simulation.target - self.simulation.position) / SPEED, -1, 1)[None]


POINT = EnvCard(
    id="test/Point",
    family="test",
    simulation="tests.worlds:PointWorld",
    expert="tests.worlds:PointExpert",
    summary="Push a point to a coloured target.",
)

POINT_TOLD = dataclasses.replace(POINT, id="test/PointTold", kwargs={"told": True}, cheap=True)
