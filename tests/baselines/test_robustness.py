"""What baselines do when things go wrong: signals, losses that are not finite, too little memory, dying ranks, the wrong checkpoint."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from baselines import ppo
from tests.baselines.scripts import HERE, launch
from tests.mlp import MlpPolicy
from tests.worlds import PointWorld
from vlahub import catalog, distributed
from vlahub.distributed import Ranks
from vlahub.run import Run, advice, arguments, load_policy, memory_advice

SMALL = {"env_id": "test/Point", "policy": "tiny:test-mlp-gaussian", "num_envs": 2, "num_chunks": 4, "num_minibatches": 2, "eval_every": 0, "workers": 1}
CPU = Ranks(0, 1, 0, torch.device("cpu"))


def start(baseline, *torchrun, **options) -> subprocess.Popen:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else [sys.executable]
    command = [*launcher, "tests/baselines/launch.py", baseline, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=HERE)


def wait_for(condition, process, seconds=150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.1)


def test_sigterm_saves_and_leaves(tmp_path):
    process = start("ppo", out=tmp_path, name="run", total_iterations=100_000, save_every=0, **SMALL)
    board = tmp_path / "run"
    wait_for(lambda: any(file.stat().st_size > 3000 for file in board.glob("events.*")), process)  # some iterations are done
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert f"stopped by SIGTERM; go on with --resume {board}" in shown
    (saved,) = (board / "checkpoints").glob("step-*")
    done = json.loads((saved / "checkpoint.json").read_text())["counters"]["iteration"]
    rest = launch("ppo", resume=board, total_iterations=done + 1)
    assert rest.returncode == 0 and f"resuming after iteration {done}" in rest.stdout, rest.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ not finite


@dataclasses.dataclass
class Settings:
    env_id: str = "test/Point"
    policy: str = "tiny:test-mlp-gaussian"
    out: str = ""
    name: str = "run"
    resume: str = ""
    seed: int = 0
    bf16: bool = False
    shard: bool = False
    gradient_checkpointing: bool = False
    offload: bool = False
    track: bool = False
    workers: int = 1
    max_steps: int = 0
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    eval_every: int = 0
    eval_episodes: int = 1
    total_iterations: int = 1
    keep: int = 1
    max_skipped: int = 2


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_and_counted_and_stops_in_the_end(tmp_path, capsys, wrong):
    policy = MlpPolicy.tiny(PointWorld().interface)
    run = Run("test", Settings(out=str(tmp_path)), CPU)
    optimizer = run.optimizer(policy)
    saved = run.save(policy, optimizer, {"iteration": 1})
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    def step(bad: bool) -> None:
        (policy.actor[0].weight.sum() * (float("nan") if bad and wrong == "gradient" else 1.0)).backward()
        run.step(optimizer, policy, float("inf") if bad and wrong == "loss" else 1.0, 1.0)

    step(bad=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert "optimizer step skipped" in (shown := capsys.readouterr().out) and ("actor.0.weight" if wrong == "gradient" else "the loss (inf)") in shown
    assert not any(parameter.grad is not None for parameter in policy.parameters())
    step(bad=False)
    assert not torch.equal(before["actor.0.weight"], policy.actor[0].weight) and run.skipped == 1 and run.skipped_in_a_row == 0
    step(bad=True)
    with pytest.raises(FloatingPointError, match=rf"2 optimizer steps in a row were not finite.*last good checkpoint is .*{saved.name}"):
        step(bad=True)
    assert run.skipped == 3
    run.close()


def test_offload_takes_turns_and_changes_nothing(tmp_path):
    weights, order = [], []

    class Env:
        park, unpark = (lambda self, word=word: order.append(word) for word in ("park", "unpark"))

    for offload in (False, True):
        torch.manual_seed(0)
        policy = MlpPolicy.tiny(PointWorld().interface)
        run = Run("test", Settings(out=str(tmp_path), name=str(offload), offload=offload), CPU)
        optimizer = run.optimizer(policy)
        for _ in range(3):
            with run.updating(optimizer, Env()):
                policy.actor[0].weight.square().sum().backward()
                run.step(optimizer, policy, 1.0, 1.0)
        assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cpu"}
        weights.append(policy.actor[0].weight.detach().clone())
        run.close()
    assert torch.equal(*weights) and order == ["park", "unpark"] * 3


def test_skipped_steps_are_logged(tmp_path):
    from tests.baselines.scripts import curves

    run = Run("test", Settings(out=str(tmp_path)), CPU)
    run.skipped = 3
    run.log(1, {})
    run.close()
    assert curves(tmp_path / "run", "train/skipped_steps") == [{"train/skipped_steps": 3}]


# ------------------------------------------------------------------------------------------------ memory, ranks, checkpoints


def test_out_of_memory_proposes_the_knobs():
    @dataclasses.dataclass
    class Args:
        micro_batch_size: int = 64
        bf16: bool = False
        gradient_checkpointing: bool = False
        shard: bool = False
        num_envs: int = 8

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        words = memory_advice(error, Args())
        assert all(word in words for word in ("--micro-batch-size (it is 64", "--bf16", "--gradient-checkpointing", "--shard", "--num-envs (it is 8)")), words
    assert "--bf16" not in memory_advice(MemoryError(), Args(bf16=True))
    assert not memory_advice(ValueError("something else"), Args()) and not memory_advice(RuntimeError("another"), Args())
    with pytest.raises(MemoryError) as raised, advice(Args()):
        raise MemoryError
    assert "--micro-batch-size" in raised.value.__notes__[0]


def test_out_of_memory_says_when_the_gpu_is_full_of_others(monkeypatch):
    @dataclasses.dataclass
    class Args:
        micro_batch_size: int = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 14 * 2**30)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 308 MiB")
    for free, told in ((1, True), (100, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 140 * 2**30))
        words = memory_advice(error, Args())
        assert ("125 of this GPU's 140 GB are not this training's (14 GB are)" in words) == told == ("MUJOCO_EGL_DEVICE_ID" in words)
        assert "--micro-batch-size" in words
    assert "GPU" not in memory_advice(MemoryError(), Args())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "killed"])
def test_all_ranks_stop_when_one_dies_and_the_first_cause_is_named(tmp_path, how):
    """Rank 1 falls in its third iteration while rank 0 waits for it: by an error of its own, or, simulating for rank 0, by a signal."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {os.getcwd()!r})
