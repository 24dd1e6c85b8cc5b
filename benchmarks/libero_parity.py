"""Do LIBERO's states equal the stock environment's? Largest difference after many random steps, in every suite.

    python benchmarks/libero_parity.py                     # one task of each suite, 300 steps
    python benchmarks/libero_parity.py --tasks 10 --steps 100

Both worlds begin with the same initial state and seed and get the same actions, which press the arm into the scene. The stock environment runs robosuite's own loop;
nothing is drawn. Exit status 1 if any position or velocity differs by 1e-9 or more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import tyro

from vlahub_envs.libero import assets, upstream
from vlahub_envs.libero.scene import Scene

LIMIT = 1e-9  # m, rad, or these per second


@dataclass
class Args:
    """What to compare."""

    suites: tuple[str, ...] = ("Spatial", "Object", "Goal", "10", "90")
    tasks: int = 1
    """so many of each suite, spread evenly"""
    steps: int = 300
    """control steps"""
    assets: str = "auto"
    """auto, official, stand-in, or a folder"""


def differences(suite: str, index: int, folder, steps: int, seed: int = 7) -> tuple[float, float, int]:
    """-> largest difference of a position, of a velocity, and the largest number of contacts on the way."""
    task = upstream.tasks(suite)[index]
    scene = Scene(task, folder, (64, 64), (64, 64))
    scene.reset(seed, trial=1, settle=10, settle_grip=-1.0)

    from libero.libero.envs.env_wrapper import ControlEnv

    stock = ControlEnv(bddl_file_name=str(task.bddl), use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True)
    stock.env.object_property_initializers.clear()  # each hard reset adds a second draw of the same joint; one set is what a first reset would make
    stock.seed(seed)
    stock.reset()
    stock.set_init_state(scene.states[1])
    for _ in range(10):
        stock.step([0.0] * 6 + [-1.0])
    random, position, velocity, contacts = np.random.default_rng(seed), 0.0, 0.0, 0
    for _ in range(steps):
        action = random.uniform(-1, 1, 7).astype(np.float32).astype(np.float64)
        action[2] = -abs(action[2])
        scene.step(action)
        stock.step(action)
        position = max(position, np.abs(scene.data.qpos - stock.sim.data.qpos).max())
        velocity = max(velocity, np.abs(scene.data.qvel - stock.sim.data.qvel).max())
        contacts = max(contacts, scene.data.ncon)
    stock.close()
    return position, velocity, contacts


def main(args: Args) -> int:
    kind, folder = assets.find(args.assets)
    worst = 0.0
    for suite in args.suites:
        for index in np.linspace(0, len(upstream.tasks(suite)) - 1, args.tasks).round().astype(int):
            position, velocity, contacts = differences(suite, int(index), folder, args.steps)
            worst = max(worst, position, velocity)
            print(f"LIBERO-{suite:8} task {index:2d}: position {position:.1e}, velocity {velocity:.1e}, up to {contacts} contacts", flush=True)
    print(f"{kind} assets, {args.steps} steps: largest difference {worst:.1e}, allowed {LIMIT:.0e}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
