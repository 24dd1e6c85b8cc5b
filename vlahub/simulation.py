"""Simulation: the one thing that an environment family implements.

`apply` and `observe` are apart because a policy looks once per chunk: frames that nobody looks at are never rendered.
A whole chunk goes into `apply` because some families plan it as a whole (RoboTwin's time-parameterised path, EVAC's video chunk)
and others must know which step is the last one.

`vlahub.env.Env` makes a gymnasium.Env of one Simulation, `vlahub.vector.VectorEnv` a VectorEnv of many in worker processes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlahub.interface import Interface
from vlahub.observation import Observation


@dataclass
class Outcomes:
    """What happened in the `n <= N` control steps that `apply` ran (fewer if the episode ended inside the chunk)."""

    reward: np.ndarray  # [n] float32
    success: np.ndarray  # [n] bool, True from the step at which the task was solved
    terminated: np.ndarray | None = None  # [n] bool, the episode's end; None: it ends when solved
    info: dict[str, Any] = field(default_factory=dict)  # about the chunk; numbers, strings, small arrays


@runtime_checkable
class Simulation(Protocol):
    """One world. Not thread-safe; created, used and closed in one process.

    Attributes:
        interface: cameras, state, action; constant over the life of the simulation.
        max_steps: control steps after which an episode is cut (truncated); the environment counts them.
        tasks: number of tasks that `options={"task": i}` may select; `trials` likewise, or None if any number of trials exists.
        assets: which asset set is in use, for results and `vlahub doctor` ("official", "stand-in", ...).
    """

    interface: Interface
    max_steps: int
    tasks: int
    trials: int | None
    assets: str

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Start an episode. The same seed and options give the same world in any process. Returns info, with `task` and `trial` as chosen.

        Unknown options are an error that lists the known ones."""

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        """Run the control steps `actions` [N, D] (finite, within bounds), stopping where the episode terminates.

        Draws nothing unless `watch` is given: then it is called after every control step, so that a recorder can `render`."""

    def observe(self) -> Observation:
        """The cameras and the state as of the last step applied. Fresh arrays, or arrays that stay valid until the next observe."""

    def render(self) -> np.ndarray:
        """A picture for people, [H, W, 3] uint8, upright, as of the last step applied."""

    def close(self) -> None:
        """Free the GPU and the simulator. May be called twice."""


class Expert(Protocol):
    """A scripted controller with privileged access to one simulation: proves the task solvable and makes demonstrations."""

    def reset(self) -> None:
        """Called after the simulation's reset."""

    def act(self) -> np.ndarray:
        """The next chunk [n, D], n >= 1, in env units, from the simulation's present state."""


def check_options(options: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Refuse unknown reset options. `known` maps each name to its one-line meaning."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        meanings = "; ".join(f"{name!r}: {meaning}" for name, meaning in known.items())
        raise ValueError(f"unknown reset option{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; known are {meanings}")


def layout_of(seed: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(trial, layout) of an environment with one task and endless layouts: seed s, trial j is the layout of seed s + j. Refuses other tasks and trials."""
    if options.get("task", 0) != 0:
        raise ValueError(f"task {options['task']!r} is out of range; this environment has task 0 only")
    try:
        trial = operator.index(options.get("trial", 0))
    except TypeError:
        trial = -1
    if not 0 <= seed + trial < 2**32 or trial < 0:
        raise ValueError(f"trial must be a whole number >= 0, not {options['trial']!r}")
    return trial, seed + trial


def checked_size(size: Any, least: int = 16) -> tuple[int, int]:
    """`camera_size` as (height, width), or an error that says what it must be."""
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"camera_size must be (height, width) in pixels, not {size!r}") from None
    if not (least <= height <= 4096 and least <= width <= 4096):
        raise ValueError(f"camera_size must be (height, width), each from {least} to 4096 pixels, not {size!r}")
    return height, width
