"""Reinforcement learning that one can wait for: a trained policy with miscalibrated grippers, some minutes of GRPO on two CPU cores, success before and after.

    python examples/improve_policy.py                 # about 6 minutes on 2 cores; everything goes to outputs/demo/improve
    python examples/improve_policy.py --offset 0      # the bundled policy as it is

The bundled policy presses the bell of vlahub/RoboTwin-ClickBell. Here all its targets for the two grippers are `offset` too wide (0 is closed, 1 open), as on a robot
that was calibrated carelessly: the hand comes to the right place and does not quite close, and only a closed one counts (below 0.2). GRPO (PPO's clipped update with the
mean of a group of equal starts in place of a critic) tries small deviations, is told 0 or 1 at the end of each episode and nothing else, and changes the 14 biases of the
action head. The fault is made for this example, because it is the same in every scene. A few hundred episodes mend a part of it; docs/results.md says how much, on more scenes.
"""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

import vlahub
from vlahub.evaluation import Results
from vlahub.plot import plot

ROOT = Path(__file__).resolve().parents[1]
ENV, POLICY = "vlahub/RoboTwin-ClickBell", "vlahub/lingbot-tiny-clickbell"
GRIPPERS = (6, 13)  # of the 14 numbers of an action: 6 joints and a gripper for the left arm, then for the right
STEPS = 90  # control steps; the expert needs 80
PICTURES = {"camera_size": (96, 128)}  # the policy sees 96 x 96; drawing in software costs by the pixel
GRID = {"denoising_steps": 4, "num_steps": 4}  # evaluated on the denoising steps that are trained


def miscalibrated(offset: float, folder: Path) -> Path:
    """A copy of the bundled policy whose gripper targets are off by `offset`."""
    policy = vlahub.Policy.from_pretrained(POLICY, dtype=torch.float32)
    joints = policy.config.joints
    actions = joints.statistics.actions
    mean = tuple(value + offset * (i in GRIPPERS) for i, value in enumerate(actions.mean))
    statistics = dataclasses.replace(joints.statistics, actions=dataclasses.replace(actions, mean=mean))
    policy.config = dataclasses.replace(policy.config, joints=dataclasses.replace(joints, statistics=statistics))
    return policy.save_pretrained(folder)


def sign_test(gained: int, lost: int) -> float:
    """Probability of a split at least as uneven if both ways were equally likely; scenes with the same outcome before and after say nothing."""
    count = gained + lost
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(max(gained, lost), count + 1)) / 2**count)


def main(
    offset: float = 0.18,
    iterations: int = 11,
    episodes: int = 40,
    learning_rate: float = 0.05,
    seed: int = 0,
    out: Path = Path("outputs/demo/improve"),
) -> None:
    """Evaluate, train, evaluate.

    Args:
        offset: error of the grippers' targets.
        iterations: of GRPO, 24 episodes each.
        episodes: of each evaluation; the same ones before and after, none of which is trained on.
        learning_rate: of the biases.
        seed: of training.
        out: folder of policies, reports and curve; what an earlier call left there is replaced.
    """
    shutil.rmtree(out, ignore_errors=True)

    def evaluate(folder: Path, name: str) -> Results:
        policy = vlahub.Policy.from_pretrained(folder, **GRID)
        return vlahub.evaluate(
            ENV, policy, episodes, num_envs=2, seed=7, out=out / name, max_steps=STEPS, videos=1, env_options=PICTURES, policy_name=name, progress=False
        )

    start = miscalibrated(offset, out / "start")
    before = evaluate(start, "before")
    print(before, flush=True)
    words = ["--env-id", ENV, "--policy", str(start), "--env-options", "camera_size=[96,128]", "--max-steps", str(STEPS)]
    words += ["--num-groups", "6", "--group-size", "4", "--update-epochs", "1", "--num-minibatches", "1", "--target-kl", "0"]
    words += ["--train-only", "model.action_out_proj.bias", "--learning-rate", str(learning_rate), "--total-iterations", str(iterations)]
    # what is told here of noise: docs/results.md
    words += ["--policy-options", *(f"{name}={value}" for name, value in GRID.items()), "noise_level=0.2", "noise_step=last", "noise_correlation=0.95"]
    words += ["--seed", str(seed), "--device", "cpu", "--workers", "2", "--eval-every", "0", "--save-every", "0", "--out", str(out), "--name", "run"]
    print("python baselines/grpo.py", *words, flush=True)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the simulations need the cores
    began, iteration = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, str(ROOT / "baselines" / "grpo.py"), *words], stdout=subprocess.PIPE, text=True, env=one_thread) as training:
        for line in training.stdout:
            if found := re.search(r"^step .* env/success_rate (\S+)", line):
                iteration += 1
                print(f"iteration {iteration} of {iterations}: {100 * float(found[1]):3.0f} % of 24 exploring episodes solved", flush=True)
    if training.returncode:
        raise SystemExit(f"training failed (status {training.returncode}); its message is above")
    minutes = (time.perf_counter() - began) / 60
    after = evaluate(out / "run" / "policy", "after")
    curve = plot([out / "run"], out / "curve.png", ["env/success_rate"])

    print(f"\n{24 * iterations} episodes of GRPO in {minutes:.1f} minutes; {episodes} episodes that were not trained on, the same before and after:")
    for name, results in (("before", before), ("after", after)):
        low, high = results.interval
        print(
            f"  {name:6}  {100 * results.success_rate:5.1f} % solved (95 % interval {100 * low:.1f} to {100 * high:.1f})   {(out / name / 'report.html').resolve()}"
        )
    first, second = ({one.index: one.success for one in results.episodes if not one.aborted} for results in (before, after))
    both = first.keys() & second.keys()
    gained, lost = sum(second[i] and not first[i] for i in both), sum(first[i] and not second[i] for i in both)
    chance = sign_test(gained, lost)
    print(
        f"{gained} scenes are solved that were not, {lost} no longer. If training had changed nothing, so uneven a split would come up with a probability of {chance:.3f}:"
    )
    if chance >= 0.05:
        print("so few episodes do not show that the policy changed for the better or worse. More --iterations and --episodes may.")
    else:
        print(f"on these scenes the policy became {'better' if gained > lost else 'worse'}; docs/results.md has other scenes.")
    print(f"the curve of training: {curve.resolve()}")


if __name__ == "__main__":
    tyro.cli(main)
