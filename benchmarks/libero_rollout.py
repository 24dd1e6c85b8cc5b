"""LIBERO's speed: vlahub's VectorEnv, LIBERO's own SubprocVectorEnv, and Gymnasium's AsyncVectorEnv around the stock environment, in one call.

    python benchmarks/libero_rollout.py                      # 2 workers, one task, chunk 8, two cameras of 256 pixels
    python benchmarks/libero_rollout.py --envs 16 --chunks 20

All three draw the same assets on the same task. A round is an episode start (reset, initial state, 10 settle steps) and `chunks` chunks of random actions.
The stock environments draw every step, as they always do; ours draws where a policy looks. Steps per second count the policy's control steps.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import time
from dataclasses import dataclass
from pathlib import Path

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


def timed(name: str, args: Args, start, run) -> dict[str, float]:
    """Seconds per episode start and control steps per second, after one round that is not timed."""
    random, starts, steps = np.random.default_rng(0), 0.0, 0.0
    for number in range(args.rounds + 1):
        began = time.perf_counter()
        start(number)
        ready = time.perf_counter()
        for _ in range(args.chunks):
            run(random.uniform(-1, 1, (args.envs, args.chunk, 7)).astype(np.float32))
        if number:
            starts += ready - began
            steps += time.perf_counter() - ready
    count = args.rounds * args.envs * args.chunks * args.chunk
    figures = {
        "episode start, s": starts / args.rounds,
        "control steps/s": count / steps,
        "control steps/s with starts": count / (steps + starts),
    }
    print(f"{name:26}" + "".join(f"{key}: {value:8.2f}   " for key, value in figures.items()), flush=True)
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


def main(args: Args) -> None:
    print(f"LIBERO-{args.suite} task {args.task}, {assets.find('auto')[0]} assets, {args.envs} workers, {os.cpu_count()} cores, GL {upstream.choose_gl()}")
    upstream.load()
    figures = {"vlahub": ours(args), "libero": libero_own(args), "gymnasium": gymnasium_async(args)}
    for key in figures["vlahub"]:
        values = {name: figure[key] for name, figure in figures.items()}
        best = (
            min(values["libero"], values["gymnasium"]) / values["vlahub"]
            if key.endswith(", s")
            else values["vlahub"] / max(values["libero"], values["gymnasium"])
        )
        print(f"{key}: {best:.1f} times as fast as the better of the two")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
