"""Imagined worlds as a VectorEnv: all worlds that still run are one batch of the video model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from vlahub import catalog
from vlahub.catalog import EnvCard
from vlahub.env import ChunkResult, own
from vlahub.observation import Observation, stack
from vlahub.vector import BaseVectorEnv, checked_mask, collate, per_env
from vlahub_envs.evac import memory
from vlahub_envs.evac.model import WorldModel
from vlahub_envs.evac.quirks import PublishedImagination
from vlahub_envs.evac.simulation import Imagination, upright
from vlahub_envs.evac.start_states import StartStates


class EvacVectorEnv(BaseVectorEnv):
    """A batch of imagined worlds, under the contract of `vlahub.vector.VectorEnv`.

    A finished world leaves the batch and costs nothing until it is reset. Members of a group share their start if they get the same seed, or the same task and
    trial; with the same seed they also share the imagination's noise, so that only their actions tell them apart.

    Args:
        card: its catalog card; None if the class is used directly.
        num_envs: worlds.
        model, starts, options: see `Imagination`; or `imagination`, one made already.
        strict_upstream_quirks: run the published environment's loop instead, defects included (docs/evac.md lists them). For comparisons only.
        render_mode: None or "rgb_array" (`render` gives the last imagined frames, upright).
        max_steps: control steps per episode, 256 as published. Chunks of the model's own length waste nothing.
        slots: equal parts that `send` and `recv` treat apart. Chunks run one after another in a background thread, so the policy can work meanwhile.
        autoreset_mode: Gymnasium's; in `step_chunk` a finished world runs nothing until it is reset, and no mode runs past an episode's end.
    """

    def __init__(
        self,
        card: EnvCard | None = None,
        num_envs: int = 1,
        *,
        model: WorldModel | str | Path | None = None,
        starts: StartStates | str | Path | None = None,
        imagination: Imagination | None = None,
        strict_upstream_quirks: bool = False,
        render_mode: str | None = None,
        max_steps: int | None = None,
        slots: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        **options: Any,
    ):
        self.closed = True  # until there is something to close
        self.card = card
        self._set_up(num_envs, slots, render_mode, autoreset_mode)
        known = inspect.signature(Imagination).parameters
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}; {catalog.suggest(name, [*known, *inspect.signature(EvacVectorEnv).parameters])}"
                )
        given = {**(card.kwargs if card else {}), **{name: value for name, value in (("model", model), ("starts", starts)) if value is not None}, **options}
        self.imagination = imagination or (PublishedImagination if strict_upstream_quirks else Imagination)(**given)
        model, at_once = self.imagination.model, min(num_envs, self.imagination.max_batch or num_envs)
        words = memory.check(model.config, model.unet.out[2].weight.dtype, model.device, at_once)
        if model.device.type == "cuda":
            print(words, flush=True)
        self.worlds = [self.imagination.world() for _ in range(num_envs)]
        self.episodes = [self.imagination.episode(world, max_steps) for world in self.worlds]
        self._describe(self.worlds[0])
        self.max_steps = self.episodes[0].max_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imagination")
        self.closed = False

    # ------------------------------------------------------------------------------------------------ Gymnasium's methods

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None, slot: int | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start episodes. Nothing is computed yet: first frames are encoded with the first chunk.

        Args:
            seed: an int s gives world i the seed s + i; a list gives each its own, None for a drawn one.
            options: `reset_mask`, bool [B], resets some worlds only. `task` and `trial` select start states; `image`, `pose` and `text` give one by hand.
                Lists and arrays have one entry per world.
            slot: reset within this slot only (masks, lists and the observation are of its size).
        """
        rows = self._idle(slot, "reset")
        options = dict(options or {})
        mask = checked_mask(options.pop("reset_mask", True), len(rows), "options['reset_mask']")
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no env")
        seeds, each = self._seeds(seed, rows), per_env(options, len(rows))
        infos = {}
        for row, env in enumerate(rows):
            if mask[row]:
                infos[row] = self.episodes[env].reset(self._seed(env, seeds[row]), each[row])
        self._started = True
        return self._observation(rows), collate(infos, len(rows))

    def step(self, actions: Any) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action [B, D] per world. It costs as much as a whole chunk: the model imagines nothing shorter."""
        rows = self._idle(None, "step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"step: actions have shape {actions.shape}, expected {self.action_space.shape}")
        checked = self._checked(actions[:, None], rows, "step")
        over = [env for env in rows if self.episodes[env].done]
        if over and self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            raise gymnasium.error.ResetNeeded(f"the episodes of envs {over} are over: reset them with options['reset_mask']")
        result = self._run(*checked)
        return result.observation, result.reward[:, 0], result.terminated[:, 0], result.truncated[:, 0], result.info

    def render(self, mask: Any = None) -> tuple[np.ndarray | None, ...] | None:
        """The last imagined frame per world, upright; None where a world was never reset or is left out by `mask` [B]."""
        if self.render_mode is None:
            return None
        rows = self._idle(None, "render")
        wanted = checked_mask(True if mask is None else mask, self.num_envs, "mask")
        return tuple(self.worlds[env].render() if wanted[env] and self.worlds[env].start else None for env in rows)

    def park(self) -> None:
        """Move the world model to the CPU. Its graphs read the weights where they lay, so they are made anew afterwards."""
        self._idle(None, "park")
        model = self.imagination.model
        self._home = model.device
        model.accelerate("off")
        model.to("cpu")

    def unpark(self) -> None:
        self.imagination.model.to(self._home)
        self.imagination.model.accelerate(self.imagination.acceleration)

    def close_extras(self, **kwargs: Any) -> None:
        self._thread.shutdown(cancel_futures=True)
        for world in self.worlds:
            world.close()

    # ------------------------------------------------------------------------------------------------ chunks

    def step_chunk(self, actions: Any, record: Any = None, record_every: int = 1) -> ChunkResult:
        """Run a chunk in every world and look at its end. A finished world runs nothing (length 0).

        Args:
            actions: [B, N, D] in env units; or a list of B chunks [n, D] of different lengths, where an empty one or None leaves the world as it is.
            record: bool [B], or True: bring back info["frames"], per world a list of pictures [H, W, 3] for people. They are imagined anyway.
            record_every: a picture after every so many control steps.
        """
        rows = self._idle(None, "step_chunk")
        return self._run(*self._checked(actions, rows, "step_chunk", record, record_every))

    def send(self, actions: Any, slot: int = 0, record: Any = None, record_every: int = 1) -> None:
        """Start `step_chunk` in one slot and return at once; its envs are `slot_envs(slot)`."""
        rows = self._idle(slot, "send")
        self._pending[slot] = self._thread.submit(self._run, *self._checked(actions, rows, "send", record, record_every))

    def recv(self, slot: int = 0) -> ChunkResult:
        """Wait for what `send` started in this slot."""
        self.slot_envs(slot)
        if slot not in self._pending:
            raise gymnasium.error.NoAsyncCallError(f"recv({slot}) without a send to slot {slot}", "send")
        return self._pending.pop(slot).result()

    def _checked(self, actions: Any, rows: range, where: str, record: Any = None, record_every: int = 1) -> tuple:
        """The arguments of `_run`."""
        chunks, clipped = self._checked_chunks(actions, rows, where)
        recorded = checked_mask(False if record is None else record, len(rows), "record")
        if record_every < 1:
            raise ValueError(f"record_every must be at least 1, not {record_every}")
        return chunks, clipped, rows, np.where(recorded, record_every, 0)

    def _run(self, chunks: Sequence[np.ndarray], clipped: Sequence[int], rows: range, record_every: np.ndarray) -> ChunkResult:
        """Imagine one batch of all worlds that run, then let each episode book its own. The autoreset mode's resets come before it, or after."""
        ended = [row for row, env in enumerate(rows) if self.episodes[env].done]
        live = [row for row, env in enumerate(rows) if not self.episodes[env].done and len(chunks[row])]
        left = [self.max_steps - self.episodes[rows[row]].steps if self.imagination.stops else None for row in live]
        if live:
            self.imagination.advance([self.worlds[rows[row]] for row in live], [chunks[row][:n] for row, n in zip(live, left, strict=True)])
        shape = len(rows), max(map(len, chunks))
        reward, length = np.zeros(shape, np.float32), np.zeros(len(rows), np.int64)
        terminated, truncated = np.zeros(shape, bool), np.zeros(shape, bool)
        infos: dict[int, dict[str, Any]] = {}
        for row, env in enumerate(rows):
            n = len(chunks[row])
            if row in ended and self.autoreset_mode is AutoresetMode.NEXT_STEP:
                info = self.episodes[env].reset(self._seed(env), {})
            elif n:
                reward[row, :n], terminated[row, :n], truncated[row, :n], length[row], info = self.episodes[env].run(chunks[row])
            else:
                info = {"success": self.episodes[env].succeeded, "steps": self.episodes[env].steps}
            infos[row] = {**info, "aborted": False}
            if clipped[row] and length[row]:
                infos[row]["clipped"] = int(clipped[row])
            if record_every[row] and length[row]:
                infos[row]["frames"] = [upright(frame) for frame in self.worlds[env].frames[record_every[row] - 1 : length[row] : record_every[row]]]
            if self.autoreset_mode is AutoresetMode.SAME_STEP and row not in ended and self.episodes[env].done:
                final = {"final_obs": own(self.worlds[env].observe()), "final_info": infos[row]}
                infos[row] = {**self.episodes[env].reset(self._seed(env), {}), "aborted": False, **final}
        return ChunkResult(self._observation(rows), reward, terminated, truncated, length, collate(infos, len(rows)))

    def _observation(self, rows: range) -> Observation:
        return stack([own(self.worlds[env].observe()) if self.worlds[env].start else self._nothing() for env in rows])

    def _nothing(self) -> Observation:
        """The observation of a world that was never reset."""
        spaces = self.single_observation_space.spaces
        return {name: "" if name == "task_descriptions" else np.zeros(space.shape, space.dtype) for name, space in spaces.items()}
