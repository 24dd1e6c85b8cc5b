import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import vlahub
from tests.slope import SLOPE, Slope, SlopeConfig
from tests.torchrun import torchrun
from vlahub import catalog, checkpoint
from vlahub.hub import CheckpointError


@pytest.fixture(autouse=True)
def slope_family(monkeypatch):
    monkeypatch.setattr(catalog, "FAMILIES", {"slope": SLOPE})


class Run:
    """A policy in training. Every step draws from all three generators that a baseline may use."""

    def __init__(self, seed=0, horizon=3, frozen=False):
        torch.manual_seed(seed)
        self.policy = Slope(SlopeConfig(horizon=horizon))
        self.policy.head.bias.requires_grad_(not frozen)
        self.optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self):
        batch = {"states": torch.randn(4, 2), "actions": torch.randn(4, self.policy.horizon, 2) * random.random() + float(np.random.rand())}
        loss = self.policy.sft_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def save(self, folder, step, **kwargs):
        return checkpoint.save(folder, step, self.policy, self.optimizer, self.scheduler, **kwargs)

    def load(self, path):
        return checkpoint.load(path, self.policy, self.optimizer, self.scheduler)


@pytest.mark.parametrize("frozen", [False, True])
def test_three_iterations_and_three_after_resuming_equal_six(tmp_path, frozen):
    random.seed(0), np.random.seed(0)
    run = Run(frozen=frozen)
    for _ in range(3):
        run.step()
    np.random.randn()  # leaves half a pair in numpy's generator
    path = run.save(tmp_path, 3, counters={"env_seed": 4096, "best": 0.1 + 0.2})
    losses = [run.step() for _ in range(3)]

    random.seed(9), np.random.seed(9)
    again = Run(seed=5, frozen=frozen)
    counters = again.load(path)
    assert counters == {"env_seed": 4096, "best": 0.1 + 0.2, "step": 3}
    assert [again.step() for _ in range(3)] == losses
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], tensor), name
    assert again.scheduler.get_last_lr() == run.scheduler.get_last_lr()


def test_saving_does_not_disturb_the_run(tmp_path):
    losses = []
    for saves in (False, True):
        random.seed(0), np.random.seed(0)
        run = Run()
        losses.append([])
        for step in range(4):
            if saves:
                run.save(tmp_path, step)
            losses[-1].append(run.step())
    assert losses[0] == losses[1]


def test_from_pretrained_reads_the_policy_inside(tmp_path):
    run = Run()
    path = run.save(tmp_path, 1)
    policy = vlahub.Policy.from_pretrained(path / "policy")
    assert torch.equal(policy.head.weight, run.policy.head.weight)


def test_the_last_k_are_kept_and_latest_counts_in_numbers(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    run = Run()
    for step in (2, 9, 10, 1_000_000_000):
        run.save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000000010", "step-1000000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-1000000000"]
    assert checkpoint.latest(tmp_path).name == "step-1000000000"
    (tmp_path / "step-2000000000").mkdir()  # copied in part, say
    assert checkpoint.latest(tmp_path).name == "step-1000000000"
    with pytest.raises(ValueError, match="keep must be at least 1"):
        run.save(tmp_path, 11, keep=0)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(value, path):
    path.write_bytes(b"half of a file")
    die()


# The point of saving step 2 at which the process dies by SIGKILL, and the step that must be there afterwards
KILLS = [(Slope, "side_files", die, 1), (torch, "save", die_half_way, 1), (Path, "rename", die, 1), (shutil, "rmtree", die, 2)]


@pytest.mark.parametrize(("owner", "name", "last_words", "survivor"), KILLS, ids=[name for _, name, _, _ in KILLS])
def test_kill_9_while_saving_loses_nothing_saved_before(tmp_path, owner, name, last_words, survivor):
    run = Run()
    run.step()
    run.save(tmp_path, 1, counters={"n": 1})
    child = os.fork()
    if child == 0:
        try:
            setattr(owner, name, last_words)
            run.save(tmp_path, 2, counters={"n": 2}, keep=1)
        finally:
            os._exit(0)  # the child never returns into pytest
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = Run(seed=1)
    assert again.load(checkpoint.latest(tmp_path)) == {"n": survivor, "step": survivor}
    assert torch.equal(again.policy.head.weight, run.policy.head.weight)
    again.save(tmp_path, 3, keep=5)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [], "what the killed process left is cleared away"
    assert checkpoint.latest(tmp_path).name == "step-000000003"


def test_what_does_not_fit_is_refused_by_name(tmp_path, monkeypatch):
    run = Run()
    path = run.save(tmp_path, 1)

    class Other(Slope):
        family = "other"

    with pytest.raises(CheckpointError, match="holds a slope policy, the run trains a other policy"):
        checkpoint.load(path, Other(SlopeConfig()))
    with pytest.raises(CheckpointError, match=r"does not fit Slope:\n  - 2 tensors of another shape: .*head.weight \[6, 2\] for \[10, 2\]"):
        Run(horizon=5).load(path)
    with pytest.raises(FileExistsError, match="exists already; resume from it, or give this run a folder of its own"):
        run.save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: it has no checkpoint.json. It holds step-000000001"):
        run.load(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"saved with 1 groups of 2 parameters, this one has 1 of 1; head.bias trained in one of them only"):
        Run(frozen=True).load(path)
    with pytest.raises(ValueError, match="2 parameters that are not the policy's"):
        checkpoint.save(tmp_path, 2, Slope(SlopeConfig()), run.optimizer)
    bare = checkpoint.save(tmp_path / "bare", 1, run.policy)
    with pytest.raises(CheckpointError, match="saved without optimizer state"):
        run.load(bare)
    assert checkpoint.load(bare, Slope(SlopeConfig())) == {"step": 1}
    record = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**record, "version": 99}))
    with pytest.raises(CheckpointError, match="layout 99, this vlahub reads 1"):
        run.load(path)


