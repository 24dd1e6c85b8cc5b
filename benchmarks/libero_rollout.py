"""LIBERO's speed: vlahub's VectorEnv, LIBERO's own SubprocVectorEnv, and Gymnasium's AsyncVectorEnv around the stock environment, in one call.

    python benchmarks/libero_rollout.py                      # 2 workers, one task, chunk 8, two cameras of 256 pixels
    python benchmarks/libero_rollout.py --envs 16 --chunks 20 --rounds 2

All three draw the same assets on the same task. A round is an episode start (reset, initial state, 10 settle steps) and `chunks` chunks of random actions.
The stock environments draw every step, as they always do; ours draws where a policy looks. Steps per second count the policy's control steps. "CPU" is the
processor time of all processes, which other programs on the machine do not change. Last, where our time goes, and the least that each part could take.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import tyro

import vlahub  # noqa: F401  registers the ids
from vlahub.observation import Observation
from vlahub_envs.libero import assets, upstream

SETTLE = np.array([0] * 6 + [-1], np.float32)


@dataclass
class Args:
    """What to measure."""

    suite: str = "Spatial"
    """Spatial, Object, Goal, 10 or 90"""
    task: int = 0
    """number of the task in its suite"""
    envs: int = 2
    """worker processes"""
    chunks: int = 4
    """chunks per episode"""
    chunk: int = 8
    """control steps per chunk"""
    rounds: int = 1
    """episodes that are timed, after one that is not"""
    size: int = 256
    """height and width of both images"""
    split_by: Literal["wall", "cpu"] = "wall"
    """the clock of the last table; cpu on a busy machine that draws without a GPU"""
    out: Path | None = None
    """write the figures here as JSON"""


class Stock(gym.Env):
    """The stock environment as evaluators use it: a hard reset, then the initial state."""

    def __init__(self, args: Args):
        _, folder = assets.find("auto")
        libero = upstream.load()
        libero.libero._assets_path_cache = str(folder)
        from libero.libero.envs import OffScreenRenderEnv

        task = upstream.tasks(args.suite)[args.task]
        self.env = OffScreenRenderEnv(bddl_file_name=str(task.bddl), camera_heights=args.size, camera_widths=args.size)
        self.states, self.trial = upstream.initial_states(task.init), 0
        image = gym.spaces.Box(0, 255, (args.size, args.size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(main_images=image, wrist_images=image, states=gym.spaces.Box(-np.inf, np.inf, (8,), np.float64))
        self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.env.reset()
        self.trial = (self.trial + 1) % upstream.TRIALS
        return self._view(self.env.set_init_state(self.states[self.trial])), {}

    def step(self, action):
        observation, reward, done, _ = self.env.step(action)
        return self._view(observation), reward, bool(done), False, {}

    def _view(self, seen: dict) -> Observation:
        state = np.concatenate([seen["robot0_eef_pos"], seen["robot0_eef_quat"][:3], seen["robot0_gripper_qpos"]])
        return {"main_images": seen["agentview_image"], "wrist_images": seen["robot0_eye_in_hand_image"], "states": state}

    def seed(self, seed=None):
        self.env.seed(seed)

    def close(self):
        self.env.close()


def cpu_seconds() -> float:
    """Processor time that this process and all below it have used so far."""
    parents, used = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        number = int(file.parent.name)
        parents[number], used[number] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def below(number: int) -> bool:
        while number not in (0, os.getpid()):
            number = parents.get(number, 0)
        return number != 0

    return sum(seconds for number, seconds in used.items() if below(number))


def timed(name: str, args: Args, start, run) -> dict[str, float]:
    """Seconds per episode start and control steps per second, after one round that is not timed."""
    random, starts, steps, cpu = np.random.default_rng(0), 0.0, 0.0, [0.0, 0.0]
    for number in range(args.rounds + 1):
        before, began = cpu_seconds(), time.perf_counter()
        start(number)
        between, ready = cpu_seconds(), time.perf_counter()
        for _ in range(args.chunks):
            run(random.uniform(-1, 1, (args.envs, args.chunk, 7)).astype(np.float32))
        if number:
            starts += ready - began
            steps += time.perf_counter() - ready
            cpu = [cpu[0] + between - before, cpu[1] + cpu_seconds() - between]
    count = args.rounds * args.envs * args.chunks * args.chunk
    figures = {
        "episode start, s": starts / args.rounds,
        "control steps/s": count / steps,
        "control steps/s with starts": count / (steps + starts),
        "CPU ms per episode start": 1000 * cpu[0] / args.rounds / args.envs,
        "CPU ms per control step": 1000 * cpu[1] / count,
        "CPU ms per control step with starts": 1000 * sum(cpu) / count,
    }
    print(f"{name:26}" + "".join(f"{key}: {value:.2f}   " for key, value in figures.items()), flush=True)
    return figures


def ours(args: Args) -> dict[str, float]:
    options = {"protocol": "openvla", "camera_size": (args.size, args.size)}
    # episodes must outlast the rounds, or finished environments would stand still
    env = gym.make_vec(f"vlahub/LIBERO-{args.suite}", num_envs=args.envs, max_steps=10**6, **options)
    try:
        return timed(
            "vlahub.VectorEnv", args, lambda number: env.reset(seed=number, options={"task": args.task, "trial": number % upstream.TRIALS}), env.step_chunk
        )
    finally:
        env.close()


def stock(name: str, args: Args, env) -> dict[str, float]:
    """The same rounds on a vector env of stock environments, which knows steps only."""

    def start(number: int) -> None:
        env.reset()
        for _ in range(10):
            env.step(np.tile(SETTLE, (args.envs, 1)))

    def run(actions: np.ndarray) -> None:
        for action in actions.transpose(1, 0, 2):
            env.step(action)

    try:
        return timed(name, args, start, run)
    finally:
        env.close()


def libero_own(args: Args) -> dict[str, float]:
    from libero.libero.envs import SubprocVectorEnv

    return stock("LIBERO SubprocVectorEnv", args, SubprocVectorEnv([lambda: Stock(args)] * args.envs))


def gymnasium_async(args: Args) -> dict[str, float]:
    mode = gym.vector.AutoresetMode.DISABLED
    return stock("gymnasium AsyncVectorEnv", args, gym.vector.AsyncVectorEnv([lambda: Stock(args)] * args.envs, context="spawn", autoreset_mode=mode))


# ------------------------------------------------------------------------------------------------ where our time goes


def split(args: Args) -> dict[str, tuple[float, float]]:
    """Part -> (what it takes, the least that it could), both in ms per chunk of one worker. Medians over chunks of random actions."""
    import mujoco
    from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

    from vlahub_envs.libero import control
    from vlahub_envs.libero.simulation import Libero

    world = Libero(args.suite, protocol="openvla", camera_size=(args.size, args.size))
    world.reset(0, {"task": args.task, "trial": 0})
    world.observe()
    scene, random, rows = world.scene, np.random.default_rng(0), []
    model, data, arm, painter = scene.model, scene.data, scene.controller, scene.painter
    before, picture, run = mujoco.MjData(model), np.empty((args.size, args.size, 3), np.uint8), control._run
    viewport = mujoco.MjrRect(0, 0, args.size, args.size)

    def recording(*given) -> None:
        *given, count, begun = given
        for substep in range(count):
            run(*given, 1, begun and substep == 0)
            rows.append(data.ctrl.copy())

    def physics() -> None:
        for row in rows:
            data.ctrl[:] = row
            mujoco.mj_step(model, data)

    def kernels() -> None:
        now, goal = arm.now, arm.goal
        for _ in rows:
            orientation_error(goal.rotation, now.rotation)
            nullspace = opspace_matrices(now.mass, now.j_full, now.j_position, now.j_rotation)[3]
            nullspace_torques(now.mass, nullspace, goal.rest, now.joints, now.speeds)

    def paint() -> None:
        mujoco.mjr_render(viewport, painter.scene, painter.context)
        mujoco.mjr_readPixels(picture, None, viewport, painter.context)

    now = time.perf_counter if args.split_by == "wall" else time.process_time

    def clock(function, *given) -> float:
        began = now()
        function(*given)
        return 1000 * (now() - began)

    found = []
    for _ in range(16):
        actions = random.uniform(-1, 1, (args.chunk, 7)).astype(np.float32)
        mujoco.mj_copyData(before, model, data)
        grip, ticks = arm.goal.grip.copy(), copy.copy(scene.clock)
        rows.clear()
        control._run = recording
        world.apply(actions)
        control._run = run
        after = data.qpos.copy()
        mujoco.mj_copyData(data, model, before)
        arm.goal.grip[:], scene.clock = grip, ticks
        applied = clock(world.apply, actions)
        mujoco.mj_copyData(data, model, before)
        stepped = clock(physics)
        assert np.array_equal(data.qpos, after), "the floor is not the same physics"
        seen, painted = clock(world.observe), 0.0
        for camera in ("agentview", "eye_in_hand"):
            scene.picture(camera, world.size)
            painted += clock(paint)
        found.append((stepped, applied - stepped, seen, stepped, clock(kernels), painted))
    world.close()
    medians = np.median(found, axis=0)
    parts = dict(zip(("physics", "control", "rendering"), zip(medians[:3], medians[3:], strict=True), strict=True))
    env = gym.make_vec(f"vlahub/LIBERO-{args.suite}", num_envs=1, max_steps=1, camera_size=(args.size, args.size))
    try:
        env.reset(seed=0, options={"task": args.task})
        env.step_chunk(np.zeros((1, 1, 7), np.float32))
        actions = np.zeros((1, args.chunk, 7), np.float32)  # of an episode that is over: nothing runs or is drawn, and what was seen last travels again
        seen = env.step_chunk(actions).observation
        there = {key: value.copy() for key, value in seen.items() if key != "task_descriptions"}
        floor = [clock(lambda: [np.copyto(there[key], seen[key]) for key in there]) for _ in range(200)]
        before = cpu_seconds()
        waited = np.median([clock(env.step_chunk, actions) for _ in range(200)])
        parts["transfer"] = (waited if args.split_by == "wall" else 5 * (cpu_seconds() - before), np.median(floor))
    finally:
        env.close()
    return parts


def main(args: Args) -> None:
    print(f"LIBERO-{args.suite} task {args.task}, {assets.find('auto')[0]} assets, {args.envs} workers, {os.cpu_count()} cores, GL {upstream.choose_gl()}")
    upstream.load()
    figures = {"vlahub": ours(args), "libero": libero_own(args), "gymnasium": gymnasium_async(args)}
    ratios = {}
    for key, mine in figures["vlahub"].items():
        peers = figures["libero"][key], figures["gymnasium"][key]
        ratios[key] = mine / max(peers) if key.startswith("control") else min(peers) / mine
        print(f"{key}: {ratios[key]:.1f} times better than the better of the two")
    parts = split(args)
    for part, (takes, floor) in parts.items():
        print(f"{part:10} {takes:7.2f} ms per chunk, at least {floor:7.2f}")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": None}, "figures": figures, "ratios": ratios, "parts": parts}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
