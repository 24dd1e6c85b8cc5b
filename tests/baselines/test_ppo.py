import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from baselines import ppo
from baselines.ppo import Args, advantages_of, critic_loss, gae, minibatches, surrogate
from tests.baselines.scripts import HERE, curves, launch
from vlahub import video
from vlahub.rollout import Rollout

BOOL = torch.bool


def test_gae_by_hand():
    """Three chunks, two environments. The first is solved in the second chunk; the time limit of the old kind (treated as terminal) ends both."""
    value = torch.tensor([[0.1, 0.2], [0.3, 0.1], [0.5, 0.0]])
    reward = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    terminated = torch.tensor([[0, 0], [1, 0], [1, 1]], dtype=BOOL)
    no = torch.zeros_like(terminated)
    advantage, returns = gae(reward, value, torch.tensor([0.9, 0.4]), terminated, no, torch.zeros(3, 2), 0.99, 0.95)
    assert torch.allclose(advantage, torch.tensor([[0.85535, -0.19505], [0.7, -0.1], [-0.5, 0.0]]), atol=1e-6)
    assert torch.allclose(returns[:, 0], torch.tensor([0.95535, 1.0, 0.0]), atol=1e-6)


def test_a_time_limit_bootstraps_and_a_termination_does_not():
    one, no = torch.tensor([[True]]), torch.tensor([[False]])
    given = (torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([10.0]))
    assert gae(*given, one, no, torch.zeros(1, 1), 0.9, 0.95)[0].item() == pytest.approx(1 - 0.5)
    assert gae(*given, no, one, torch.tensor([[2.0]]), 0.9, 0.95)[0].item() == pytest.approx(1 + 0.9 * 2 - 0.5)
    assert gae(*given, no, no, torch.zeros(1, 1), 0.9, 0.95)[0].item() == pytest.approx(1 + 0.9 * 10 - 0.5)


def test_gae_equals_the_naive_sum():
    rng = torch.Generator().manual_seed(0)
    reward, value, cut_value = (torch.randn(12, 3, generator=rng) for _ in range(3))
    terminated = torch.rand(12, 3, generator=rng) < 0.2
    cut = (torch.rand(12, 3, generator=rng) < 0.2) & ~terminated
    next_value = torch.randn(3, generator=rng)
    advantage, _ = gae(reward, value, next_value, terminated, cut, cut_value, 0.9, 0.8)
    for b in range(3):
        for t in range(12):
            total, weight = 0.0, 1.0
            for s in range(t, 12):
                after = 0.0 if terminated[s, b] else cut_value[s, b] if cut[s, b] else next_value[b] if s == 11 else value[s + 1, b]
                total += weight * (reward[s, b] + 0.9 * after - value[s, b])
                if terminated[s, b] or cut[s, b]:
                    break
                weight *= 0.9 * 0.8
            assert advantage[t, b].item() == pytest.approx(float(total), abs=1e-5)


def a_rollout(K=4, B=2, N=2, values=1) -> Rollout:
    rng = torch.Generator().manual_seed(1)
    no = torch.zeros(K, B, N, dtype=BOOL)
    row = torch.arange(K * B).view(K, B)
    return Rollout(
        trace={}, log_prob=torch.randn(K * B, N, 3, generator=rng), row=row, reward=torch.rand(K, B, N, generator=rng), valid=~no, terminated=no.clone(),
        truncated=no.clone(), value=torch.randn(K, B, values, generator=rng), cut_value=torch.zeros(K, B), next_value=torch.randn(B, generator=rng),
    )  # fmt: skip


@pytest.mark.parametrize("level", ["chunk", "action"])
def test_a_time_limit_may_be_an_end(level):
    rollout = a_rollout(values=1 if level == "chunk" else 2)
    rollout.truncated[1, 0, 1] = True
    rollout.cut_value[1, 0] = 3.0
    ends, goes_on = (advantages_of(rollout, Args(advantage_level=level, gamma=0.9, bootstrap_time_limit=bootstrap))[0] for bootstrap in (False, True))
    last = (1, 0) if level == "chunk" else (1, 0, 1)
    assert (goes_on - ends)[last].item() == pytest.approx(0.9 * 3.0)
    assert torch.equal(goes_on[2:], ends[2:]) and torch.equal(goes_on[:, 1], ends[:, 1])


