"""LIBERO on MuJoCo: the Simulation behind every vlahub/LIBERO-... id."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from vlahub.interface import Camera, Field, Interface
from vlahub.observation import Observation
from vlahub.simulation import Outcomes, check_options, checked_size
from vlahub_envs.libero import assets as asset_sets
from vlahub_envs.libero import upstream
from vlahub_envs.libero.scene import Scene, Shelf
from vlahub_envs.libero.upstream import LiberoTask

PEOPLE_SIZE = (480, 640)  # of `render`
SHELF = Shelf()


@dataclass(frozen=True)
class Protocol:
    """How a published evaluator runs an episode."""

    max_steps: Mapping[str, int]  # suite -> control steps of the policy
    settle: int  # steps before the policy's first, in which objects fall onto their surfaces; not counted
    grip: float  # the gripper's number in them


_OPENVLA = {"Spatial": 220, "Object": 280, "Goal": 300, "10": 520, "90": 400, "130": 520}
PROTOCOLS = {
    # Ours: openvla's limits. Groceries on the living-room table and on the floor start inside it and are thrown up; after 10 steps some still move by
    # 14 cm per step, after 20 all lie.
    "vlahub": Protocol(_OPENVLA, 20, -1.0),
    "openvla": Protocol(_OPENVLA, 10, -1.0),
    "openpi": Protocol(_OPENVLA, 10, -1.0),
    "lerobot": Protocol({**_OPENVLA, "Spatial": 280}, 10, -1.0),
    "rlinf": Protocol({"Spatial": 240, "Object": 240, "Goal": 320, "10": 512, "90": 512, "130": 512}, 15, 0.0),
}


class Libero:
    """
    ## Description
    A suite of the LIBERO benchmark: a Panda arm at a table, in a kitchen, a study, a living room or on the floor, with 10 tasks (Spatial, Object, Goal, 10),
    90, or all 130. Physics, controller, initial states and success are those of the installed `libero` and `robosuite` packages, on MuJoCo, at 20 Hz.

    ## Action space
    `Box(-1, 1, (7,))`

    | number | meaning |
    |---|---|
    | 0-2 | step of the hand in the world's x, y, z; 1 is 5 cm |
    | 3-5 | rotation vector of the hand's turn in the world's frame; 1 is 0.5 rad |
    | 6 | gripper: negative opens, positive closes, 0 holds; only the sign matters |

    An operational-space controller follows these with 150 s^-2 of stiffness, so that the hand lags: ten steps of 1 in x ask for 0.5 m and move 0.1 m.

    ## Observation space
    `main_images` (agentview) and `wrist_images` (eye_in_hand), both turned by 180 degrees from MuJoCo's bottom-up rows, which is upright but mirrored, as
    in all published training data; `states` [8]: position of the grip site, rotation vector of the hand (angle from 0 to 2 pi), two finger joints;
    `task_descriptions`.

    ## Reward
    1 at the step at which the task is solved, else 0.

    ## Start
    Initial state `trial` of the task's 50; the seed places the cabinets, stoves and racks, which are no part of it, by a few centimetres. Then the protocol's
    settle steps.

    ## End
    Terminated when solved; truncated after the protocol's limit.

    ## Arguments
    Args:
        suite: the registered ids set it.
        task: make an environment of this one task of the suite, its task 0; without it every episode draws its task.
        protocol: limits and settle steps of "vlahub", "openvla", "openpi", "lerobot" or "rlinf".
        camera_size: (height, width) of both images.
        wrist: offer the wrist camera; without it, a look costs half.
        assets: "auto" (the official release if it is on this machine, else stand-ins), "official", "stand-in", or the folder of the official release.
        models: how many compiled tasks to keep for each environment, about 100 MB each. Those of one process share them; the least recently used goes first, and comes back in 0.3 s.

    ## Options of reset
    `task`: number of the task in its suite. `trial`: 0 to 49, the initial state. What is not given is drawn from the seed.

    ## Info
    From reset: `task`, `trial`, `task_name`.
    """

    trials = upstream.TRIALS

    def __init__(
        self,
        suite: str,
        task: int | None = None,
        protocol: Literal["vlahub", "openvla", "openpi", "lerobot", "rlinf"] = "vlahub",
        camera_size: tuple[int, int] = (256, 256),
        wrist: bool = True,
        assets: str | os.PathLike = "auto",
        models: int = 4,
    ):
        self.scene: Scene | None = None
        self.models = 0  # until the end of this: nothing to close
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(map(repr, PROTOCOLS))}, not {protocol!r}")
        if isinstance(models, bool) or not isinstance(models, int) or models < 1:
            raise ValueError(f"models must be a whole number of at least 1, not {models!r}")
        self.suite, self.all_tasks = suite, upstream.tasks(suite)
        if task is not None:
            task = _index({"task": task}, "task", 0, _names(self.all_tasks))
            self.all_tasks = self.all_tasks[task : task + 1]
        self.tasks, self.protocol = len(self.all_tasks), PROTOCOLS[protocol]
        self.max_steps = self.protocol.max_steps[suite]
        self.size = checked_size(camera_size, least=1)
        self.interface = _interface(*self.size, wrist)
        self.assets, self.folder = asset_sets.find(assets)
        upstream.choose_gl()  # fail where the environment is made, not at the first picture
        self.models = models
        SHELF.resize(models)

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        check_options(options, {"task": f"0 to {self.tasks - 1}, the task", "trial": f"0 to {self.trials - 1}, the initial state"})
        random = np.random.default_rng(seed)
        drawn_task, drawn_trial = int(random.integers(self.tasks)), int(random.integers(self.trials))  # both, so that one option leaves the other's draw
        task = _index(options, "task", drawn_task, _names(self.all_tasks))
        trial = _index(options, "trial", drawn_trial, [""] * self.trials)
        self._put_back()
        chosen = self.all_tasks[task]
        self.scene = SHELF.take(self._key(chosen), lambda: Scene(chosen, self.folder, self.size, PEOPLE_SIZE))
        self.scene.reset(seed, trial, self.protocol.settle, self.protocol.grip)
        return {"task": task, "trial": trial, "task_name": self.scene.task.name}

    def _key(self, task: LiberoTask) -> Hashable:
        return str(task.bddl), str(self.folder), self.size

    def _put_back(self) -> None:
        if self.scene is not None:
            SHELF.put(self._key(self.scene.task), self.scene)
            self.scene = None

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        success = []
        for action in actions:
            success.append(self._running().step(action.astype(np.float64)))
            if watch:
                watch()
            if success[-1]:
                break
        return Outcomes(np.array(success, np.float32), np.array(success))

    def observe(self) -> Observation:
        scene = self._running()
        observation: Observation = {"main_images": scene.picture("agentview", self.size)[::-1, ::-1]}
        if self.interface.wrists:
            observation["wrist_images"] = scene.picture("eye_in_hand", self.size)[::-1, ::-1]
        return {**observation, "states": scene.state.astype(np.float32), "task_descriptions": scene.task.language}

    def render(self) -> np.ndarray:
        return np.ascontiguousarray(self._running().picture("agentview", PEOPLE_SIZE)[::-1])

    def close(self) -> None:
        self._put_back()
        SHELF.resize(-self.models)
        self.models = 0  # closing twice takes nothing twice

    def __del__(self):
        if not sys.is_finalizing():  # OpenGL may be gone by then
            self.close()

    def _running(self) -> Scene:
        if self.scene is None:
            raise RuntimeError("no episode was started, or the environment is closed: call reset() first")
        return self.scene


def _names(tasks: Sequence[LiberoTask]) -> list[str]:
    return [task.name for task in tasks]


def _index(options: Mapping[str, Any], name: str, drawn: int, known: Sequence[str]) -> int:
    """An option that counts, 0 to len(known) - 1, or what was drawn. `known` are the names of what it counts, if it has names."""
    if name not in options:
        return drawn
    given = options[name]
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        index = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {given!r}; {_valid(given, known)}") from None
    if not 0 <= index < len(known):
        raise ValueError(f"{name} {index} is out of range; {_valid(given, known)}")
    return index


def _valid(given: Any, known: Sequence[str]) -> str:
    """What could have been given: all names, or the nearest of many."""
    listed = f"valid are 0 to {len(known) - 1}"
    if not known[0]:
        return listed
    shown = known if len(known) <= 10 else get_close_matches(str(given).replace(" ", "_"), known, n=5, cutoff=0.4)
    return listed + "".join(f"\n    {known.index(one)} {one}" for one in shown)


def _interface(height: int, width: int, wrist: bool) -> Interface:
    return Interface(
        main=Camera("agentview", height, width, turned=180),
        wrists=(Camera("eye_in_hand", height, width, turned=180),) if wrist else (),
        state=(
            # wider than anything that the arm can reach
            Field("position", 3, "m", frame="world", low=-3, high=3),
            Field("rotation", 3, "rad", rotation="axis_angle", frame="world", low=-6.3, high=6.3),
            Field("fingers", 2, "m", low=-0.1, high=0.1),
        ),
        action=(
            Field("position", 3, "1", reference="delta", frame="world", low=-1, high=1),
            Field("rotation", 3, "1", reference="delta", rotation="axis_angle", frame="world", low=-1, high=1),
            Field("gripper", 1, "1", low=-1, high=1, open=-1, closed=1),
        ),
        control_hz=20,
    )
