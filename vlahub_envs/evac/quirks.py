"""The loop of the published (and withdrawn) EVAC environment, defects included, for comparisons with it. docs/evac.md lists them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vlahub.env import Episode
from vlahub.observation import Observation
from vlahub.simulation import Outcomes
from vlahub_envs.evac.simulation import Evac, Imagination, state_of

REWARD = 5.0  # published coefficient of the differences between verdicts


class PublishedImagination(Imagination):
    """Imagines with the published poses and image tokens. Chunks must have the model's length."""

    stops = False
    first: Evac | None = None  # every world is shown this one's first frame

    def world(self) -> Evac:
        made = PublishedWorld(self)
        self.first = self.first or made
        return made

    def episode(self, world: Evac, max_steps: int | None) -> Episode:
        return PublishedEpisode(world, max_steps)

    def poses(self, worlds: list[Evac], actions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The published pose buffer takes predictions one row early: its row of the present frame holds the first of them, its last row the start pose for ever."""
        if any(len(given) != self.config.chunk for given in actions):
            raise ValueError(f"strict_upstream_quirks runs chunks of {self.config.chunk} actions only")
        reached = self.convert(np.stack([world.pose for world in worlds]), actions, normalised=False)
        last = np.stack([world.start.pose for world in worlds])[:, None]
        return reached, np.concatenate([reached, last], axis=1), np.concatenate([reached[:, 1:], last], axis=1)

    def tokens(self, world: Evac) -> torch.Tensor:
        """Those of the first world's first frame; after the first chunk, of that frame encoded and decoded."""
        shown = self.first
        if shown.latents is None:
            self._encode_starts([shown])
        if world.latents.shape[1] == self.config.memory:
            return shown.image_tokens
        return self.model.decoded_image_tokens(shown.latents[None, :, 0])[0]


class PublishedWorld(Evac):
    judged = np.float32(0)  # the last frame's verdict

    def reset(self, seed: int, options: Any) -> dict[str, Any]:
        info = super().reset(seed, options)
        self.judged = np.float32(0)
        return info

    def take(self, frames: np.ndarray, poses: np.ndarray, probability: np.ndarray) -> None:
        success = probability > self.imagination.threshold
        verdicts = success.astype(np.float32)
        terminated = np.zeros(len(success), bool)
        terminated[-1] = success.any()
        self.outcomes = Outcomes(REWARD * np.diff(verdicts, prepend=self.judged), success, terminated, {"success_probability": probability})
        self.judged, self.frames, self.frame = verdicts[-1], frames, frames[-1]
        self.pose = poses[0]  # the next chunk starts from the first pose of this one

    def observe(self) -> Observation:
        return {**super().observe(), "states": state_of(self.start.pose, self.imagination.config)}  # the last row of the buffer

    def buffer(self, reached: np.ndarray) -> np.ndarray:
        """The published pose buffer [m + c, 8] after a chunk that reached these poses."""
        return np.concatenate([[self.start.pose] * (self.imagination.config.memory - 1), reached, [self.start.pose]])


class PublishedEpisode(Episode):
    """Flags in the last column only, and no end: worlds are imagined on."""

    def run(self, actions: np.ndarray, watch: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[str, Any]]:
        outcomes = self.simulation.apply(actions, watch)
        self.steps += len(actions)
        self.succeeded = self.succeeded or bool(outcomes.success.any())
        truncated = np.zeros(len(actions), bool)
        truncated[-1] = self.steps >= self.max_steps
        return outcomes.reward, outcomes.terminated, truncated, len(actions), {**outcomes.info, "success": self.succeeded, "steps": self.steps}
