"""Reinforcement learning that one can wait for: the bundled tiny LingBot-VLA, some minutes of GRPO on two CPU cores, success before and after.

    python examples/improve_policy.py                     # about 8 minutes on 2 cores, evaluations included; everything goes to outputs/demo/improve
    python examples/improve_policy.py --iterations 30     # longer

The policy was trained on demonstrations of five RoboTwin tasks. With 90 control steps, where the expert needs 80, it presses the bell in some four of ten scenes. GRPO plays
each scene several times with small deviations from the policy's actions (`noise_level` and the like in its config), is told 0 or 1 at the end of each episode and nothing else,
and moves all weights a little towards what was done in the better episodes of a scene. docs/training.md explains the settings.
"""

import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tyro

import vlahub
from vlahub.evaluation import Results
from vlahub.plot import plot

ROOT = Path(__file__).resolve().parents[1]
ENV, POLICY = "vlahub/RoboTwin-ClickBell", "vlahub/lingbot-tiny-robotwin"
STEPS = 90  # control steps of an episode
CAMERAS = ("head",)  # the policy sees no other; drawing in software costs by the pixel
GROUPS, SIZE = 6, 8  # of an iteration: scenes, and episodes of each


def sign_test(gained: int, lost: int) -> float:
    """Probability of a split at least as uneven if both ways were equally likely; scenes with the same outcome before and after say nothing."""
    count = gained + lost
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(max(gained, lost), count + 1)) / 2**count)


def training(iterations: int, learning_rate: float, seed: int, out: Path) -> list[str]:
    """The command line of GRPO."""
    words = ["--env-id", ENV, "--policy", POLICY, "--env-options", f"cameras={CAMERAS}", "--max-steps", STEPS]
    words += ["--num-groups", GROUPS, "--group-size", SIZE, "--total-iterations", iterations, "--learning-rate", learning_rate, "--target-kl", 0.2]
    words += ["--seed", seed, "--device", "cpu", "--workers", 2, "--eval-every", 0, "--save-every", 0, "--out", out, "--name", "run"]
    return [str(word) for word in words]


def main(iterations: int = 12, episodes: int = 100, learning_rate: float = 5e-6, seed: int = 0, out: Path = Path("outputs/demo/improve")) -> None:
    """Evaluate, train, evaluate.

    Args:
        iterations: of GRPO, 48 episodes each.
        episodes: of each evaluation; the same ones before and after, none of which is trained on.
        learning_rate: of the policy's weights.
        seed: of training.
        out: folder of the policy, reports and curve; what an earlier call left there is replaced.
    """
    shutil.rmtree(out, ignore_errors=True)

    def evaluate(policy: str | Path, name: str) -> Results:
        loaded = vlahub.Policy.from_pretrained(policy)
        results = vlahub.evaluate(
            ENV, loaded, episodes, num_envs=2, seed=7, out=out / name, max_steps=STEPS, videos=1, env_options={"cameras": CAMERAS}, policy_name=name
        )
        print(results, flush=True)
        return results

    before = evaluate(POLICY, "before")
    words = training(iterations, learning_rate, seed, out)
    print("python baselines/grpo.py", *words, flush=True)
    began, iteration = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, str(ROOT / "baselines" / "grpo.py"), *words], stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            if found := re.search(r"^step .* env/success_rate (\S+)", line):
                iteration += 1
                print(f"iteration {iteration} of {iterations}: {100 * float(found[1]):3.0f} % of the exploring episodes solved", flush=True)
    if running.returncode:
        raise SystemExit(f"training failed (status {running.returncode}); its message is above")
    minutes = (time.perf_counter() - began) / 60
    after = evaluate(out / "run" / "policy", "after")
    curve = plot([out / "run"], out / "curve.png", ["env/success_rate"])

    print(f"\n{GROUPS * SIZE * iterations} episodes of GRPO in {minutes:.1f} minutes; {episodes} episodes that were not trained on, the same before and after:")
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
        f"{gained} scenes are solved that were not, {lost} no longer. If training had changed nothing, so uneven a split would come up with a probability of {chance:.3g}:"
    )
    if chance >= 0.05:
        print("so few episodes do not show that the policy changed for the better or worse. More --iterations and --episodes may.")
    else:
        print(f"the policy became {'better' if gained > lost else 'worse'}.")
    print(f"the curve of training: {curve.resolve()}")


if __name__ == "__main__":
    tyro.cli(main)
