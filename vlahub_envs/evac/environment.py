"""Imagined worlds as a VectorEnv: all worlds that still run are one batch of the video model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from vlahub.catalog import EnvCard
from vlahub.env import ChunkResult, Episode, checked_actions, checked_seed, own
from vlahub.observation import Observation, space_of, stack
from vlahub.vector import checked_mask, collate, per_env
from vlahub_envs.evac.model import WorldModel
from vlahub_envs.evac.simulation import Evac, Imagination
from vlahub_envs.evac.start_states import StartStates


class EvacVectorEnv(gymnasium.vector.VectorEnv):
    """A batch of imagined worlds, under the contract of `vlahub.vector.VectorEnv`.

    A finished world leaves the batch and costs nothing until it is reset. Members of a group share their start if they get the same seed, or the same task and
    trial; with the same seed they also share the imagination's noise, so that only their actions tell them apart.

    Args:
        card: its catalog card; None if the class is used directly.
        num_envs: worlds.
        model, starts, options: see `Imagination`; or `imagination`, one made already.
        render_mode: None or "rgb_array" (`render` gives the last imagined frames, upright).
        max_steps: control steps per episode, 256 as published. Chunks of the model's own length waste nothing.
        slots: equal parts that `send` and `recv` treat apart. Chunks run one after another in a background thread, so the policy can work meanwhile.
        autoreset_mode: only DISABLED; reset finished worlds with options["reset_mask"].
    """

    def __init__(
        self,
        card: EnvCard | None = None,
        num_envs: int = 1,
        *,
        model: WorldModel | str | Path | None = None,
        starts: StartStates | str | Path | None = None,
        imagination: Imagination | None = None,
        render_mode: str | None = None,
        max_steps: int | None = None,
        slots: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        **options: Any,
    ):
        self.closed = True  # until there is something to close
        self.card = card
        if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number of at least 1, not {num_envs!r}")
        if not 1 <= slots <= num_envs:
            raise ValueError(f"slots must be from 1 to num_envs={num_envs}, not {slots!r}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        if AutoresetMode(autoreset_mode) is not AutoresetMode.DISABLED:
            raise ValueError("imagined worlds are reset by hand: autoreset_mode must be DISABLED; pass options={'reset_mask': result.done} to reset")
        given = {**(card.kwargs if card else {}), **{name: value for name, value in (("model", model), ("starts", starts)) if value is not None}, **options}
        if imagination is None and given.get("model") is None:
            raise ValueError("an imagined environment needs a world model: model='user/name', a folder, or a WorldModel")
        self.imagination = imagination or Imagination(**given)
        self.num_envs, self.render_mode, self.autoreset_mode = int(num_envs), render_mode, AutoresetMode.DISABLED
        self.worlds = [Evac(imagination=self.imagination) for _ in range(num_envs)]
        self.episodes = [Episode(world, max_steps) for world in self.worlds]
        if self.imagination.strict:
            self.imagination.first = self.worlds[0]
        first = self.worlds[0]
        self.interface, self.tasks, self.trials, self.assets = first.interface, first.tasks, first.trials, first.assets
        self.max_steps = self.episodes[0].max_steps
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(self.interface.control_hz), "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = space_of(self.interface), self.interface.action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._slots = [range(part[0], part[-1] + 1) for part in np.array_split(range(num_envs), slots)]
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]  # per world: the seeds of unseeded resets
        self._pending: dict[int, Future[ChunkResult]] = {}
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
                if seeds[row] is not None:
                    self._generators[env] = seeding.np_random(seeds[row])[0]
                drawn = int(self._generators[env].integers(2**31)) if seeds[row] is None else seeds[row]
                infos[row] = self.episodes[env].reset(drawn, each[row])
        return self._observation(rows), collate(infos, len(rows))

    def step(self, actions: Any) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action [B, D] per world. It costs as much as a whole chunk: the model imagines nothing shorter."""
        rows = self._idle(None, "step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"step: actions have shape {actions.shape}, expected {self.action_space.shape}")
        over = [env for env in rows if self.episodes[env].done]
        if over and not self.imagination.strict:
            raise gymnasium.error.ResetNeeded(f"the episodes of envs {over} are over: reset them with options['reset_mask']")
        result = self._run(*self._checked(actions[:, None], rows, "step"), rows)
        return result.observation, result.reward[:, 0], result.terminated[:, 0], result.truncated[:, 0], result.info

    def render(self) -> tuple[np.ndarray | None, ...] | None:
        if self.render_mode is None:
            return None
        return tuple(None if self.worlds[env].start is None else self.worlds[env].render() for env in self._idle(None, "render"))

    def close_extras(self, **kwargs: Any) -> None:
        self._thread.shutdown(cancel_futures=True)
        for world in self.worlds:
            world.close()

    # ------------------------------------------------------------------------------------------------ chunks

    def step_chunk(self, actions: Any) -> ChunkResult:
        """Run actions [B, N, D] in every world and look at the end. A finished world runs nothing (length 0)."""
        rows = self._idle(None, "step_chunk")
        return self._run(*self._checked(actions, rows, "step_chunk"), rows)

    def send(self, actions: Any, slot: int = 0) -> None:
        """Start `step_chunk` in one slot and return at once."""
        rows = self._idle(slot, "send")
        self._pending[slot] = self._thread.submit(self._run, *self._checked(actions, rows, "send"), rows)

    def recv(self, slot: int = 0) -> ChunkResult:
        """Wait for what `send` started in this slot."""
        self.slot_envs(slot)
        if slot not in self._pending:
            raise gymnasium.error.NoAsyncCallError(f"recv({slot}) without a send to slot {slot}", "send")
        return self._pending.pop(slot).result()

    def slot_envs(self, slot: int) -> range:
        """The envs of a slot."""
        if isinstance(slot, bool) or not isinstance(slot, (int, np.integer)) or not 0 <= slot < len(self._slots):
            raise ValueError(f"slot must be a whole number from 0 to {len(self._slots) - 1}, not {slot!r}; the number of slots is an argument of the env")
        return self._slots[slot]

    def _checked(self, actions: Any, rows: range, where: str) -> tuple[np.ndarray, np.ndarray]:
        if all(self.worlds[env].start is None for env in rows):
            raise gymnasium.error.ResetNeeded(f"call reset() before {where}()")
        return checked_actions(actions, self.single_action_space, (len(rows),), where)

    def _run(self, actions: np.ndarray, clipped: np.ndarray, rows: range) -> ChunkResult:
        """Imagine one batch of all worlds that run, then let each episode book its own."""
        strict = self.imagination.strict
        live = [row for row, env in enumerate(rows) if not self.episodes[env].done]
        given = [actions[row] if strict else actions[row, : self.max_steps - self.episodes[rows[row]].steps] for row in live]
        if live:
            self.imagination.advance([self.worlds[rows[row]] for row in live], given)
        reward, length = np.zeros(actions.shape[:2], np.float32), np.zeros(len(rows), np.int64)
        terminated, truncated = np.zeros(actions.shape[:2], bool), np.zeros(actions.shape[:2], bool)
        infos: dict[int, dict[str, Any]] = {}
        for row, env in enumerate(rows):
            book = self._book_strict if strict else self.episodes[env].run
            reward[row], terminated[row], truncated[row], length[row], info = book(actions[row], env) if strict else book(actions[row])
            infos[row] = {**info, "aborted": False, **({"clipped": int(clipped[row])} if clipped[row] else {})}
        return ChunkResult(self._observation(rows), reward, terminated, truncated, length, collate(infos, len(rows)))

    def _book_strict(self, actions: np.ndarray, env: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[str, Any]]:
        """The published environment's flags: in the last column only, and worlds are imagined on after their end."""
        episode = self.episodes[env]
        outcomes = self.worlds[env].apply(actions)
        episode.steps += len(actions)
        episode.succeeded = episode.succeeded or bool(outcomes.success.any())
        truncated = np.zeros(len(actions), bool)
        truncated[-1] = episode.steps >= episode.max_steps
        return outcomes.reward, outcomes.terminated, truncated, len(actions), {**outcomes.info, "success": episode.succeeded, "steps": episode.steps}

    # ------------------------------------------------------------------------------------------------ bookkeeping

    def _idle(self, slot: int | None, where: str) -> range:
        """The envs of a slot, or all; none of them may be under way."""
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError(f"{where}() after close(): make a new environment")
        rows = range(self.num_envs) if slot is None else self.slot_envs(slot)
        busy = sorted(self._pending if slot is None else self._pending.keys() & {slot})
        if busy:
            raise gymnasium.error.AlreadyPendingCallError(f"{where}() while slot {busy[0]} is under way: call recv({busy[0]}) first", "send")
        return rows

    def _seeds(self, seed: Any, rows: range) -> list[int | None]:
        if seed is None:
            return [None] * len(rows)
        if isinstance(seed, (list, tuple, np.ndarray)):
            if len(seed) != len(rows):
                raise ValueError(f"seed has {len(seed)} entries for {len(rows)} envs")
            return [None if one is None else checked_seed(one) for one in seed]
        return [checked_seed(checked_seed(seed) + env) for env in rows]

    def _observation(self, rows: range) -> Observation:
        return stack([own(self.worlds[env].observe()) if self.worlds[env].start else self._nothing() for env in rows])

    def _nothing(self) -> Observation:
        """The observation of a world that was never reset."""
        spaces = self.single_observation_space.spaces
        return {name: "" if name == "task_descriptions" else np.zeros(space.shape, space.dtype) for name, space in spaces.items()}
