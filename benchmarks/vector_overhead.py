"""What the vector engine costs, measured on a simulation that does nothing but take its time and show three cameras of 240x320.

    python benchmarks/vector_overhead.py            # both tables, about two minutes
    python benchmarks/vector_overhead.py --help

1. Overhead: control steps per second of `step_chunk` over the workers, against the sum of what as many processes reach on the same cores when each
   steps a simulation of its own and talks to nobody. Physics of 1 ms, either waiting ("sleep": time passes, cores are idle) or computing ("work": cores
   are the limit).
2. Transfer: observations per second of `step` with physics of 0 ms, against gymnasium.vector.AsyncVectorEnv on the same simulation: through its pipes
   (the only mode that brings instructions across), and through its shared memory with the instruction taken out of the observation, with and without
   the copy that keeps an old observation from changing.
   "kept" means that the observation is only received, "read" that a policy copies it out once.

   "CPU" is the time that all processes together spend per observation; unlike the rates it hardly depends on what else the machine does.

Every ratio is of neighbouring measurements of one run, and the median of several; on a shared machine single numbers vary by a factor of two.
"""

import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):  # run as a script: make `benchmarks` importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlahub import Camera, Env, EnvCard, Field, Interface, Outcomes
from vlahub.vector import VectorEnv

ACTION_DIM = 14


class NoOp:
    """A simulation whose control step takes `cost` seconds and changes nothing. `physics` says whether it waits or computes meanwhile."""

    max_steps, tasks, trials, assets = 10**9, 1, None, "none"

    def __init__(self, cost: float = 1e-3, physics: Literal["sleep", "work"] = "sleep", height: int = 240, width: int = 320):
        self.cost, self.physics = cost, physics
        head, left, right = (Camera(name, height, width) for name in ("head", "left_wrist", "right_wrist"))
        fields = (Field("joints", ACTION_DIM, "rad", low=-1, high=1),)
        self.interface = Interface(main=head, wrists=(left, right), state=fields, action=fields, control_hz=20)
        rng = np.random.default_rng(0)
        self.observation = {
            "main_images": rng.integers(256, size=(height, width, 3), dtype=np.uint8),
            "wrist_images": rng.integers(256, size=(2, height, width, 3), dtype=np.uint8),
            "states": np.zeros(ACTION_DIM, np.float32),
            "task_descriptions": "do nothing, but do it well",
        }

    def reset(self, seed, options):
        return {"task": 0, "trial": 0}

    def apply(self, actions, watch=None):
        for _ in actions:
            if self.physics == "sleep":
                if self.cost:
                    time.sleep(self.cost)
            else:
                end = time.thread_time() + self.cost  # of this thread: time in which others have the core does not count
                while time.thread_time() < end:
                    pass
        return Outcomes(np.zeros(len(actions), np.float32), np.zeros(len(actions), bool))

    def observe(self):
        return self.observation

    def render(self):
        return self.observation["main_images"]

    def close(self):
        pass


OURS, DEFAULT = "vlahub, a process per env", "vlahub, a process per core"  # the second is the default number of workers
CARD = EnvCard(id="bench/NoOp", family="bench", simulation="benchmarks.vector_overhead:NoOp", summary="Does nothing.")


@dataclass
class Args:
    workers: int = 8
    """processes, with one env each"""
    chunks: tuple[int, ...] = (1, 10, 25)
    """control steps per chunk"""
    cost: float = 1e-3
    """seconds of physics per control step in the overhead table"""
    rounds: int = 7
    """measurements of each kind, in turn; the ratios are medians"""
    seconds: float = 1.0
    """length of one measurement"""


def rate(do: Callable[[], Any], seconds: float) -> float:
    """Calls per second."""
    do()
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        do()
        calls += 1
    return calls / elapsed