import tests.conftest
from pathlib import Path
from baselines import ppo
from vlahub import remote
from vlahub.run import Run, arguments

log, receive, calls = Run.log, remote.receive, [0]

def fall():
    Path({str(tmp_path)!r}, "died").touch()
    if {how!r} == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the roof came down on rank 1")

def logging(self, *rest, **more):
    calls[0] += 1
    if calls[0] == 3 and self.ranks.rank == 1:
        fall()
    log(self, *rest, **more)

def receiving(rank):
    calls[0] += 1
    if calls[0] == 30 and os.environ["RANK"] == "1":
        fall()
    return receive(rank)

Run.log, remote.receive = logging, receiving
if __name__ == "__main__":
    ppo.main(arguments(ppo.Args, ppo.__doc__, sys.argv[1:]))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    roles = {"policy_ranks": "0", "env_ranks": "1"} if how == "killed" else {}
    words = [
        word
        for name, value in {**SMALL, **roles, "out": tmp_path, "name": "run", "total_iterations": 50}.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=HERE)
    assert done.returncode != 0 and time.time() - (tmp_path / "died").stat().st_mtime < 60, "all ranks are gone within a minute"
    assert "Root Cause" in done.stderr and ("the roof came down on rank 1" in done.stderr if how == "raises" else "SIGKILL" in done.stderr), done.stderr[-3000:]


def test_only_what_is_named_trains():
    args = ppo.Args(env_id="test/Point", policy="tiny:test-mlp-gaussian", train_only=("actor.4", "log_std"))
    policy = load_policy(args, PointWorld().interface)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == {"log_std", "actor.4.weight", "actor.4.bias"}
    with pytest.raises(ValueError, match="no parameter of tiny:test-mlp-gaussian begins with 'head'; they begin with log_std, actor.0"):
        load_policy(dataclasses.replace(args, train_only=("head",)), PointWorld().interface)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    done = launch("ppo", out=tmp_path, name="run", total_iterations=1, **SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    other = launch("ppo", resume=tmp_path / "run", policy="tiny:test-mlp-flow", total_iterations=2)
    assert other.returncode != 0 and "policy was 'tiny:test-mlp-gaussian', now 'tiny:test-mlp-flow'" in other.stderr
    arguments = json.loads((tmp_path / "run/args.json").read_text())
    (tmp_path / "run/args.json").write_text(json.dumps({**arguments, "policy": "tiny:test-mlp-flow"}))  # behind the run's back
    other = launch("ppo", resume=tmp_path / "run", total_iterations=2)
    assert other.returncode != 0 and "holds a test-mlp-gaussian policy, the run trains a test-mlp-flow policy" in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env-id", "vlahub/RoboTwin-ClikBell"], "did you mean 'vlahub/RoboTwin-ClickBell'"),
        (["--env-id", "no_such_module:my/Reach"], "No module named 'no_such_module'"),
        (["--policy", "tiny:pi"], "did you mean 'pi0'"),
        (["--policy", "pi0"], "tiny:FAMILY"),
    ],
)
def test_a_mistyped_name_is_one_message_before_anything_starts(words, message):
    with pytest.raises(SystemExit, match=message):
        arguments(ppo.Args, None, words)


def test_a_module_beside_the_user_registers_its_environment(tmp_path, monkeypatch):
    source = "import vlahub; vlahub.register_env(vlahub.EnvCard(id='my/Beside', family='my', simulation='tests.worlds:PointWorld', summary=''))"
    (tmp_path / "my_world_beside.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(catalog, "ENVS", dict(catalog.ENVS))
    assert arguments(ppo.Args, None, ["--env-id", "my_world_beside:my/Beside"]).env_id == "my_world_beside:my/Beside"
    assert catalog.env_card("my_world_beside:my/Beside").id == "my/Beside"


def test_a_mistake_is_one_message(tmp_path):
    wrong = launch("ppo", out=tmp_path, **{**SMALL, "num_minibatches": 3})
    assert wrong.returncode != 0 and "num_minibatches (3) does not divide num_chunks (4); nearest that do: 1, 2, 4" in wrong.stderr
    assert distributed.world() == 1
