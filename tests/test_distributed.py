import re

import numpy as np
import pytest
import torch

from tests.torchrun import torchrun
from vlahub import distributed
from vlahub.distributed import average, average_gradients, parse_ranks, seed_everything, share, statistics


def test_alone_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.setup("cpu")
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.device) == (0, 1, 0, torch.device("cpu"))
    distributed.barrier("nobody")
    assert distributed.on_rank0(lambda: 3) == 3 and distributed.any_rank(True) and not distributed.any_rank(False)
    distributed.broadcast_weights(torch.nn.Linear(1, 1))
    distributed.cleanup()


def test_half_a_launch_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="WORLD_SIZE.* not set, but RANK is; start the script with torchrun"):
        distributed.setup("cpu")


@pytest.mark.parametrize(("text", "ranks"), [("0", [0]), ("0-3,6", [0, 1, 2, 3, 6]), ("6, 0 - 1", [0, 1, 6]), ("2-2", [2])])
def test_parse_ranks(text, ranks):
    assert parse_ranks(text, 8) == ranks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no rank and no range; write ranks like 0-3,6"),
        ("a", "'a' is no rank"),
        ("0--1", "no range"),
        ("3-", "no range"),
        ("-3", "no rank"),
        ("3-1", "runs backwards"),
        ("0-2,1", "1 stands there twice"),
        ("0-8", "there is no rank 8; this run has ranks 0 to 7"),
    ],
)
def test_parse_ranks_says_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        parse_ranks(text, 8)


@pytest.mark.parametrize(
    ("envs", "rollouts", "policies", "words"),
    [
        ("0-1", "", "", r"env_ranks \(0-1\), rollout_ranks \(none\), policy_ranks \(none\): policy_ranks says who trains"),
        ("", "", "0-3", "goes with env_ranks"),
        ("0-1", "", "1-3", r"rank 1 stands in env_ranks \(0-1\) and in policy_ranks \(1-3\)"),
        ("0", "1-2", "2-3", r"rank 2 stands in rollout_ranks \(1-2\) and in policy_ranks \(2-3\)"),
        ("0-1", "", "3", r"rank 2 stands in none of env_ranks \(0-1\), policy_ranks \(3\); this run has ranks 0 to 3"),
        ("0", "", "1-3", "1 env ranks cannot be shared evenly by 3 policy ranks"),
        ("0", "1-2", "3", "1 env ranks cannot be shared evenly by 2 rollout ranks"),
        ("0-4", "", "5", "there is no rank 4"),
    ],
)
def test_roles_that_cannot_be_are_refused(envs, rollouts, policies, words):
    with pytest.raises(ValueError, match=words):
        distributed._split(distributed.Ranks(0, 4, 0, torch.device("cpu")), envs, policies, rollouts)


def test_rollout_and_policy_ranks_share_evenly_or_not_at_all():
    with pytest.raises(ValueError, match="2 rollout ranks and 3 policy ranks do not share evenly"):
        distributed._split(distributed.Ranks(0, 5, 0, torch.device("cpu")), "", "2-4", "0-1")


@pytest.mark.parametrize(
    ("own", "others", "partners"),
    [
        ([0, 1, 2, 3], [4, 5], [(4,), (4,), (5,), (5,)]),  # two policy ranks share a rollout rank
        ([4, 5], [0, 1, 2, 3], [(0, 1), (2, 3)]),
        ([0, 1], [2, 3], [(2,), (3,)]),
        ([0, 1], [], [(), ()]),
    ],
)
def test_partners_of_another_role(own, others, partners):
    assert [distributed._partners(rank, own, others) for rank in own] == partners