def test_a_failed_save_leaves_the_old_ones(tmp_path, monkeypatch):
    run = Run()
    run.save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step-000000001"


class TiedSlope(Slope):
    def __init__(self, config):
        super().__init__(config)
        self.twin = torch.nn.Linear(2, config.horizon * 2)
        self.twin.weight = self.head.weight


def test_tied_parameters_survive(tmp_path):
    policy = TiedSlope(SlopeConfig())
    path = checkpoint.save(tmp_path, 1, policy)
    again = TiedSlope(SlopeConfig())
    checkpoint.load(path, again)
    assert torch.equal(again.twin.weight, policy.head.weight) and again.twin.weight is again.head.weight


SHARDED = """
import random, torch, numpy as np
from tests.slope import SLOPE, Slope, SlopeConfig
from vlahub import catalog, checkpoint, distributed as d

catalog.FAMILIES["slope"] = SLOPE
ranks = d.setup("cpu")

def make(seed, sharded):
    torch.manual_seed(seed)
    policy = Slope(SlopeConfig())
    if sharded:
        d.shard(policy, [], d.mesh(ranks))
    return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)

def step(policy, optimizer, sharded):
    batch = {"states": torch.randn(4, 2), "actions": torch.randn(4, 3, 2)}  # each rank draws its own
    optimizer.zero_grad()
    policy.sft_loss(batch).backward()
    if not sharded:
        d.average_gradients(policy.parameters())
    optimizer.step()

def weights(policy):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in policy.parameters()]

for sharded in (False, True):
    d.seed_everything(3, ranks.rank)
    policy, optimizer = make(0, sharded)
    torch.manual_seed(100 + ranks.rank)
    for _ in range(2):
        step(policy, optimizer, sharded)
    path = checkpoint.save(folder / f"sharded-{sharded}", 2, policy, optimizer, counters={"n": 7})
    step(policy, optimizer, sharded)
    expected = weights(policy)

    policy, optimizer = make(1, sharded)
    assert checkpoint.load(path, policy, optimizer) == {"n": 7, "step": 2}
    step(policy, optimizer, sharded)
    for a, b in zip(weights(policy), expected):
        assert torch.equal(a, b), (sharded, a - b)

# both ways of training write the same file, and either is read by the other
policy, optimizer = make(2, True)
checkpoint.load(folder / "sharded-False" / "step-000000002", policy, optimizer)
step(policy, optimizer, True)
for a, b in zip(weights(policy), expected):
    torch.testing.assert_close(a, b)

# rank 0 cannot write: all ranks hear of it
try:
    checkpoint.save("/proc/nowhere", 1, policy, optimizer)
    raise SystemExit("a save into /proc was accepted")
except (OSError, RuntimeError) as error:
    print(f"rank {ranks.rank} heard: {error}", flush=True)
d.cleanup()
"""


def test_two_ranks_whole_and_sharded_resume_to_the_bit_and_one_rank_reads_both(tmp_path):
    process = torchrun(SHARDED, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "rank 0 heard" in process.stdout and "rank 1 heard: rank 0 failed" in process.stdout
    states = []
    for sharded in (False, True):
        path = checkpoint.latest(tmp_path / f"sharded-{sharded}")
        policy = vlahub.Policy.from_pretrained(path / "policy")
        optimizer = torch.optim.AdamW(policy.parameters())
        assert checkpoint.load(path, policy, optimizer) == {"n": 7, "step": 2}
        states.append([*policy.state_dict().values(), *(entry["exp_avg"] for entry in optimizer.state.values())])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)
