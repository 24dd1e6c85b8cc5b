"""RoboTwin 2.0 on SAPIEN, without a clone, a planner or a download: the Simulation behind every vlahub/RoboTwin-... id."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vlahub.catalog import suggest
from vlahub.interface import Camera, Field, Interface
from vlahub.observation import Observation
from vlahub.simulation import Outcomes, check_options, checked_size, layout_of
from vlahub_envs.robotwin import assets as asset_sets
from vlahub_envs.robotwin import clutter
from vlahub_envs.robotwin import randomization as scenery
from vlahub_envs.robotwin.embodiments import find as find_embodiment
from vlahub_envs.robotwin.instructions import InstructionSet, instruction
from vlahub_envs.robotwin.kinematics import euler_of_pose, pose_of_euler
from vlahub_envs.robotwin.robot import SIDES, Robot
from vlahub_envs.robotwin.scene import Scene
from vlahub_envs.robotwin.task import Draws, Task
from vlahub_envs.robotwin.trajectory import HOLD_ALONE, HOLD_IN_CHUNK, plan

CAMERAS = ("head", "left_wrist", "right_wrist", "front")
PEOPLE_SIZE = (480, 640)  # of `render`


class RoboTwin:
    """
    ## Description
    A dual-arm tabletop task of the RoboTwin 2.0 benchmark: two 6-joint arms with parallel grippers (the "aloha-agilex" robot) at a table, physics at 250 Hz in
    SAPIEN on the CPU, drawn on a GPU or, without one, by a software Vulkan. In `vlahub/RoboTwin-ClickBell` a closed gripper presses a desk bell; docs/robotwin.md
    lists the other tasks.

    ## Action space
    `Box(14)`, absolute. Left arm, then right arm.

    | control_mode | numbers per arm | meaning |
    |---|---|---|
    | `"qpos"` | 6 joints, 1 gripper | joint positions in rad, -pi to pi; gripper 0 (closed) to 1 (open) |
    | `"ee_pose"` | x, y, z, roll, pitch, yaw, 1 gripper | world pose of the hand (`link6`) in m and rad, R = Rz(yaw) Ry(pitch) Rx(roll); solved by inverse kinematics, out of reach the nearest pose that is within |

    A chunk is one path in time: see `executor`.

    ## Observation space
    `main_images` (head camera), `wrist_images` (left, right), `extra_view_images` (front camera, if asked for), `states` [14] (joints and grippers as last
    commanded, in the layout of `"qpos"`), `task_descriptions`.

    ## Reward
    1 at the step at which the task is solved, else 0. The check runs after every physics step.

    ## Start
    The robot is at its home pose with open grippers. The seed fixes the layout, with the draws of upstream's generator in upstream's order, and the instruction.

    ## End
    Terminated when solved; truncated after `max_steps` control steps (400 to 1200, by task).

    ## Arguments
    Args:
        task: name of the task; the registered ids set it.
        control_mode: "qpos" or "ee_pose", see the action space.
        executor: "chunk" runs the actions given at once as one path through all of them, as RL systems do; "per_action" stops at each, as the benchmark does.
        cameras: which to draw, of "head" (always), "left_wrist", "right_wrist", "front".
        camera_size: (height, width) of every image.
        instruction_set: "seen" or "unseen" sentences and object descriptions; also the pictures of a randomized background.
        randomization: "clean"; "randomized" (table height, lights, backgrounds, clutter); or a dict of what differs from clean, see `Randomization`.
        embodiment: "aloha-agilex", or "franka-panda", two 7-joint arms.
        assets: "auto" (the official release if it is on this machine, else stand-ins), "official", "stand-in", or the folder of the official release.
        render_device: "cuda", "cuda:1", "cpu"; None takes a GPU if there is one.
        shader: SAPIEN's rasteriser, "minimal" or "default"; the pictures are nearly the same, the first takes three quarters of the time.
        strict_upstream_quirks: repeat the upstream errors that docs/robotwin.md lists; False corrects them.
        shadows: draw shadows. Off by default, also on a GPU: one checkpoint sees the same pictures everywhere.

    ## Options of reset
    `task`: 0, the only one. `trial`: number of the layout, counted from the seed's own: seed s, trial j is the layout of seed s + j.

    ## Info
    From reset: `task`, `trial`, `arm` words and objects as `stands_for`, `settled` (did the objects come to rest; upstream throws away a seed whose do not); unless
    clean also `scene`, what was drawn. From steps: `physics_steps`; with `"ee_pose"` also `unreachable`, how many hand poses of the chunk were out of reach, and
    `ik_error`, the largest distance in m between an asked and a commanded hand position.
    """

    tasks = 1
    trials = None

    def __init__(
        self,
        task: str = "ClickBell",
        control_mode: Literal["qpos", "ee_pose"] = "qpos",
        executor: Literal["chunk", "per_action"] = "chunk",
        cameras: Sequence[str] = ("head", "left_wrist", "right_wrist"),
        camera_size: tuple[int, int] = (240, 320),
        instruction_set: InstructionSet = "seen",
        randomization: str | Mapping[str, Any] = "clean",
        embodiment: str = "aloha-agilex",
        assets: str = "auto",
        render_device: str | None = None,
        shader: Literal["minimal", "default"] = "minimal",
        shadows: bool = False,
        strict_upstream_quirks: bool = False,
    ):
        choices = {
            "control_mode": (control_mode, ("qpos", "ee_pose")),
            "executor": (executor, ("chunk", "per_action")),
            "instruction_set": (instruction_set, ("seen", "unseen")),
            "shader": (shader, ("minimal", "default")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")
        self.control_mode, self.executor, self.instruction_set = control_mode, executor, instruction_set
        self.randomization = scenery.checked(randomization)
        height, width = checked_size(camera_size)
        names = _checked_cameras(cameras)
        kind = find_embodiment(embodiment)
        self.task = load_task(task)
        self.max_steps = self.task.step_limit
        asset_set = asset_sets.find(assets, tuple(self.task.objects))
        self.assets = asset_set.name
        self.scene = Scene(asset_set, render_device, shader, shadows, near_is_touching=strict_upstream_quirks, embodiment=kind)
        self.interface = _interface(control_mode, names, height, width, self.scene.robot)
        for name in self.interface.cameras:
            self.scene.stage.add_camera(name, height, width)
        self.instruction = ""
        self._clock, self._flicker = 0, None  # physics steps of the episode; its changing lights, if it has them
        self._distractors = clutter.candidates(asset_set, self.task.objects) if self.randomization.clutter else {}
        self._backgrounds = asset_sets.backgrounds(asset_set, instruction_set) if self.randomization.background else None

    def reset(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        check_options(options, {"task": "0, the only one of this environment", "trial": "number of the layout, counted from the seed's own"})
        trial, layout = layout_of(seed, options)
        draws = Draws(layout, self.randomization.table_height, self.randomization.camera_offset)
        self.scene.clear(draws.lowered)
        self._clock = 0
        stands_for = self.task.place(self.scene, draws)
        drawn = self._randomize(draws, layout)
        settled = self.scene.settle()
        self.scene.ready()
        self.instruction = instruction(self.task.sentences, self.instruction_set, stands_for, layout)
        words = ", ".join(f"{letter}={value}" for letter, value in stands_for.items())
        return {"task": 0, "trial": trial, "stands_for": words, "settled": settled, **drawn}

    def _randomize(self, draws: Draws, layout: int) -> dict[str, Any]:
        """Cameras, lights, backgrounds and clutter of a new episode, drawn after the task. -> info."""
        how, scene, random = self.randomization, self.scene, draws.random
        if how == scenery.NAMED["clean"]:
            return {}
        words = [f"table {1000 * draws.lowered:.0f} mm"]
        for name, offset in draws.offsets.items():
            if name in scene.stage.cameras:
                scene.stage.aim(name, offset)
        if how.lights:
            flickers = random.uniform() < how.flicker_rate
            lights = scenery.draw_lights(random)
            self._flicker = scenery.Flicker(layout) if flickers else None
            scene.stage.light(lights)
            words.append("lights flicker" if flickers else "lights drawn")
        if how.background:
            for name, number in scenery.draw_backgrounds(random, self.instruction_set, how.plain_rate).items():
                scene.stage.paint(name, None if number is None else scenery.picture(self.instruction_set, number, self._backgrounds))
                words.append(f"{name} {'plain' if number is None else f'{self.instruction_set}/{number}'}")
        if how.clutter and random.uniform() >= how.plain_rate:
            taken = [clutter.footprint(thing.model, thing.frame) for thing in scene.things.values()]
            strewn = clutter.strew(random, scene.assets, self._distractors, [*taken, *self.task.keep_free])
            for i, (model, where) in enumerate(strewn):
                scene.add(f"clutter {i}", model, where)
            words.append("clutter " + ", ".join(f"{model.name}/base{model.id}" for model, _ in strewn))
        return {"scene": "; ".join(words)}

    def apply(self, actions: np.ndarray, watch: Callable[[], None] | None = None) -> Outcomes:
        scene, robot = self.scene, self.scene.robot
        joints, grippers, info = self.decode(actions)
        joints, grippers = np.vstack([robot.joints, joints]), np.vstack([robot.grippers, grippers])  # [N + 1, 2 J], [N + 1, 2]
        if self.executor == "chunk":
            motions = iter([plan(joints, grippers, HOLD_IN_CHUNK)])
        else:
            motions = (plan(joints[i : i + 2], grippers[i : i + 2], HOLD_ALONE) for i in range(len(actions)))
        done, solved, physics_steps = 0, False, 0
        for motion in motions:
            begin = 0
            for end in motion.ends:
                for step in range(begin, end):
                    robot.command(motion.joints[step], motion.velocities[step], motion.grippers[step])
                    scene.step()
                    physics_steps += 1
                    self._clock += 1
                    solved = self.task.solved(scene)
                    if solved:
                        break
                begin = end
                done += 1
                if watch:
                    watch()
                if solved:
                    break
            if solved:
                break
        success = np.zeros(done, bool)
        success[-1] = solved
        return Outcomes(success.astype(np.float32), success, info={**info, "physics_steps": physics_steps})

    def decode(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Actions [N, D] -> joints [N, 2 J], grippers [N, 2], info."""
        robot = self.scene.robot
        arms = actions.astype(float).reshape(len(actions), 2, -1)  # N, arm, numbers
        grippers = arms[:, :, -1]
        if self.control_mode == "qpos":
            return arms[:, :, :-1].reshape(len(actions), -1), grippers, {}
        joints, unreachable, worst = np.zeros((len(arms), len(robot.home))), 0, 0.0
        present = robot.joints
        for i, row in enumerate(arms):
            for side, name in enumerate(SIDES):
                part = robot.part[name]
                solution = robot.arms[name].inverse(pose_of_euler(row[side]), present[part])
                joints[i, part] = solution.joints
                unreachable += not solution.reached
                worst = max(worst, solution.position_error)
            present = joints[i]
        return joints, grippers, {"unreachable": unreachable, "ik_error": worst}

    def encode(self, joints: np.ndarray, grippers: np.ndarray) -> np.ndarray:
        """Joints [N, 2 J] and grippers [N, 2] -> actions [N, D] of this control mode."""
        robot = self.scene.robot
        if self.control_mode == "qpos":
            arms = joints.reshape(len(joints), 2, -1)
        else:
            arms = np.array([[euler_of_pose(robot.arms[name].forward(row[robot.part[name]])) for name in SIDES] for row in joints])
        return np.concatenate([arms, grippers[:, :, None]], axis=-1).reshape(len(joints), -1).astype(np.float32)

    def observe(self) -> Observation:
        pictures = dict(zip(self.interface.cameras, self._pictures(tuple(self.interface.cameras)), strict=True))
        observation: Observation = {"main_images": np.ascontiguousarray(pictures["head"])}
        wrists = [pictures[camera.name] for camera in self.interface.wrists]
        if wrists:
            observation["wrist_images"] = np.stack(wrists) if len(wrists) > 1 else np.ascontiguousarray(wrists[0])
        if self.interface.extras:
            observation["extra_view_images"] = np.stack([pictures[camera.name] for camera in self.interface.extras])
        observation["states"] = self.scene.robot.state.astype(np.float32)
        observation["task_descriptions"] = self.instruction
        return observation

    def render(self) -> np.ndarray:
        if "people" not in self.scene.stage.cameras:
            self.scene.stage.add_camera("people", *PEOPLE_SIZE)
        return np.ascontiguousarray(self._pictures(("people",))[0])

    def _pictures(self, names: tuple[str, ...]) -> list[np.ndarray]:
        if self._flicker:
            self.scene.stage.light(self._flicker.at(self._clock))
        return self.scene.stage.pictures(names)

    def close(self) -> None:
        if self.scene is not None:
            self.scene.close()
            self.scene = None


