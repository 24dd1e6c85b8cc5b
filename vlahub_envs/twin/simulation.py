"""The Simulation behind vlahub/Twin-PickPlace and vlahub/Twin-PickPlace-Real."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np

from vlahub.catalog import suggest
from vlahub.interface import Camera, Field, Interface
from vlahub.observation import Observation
from vlahub.simulation import Outcomes, check_options, checked_size, layout_of
from vlahub_envs.robotwin.stage import render_system
from vlahub_envs.twin.gap import Gap
from vlahub_envs.twin.layout import INSTRUCTION
from vlahub_envs.twin.objects import NAMES


class Twin:
    """
    ## Description
    A Panda arm picks one of 25 objects from a table and puts it into a white tray. The layout, randomisation, controller, camera, instruction, success and reward
    are those of RLinf's `PandaPutOnPlateInScene25DigitalTwin-v1`, on ManiSkill 3 with PhysX on the CPU. `vlahub/Twin-PickPlace-Real` is the same cell with the gap
    of `vlahub_envs/twin/gap.py`.

    ## Action space
    `Box(7)`, one action is 0.2 s.

    | number | meaning |
    |---|---|
    | 0-2 | step of the tool's target along the base's x, y, z in m, -0.1 to 0.1 |
    | 3-5 | roll, pitch, yaw of the tool's target about its own axes in rad, -0.1 to 0.1 |
    | 6 | gripper from -1 (closed) to 1 (open) |

    The arm follows its target with a lag of about 0.25 s, as the real one does under impedance control.

    ## Observation space
    `main_images` (a fixed camera), `states` [7] (the tool's position and Euler angles in the base's frame, R = Rz Ry Rx, with a roll near -pi or pi, and the
    fingers' distance in m), `task_descriptions` (one sentence).

    ## Reward
    `"sparse"`: 0.2 at the first grasp, 1 at the first success, -0.4 when success is first lost. `"dense"`: 0 to 5 for the tool's way to the object, the grasp, and
    the way to the tray; `"normalized_dense"`: a fifth of it.

    ## Start
    The seed fixes the object, its place and yaw, and the tray's place. The arm is at home, the fingers half open.

    ## End
    Terminated when solved, unless `stop_when_solved` is False; truncated after 80 control steps. The object need not be let go.

    ## Arguments
    Args:
        cell: "twin" or "real"; the registered ids set it.
        camera_size: (height, width) of the picture. The height shows the same at any size, so other shapes than 3:4 show less or more at the sides.
        reward: "sparse", "dense" or "normalized_dense".
        stop_when_solved: end the episode at the first success; the published system goes on to step 80.
        assets: "auto" (the official release if it is on this machine, else stand-ins), "official", "stand-in", or the folder of the official release.
        gap: numbers of `Gap` that shall differ from the cell's, by name ({"delay": 0.1}).
        render_device: "cuda", "cuda:1", "cpu"; None takes a GPU if there is one.

    ## Options of reset
    `task`: 0, the only one. `trial`: number of the layout, counted from the seed's own: seed s, trial j is the layout of seed s + j. `object`: name of the object.

    ## Info
    From reset: `task`, `trial`, `object`. From steps: `grasped`.
    """

    tasks = 1
    trials = None

    def __init__(
        self,
        cell: Literal["twin", "real"] = "twin",
        camera_size: tuple[int, int] = (480, 640),
        reward: Literal["sparse", "dense", "normalized_dense"] = "sparse",
        stop_when_solved: bool = True,
        assets: str | os.PathLike = "auto",
        gap: Mapping[str, Any] | None = None,
        render_device: str | None = None,
    ):
        choices = {"cell": (cell, ("twin", "real")), "reward": (reward, ("sparse", "dense", "normalized_dense"))}
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")
        size = checked_size(camera_size)
        numbers = _checked_gap(cell, gap or {})
        render_system(render_device)  # first: its error says what to install, and the renderer is kept for every later scene of this process

        # ManiSkill reports at import and with every scene what it does without (no GPU, no pinocchio of its own): only errors concern our users
        logging.getLogger("mani_skill").setLevel(logging.ERROR)
        from vlahub_envs.twin.cell import MAX_STEPS, TwinPickPlace

        self.max_steps, self.stop_when_solved = MAX_STEPS, stop_when_solved
        self.interface = _interface(*size)
        self.cell = TwinPickPlace(
            obs_mode="none", reward_mode=reward, render_mode="rgb_array", sim_backend="physx_cpu", render_backend=_backend(render_device), camera_size=size,
            assets=assets, gap=numbers,
        )  # fmt: skip
        self.assets = self.cell.asset_set.name

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        meanings = {"task": "0, the only one of this environment", "trial": "number of the layout, counted from the seed's own", "object": "name of the object"}
        check_options(options, meanings)
        trial, layout = layout_of(seed, options)
        name = options.get("object")
        if name is not None and name not in NAMES:
            raise ValueError(f"there is no object {name!r}; {suggest(str(name), NAMES)}")
        self._running().reset(seed=layout, options={"object": name})
        return {"task": 0, "trial": trial, "object": NAMES[int(self.cell.thing[0])]}

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        rewards, success = [], []
        for action in actions:
            _, reward, _, _, info = self._running().step(action)
            rewards.append(float(reward[0]))
            success.append(bool(info["success"][0]))
            if watch:
                watch()
            if success[-1] and self.stop_when_solved:
                break
        solved = np.array(success)
        ends = solved if self.stop_when_solved else np.zeros_like(solved)
        return Outcomes(np.array(rewards, np.float32), solved, ends, {"grasped": bool(info["is_grasped"][0])})

    def observe(self) -> Observation:
        cell = self._running()
        return {"main_images": cell.look()[0].cpu().numpy(), "states": cell.measured_state()[0].numpy(), "task_descriptions": INSTRUCTION}

    def render(self) -> np.ndarray:
        return self._running().render_rgb_array()[0].cpu().numpy()

    def close(self) -> None:
        if self.cell is not None:
            self.cell.close()
            self.cell = None

    def _running(self) -> Any:
        if self.cell is None:
            raise RuntimeError("the environment is closed: make another one")
        return self.cell


def _backend(device: str | None) -> str:
    """ManiSkill's name of the device to draw on."""
    if device is None:
        import torch

        return "sapien_cuda" if torch.cuda.is_available() else "sapien_cpu"
    return device.replace("cuda", "sapien_cuda").replace("cpu", "sapien_cpu")


def _checked_gap(cell: str, numbers: Mapping[str, Any]) -> Gap:
    known = [field.name for field in fields(Gap)]
    for name in numbers:
        if name not in known:
            raise ValueError(f"gap has no number {name!r}; {suggest(str(name), known)}")
    return replace(Gap() if cell == "real" else Gap.none(), **numbers)


def _interface(height: int, width: int) -> Interface:
    return Interface(
        main=Camera("front", height, width),
        state=(
            # wider than anything that the arm can reach, noise included
            Field("position", 3, "m", frame="robot_base", low=-1.5, high=1.5),
            Field("rotation", 3, "rad", rotation="euler_xyz", frame="robot_base", low=-3.3, high=3.3),
            Field("gripper", 1, "m", low=-0.05, high=0.15, open=0.08, closed=0.0),
        ),
        action=(
            Field("position", 3, "m", reference="delta", frame="robot_base", low=-0.1, high=0.1),
            Field("rotation", 3, "rad", reference="delta", rotation="euler_xyz", frame="tool", low=-0.1, high=0.1),
            Field("gripper", 1, "1", low=-1, high=1, open=1, closed=-1),
        ),
        control_hz=5,
    )