def cpu_ms(processes: list[int]) -> float:
    """CPU time that these processes have used so far (Linux)."""
    tasks = [task for pid in processes for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def _alone(connection, cost: float, physics: str) -> None:
    """A process that steps a simulation of its own whenever it is told a chunk length and a duration."""
    simulation = NoOp(cost, physics)

    def chunk() -> None:
        simulation.apply(actions)
        simulation.observe()

    connection.send("ready")
    while (order := connection.recv()) is not None:
        length, seconds = order
        actions = np.zeros((length, ACTION_DIM), np.float32)
        connection.send(rate(chunk, seconds) * length)


def overhead(args: Args, table: Table) -> None:
    for physics in ("sleep", "work"):
        env = VectorEnv(CARD, args.workers, workers=args.workers, cost=args.cost, physics=physics)
        env.reset(seed=0)
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(args.workers)]
        processes = [context.Process(target=_alone, args=(theirs, args.cost, physics), daemon=True) for _, theirs in pipes]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            ours.recv()
        for length in args.chunks:
            alone, vector = [], []
            actions = np.zeros((args.workers, length, ACTION_DIM), np.float32)
            for _ in range(args.rounds):
                for ours, _ in pipes:
                    ours.send((length, args.seconds))
                alone.append(sum(ours.recv() for ours, _ in pipes))
                vector.append(rate(functools.partial(env.step_chunk, actions), args.seconds) * length * args.workers)
            losses = [100 * (1 - ours / theirs) for ours, theirs in zip(vector, alone, strict=True)]
            table.add_row(
                physics,
                str(length),
                f"{statistics.median(alone):.0f}",
                f"{statistics.median(vector):.0f}",
                f"{statistics.median(losses):.1f} %",
                f"{min(losses):.1f} to {max(losses):.1f} %",
            )
        for (ours, _), process in zip(pipes, processes, strict=True):
            ours.send(None)
            process.join()
        env.close()


class WithoutInstruction(gymnasium.ObservationWrapper):
    """Gymnasium's shared memory garbles text."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Dict({key: space for key, space in env.observation_space.items() if key != "task_descriptions"})

    def observation(self, observation):
        return {key: observation[key] for key in self.observation_space}


def transfer(args: Args, table: Table) -> None:
    def single() -> Env:
        return Env(NoOp(cost=0))

    envs = {
        OURS: VectorEnv(CARD, args.workers, workers=args.workers, cost=0.0),
        DEFAULT: VectorEnv(CARD, args.workers, cost=0.0),
        "AsyncVectorEnv, pipes": gymnasium.vector.AsyncVectorEnv([single] * args.workers, shared_memory=False),
        "AsyncVectorEnv, shared memory": gymnasium.vector.AsyncVectorEnv([lambda: WithoutInstruction(single())] * args.workers, shared_memory=True),
        "AsyncVectorEnv, no copy": gymnasium.vector.AsyncVectorEnv([lambda: WithoutInstruction(single())] * args.workers, shared_memory=True, copy=False),
    }
    actions = np.zeros((args.workers, ACTION_DIM), np.float32)
    policy = {}  # where a policy takes the pictures
    held = {}  # as in any loop, an observation lives until the next one has come

    def step(env: gymnasium.vector.VectorEnv, read: bool) -> None:
        observation = held[env] = env.step(actions)[0]
        if read:
            for key in ("main_images", "wrist_images"):
                np.copyto(policy.setdefault(key, np.empty_like(observation[key])), observation[key])

    for env in envs.values():
        env.reset(seed=0)
    for read in (False, True):
        rates: dict[str, list[float]] = {name: [] for name in envs}
        spent: dict[str, list[float]] = {name: [] for name in envs}
        for _ in range(args.rounds):
            for name, env in envs.items():
                pids = [os.getpid(), *([one.process.pid for one in env._workers] if isinstance(env, VectorEnv) else [one.pid for one in env.processes])]
                before, start = cpu_ms(pids), time.perf_counter()
                rates[name].append(rate(functools.partial(step, env, read), args.seconds) * args.workers)
                spent[name].append((cpu_ms(pids) - before) / (rates[name][-1] * (time.perf_counter() - start)))
        for name in envs:
            row = [name, "read" if read else "kept", f"{statistics.median(rates[name]):.0f}", f"{statistics.median(spent[name]):.3f} ms"]
            for peer in (OURS, DEFAULT):
                ratios = [ours / theirs for ours, theirs in zip(rates[peer], rates[name], strict=True)]
                work = statistics.median(spent[name]) / statistics.median(spent[peer])
                row.append("" if name in (OURS, DEFAULT) else f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}), CPU {work:.1f}x")
            table.add_row(*row)
    for env in envs.values():
        env.close()


def main(args: Args) -> None:
    console = Console(width=150)  # whole rows, in a pipe as well
    cores = len(os.sched_getaffinity(0))
    table = Table("physics", "N", "alone: steps/s", "step_chunk: steps/s", "loss: median", "range", title=f"overhead, {args.workers} workers, {cores} cores")
    overhead(args, table)
    console.print(table)
    columns = "vector env", "observation", "observations/s", "CPU each", f"{OURS}: faster by", f"{DEFAULT}: faster by"
    table = Table(*columns, title=f"transfer, {args.workers} envs, {cores} cores")
    transfer(args, table)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