def load_task(name: str) -> Task:
    """The task of a name such as "ClickBell"."""
    from vlahub_envs.robotwin import TASKS

    if name not in TASKS:
        raise ValueError(f"RoboTwin has no task {name!r}; {suggest(name, TASKS)}")
    module = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return getattr(importlib.import_module(f"vlahub_envs.robotwin.tasks.{module}"), name)()


def _interface(control_mode: str, cameras: tuple[str, ...], height: int, width: int, robot: Robot) -> Interface:
    def gripper(side: str) -> Field:
        return Field(f"{side}_gripper", 1, "1", low=0.0, high=1.0, open=1.0, closed=0.0)

    def bound(limits: np.ndarray, sign: int) -> float | tuple[float, ...]:
        """Where a joint turns freely, more than half a turn either way reaches nothing new."""
        values = np.where(np.isinf(limits), sign * np.pi, limits).tolist()
        return values[0] if len(set(values)) == 1 else tuple(values)

    joints = tuple(
        field
        for side, arm in robot.arms.items()
        for field in (Field(f"{side}_joints", arm.count, "rad", low=bound(arm.low, -1), high=bound(arm.high, 1)), gripper(side))
    )
    hands = tuple(
        field
        for side in SIDES
        for field in (
            Field(f"{side}_position", 3, "m", frame="world", low=(-1.5, -1.5, 0.0), high=(1.5, 1.5, 2.0)),
            Field(f"{side}_rotation", 3, "rad", rotation="euler_xyz", frame="world", low=-np.pi, high=np.pi),
            gripper(side),
        )
    )
    views = {name: Camera(name, height, width) for name in cameras}
    return Interface(
        main=views["head"],
        wrists=tuple(views[name] for name in ("left_wrist", "right_wrist") if name in views),
        extras=tuple(views[name] for name in ("front",) if name in views),
        state=joints,
        action=joints if control_mode == "qpos" else hands,
        control_hz=None,  # an action lasts as long as the path to it takes
    )


def _checked_cameras(cameras: Sequence[str]) -> tuple[str, ...]:
    names = (cameras,) if isinstance(cameras, str) else tuple(cameras)
    for name in names:
        if name not in CAMERAS:
            raise ValueError(f"cameras: there is no camera {name!r}; {suggest(name, CAMERAS)}")
    if "head" not in names or len(set(names)) < len(names):
        raise ValueError(f"cameras must contain 'head' (main_images) and each name once, not {names}")
    return names
