"""Does every LIBERO task load, and does every initial state settle? Nothing may explode, fall or stick in something else.

    python benchmarks/libero_assets_check.py                       # 130 tasks x 50 initial states, about 20 minutes of processor time, on all cores
    python benchmarks/libero_assets_check.py --trials 3 --suite 90

Each start is settled as `protocol="vlahub"` does (20 steps) and watched for 10 more. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mujoco
import numpy as np
import tyro

from vlahub_envs.libero import assets, upstream
from vlahub_envs.libero.scene import Scene

SETTLE, WATCH = 20, 10
STILL = 0.02  # m/s of any object at the end
SHIFT = 0.12  # m sideways on the way down; what is thrown up from inside a table or rolls travels a little
DEPTH = 0.004  # m of one solid inside another


@dataclass
class Args:
    """What to check."""

    suite: str = "130"
    """Spatial, Object, Goal, 10, 90 or 130"""
    trials: Annotated[int, tyro.conf.arg(help="initial states per task, of 50")] = 50
    assets: str = "auto"
    """auto, official, stand-in, or a folder"""
    first: int = 0
    """task to begin with"""
    workers: int = os.cpu_count() or 1
    """processes"""


def problems(scene: Scene, trial: int) -> list[str]:
    scene.reset(seed=trial, trial=trial, settle=0, settle_grip=-1.0)
    start = positions(scene)
    if scene.env._check_success():
        return ["solved before the first step"]
    pause, found = np.array([0.0] * 6 + [-1.0]), []
    solved = [scene.step(pause) for _ in range(SETTLE + WATCH)]
    if any(solved):
        found.append(f"solved without an action, at step {solved.index(True)}")
    before = positions(scene)
    scene.step(pause)
    for name, end in positions(scene).items():
        speed, shift, drop = np.linalg.norm(end - before[name]) * 20, np.linalg.norm((end - start[name])[:2]), (start[name] - end)[2]
        if speed > STILL:
            found.append(f"{name} moves at {speed:.3f} m/s")
        if shift > SHIFT:
            found.append(f"{name} went {shift:.3f} m sideways")
        if drop > 0.2:
            found.append(f"{name} fell {drop:.3f} m")
    if scene.data.ncon:
        contact = min(scene.data.contact[: scene.data.ncon], key=lambda c: c.dist)
        if contact.dist < -DEPTH:
            geoms = [mujoco.mj_id2name(scene.model, mujoco.mjtObj.mjOBJ_GEOM, geom) for geom in (contact.geom1, contact.geom2)]
            found.append(f"{geoms[0]} is {-1000 * contact.dist:.1f} mm inside {geoms[1]}")
    return found


def positions(scene: Scene) -> dict[str, np.ndarray]:
    return {name: scene.data.xpos[scene.env.obj_body_id[name]].copy() for name in scene.env.objects_dict}


def check(job: tuple[str, int, int, str]) -> tuple[int, int, Counter]:
    """-> task, how many of its starts have problems, and how often each problem occurs."""
    suite, index, trials, folder = job
    scene = Scene(upstream.tasks(suite)[index], Path(folder), (64, 64), (64, 64))
    found = [dict.fromkeys(problems(scene, trial)) for trial in range(trials)]
    # a scene is freed with its garbage, because robosuite's objects refer to each other in circles
    del scene
    gc.collect()
    return index, sum(map(bool, found)), Counter(problem for some in found for problem in some)


def main(args: Args) -> int:
    kind, folder = assets.find(args.assets)
    tasks, start, counts = upstream.tasks(args.suite), time.time(), Counter()
    jobs = [(args.suite, index, args.trials, str(folder)) for index in range(args.first, len(tasks))]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for index, bad, found in pool.map(check, jobs):
            counts.update({"starts": args.trials, "bad": bad, "tasks": bool(bad)})
            for problem, times in found.most_common(6):
                print(f"{index:3d} {tasks[index].suite} {tasks[index].name}: {problem} ({times}x)", flush=True)
    print(
        f"{kind} assets: {len(jobs)} tasks, {counts['starts']} starts: {counts['bad']} starts of {counts['tasks']} tasks with problems; "
        f"{time.time() - start:.0f} s with {args.workers} processes"
    )
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
