"""RoboTwin at work: rollouts in worker processes, the time of a reset, and what 500 episodes do to memory.

    python -m benchmarks.robotwin_rollout                                          # 1 and 2 workers, shadows off
    python -m benchmarks.robotwin_rollout --workers 1 16 --shadows False True      # a GPU machine

Both sides replay the same recorded expert actions, resets included, with three cameras of 240 x 320:
  vlahub    `VectorEnv`, a chunk of actions as one path, one look at its end; two halves of the environments alternate
  upstream  one environment per process and no word between them, every action by itself, all cameras drawn after each, as upstream's evaluation does
Compare within a run only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import vlahub
from benchmarks.robotwin_speed import record, resident_mib


@dataclass
class Args:
    """What to measure."""

    task: str = "ClickBell"
    """name of the task"""
    workers: tuple[int, ...] = (1, 2)
    """numbers of worker processes; one environment each"""
    shadows: tuple[bool, ...] = (False,)
    """with and without shadows"""
    chunk: int = 25
    """actions per chunk"""
    episodes: int = 4
    """episodes per environment and side"""
    recorded: int = 8
    """different episodes"""
    size: tuple[int, int] = (240, 320)
    """height and width of every picture"""
    resets: int = 50
    """resets that are timed, per randomization"""
    memory: int = 500
    """whole episodes over which the growth of memory is measured, per randomization; 0 for none"""
    memory_size: tuple[int, int] = (240, 320)
    """height and width of the pictures meanwhile"""
    out: Path | None = None
    """write the figures here as JSON"""


def main(args: Args) -> None:
    env_id = f"vlahub/RoboTwin-{args.task}"
    options = {"assets": "stand-in", "camera_size": tuple(args.size)}
    env = gym.make(env_id, **options)
    episodes = [(seed, record(env, seed)) for seed in range(args.recorded)]
    device = env.simulation.scene.stage.sapien.render_system.device.name
    env.close()
    print(
        f"{env_id}, {os.cpu_count()} cores, drawn on {device}; chunks of {args.chunk}, {np.mean([len(actions) for _, actions in episodes]):.0f} steps an episode"
    )
    figures = []
    for shadows in args.shadows:
        for count in args.workers:
            rows = {"vlahub": ours(env_id, {**options, "shadows": shadows}, episodes, count, args)}
            rows["upstream"] = upstream_style(env_id, {**options, "shadows": shadows}, episodes, count, args)
            cores = min(count, os.cpu_count())
            print(f"\nshadows {'on' if shadows else 'off'}, {count} worker{'s' if count > 1 else ''}:")
            for name, (steps, looks) in rows.items():
                print(f"  {name:9s} {steps:8.1f} control steps/s ({steps / cores:6.1f} per core), {looks:7.1f} observations of 3 cameras/s")
                figures.append({"side": name, "shadows": shadows, "workers": count, "steps/s": steps, "observations/s": looks})
            print(f"  control steps: {rows['vlahub'][0] / rows['upstream'][0]:.1f} times as many", flush=True)
    for how in ("clean", "randomized"):
        figures += one_process(env_id, {"assets": "stand-in", "randomization": how}, episodes, args)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2))


def ours(env_id: str, options: dict, episodes: list, count: int, args: Args) -> tuple[float, float]:
    """-> control steps and observations per second of a vector environment."""
    env = gym.make_vec(env_id, num_envs=count, workers=count, slots=min(2, count), **options)
    slots = [env.slot_envs(slot) for slot in range(env.slots)]
    todo: list[deque] = []
    steps = looks = 0

    def begin(slot: int, fresh: np.ndarray) -> None:
        """Start the next episode in these environments of a slot, as long as there are any."""
        nonlocal looks
        rows = slots[slot]
        fresh = fresh & np.array([bool(todo[row]) for row in rows])
        if fresh.any():
            for row in np.array(rows)[fresh]:
                seed, actions = todo[row].popleft()
                seeds[row], left[row] = seed, [actions[i : i + args.chunk] for i in range(0, len(actions), args.chunk)]
            env.reset(seed=[seeds[row] for row in rows], options={"reset_mask": fresh}, slot=slot)
            looks += int(fresh.sum())

    def send(slot: int) -> bool:
        chunks = [left[row].pop(0) if left[row] else None for row in slots[slot]]
        if any(chunk is not None for chunk in chunks):
            env.send(chunks, slot)
            return True
        return False

    def play(number: int) -> float:
        nonlocal todo, steps, looks
        todo = [deque(episodes[(row + i) % len(episodes)] for i in range(number)) for row in range(count)]
        steps = looks = 0
        began = time.perf_counter()
        running = deque()
        for slot, rows in enumerate(slots):
            begin(slot, np.ones(len(rows), bool))
            if send(slot):
                running.append(slot)
        while running:
            slot = running.popleft()
            result = env.recv(slot)
            steps, looks = steps + int(result.length.sum()), looks + int((result.length > 0).sum())
            over = result.done | np.array([not left[row] for row in slots[slot]])
            for row in np.array(slots[slot])[over]:
                left[row] = []
            begin(slot, over)
            if send(slot):
                running.append(slot)
        return time.perf_counter() - began

    seeds, left = [0] * count, [[] for _ in range(count)]
    play(1)  # the first pictures of a process take seconds
    seconds = play(args.episodes)
    env.close()
    return steps / seconds, looks / seconds


def upstream_style(env_id: str, options: dict, episodes: list, count: int, args: Args) -> tuple[float, float]:
    """-> control steps and observations per second, of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(count), context.Queue()
    workers = [context.Process(target=_alone, args=(env_id, options, episodes, row, args.episodes, ready, queue)) for row in range(count)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join()
    seconds = max(seconds for _, _, seconds in results)
    return sum(steps for steps, _, _ in results) / seconds, sum(looks for _, looks, _ in results) / seconds


def _alone(env_id: str, options: dict, episodes: list, row: int, number: int, ready, queue) -> None:
    env = gym.make(env_id, **options)

    def play(which: list) -> tuple[int, int]:
        steps = 0
        for seed, actions in which:
            env.reset(seed=seed)
            for action in actions:
                if env.episode.done:
                    break
                env.step(action)
            steps += env.episode.steps
        return steps, steps + len(which)

    play(episodes[:1])
    ready.wait(timeout=1800)
    began = time.perf_counter()
    steps, looks = play([episodes[(row + i) % len(episodes)] for i in range(number)])
    queue.put((steps, looks, time.perf_counter() - began))
    env.close()


def one_process(env_id: str, options: dict, episodes: list, args: Args) -> list[dict]:
    """Resets, and memory over whole episodes of ever new layouts, with actions recorded on others: the arms bump into things."""
    name = options["randomization"]
    env = gym.make(env_id, camera_size=tuple(args.memory_size), **options)
    env.reset(seed=0)
    bare, looked = [], []
    for seed in range(args.resets):
        began = time.perf_counter()
        env.simulation.reset(seed, {})
        bare.append(1000 * (time.perf_counter() - began))
        env.simulation.observe()
        looked.append(1000 * (time.perf_counter() - began))
    print(f"\n{name}: a warm reset takes {np.median(bare):.1f} ms (at most {max(bare):.1f}), {np.median(looked):.1f} ms with the first look")
    figures = [{"randomization": name, "reset, ms": float(np.median(bare)), "with look, ms": float(np.median(looked))}]
    if args.memory:
        sizes = []
        for number in range(args.memory + 1):
            seed, actions = episodes[number % len(episodes)]
            env.reset(seed=number)
            for i in range(0, len(actions), args.chunk):
                if env.episode.done:
                    break
                env.step_chunk(actions[i : i + args.chunk])
            if number % 50 == 0:
                sizes.append(resident_mib())
        growth = 100 * (sizes[-1] / sizes[0] - 1)
        print(
            f"  memory after 1, 51, 101 ... episodes, MiB: {' '.join(f'{size:.0f}' for size in sizes)}; {args.memory} episodes grow it by {growth:.1f} %",
            flush=True,
        )
        figures.append({"randomization": name, "MiB": sizes, "growth, %": growth})
    env.close()
    return figures


if __name__ == "__main__":
    assert vlahub  # it registers the ids
    main(tyro.cli(Args, description=__doc__))