@pytest.mark.parametrize(("count", "world"), [(8, 2), (7, 3), (2, 4), (0, 2)])
def test_shares_cover_everything_once_and_evenly(count, world):
    parts = [share(count, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_seeds_repeat_and_ranks_differ():
    drawn = []
    for seed, rank in ((1, 0), (1, 0), (1, 1), (2, 0)):
        seed_everything(seed, rank)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_statistics_of_masked_tensors():
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, -99.0, 99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = statistics(values, mask)
    assert (found.mean, found.min, found.max, found.count) == (pytest.approx(7 / 3), 1.0, 4.0, 3)
    assert found.std == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())  # torch's is unbiased
    assert statistics(torch.tensor([5.0])).std == 0
    # two passes: the spread of large, close numbers survives
    assert statistics(torch.tensor([1e8, 1e8 + 8, 1e8 + 16])).std == pytest.approx(8)
    with pytest.raises(ValueError, match="differ in shape"):
        statistics(values, mask[0])
    with pytest.raises(ValueError, match="nothing to take statistics of"):
        statistics(values, mask * 0)


def test_average_weights_the_ranks():
    assert average({"a": 2.0}, weight=3) == {"a": 2.0}
    assert average({"a": 2.0}, weight=0) == {}


def test_gradients_of_one_rank_stay():
    layer = torch.nn.Linear(2, 2)
    average_gradients(layer.parameters())
    assert layer.weight.grad is None


COLLECTIVES = """
import torch
from torch import nn
from vlahub import distributed as d

ranks = d.setup("cpu")
assert ranks.world == 2 and d.rank() == ranks.rank and d.world() == 2
d.print0("rank zero speaks")

# statistics equal those of one process that holds everything; one rank may have nothing selected
values = torch.arange(12, dtype=torch.float32).reshape(2, 6)
mine = values[ranks.rank]
whole = d.statistics(mine)
assert abs(whole.mean - values.mean().item()) < 1e-12 and abs(whole.std - values.std().item()) < 1e-6, whole
assert (whole.min, whole.max, whole.count) == (0.0, 11.0, 12)
half = d.statistics(mine, torch.full((6,), ranks.rank == 1))
assert (half.min, half.max, half.count) == (6.0, 11.0, 6) and abs(half.std - values[1].std().item()) < 1e-6
try:
    d.statistics(mine, torch.zeros(6))
    raise SystemExit("an empty selection was accepted")
except ValueError:
    pass
assert d.average({"both": float(ranks.rank), **({"only1": 5.0} if ranks.rank else {})}, weight=1 + 2 * ranks.rank) == {"both": 0.75, "only1": 5.0}
assert d.any_rank(ranks.rank == 1) and not d.any_rank(False)

# an error on rank 0 reaches all
assert d.on_rank0(lambda: {"answer": 42}) == {"answer": 42}
try:
    d.on_rank0(lambda: 1 / 0)
    raise SystemExit("the error of rank 0 was lost")
except (ZeroDivisionError, RuntimeError) as error:
    assert ranks.rank == 0 or "rank 0 failed: ZeroDivisionError" in str(error), error

# data parallelism: the mean of the ranks' gradients is the gradient of the whole batch
torch.manual_seed(ranks.rank)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
d.broadcast_weights(model)
inputs = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 10
spare = nn.Parameter(torch.ones(2))  # used on rank 1 only
unused = nn.Parameter(torch.ones(2))
loss = model(inputs[2 * ranks.rank : 2 * ranks.rank + 2]).square().mean() + (spare.sum() if ranks.rank else 0)
loss.backward()
d.average_gradients([*model.parameters(), spare, unused])
got = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(inputs).square().mean().backward()
for g, p in zip(got, model.parameters()):
    torch.testing.assert_close(g, p.grad)
assert spare.grad.tolist() == [0.5, 0.5] and unused.grad is None

# the same with reductions under way during the backward pass: three steps of two passes each, in which the ranks finish in different orders
d.LARGE = 1
torch.manual_seed(0)
first, second, third, idle = (nn.Parameter(torch.randn(3)) for _ in range(4))
weights = nn.ParameterList([first, second, third, idle])
early = d.EarlyGradients(weights)
for step in range(3):
    expected = []
    for rank in range(2):
        chain = [first, second] if (rank + step) % 2 else [second, first]
        loss = (chain[1] * (chain[0] * (step + 1)).tanh()).sum() + (third.square().sum() if rank == step % 2 else 0)
        expected.append(torch.autograd.grad(loss, [first, second, third], allow_unused=True, retain_graph=True))
        if rank == ranks.rank:
            mine = loss
    for last in (False, True):
        d.sync_gradients(weights, last, early)
        (mine / 2).backward(retain_graph=not last)
    d.average_gradients(weights.parameters(), early)
    for p, g in zip((first, second, third), zip(*expected)):
        torch.testing.assert_close(p.grad, sum(x for x in g if x is not None) / 2)
    assert idle.grad is None
    weights.zero_grad()

# FSDP2: the same step, sharded
whole_model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
whole_model.load_state_dict(model.state_dict())
sharded = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
sharded.load_state_dict(model.state_dict())

class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x):
        return self.body(x)
    def sft_loss(self, x):
        return self.body(x).square().mean()

net = d.shard(Net(sharded), [sharded], d.mesh(ranks))
loss = net.sft_loss(inputs[2 * ranks.rank : 2 * ranks.rank + 2])  # an entry point before any forward
loss.backward()
net(inputs)
for p, q in zip(net.parameters(), got):
    torch.testing.assert_close(p.grad.full_tensor(), q)
    assert p.grad.to_local().numel() <= q.numel()
try:
    d.mesh(ranks, replicas=3)
    raise SystemExit("three replicas on two ranks were accepted")
except ValueError as error:
    assert "possible are 1, 2" in str(error)
d.barrier("the end", 30)
d.cleanup()
print(f"rank {ranks.rank} is done", flush=True)
"""


def test_two_ranks_agree(tmp_path):
    process = torchrun(COLLECTIVES, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("rank zero speaks") == 1
    assert "rank 0 is done" in process.stdout and "rank 1 is done" in process.stdout


def test_a_rank_that_does_not_come_is_named_and_ends_the_run(tmp_path):
    code = """
        import time
        from vlahub import distributed as d

        ranks = d.setup("cpu")
        if ranks.rank == 1:
            time.sleep(600)
        d.barrier("the first batch", seconds=2)
    """
    process = torchrun(code, tmp_path, seconds=240)
    assert process.returncode != 0
    assert re.search(r"TimeoutError: rank 0 waited 2 s for the other ranks \(the first batch\): .*1 failed to pass", process.stderr), process.stderr[-2000:]
