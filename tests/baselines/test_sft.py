import json

import pytest
import torch
from safetensors.torch import load_file

from baselines.sft import Args, average_into, check_args, learning_rate_fraction
from tests.baselines.scripts import curves, launch
from tests.mlp import MlpPolicy
from tests.test_dataset import record
from tests.worlds import PointWorld
from vlahub.distributed import Ranks


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    record(folder, PointWorld(size=8, told=True), 60)
    return folder


def sft(demos, tmp_path, **options):
    small = {"dataset": demos, "policy": "tiny:test-mlp-gaussian", "out": tmp_path, "batch_size": 8, "log_every": 1, "save_every": 3, "workers": 1}
    run = launch("sft", **{**small, **options})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run


def test_two_ranks_see_what_one_sees(demos, tmp_path):
    sft(demos, tmp_path, name="one", policy="tiny:test-mlp-flow", total_iterations=4, micro_batch_size=2)
    sft(demos, tmp_path, ranks=2, name="two", policy="tiny:test-mlp-flow", total_iterations=4)
    one, two = (curves(tmp_path / name, "train/sft_loss", "train/actor/grad_norm") for name in ("one", "two"))
    assert len(one) == 4 and all(a[name] == pytest.approx(b[name], abs=1e-5) for a, b in zip(one, two, strict=True) for name in a)


def test_a_resumed_run_equals_an_uninterrupted_one(demos, tmp_path):
    sft(demos, tmp_path, name="whole", total_iterations=6, ema=0.9)
    sft(demos, tmp_path, name="half", total_iterations=6, ema=0.9)
    newest = tmp_path / "half/checkpoints/step-000000006"
    (newest / "checkpoint.json").unlink()  # as if killed before it was complete
    rest = launch("sft", resume=tmp_path / "half")
    assert rest.returncode == 0 and "resuming after iteration 3" in rest.stdout, rest.stdout[-2000:] + rest.stderr[-2000:]
    for part in ("policy", "ema"):
        a, b = (load_file(tmp_path / name / "checkpoints/step-000000006" / part / "model.safetensors") for name in ("whole", "half"))
        assert all(torch.equal(a[name], b[name]) for name in a), part
    averaged = load_file(tmp_path / "half/policy/model.safetensors")
    assert all(torch.equal(averaged[name], b[name]) for name in b), "the moving average is what is exported"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["gaussian", "categorical", "flow"])
def test_learns_from_demonstrations(demos, tmp_path, head):
    options = {"learning_rate": 3e-3, "eval_every": 600, "eval_episodes": 40, "save_every": 0, "log_every": 100, "batch_size": 64}
    sft(demos, tmp_path, name=head, policy=f"tiny:test-mlp-{head}", env_id="test/PointTold", total_iterations=600, **options)
    assert json.loads((tmp_path / head / "eval/000600/results.json").read_text())["success_rate"] > 0.8
    assert (tmp_path / head / "policy/config.json").exists()


def test_bad_arguments_are_refused(demos, tmp_path):
    cpu = Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="--dataset FOLDER"):
        check_args(Args(), cpu)
    with pytest.raises(ValueError, match="nearest that do: 5, 6, 10"):
        check_args(Args(dataset=("x",), batch_size=30, micro_batch_size=7), cpu)
    missing = launch("sft", dataset=tmp_path / "nothing", policy="tiny:test-mlp-gaussian", out=tmp_path)
    assert missing.returncode != 0 and "no meta/info.json" in missing.stderr
    record(tmp_path / "other", PointWorld(size=8), 1)
    other = launch("sft", dataset=[demos, tmp_path / "other"], policy="tiny:test-mlp-gaussian", out=tmp_path)
    assert other.returncode != 0 and "2 numbers in states, " in other.stderr


def test_the_learning_rate_warms_up_and_falls():
    args = Args(warmup=10, total_iterations=110, final_lr_fraction=0.1)
    assert learning_rate_fraction(0, args) == 0.1 and learning_rate_fraction(9, args) == 1.0
    assert learning_rate_fraction(60, args) == pytest.approx(0.55) and learning_rate_fraction(110, args) == pytest.approx(0.1)


def test_the_average_moves_towards_the_weights():
    interface = PointWorld().interface
    a, b = MlpPolicy.tiny(interface), MlpPolicy.tiny(interface)
    start, target = a.actor[0].weight.clone(), b.actor[0].weight.clone()
    average_into(a, b, 0.9, iteration=10**6)
    assert torch.allclose(a.actor[0].weight, 0.9 * start + 0.1 * target, atol=1e-6)