def test_action_level_advantages_skip_what_did_not_run():
    """An episode that ends at the first of two actions: the second contributes nothing, and the next episode does not leak into it."""
    rollout = a_rollout(values=2)
    rollout.terminated[1, 0, 0] = True
    rollout.valid[1, 0, 1] = False
    rollout.reward[1, 0, 1] = 0.0
    advantage, _, mask = advantages_of(rollout, Args(advantage_level="action", gamma=0.9, gae_lambda=0.8))
    assert advantage.shape == (4, 2, 2) and torch.equal(mask, rollout.valid)
    assert advantage[1, 0, 0].item() == pytest.approx(float(rollout.reward[1, 0, 0] - rollout.value[1, 0, 0]))
    other = a_rollout(values=2)
    other.reward[2:, 0] += 5  # the next episode's rewards
    other.terminated[1, 0, 0], other.valid[1, 0, 1], other.reward[1, 0, 1] = True, False, 0.0
    again, _, _ = advantages_of(other, Args(advantage_level="action", gamma=0.9, gae_lambda=0.8))
    assert torch.equal(again[:1, 0], advantage[:1, 0]) and again[1, 0, 0] == advantage[1, 0, 0]


def test_clipping_is_asymmetric_and_pessimistic():
    old = torch.zeros(4)
    log_prob, advantage = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, ratio = surrogate(log_prob, old, advantage, 0.2, 0.28)
    up, down = np.exp(0.5), np.exp(-0.5)
    assert torch.allclose(loss, torch.tensor([-1.28, up, -down, 0.8], dtype=torch.float32)) and ratio[0].item() == pytest.approx(up)


def test_critic_loss_by_hand():
    value, old, target = torch.tensor([1.0, 30.0]), torch.tensor([0.0, 30.0]), torch.tensor([2.0, 0.0])
    assert critic_loss(value, old, target, 0.0, 10.0).tolist() == [0.5, 10 * (30 - 5)]
    assert critic_loss(value, old, target, 0.2, 10.0)[0].item() == pytest.approx(0.5 * 1.8**2), "the value moved only 0.2 from the old one counts"


def test_policy_gradient_equals_autograd_of_the_formula():
    log_prob = torch.randn(6, dtype=torch.float64, requires_grad=True)
    old, advantage = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    surrogate(log_prob, old, advantage, 0.2, 0.3)[0].sum().backward()
    ratio = (log_prob - old).exp().detach()
    inside = torch.where(advantage > 0, ratio < 1.3, ratio > 0.8)
    assert torch.allclose(log_prob.grad, -advantage * ratio * inside)


