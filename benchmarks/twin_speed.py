"""The twin's speed: our step_chunk, which draws what a policy looks at, against ManiSkill's own way of stepping the same cell, a picture at every step.

    python -m benchmarks.twin_speed                          # 1 worker, chunks of 8, pictures of 224 x 224 and 480 x 640
    python -m benchmarks.twin_speed --workers 16 --rounds 5
    python -m benchmarks.twin_speed --cpu-time               # both in this process, by CPU time, which other programs on the machine disturb little

Ours is `gym.make_vec("vlahub/Twin-PickPlace")`; theirs is `gym.make("VlahubTwinPickPlace-v1", obs_mode="rgb")` in ManiSkill's CPUGymWrapper and Gymnasium's
AsyncVectorEnv, as ManiSkill documents for physics on the CPU. Both run the same actions from the same seeds, one after the other in every round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

import vlahub  # noqa: F401  registers the ids


@dataclass
class Args:
    """What to measure."""

    workers: int = 1
    """simulation processes"""
    chunk: int = 8
    """control steps per look"""
    chunks: int = 5
    """chunks per episode"""
    rounds: int = 3
    """episodes that are timed, after one that is not; the figures are medians"""
    sizes: tuple[int, ...] = (224, 224, 480, 640)
    """heights and widths of the pictures to measure with"""
    cpu_time: bool = False
    """one environment of each in this process, and CPU time instead of the wall clock"""
    out: Path | None = None
    """write the figures here as JSON"""


def stock(size: tuple[int, int]) -> gym.Env:
    """The cell as ManiSkill makes it, in a worker process."""
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("mani_skill").setLevel(logging.ERROR)
    from mani_skill.utils.wrappers import CPUGymWrapper

    import vlahub_envs.twin.cell  # noqa: F401  registers

    render = "sapien_cuda" if torch.cuda.is_available() else "sapien_cpu"
    return CPUGymWrapper(gym.make("VlahubTwinPickPlace-v1", obs_mode="rgb", reward_mode="sparse", render_backend=render, camera_size=size))


def ours(env: gym.vector.VectorEnv, seed: int, actions: np.ndarray, chunk: int) -> None:
    env.reset(seed=seed)
    for start in range(0, actions.shape[1], chunk):
        env.step_chunk(actions[:, start : start + chunk])


def ours_here(env: gym.Env, seed: int, actions: np.ndarray, chunk: int) -> None:
    env.reset(seed=seed)
    for start in range(0, actions.shape[1], chunk):
        env.step_chunk(actions[0, start : start + chunk])


def theirs(env: gym.vector.VectorEnv, seed: int, actions: np.ndarray, chunk: int) -> None:
    env.reset(seed=seed)
    for step in range(actions.shape[1]):
        env.step(actions[:, step])


def measure(args: Args, size: tuple[int, int]) -> dict[str, float]:
    """Control steps per second of each, all workers together, or per second of CPU time of one."""
    count = 1 if args.cpu_time else args.workers
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        one = gym.make("vlahub/Twin-PickPlace", camera_size=size)
        envs: dict[str, tuple[Any, Callable]] = {"ours": (one, ours_here), "ManiSkill": (gym.vector.SyncVectorEnv([lambda: stock(size)]), theirs)}
    else:
        envs = {
            "ours": (gym.make_vec("vlahub/Twin-PickPlace", num_envs=count, workers=count, camera_size=size), ours),
            "ManiSkill": (gym.vector.AsyncVectorEnv([lambda: stock(size)] * count, context="spawn"), theirs),
        }
    steps = args.chunk * args.chunks
    rates: dict[str, list[float]] = {name: [] for name in envs}
    for number in range(args.rounds + 1):
        actions = np.random.default_rng(number).uniform(-0.02, 0.02, (count, steps, 7)).astype(np.float32)
        for name, (env, run) in envs.items():
            begin = clock()
            run(env, 100 * number, actions, args.chunk)
            if number:  # the first round warms up
                rates[name].append(count * steps / (clock() - begin))
    for env, _ in envs.values():
        env.close()
    found = {name: median(values) for name, values in rates.items()}
    return {**found, "ratio": median(a / b for a, b in zip(rates["ours"], rates["ManiSkill"], strict=True))}


def main(args: Args) -> None:
    sizes = list(zip(args.sizes[::2], args.sizes[1::2], strict=True))
    workers = "CPU time of one environment" if args.cpu_time else f"{args.workers} workers"
    print(f"{workers}, chunks of {args.chunk}, {args.chunks} per episode, resets included; control steps per second:")
    results = {}
    for size in sizes:
        found = results["x".join(map(str, size))] = measure(args, size)
        print(
            f"  {size[0]} x {size[1]}: ours {found['ours']:.1f}, ManiSkill with a picture per step {found['ManiSkill']:.1f}: {found['ratio']:.1f} x", flush=True
        )
    if args.out:
        args.out.write_text(
            json.dumps({"workers": args.workers, "cpu_time": args.cpu_time, "chunk": args.chunk, "control_steps_per_second": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
