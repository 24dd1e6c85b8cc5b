"""Worlds that fail, and policies to run in them. Imported by worker processes, so it stays light."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import vlahub
from tests.worlds import SPEED, PointWorld
from vlahub.catalog import EnvCard


class FragileWorld(PointWorld):
    """Args: the world misbehaves in the `step`-th step of the `bad` trial of task 1 (-1: of all its trials); only the first time if `once` names a file to remember it by."""

    trials = 4

    def __init__(self, bad: int = 2, step: int = 1, once: str = "", trouble: str = "crash", cost: float = 0.0):
        super().__init__(trouble=trouble, cost=cost)
        self.bad, self.step, self.once = bad, step, once

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        info = super().reset(seed, options)
        if info["task"] == 1 and self.bad in (-1, info["trial"]) and not (self.once and Path(self.once).exists()):
            self.trouble_at = self.step
            if self.once:
                Path(self.once).touch()
        return info


FRAGILE = EnvCard(id="test/Fragile", family="test", simulation="tests.fragile:FragileWorld", expert="tests.worlds:PointExpert", summary="A world that fails.")


class Seeker:
    """Looks for the target in the picture and goes there, badly: noise of each episode's own seed and step. Notes what it was asked."""

    horizon, execute = 6, 3

    def __init__(self, noise: float = 0.9):
        self.interface, self.noise, self.asked, self.batches = PointWorld().interface, noise, [], []

    def act(self, observation: dict, seeds: list[tuple[int, int]]) -> np.ndarray:
        self.asked += seeds
        self.batches.append(len(seeds))
        assert len(seeds) == len(observation["task_descriptions"])
        chunks = []
        for image, position, seed in zip(observation["main_images"], observation["states"], seeds, strict=True):
            coloured = np.argwhere((image.max(-1) == 255) & (image.min(-1) == 0))  # the target's pixels; the point itself is white
            towards = np.zeros(2)
            if len(coloured):
                y, x = coloured.mean(0) - 1
                towards = np.array([x, y]) / (image.shape[0] - 3) * 2 - 1 - position
            rng = np.random.default_rng(seed)
            chunks.append(np.clip(towards / SPEED / 3 + self.noise * rng.standard_normal((self.horizon, 2)), -1, 1))
        return np.stack(chunks).astype(np.float32)


def stand_still(observation: dict) -> np.ndarray:
    return np.zeros((len(observation["task_descriptions"]), 5, 2), np.float32)


vlahub.register_env(FRAGILE)
