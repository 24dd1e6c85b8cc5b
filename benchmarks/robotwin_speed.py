"""How fast RoboTwin-ClickBell runs in one process, and where the time goes. `robotwin_rollout.py` has many processes, resets and memory.

    python -m benchmarks.robotwin_speed                # 2 cores, 3 cameras of 240 x 320, chunks of 25
    python -m benchmarks.robotwin_speed --chunk 50 --episodes 8

Three ways to run the same recorded expert actions, one after the other in every round; compare within a run only:
  chunk            a chunk of actions as one path, one look at its end (`step_chunk`)
  chunk, all drawn the same physics, and all cameras drawn after every control step
  step             every action by itself, a look after each (`env.step`), as upstream's evaluation does
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

import vlahub  # noqa: F401 - registers the ids
from vlahub import catalog
from vlahub_envs.robotwin import simulation as robotwin

ID = "vlahub/RoboTwin-ClickBell"


@dataclass
class Args:
    chunk: int = 25
    """actions per chunk"""
    episodes: int = 4
    """recorded episodes per round"""
    rounds: int = 3
    """the figures are medians over rounds"""
    cores: int = 2
    """CPU cores to use"""


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def record(env, seed: int) -> np.ndarray:
    """The expert's actions [n, 14] of one episode."""
    env.reset(seed=seed)
    expert = catalog.make_expert(ID, env.simulation)
    expert.reset()
    actions = []
    while not env.episode.done:
        chunk = expert.act()
        actions.append(chunk[: env.step_chunk(chunk).length])
    return np.concatenate(actions)


def replay(env, seed: int, actions: np.ndarray, way: str, size: int) -> int:
    """Run the actions; -> control steps."""
    env.reset(seed=seed)
    if way == "step":
        for action in actions:
            if env.episode.done:
                break
            env.step(action)
    else:
        watch = env.simulation.observe if way == "chunk, all drawn" else None
        for i in range(0, len(actions), size):
            if env.episode.done:
                break
            env.step_chunk(actions[i : i + size], watch)
    return env.episode.steps


def timed(owner: Any, name: str, label: str, spent: dict[str, float]) -> Callable[[], None]:
    """Count the seconds spent in a function; -> what undoes it."""
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - begin

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, original)


def main(args: Args) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    begin = time.perf_counter()
    env = gym.make(ID, assets="stand-in")
    env.reset(seed=0)
    print(f"{ID}, {len(os.sched_getaffinity(0))} cores, 3 cameras of 240 x 320, drawn on {env.simulation.scene.stage.sapien.render_system.device.name}")
    print(f"first picture after {time.perf_counter() - begin:.1f} s")
    episodes = [(seed, record(env, seed)) for seed in range(args.episodes)]

    ways = ("chunk", "chunk, all drawn", "step")
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for way in ways:
            begin = time.perf_counter()
            steps = sum(replay(env, seed, actions, way, args.chunk) for seed, actions in episodes)
            rates[way].append(steps / (time.perf_counter() - begin))
    median = {way: float(np.median(rates[way])) for way in ways}
    print(f"\ncontrol steps per second, chunk of {args.chunk}, median of {args.rounds} rounds:")
    for way in ways:
        print(f"  {way:18s} {median[way]:7.1f}   chunk is {median['chunk'] / median[way]:.1f} x as fast")

    spent: dict[str, float] = defaultdict(float)
    scene, task = env.simulation.scene, env.simulation.task
    undo = [
        timed(scene.stage, "pictures", "drawing the three cameras", spent),
        timed(robotwin, "plan", "timing the path", spent),
        timed(scene, "step", "physics", spent),
        timed(scene.robot, "command", "drive targets and feed-forward", spent),
        timed(task, "solved", "success check", spent),
        timed(env.simulation, "reset", "reset", spent),
    ]
    begin = time.perf_counter()
    for seed, actions in episodes:
        replay(env, seed, actions, "chunk", args.chunk)
    total = time.perf_counter() - begin
    for restore in undo:
        restore()
    print("\nwhere the time of 'chunk' goes:")
    for label, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {label:32s} {100 * seconds / total:5.1f} %")
    print(f"  {'everything else':32s} {100 * (1 - sum(spent.values()) / total):5.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Args))
