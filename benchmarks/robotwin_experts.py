"""How often does each task's scripted expert solve it? Prints the table of docs/robotwin.md.

python -m benchmarks.robotwin_experts --tasks StackBlocksTwo --seeds 50
"""

import argparse
import time

import numpy as np

from vlahub_envs.robotwin import TASKS
from vlahub_envs.robotwin.expert import ScriptedExpert
from vlahub_envs.robotwin.simulation import RoboTwin


def episode(simulation: RoboTwin, expert: ScriptedExpert, seed: int) -> tuple[bool, int, int, bool, str]:
    """Without a picture. -> solved, control steps, physics steps, settled, why the script stopped."""
    settled = simulation.reset(seed, {})["settled"]
    expert.reset()
    steps = physics = 0
    while steps < simulation.max_steps:
        chunk = expert.act()
        if expert.over:
            break
        outcome = simulation.apply(chunk[: simulation.max_steps - steps])
        steps, physics = steps + len(outcome.success), physics + outcome.info["physics_steps"]
        if outcome.success[-1]:
            return True, steps, physics, settled, ""
    return False, steps, physics, settled, expert.failure or "script at its end, not solved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="names of tasks; all by default")
    parser.add_argument("--seeds", type=int, default=50, help="layouts 0 to this many")
    parser.add_argument("--assets", default="stand-in", help="asset set, as the environment's argument of the same name")
    parser.add_argument("--randomization", default="clean", choices=("clean", "randomized"), help="as the environment's argument of the same name")
    parser.add_argument("--embodiment", default="aloha-agilex", help="as the environment's argument of the same name")
    args = parser.parse_args()
    print("| task | step limit | expert | control steps | physics steps | reset, ms |\n|---|---|---|---|---|---|")
    for name in args.tasks:
        options = {"assets": args.assets, "randomization": args.randomization, "embodiment": args.embodiment}
        simulation = RoboTwin(task=name, cameras=("head",), camera_size=(16, 16), **options)
        expert, rows, resets = ScriptedExpert(simulation), [], []
        for seed in range(args.seeds):
            rows.append((seed, *episode(simulation, expert, seed)))
            start = time.process_time()
            simulation.reset(seed, {})
            resets.append(1000 * (time.process_time() - start))
        won = [row for row in rows if row[1]]
        steps, physics = (np.mean([row[i] for row in won]) if won else float("nan") for i in (2, 3))
        print(f"| {name} | {simulation.max_steps} | {len(won)} of {len(rows)} | {steps:.0f} | {physics:.0f} | {np.median(resets):.0f} |", flush=True)
        for seed, solved, _, _, settled, why in rows:
            if not solved or not settled:
                print(f"    seed {seed}: {'solved' if solved else why}{'' if settled else ' (did not come to rest)'}", flush=True)
        simulation.close()


if __name__ == "__main__":
    main()
