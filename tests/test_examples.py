"""The examples run as a user runs them: from the root of the repository, as a script."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baselines import grpo
from vlahub import Policy, catalog, distributed, video
from vlahub.catalog import key_values
from vlahub.run import arguments

ROOT = Path(__file__).resolve().parent.parent
# one id per family; the example needs a scripted expert
FAMILIES = {card.family: card.id for card in reversed(catalog.ENVS.values()) if card.family != "test" and card.expert}


def run(script, *arguments, seconds=240):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"examples/{script}", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout


def test_add_your_own_env():
    out = run("add_your_own_env.py")
    assert "expert: solved 100% of 20 episodes" in out
    assert "random: solved" in out and "random: solved 100%" not in out


@pytest.mark.parametrize("env_id", ["add_your_own_env:my/Reach", *FAMILIES.values()])
def test_run_env(tmp_path, env_id):
    out = run("run_env.py", "--env-id", env_id, "--seed", 3, "--video-path", tmp_path / "episode.mp4")
    assert "instruction: " in out and "states: float32" in out and "\nsolved after " in out
    steps = int(out.split("solved after ")[1].split()[0])
    assert len(video.decode(tmp_path / "episode.mp4")) >= min(steps, 2)


def test_the_code_of_the_own_env_stays_short():
    """The example promises 40 lines: those of the class that a family implements, without blank ones."""
    source = (ROOT / "examples" / "add_your_own_env.py").read_text()
    body = source.split("class Reach:")[1].split("class Straight:")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40


def test_pi0_inference():
    out = run("pi0_inference.py")
    assert "chunk (10, 7) in" in out and "log-probabilities (4, 10, 7)" in out


def test_finetuning_a_tiny_policy(tmp_path):
    out = run("finetune.py", "--out", tmp_path, "--episodes", 10, "--steps", 2)
    assert "step 2: loss" in out and "it loads as Pi0Policy" in out


def test_finetuning_a_published_checkpoint(tmp_path):
    pytest.importorskip("sentencepiece")
    from tests.policies import published
    from vlahub.dataset import DatasetWriter
    from vlahub.interface import Camera
    from vlahub_policies.parts.robots import LIBERO

    rng = np.random.default_rng(0)
    cameras = {"main": Camera("agentview", 64, 64), "wrists": (Camera("eye_in_hand", 64, 64),)}
    with DatasetWriter(tmp_path / "demos", replace(LIBERO, **cameras), fps=20) as writer:
        for _ in range(2):
            frames = [
                {
                    "main_images": rng.integers(0, 256, (64, 64, 3), np.uint8),
                    "wrist_images": rng.integers(0, 256, (64, 64, 3), np.uint8),
                    "states": rng.normal(size=8).astype(np.float32),
                    "task_descriptions": "close the drawer",
                }
                for _ in range(3)
            ]
            writer.add_episode(frames, rng.uniform(-1, 1, (3, 7)).astype(np.float32))
    folder = published.lerobot(tmp_path / "pi05_base", published.network(pi05=True), None)
    out = run(
        "finetune.py", "--dataset", tmp_path / "demos", "--checkpoint", folder, "--robot", "libero", "--out", tmp_path / "out", "--steps", 2, "--batch-size", 2
    )
    trained, every = (int(part.replace(",", "")) for part in re.search(r"([\d,]+) of ([\d,]+) parameters train", out).groups())
    assert 0 < trained < every / 2 and "it loads as Pi0Policy" in out


def test_improving_the_policy_asks_for_a_training_that_fits(tmp_path, monkeypatch):
    """The training itself takes minutes, and its parts are tested elsewhere; here, that GRPO takes these words and the policy these options."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import improve_policy

    args = arguments(grpo.Args, None, improve_policy.training(3, 1e-6, 5, tmp_path))
    grpo.check_args(args, distributed.setup("cpu"))
    assert args.total_iterations == 3 and args.learning_rate == 1e-6 and args.seed == 5 and args.out == str(tmp_path)
    policy = Policy.from_pretrained(improve_policy.POLICY, **key_values("policy-options", args.policy_options))
    # evaluated as it is trained, on smooth chunks; explored where it shows
    settings = {"denoising_steps": 4, "num_steps": 4, "start_noise": 0.0, "noise_level": 0.1, "noise_step": "last", "noise_correlation": 0.9}
    for name, value in settings.items():
        assert getattr(policy.config, name) == value
    assert key_values("env-options", args.env_options) == {"cameras": improve_policy.CAMERAS}


@pytest.mark.parametrize("gained, lost, expected", [(0, 0, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 0, 2 / 32), (3, 3, 1.0)])
def test_sign_test_of_gained_and_lost_scenes(monkeypatch, gained, lost, expected):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import improve_policy

    assert improve_policy.sign_test(gained, lost) == pytest.approx(expected)