def test_minibatches_take_an_equal_share_of_every_environment_and_are_redrawn():
    args, rollout = Args(num_chunks=4, num_minibatches=2), a_rollout()
    parts = minibatches(rollout, range(2), args, 0, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert all((part % 2 == b).sum() == 2 for part in parts for b in range(2)), "row k * B + b belongs to environment b"
    drawn = {tuple(map(int, torch.cat(minibatches(rollout, range(2), args, iteration, epoch)))) for iteration in range(3) for epoch in range(3)}
    assert len(drawn) == 9
    rollout.row[1, 0] = -1  # aborted
    assert 2 not in torch.cat(minibatches(rollout, range(2), args, 0, 0))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_chunks": 16, "num_minibatches": 3}, r"num_minibatches \(3\) does not divide num_chunks \(16\); nearest that do: 1, 2, 4"),
        ({"num_envs": 8, "num_chunks": 16, "num_minibatches": 4, "micro_batch_size": 5}, "micro_batch_size"),
        ({"advantage_level": "action"}, "one ratio per chunk"),
    ],
)
def test_batches_that_do_not_divide_are_refused(wrong, words):
    from vlahub import distributed

    with pytest.raises(ValueError, match=words):
        ppo.check_args(Args(**wrong), distributed.Ranks(0, 1, 0, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------ whole runs

SMALL = {"env_id": "test/Point", "policy": "tiny:test-mlp-gaussian", "num_envs": 4, "num_chunks": 8, "num_minibatches": 2, "eval_every": 0, "workers": 2}


def script(tmp_path, *ranks: str, **options) -> subprocess.CompletedProcess:
    return launch("ppo", *ranks, **{**SMALL, "out": tmp_path} | options)


def losses(folder) -> list[dict]:
    return curves(folder, "train/actor/policy_loss", "train/critic/value_loss", "train/actor/approx_kl", "train/actor/grad_norm")


def test_two_ranks_see_what_one_sees_wherever_the_environments_live(tmp_path):
    """One rank that does everything; two that do; and ranks with roles of their own, through which evaluations and films go too."""
    options = {"total_iterations": 2, "save_every": 0}
    more = {"video_every": 2, "eval_every": 2, "eval_episodes": 2}
    one = script(tmp_path, name="one", **options, **more)
    two = script(tmp_path, "--nproc-per-node=2", name="two", workers=1, **options)
    roles = script(tmp_path, ranks=3, name="roles", workers=1, env_ranks="0,2", policy_ranks="1", **options, **more)
    apart = script(tmp_path, ranks=4, name="apart", workers=1, env_ranks="0,2", rollout_ranks="3", policy_ranks="1", **options, **more)
    for run in (one, two, roles, apart):
        assert run.returncode == 0, run.stderr[-3000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-5) for name in a), (a, b)
    assert losses(tmp_path / "one") == losses(tmp_path / "roles") == losses(tmp_path / "apart")
    for name in ("one", "roles", "apart"):
        assert len(video.decode(tmp_path / name / "videos/000000.mp4")) == 16, "8 chunks of 2 steps of the first environment"
        assert not (tmp_path / name / "videos/000001.mp4").exists()
    episodes = [json.loads((tmp_path / name / "eval/000002/results.json").read_text())["episodes"] for name in ("one", "roles", "apart")]
    one, roles, apart = ([(episode["seed"], episode["length"], episode["return"]) for episode in run] for run in episodes)
    assert one == roles == apart and len(one) == 2


@pytest.mark.parametrize(
    "roles",
    [
        {"ranks": 3, "rollout_ranks": "0", "policy_ranks": "1-2"},  # one rank infers for two, each of which gets its part of the rollout
        {"ranks": 3, "rollout_ranks": "0,2", "policy_ranks": "1", "save_every": 1},  # two infer for one, which joins their rollouts
    ],
)
def test_rollout_ranks_change_no_number(tmp_path, roles):
    options = {"total_iterations": 3, "policy": "tiny:test-mlp-flow", "max_steps": 6, "save_every": roles.get("save_every", 0)}
    runs = [script(tmp_path, name="one", **options), script(tmp_path, name="roles", workers=1, **{**options, **roles})]
    assert not any(run.returncode for run in runs), runs[0].stderr[-2000:] + runs[1].stderr[-2000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "roles"), strict=True):
        assert all(a[name] == pytest.approx(b[name], abs=1e-5) for name in a), (a, b)
    if "save_every" in roles:
        a, b = (json.loads((tmp_path / name / "checkpoints/step-000000003/checkpoint.json").read_text())["counters"] for name in ("one", "roles"))
        assert a == b and min(a["episodes"]) > 3


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    from safetensors.torch import load_file

    whole = script(tmp_path, name="whole", total_iterations=4, save_every=2)
    half = script(tmp_path, name="half", total_iterations=2, save_every=2)
    assert whole.returncode == 0 and half.returncode == 0, whole.stderr[-2000:] + half.stderr[-2000:]
    rest = launch("ppo", resume=tmp_path / "half", total_iterations=4)
    assert rest.returncode == 0 and "resuming after iteration 2" in rest.stdout, rest.stdout + rest.stderr[-2000:]
    a, b = (load_file(tmp_path / name / "checkpoints/step-000000004/policy/model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    counters = [json.loads((tmp_path / name / "checkpoints/step-000000004/checkpoint.json").read_text())["counters"] for name in ("whole", "half")]
    assert counters[0] == counters[1]
    other = launch("ppo", resume=tmp_path / "half", seed=5)
    assert other.returncode != 0 and "seed was 0, now 5" in other.stderr


def test_help_explains_every_argument():
    shown = subprocess.run([sys.executable, "baselines/ppo.py", "--help"], capture_output=True, text=True, timeout=240, env=HERE).stdout
    assert "probability ratio per chunk" in shown and "torchrun" in shown


@pytest.mark.slow
@pytest.mark.parametrize("head", ["gaussian", "categorical", "flow"])
def test_learns_to_reach(tmp_path, head):
    """From chance to reaching the target most of the time, with every kind of head."""
    run = script(
        tmp_path, name=head, env_id="test/PointTold", policy=f"tiny:test-mlp-{head}", num_envs=16, num_chunks=16, num_minibatches=4, total_iterations=40, update_epochs=6, learning_rate=3e-3,
        value_learning_rate=2e-3, target_kl=0.0, save_every=0, eval_every=40, eval_episodes=60, max_steps=12, workers=0,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    first, last = (json.loads((tmp_path / head / "eval" / number / "results.json").read_text())["success_rate"] for number in ("000000", "000040"))
    assert first < 0.35 and last > 0.7, (first, last)
