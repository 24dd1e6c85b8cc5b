import json

import pytest
import torch
from safetensors.torch import load_file

from baselines import rl_co
from baselines.rl_co import Args, loss_ratio
from tests.baselines.scripts import curves, launch
from tests.test_dataset import record
from tests.worlds import PointWorld
from vlahub.distributed import Ranks
from vlahub.tracking import line

SMALL = {"env_id": "test/PointTold", "policy": "tiny:test-mlp-flow", "num_envs": 2, "num_chunks": 4, "num_minibatches": 2, "eval_every": 0}
LOSSES = ("train/ppo_loss", "train/sft_loss", "actor/total_loss", "train/loss_ratio", "train/actor/grad_norm")
PPO = ("train/actor/policy_loss", "train/critic/value_loss", "train/actor/grad_norm", "train/actor/approx_kl")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    record(folder, PointWorld(size=8, told=True), 12)
    return folder


def script(baseline, tmp_path, **options):
    run = launch(baseline, **{**SMALL, "out": tmp_path, "save_every": 0} | options)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run


def test_without_real_data_it_is_ppo_to_the_digit(tmp_path):
    for name, more in (("ppo", {}), ("rl_co", {"use_real_data_co_training": False})):
        script(name, tmp_path, name=name, total_iterations=2, num_envs=4, entropy_coef=0.01, critic_warmup=1, **more)
    a, b = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("ppo", "rl_co"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert curves(tmp_path / "ppo", *PPO) == curves(tmp_path / "rl_co", *PPO)


def test_two_ranks_see_what_one_sees_and_the_losses_add_up(real, tmp_path):
    one = script("rl_co", tmp_path, name="one", total_iterations=2, real_dataset=real, sft_batch_size=6)
    two = script("rl_co", tmp_path, ranks=2, name="two", total_iterations=2, real_dataset=real, sft_batch_size=6)
    assert "4 decisions x 6 frames / (4 per micro-batch x 1 ranks) = 6 real frames per optimizer step" in one.stdout
    assert "6 real frames, 3 on each of 2 ranks" in two.stdout
    one, two = (curves(tmp_path / name, *LOSSES) for name in ("one", "two"))
    assert len(one) == 2 and all(row["train/sft_loss"] > 0 for row in one)
    for a, b in zip(one, two, strict=True):
        # the ratio divides by a loss near zero; it follows from the two losses, as the last line says
        assert all(a[name] == pytest.approx(b[name], abs=1e-5) for name in a if name != "train/loss_ratio"), (a, b)
        assert a["actor/total_loss"] == pytest.approx(a["train/ppo_loss"] + 0.2 * a["train/sft_loss"], abs=1e-6)
        assert a["train/loss_ratio"] == pytest.approx(0.2 * a["train/sft_loss"] / abs(a["train/ppo_loss"]), rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(real, tmp_path):
    script("rl_co", tmp_path, name="run", total_iterations=2, save_every=1, real_dataset=real, micro_batch_size=2, sft_batch_size=2)
    last = tmp_path / "run/checkpoints/step-000000002"
    counters = json.loads((last / "checkpoint.json").read_text())["counters"]
    assert counters["real_batches"] == 2 * 2 * 2 * 2, "iterations x epochs x minibatches x micro-batches"
    whole = load_file(last / "policy/model.safetensors")
    (last / "checkpoint.json").unlink()  # as if killed before it was complete
    rest = launch("rl_co", resume=tmp_path / "run")
    assert rest.returncode == 0 and "resuming after iteration 1" in rest.stdout, rest.stdout + rest.stderr[-2000:]
    again = load_file(last / "policy/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_true_batch_size_of_the_published_configuration(capsys):
    """RL-Co on 8 GPUs: 64 environments x 2 rounds x 20 chunks = 2560 decisions in one step, micro-batches of 40, 16 frames with each: 128 frames."""
    args = Args(num_envs=128, num_chunks=20, num_minibatches=1, micro_batch_size=40, real_dataset=("x",))
    rl_co.check_args(args, Ranks(0, 8, 0, torch.device("cpu")))
    shown = capsys.readouterr().out
    assert "each of the 8 micro-batches" in shown and "16 real frames, 2 on each of 8 ranks" in shown and "= 128 real frames per optimizer step" in shown


def test_the_loss_ratio_has_beta_in_it_and_its_warning_names_the_knob():
    assert loss_ratio(3.0, -0.5, 0.2) == pytest.approx(1.2) and loss_ratio(1.0, 0.0, 0.2) > 1e5
    assert "--sft-loss-weight" in line(1, {"train/loss_ratio": loss_ratio(1.0, 1e-7, 0.2)}, 0)
    assert "WARNING" not in line(1, {"train/loss_ratio": loss_ratio(1.0, 1e-5, 0.2)}, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sft_loss_weight": -0.1, "real_dataset": ("x",)}, "sft_loss_weight must not be negative"),
        ({}, "--real-dataset FOLDER"),
        ({"sft_batch_size": 5, "real_dataset": ("x",)}, r"the number of ranks \(2\) does not divide sft_batch_size \(5\)"),
    ],
)
def test_bad_arguments_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        rl_co.check_args(Args(**wrong), Ranks(0, 2, 0, torch.device("cpu")))


def test_data_that_do_not_fit_are_refused_by_name(real, tmp_path):
    from tests.mlp import MlpPolicy
    from vlahub.dataset import DatasetError

    record(tmp_path / "blind", PointWorld(size=8), 1)
    policy, ranks = MlpPolicy.tiny(PointWorld(told=True).interface), Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(DatasetError, match=r"blind .*--policy me: (.|\n)*state: .*position\[2\], .*position\[2\], target\[2\]"):
        rl_co.real_data(Args(real_dataset=(str(tmp_path / "blind"),), policy="me"), policy, ranks)
    (tmp_path / "blind/meta/vlahub.json").unlink()  # as if somebody else's
    with pytest.raises(DatasetError, match=r"does not fit --policy me: 'observation.state' has 2 numbers, the policy's state 4"):
        rl_co.real_data(Args(real_dataset=(str(tmp_path / "blind"),), policy="me"), policy, ranks)


def test_the_file_finds_ppo_however_it_is_started(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    code = f"import runpy, sys; sys.argv = ['rl_co.py', '--help']; sys.path.insert(0, {str(root / 'baselines')!r}); runpy.run_path({str(root / 'baselines/rl_co.py')!r}, run_name='__main__')"
    installed = {**os.environ, "PYTHONPATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root, env=installed)
    assert "--no-use-real-data-co-training" in shown.stdout and "beta, the weight" in shown.stdout, shown.stderr[-500:]


@pytest.mark.slow
def test_learns_with_demonstrations_beside(real, tmp_path):
    """Few demonstrations and few environments: both losses fall, and the policy learns to reach."""
    script(
        "rl_co", tmp_path, name="run", policy="tiny:test-mlp-gaussian", num_envs=16, num_chunks=16, num_minibatches=4, total_iterations=25, update_epochs=6, learning_rate=3e-3,
        value_learning_rate=2e-3, target_kl=0.0, eval_every=25, eval_episodes=60, max_steps=12, real_dataset=real,
    )  # fmt: skip
    first, last = (json.loads((tmp_path / "run/eval" / number / "results.json").read_text())["success_rate"] for number in ("000000", "000025"))
    assert first < 0.35 and last > 0.7, (first, last)
    losses = curves(tmp_path / "run", *LOSSES)
    assert losses[-1]["train/sft_loss"] < 0.7 * losses[0]["train/sft_loss"]
