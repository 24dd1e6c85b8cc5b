"""Training with weights spread over two ranks: the same numbers as with whole weights, and the same checkpoints."""

import pytest

from tests.baselines.scripts import curves
from tests.torchrun import torchrun

SCRIPT = """
import copy, torch
import tests.conftest
from baselines import grpo, ppo, rl_co, sft
from tests.test_policy_contracts import SEEDS, observation_for
from vlahub import catalog, distributed as d
from vlahub.record import record
from vlahub.run import arguments
from vlahub_policies.parts import robots

leave, d.cleanup = d.cleanup, lambda: None  # one process group for all runs
ranks = d.setup("cpu")

for family in ("lingbot", "openvla_oft", "pi0", "starvla"):  # dexbotic is pi0's network
    torch.manual_seed(0)
    policy = catalog.load(catalog.FAMILIES[family].policy).tiny(robots.LIBERO, value_head=True, gradient_checkpointing=True).eval()
    seen = observation_for(policy.interface)
    batch = {**seen, "actions": torch.rand(2, policy.horizon, 7)}
    whole = copy.deepcopy(policy)
    d.shard(policy, policy.blocks(), d.mesh(ranks))
    assert len(policy.blocks()) > 4
    with d.whole(policy):
        if ranks.rank == 0:  # alone: nobody would answer
            assert abs(policy.act(seen) - whole.act(seen)).max() < 1e-5, family
            policy.value(seen)
        sample = policy.sample(seen, SEEDS)
    expected = whole.sample(seen, SEEDS)
    torch.testing.assert_close(sample.log_prob, expected.log_prob, atol=1e-4, rtol=0)
    for model in (policy, whole):
        evaluation = model.evaluate(expected.trace)
        d.sync_gradients(model, False)  # two passes that accumulate
        ((evaluation.log_prob.sum() + evaluation.value.sum()) / 100).backward()
        d.sync_gradients(model, True)
        model.sft_loss(batch, SEEDS).backward()
        model.norm = d.clip_gradients(model.parameters(), 1.0)
    assert abs(policy.norm - whole.norm) < 1e-4 * whole.norm, (family, policy.norm, whole.norm)
    for (name, p), q in zip(policy.named_parameters(), whole.parameters(), strict=True):
        gradient = None if p.grad is None else p.grad.full_tensor()
        assert (gradient is None or not gradient.any()) if q.grad is None else torch.allclose(gradient, q.grad, atol=1e-5), (family, name)
    d.print0(family, "agrees")

data = d.on_rank0(lambda: str(record("test/PointTold", "expert", 4, folder / "data", progress=False).folder))
COMMON = dict(out=str(folder), device="cpu", eval_every=0, save_every=0, total_iterations=2, policy="tiny:test-mlp-flow")
RL = dict(COMMON, env_id="test/PointTold", max_steps=8)
PPO = dict(RL, num_envs=4, num_chunks=4, num_minibatches=2, micro_batch_size=2)
for shard in (False, True):
    ppo.main(ppo.Args(**{**PPO, "save_every": 1}, name=f"ppo-{shard}", shard=shard, critic_warmup=1))
    rl_co.main(rl_co.Args(**PPO, name=f"rl_co-{shard}", shard=shard, real_dataset=(data,), sft_batch_size=4))
    grpo.main(grpo.Args(**{**RL, "max_steps": 20}, name=f"grpo-{shard}", shard=shard, kl_coef=0.1, num_groups=8, micro_batch_size=40, seed=1))
    sft.main(sft.Args(**{**COMMON, "eval_every": 2}, env_id="test/PointTold", name=f"sft-{shard}", shard=shard, dataset=(data,), eval_episodes=2, num_envs=2,
                      batch_size=8, micro_batch_size=2, ema=0.5, log_every=1, warmup=1))

# a sharded run goes on from a whole one's checkpoint, and the other way round
for shard in (False, True):
    newest = folder / f"ppo-{not shard}/checkpoints/step-000000002/checkpoint.json"
    d.on_rank0(newest.unlink)  # as if it had been killed before this was complete
    ppo.main(arguments(ppo.Args, None, ["--resume", str(folder / f"ppo-{not shard}"), "--shard" if shard else "--no-shard"]))
leave()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what rank 0 printed)"""
    folder = tmp_path_factory.mktemp("sharded")
    process = torchrun(SCRIPT, folder, seconds=400)
    assert process.returncode == 0, process.stdout[-1500:] + process.stderr[-3000:]
    return folder, process.stdout


def test_every_family_computes_the_same_in_shards(ran):
    """Actions and log-probabilities while all weights are together; gradients, their norm and clipping while they are not."""
    assert ran[1].count(" agrees\n") == 4


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ("ppo", ("train/actor/policy_loss", "train/critic/value_loss", "train/actor/approx_kl")),
        ("rl_co", ("train/ppo_loss", "train/sft_loss")),
        ("grpo", ("train/actor/policy_loss", "train/actor/reference_kl")),
        ("sft", ("train/sft_loss",)),
    ],
)
def test_sharded_runs_see_what_whole_ones_see(ran, run, names):
    """Losses and gradient norms, the exported weights, and, for PPO, a third logged step: the second again, resumed from the other kind's checkpoint."""
    from safetensors.torch import load_file

    whole, sharded = (curves(ran[0] / f"{run}-{shard}", "train/actor/grad_norm", *names) for shard in (False, True))
    assert len(whole) == (3 if run == "ppo" else 2) and max(step["train/actor/grad_norm"] for step in whole) > 0.1
    for a, b in zip(whole, sharded, strict=True):
        assert all(abs(a[name] - b[name]) < 1e-5 for name in a), (a, b)
    weights = [load_file(ran[0] / f"{run}-{shard}/policy/model.safetensors") for shard in (False, True)]
    assert weights[0].keys() == weights[1].keys()
    assert all((tensor - weights[1][name]).abs().max() < 1e-5 for name, tensor in weights[0].items())


def test_everything_that_can_be_sharded_was(ran):
    assert ran[1].count("sharded over 2 ranks, gathered in 2 parts") == 7, "ppo, rl_co, grpo and its reference, sft and its average, and ppo resumed"
    assert ran[1].count("resuming after iteration 1") == 2
