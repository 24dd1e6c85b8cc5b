"""How often does the scripted expert solve each task? Nothing is drawn. Prints the table of docs/libero.md.

python -m benchmarks.libero_experts --workers 16
python -m benchmarks.libero_experts --suites Object --tasks 7 --trials 5
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from vlahub.evaluation import wilson
from vlahub_envs.libero.expert import ScriptedExpert
from vlahub_envs.libero.simulation import Libero

PART = 10  # trials that a worker runs in a row; compiling a task takes as long as one


def episodes(suite: str, task: int, trials: range, protocol: str, assets: str) -> list[tuple[int, bool, int, np.ndarray, str]]:
    """-> for each trial: its number, solved, control steps, the mean change of the six motion numbers from step to step, why the expert stopped."""
    simulation = Libero(suite, protocol=protocol, assets=assets, models=1, wrist=False)
    expert, rows = ScriptedExpert(simulation, untried=True), []
    for trial in trials:
        simulation.reset(trial, {"task": task, "trial": trial})
        expert.reset()
        actions, solved = [], False
        while len(actions) < simulation.max_steps and not solved:
            actions.append(expert.act()[0])
            solved = bool(simulation.apply(actions[-1][None]).success[-1])
        change = np.abs(np.diff(np.array(actions)[:, :6], axis=0)).mean() if len(actions) > 1 else 0.0
        rows.append((trial, solved, len(actions), change, expert.failure))
    simulation.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suites", nargs="+", default=["Spatial", "Object", "Goal"], help="as in the environments' ids; also 10 and 90, of which the expert knows some tasks"
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=list(range(10)), help="their numbers in the suite")
    parser.add_argument("--trials", type=int, default=50, help="initial states 0 to this many; the seed, which places the fixtures, is the same number")
    parser.add_argument("--protocol", default="vlahub", help="step limit and settle steps, as the environment's argument")
    parser.add_argument("--assets", default="auto", help="asset set, as the environment's argument")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker; workers inherit it
    parts = [range(first, min(first + PART, args.trials)) for first in range(0, args.trials, PART)]
    with ProcessPoolExecutor(args.workers) as pool:
        running = {
            (suite, task): [pool.submit(episodes, suite, task, part, args.protocol, args.assets) for part in parts]
            for suite in args.suites
            for task in args.tasks
        }
        print("| suite | task | solved | 95 % interval | control steps: mean, longest | change per step |\n|---|---|---|---|---|---|")
        for suite in args.suites:
            total = []
            for task in args.tasks:
                rows = [row for part in running[suite, task] for row in part.result()]
                total += rows
                print(line(suite, str(task), rows), flush=True)
                for trial, solved, _, _, failure in rows:
                    if not solved:
                        print(f"    trial {trial}: {failure or 'not solved in time'}", flush=True)
            print(line(suite, "all", total), flush=True)


def line(suite: str, task: str, rows: list[tuple[int, bool, int, np.ndarray, str]]) -> str:
    steps = [row[2] for row in rows if row[1]] or [0]
    low, high = wilson(len(steps), len(rows)) if any(row[1] for row in rows) else wilson(0, len(rows))
    solved = sum(row[1] for row in rows)
    return f"| {suite} | {task} | {solved} of {len(rows)} | {100 * low:.0f} - {100 * high:.0f} % | {np.mean(steps):.0f}, {max(steps)} | {np.mean([row[3] for row in rows]):.3f} |"


if __name__ == "__main__":
    main()
