"""One Simulation as a gymnasium.Env, with `step_chunk` beside `step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from vlahub import catalog
from vlahub.observation import Observation, space_of
from vlahub.simulation import Outcomes, Simulation


@dataclass
class ChunkResult:
    """What `step_chunk` returns. `B` is absent in a single environment; N is the number of actions given.

    Flags stand at the sub-step where they happened; rewards after the first done are 0.
    """

    observation: Observation  # as of the last step run
    reward: np.ndarray  # [B, N] float32
    terminated: np.ndarray  # [B, N] bool
    truncated: np.ndarray  # [B, N] bool
    length: np.ndarray | int  # [B] control steps run, 0 <= length <= N
    info: dict[str, Any]

    @property
    def done(self) -> np.ndarray:
        """[B] bool: the episode ended in this chunk."""
        return (self.terminated | self.truncated).any(axis=-1)


def checked_actions(actions: Any, space: gymnasium.spaces.Box, batch: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Actions [*batch, N, D] as float32 within bounds, and how many numbers [*batch] had to be clipped.

    Finite numbers out of bounds are clipped, because published policies overshoot by a little; the count is reported in info["clipped"].
    Wrong shapes and types, NaN and infinities are errors.
    """
    actions = np.asarray(actions)
    dim = space.shape[0]
    if actions.dtype.kind not in "fiu":
        raise TypeError(f"{where}: actions must be numbers, not {actions.dtype}")
    if actions.ndim != len(batch) + 2 or actions.shape[: len(batch)] != batch or actions.shape[-1] != dim or actions.shape[-2] < 1:
        raise ValueError(f"{where}: actions have shape {actions.shape}, expected {(*batch, 'N', dim)} with N >= 1")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity and is refused as one
        actions = actions.astype(np.float32)
    if not np.isfinite(actions).all():
        bad = np.argwhere(~np.isfinite(actions))[0]
        raise ValueError(f"{where}: actions[{', '.join(map(str, bad))}] is {actions[tuple(bad)]}; every action must be finite")
    clipped = np.clip(actions, space.low, space.high)
    return clipped, (clipped != actions).sum(axis=(-2, -1))


def checked_seed(seed: Any) -> int:
    if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be a whole number from 0 to {2**31 - 1}, not {seed!r}")
    return int(seed)


class Episode:
    """One Simulation and the bookkeeping of its episode: seeds, the step count, the time limit. Shared by Env and the vector env's workers."""

    def __init__(self, simulation: Simulation, max_steps: int | None = None):
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {max_steps}")
        self.simulation = simulation
        self.max_steps = max_steps or simulation.max_steps
        self.steps = 0
        self.done = True  # until the first reset
        self.succeeded = False

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        self.done = True  # if the reset fails, the episode before it is over all the same
        info = {"seed": seed, **self.simulation.reset(seed, options)}
        self.steps, self.done, self.succeeded = 0, False, False
        return info

    def run(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[str, Any]]:
        """Run checked actions [N, D]; a finished episode runs none. -> reward [N], terminated [N], truncated [N], length, info."""
        count = len(actions)
        reward, terminated, truncated = np.zeros(count, np.float32), np.zeros(count, bool), np.zeros(count, bool)
        if self.done:
            return reward, terminated, truncated, 0, {"success": self.succeeded, "steps": self.steps}
        given = actions[: self.max_steps - self.steps]
        outcomes: Outcomes = self.simulation.apply(given, watch)
        ends = outcomes.success if outcomes.terminated is None else outcomes.terminated
        ran = len(outcomes.reward)
        if not 1 <= ran <= len(given) or len(outcomes.success) != ran or len(ends) != ran:
            raise RuntimeError(
                f"{type(self.simulation).__name__}.apply was given {len(given)} actions and returned {ran} rewards, {len(outcomes.success)} successes "
                f"and {len(ends)} ends; it must return one of each per control step that it ran, at least one"
            )
        # a simulation that cannot stop inside a chunk (a video model) reports all of it; the episode counts up to its first end
        length = int(np.argmax(ends)) + 1 if np.any(ends) else ran
        reward[:length], terminated[:length] = outcomes.reward[:length], ends[:length]
        self.steps += length
        self.succeeded = self.succeeded or bool(np.any(outcomes.success[:length]))
        truncated[length - 1] = self.steps >= self.max_steps and not terminated[length - 1]
        self.done = bool(terminated[length - 1] or truncated[length - 1])
        return reward, terminated, truncated, length, {**outcomes.info, "success": self.succeeded, "steps": self.steps}


class Env(gymnasium.Env):
    """A robot environment. `gym.make("vlahub/...")` returns this class, unwrapped.

    Beyond Gymnasium's methods: `step_chunk` runs several actions and looks once; `interface` says what cameras, states and actions mean;
    `assets` which asset set is in use.

    Args:
        simulation: the world.
        env_id: its id in the catalog.
        render_mode: None or "rgb_array" (what `render` returns: a picture for people).
        max_steps: control steps per episode; the simulation's own limit by default.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, simulation: Simulation, env_id: str = "", render_mode: str | None = None, max_steps: int | None = None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.simulation, self.env_id, self.render_mode = simulation, env_id, render_mode
        self.episode = Episode(simulation, max_steps)
        self.interface = simulation.interface
        self.observation_space = space_of(simulation.interface)
        self.action_space = simulation.interface.action_space()
        # Gymnasium's video tools read this; without a fixed rate a chunked path has no better answer than 20
        self.metadata = {**self.metadata, "render_fps": round(simulation.interface.control_hz or 20)}

    @property
    def assets(self) -> str:
        return self.simulation.assets

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. Without a seed, one is drawn from the generator that the last seed started; info["seed"] says which."""
        super().reset(seed=None if seed is None else checked_seed(seed))
        seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        info = self.episode.reset(seed, options or {})
        return own(self.simulation.observe()), info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        actions, clipped = checked_actions(np.asarray(action)[None], self.action_space, (), "step")
        self._require_running()
        reward, terminated, truncated, _, info = self.episode.run(actions)
        if clipped:
            info["clipped"] = int(clipped)
        return own(self.simulation.observe()), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def step_chunk(self, actions: Any, watch: Callable[[], None] | None = None) -> ChunkResult:
        """Run actions [N, D] and look once, at the end. Stops where the episode ends.

        Args:
            actions: the chunk, in env units.
            watch: called after every control step, for recorders that `render`; otherwise the steps between draw nothing.
        """
        actions, clipped = checked_actions(actions, self.action_space, (), "step_chunk")
        self._require_running()
        reward, terminated, truncated, length, info = self.episode.run(actions, watch)
        if clipped:
            info["clipped"] = int(clipped)
        return ChunkResult(own(self.simulation.observe()), reward, terminated, truncated, length, info)

    def render(self) -> np.ndarray | None:
        return self.simulation.render() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.simulation.close()

    def _require_running(self) -> None:
        if self.episode.done:
            raise gymnasium.error.ResetNeeded("the episode is over (or none was started): call reset() first")


def own(observation: Observation) -> Observation:
    """Copies of arrays that the simulation will write again."""
    return {key: value if isinstance(value, str) else np.array(value) for key, value in observation.items()}


def make(env_id: str, render_mode: str | None = None, max_steps: int | None = None, **options: Any) -> Env:
    """Entry point of every id in Gymnasium's registry."""
    return Env(catalog.make_simulation(env_id, **options), env_id=env_id, render_mode=render_mode, max_steps=max_steps)
