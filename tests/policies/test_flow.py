import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from vlahub_policies.parts import flow, randomness

ROWS = torch.tensor([[7, 0], [7, 1], [9, 0], [2, 5]])


def network(x, t):
    """A small smooth stand-in for a policy network, with a head of each kind."""
    return flow.Denoised(torch.sin(x) * (1 + t[:, None, None]), 0.1 + 0.05 * torch.sigmoid(x), (x.mean((1, 2)) * t)[:, None])


def test_training_pair_and_time():
    actions, noise, time = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.0, 0.25, 1.0])
    x, target = flow.interpolate(actions, noise, time)
    torch.testing.assert_close(x[0], actions[0])
    torch.testing.assert_close(x[2], noise[2])
    torch.testing.assert_close(x - time[:, None, None] * target, actions)
    drawn = flow.sample_time(torch.stack([torch.arange(4000), torch.zeros(4000, dtype=torch.int64)], 1))
    assert drawn.min() > 0.001 and drawn.max() < 1.0
    assert drawn.mean() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.01)  # Beta(1.5, 1) has mean 0.6


def test_euler_keeps_the_published_clock():
    clock, t = [], torch.tensor(1.0)
    while t >= 0.05:
        clock.append(float(t))
        t = t + torch.tensor(-0.1)
    plan = flow.euler(10)
    assert plan.time.tolist() == clock and len(clock) == 10
    assert plan.time[7] != 1 - 7 * 0.1  # the float32 rounding is kept


def test_schedules_match_the_worked_numbers():
    plan = flow.schedule("flow_sde", 4, 0.5)
    torch.testing.assert_close(plan.spread, torch.tensor([0.5, 0.43301, 0.25, 0.14434]), atol=1e-5, rtol=0)
    t, after = plan.time, torch.tensor([0.75, 0.5, 0.25, 0.0])
    noise_weight = torch.tensor([0.625, 0.375, 0.1875, -0.04167])
    torch.testing.assert_close(plan.keep, 1 - after + noise_weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.move, noise_weight * (1 - t) - (1 - after) * t, atol=1e-5, rtol=0)
    cps = flow.schedule("flow_cps", 4, 0.5)
    torch.testing.assert_close(cps.spread, after * math.sin(math.pi / 4))
    ode = flow.schedule("ode", 4)
    torch.testing.assert_close(ode.keep, torch.ones(4))
    torch.testing.assert_close(ode.move, torch.full((4,), -0.25))


def test_densities():
    x, mean, std = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3) + 0.1
    torch.testing.assert_close(flow.normal_log_prob(x, mean, std), Normal(mean, std).log_prob(x))
    torch.testing.assert_close(flow.normal_entropy(std), Normal(mean, std).entropy())
    std[0] = 0
    mean.requires_grad_()
    log_prob = flow.normal_log_prob(x, mean, std)
    log_prob.sum().backward()
    assert (log_prob[0] == 0).all() and (flow.normal_entropy(std)[0] == 0).all()
    assert mean.grad.isfinite().all() and (mean.grad[0] == 0).all()


@pytest.mark.parametrize("correlation", [0.5, 0.95])
def test_correlated_noise_has_the_density_of_a_multivariate_normal(correlation):
    H, mean, std = 6, torch.randn(6, 2), torch.tensor([0.5, 2.0])
    lag = torch.arange(H)
    covariance = correlation ** (lag[:, None] - lag[None]).abs()
    drawn = flow.correlate(torch.randn(40_000, H, 1, generator=torch.Generator().manual_seed(0)), correlation)
    torch.testing.assert_close(drawn[..., 0].T.cov(), covariance, atol=0.03, rtol=0)
    x = mean + std * flow.correlate(torch.randn(H, 2), correlation)
    log_prob, entropy = flow.normal_log_prob(x, mean, std.expand(H, 2), correlation), flow.normal_entropy(std.expand(H, 2), correlation)
    for N in (1, 4, H):  # the first N actions alone, as when an episode ends within a chunk
        for d in range(2):
            whole = MultivariateNormal(mean[:N, d], covariance[:N, :N] * std[d] ** 2)
            assert log_prob[:N, d].sum().item() == pytest.approx(whole.log_prob(x[:N, d]).item(), abs=2e-3)
            assert entropy[:N, d].sum().item() == pytest.approx(whole.entropy().item(), abs=1e-3)


def test_the_last_step_alone_explores():
    how = flow.Exploration("flow_sde", steps=4, step="last", correlation=0.9)
    *_, trace = flow.explore(partial(flow.walk, lambda x, t: flow.Denoised(torch.sin(x))), (8, 2), ROWS, how, "cpu")
    assert trace["step"].tolist() == [3] * 4
    assert flow.explore(partial(flow.walk, network), (1, 1), ROWS, flow.Exploration("flow_cps", steps=4, step="last"), "cpu")[3]["step"].tolist() == [2] * 4


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
@pytest.mark.parametrize(
    "joint, step, correlation, start", [(False, "drawn", 0.0, 1.0), (True, "drawn", 0.0, 0.5), (False, "last", 0.9, 0.0), (True, "drawn", 0.9, 0.0)]
)
def test_score_repeats_explore(method, joint, step, correlation, start):
    def denoise(x, t):
        point = network(x, t)
        return point if method == "flow_noise" else flow.Denoised(point.velocity, None, point.value)

    how = flow.Exploration(method, 4, 0.5, joint, step, correlation, start)
    actions, log_prob, value, trace = flow.explore(partial(flow.walk, denoise), (3, 2), ROWS, how, "cpu")
    again, entropy, value_again = flow.score(denoise, trace, how)
    torch.testing.assert_close(again, log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(value_again, value, atol=1e-6, rtol=0)
    assert actions.shape == log_prob.shape == entropy.shape == (4, 3, 2)
    assert (entropy != 0).any() == (method == "flow_noise")
    # a row does not depend on its batch
    alone = flow.explore(partial(flow.walk, denoise), (3, 2), ROWS[2:3], how, "cpu")
    torch.testing.assert_close(alone[0][0], actions[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[1][0], log_prob[2], atol=1e-5, rtol=0)


def test_one_drawn_step_is_the_only_stochastic_one():
    how = flow.Exploration("flow_sde", steps=4)
    plan = flow.stochastic_at(how.method, how.steps, how.noise_level, torch.tensor([2, 0]))
    assert (plan.spread > 0).nonzero().tolist() == [[0, 1], [2, 0]]
    drawn = [int(flow.explore(partial(flow.walk, network), (1, 1), torch.tensor([[seed, 0]]), how, "cpu")[3]["step"]) for seed in range(60)]
    assert set(drawn) == {0, 1, 2, 3}
    last = flow.Exploration("flow_cps", steps=2)  # its last step is certain, so only the first can be drawn
    assert {int(flow.explore(partial(flow.walk, network), (1, 1), torch.tensor([[seed, 0]]), last, "cpu")[3]["step"]) for seed in range(20)} == {0}


def test_the_noise_that_denoising_starts_from_is_scaled():
    def starts(scale):
        how = flow.Exploration("flow_sde", steps=4, joint=True, start_noise=scale)
        return flow.explore(partial(flow.walk, network), (3, 2), ROWS, how, "cpu")[3]["chain"][:, 0]

    torch.testing.assert_close(starts(0.5), 0.5 * starts(1.0))
    assert starts(1.0).std() > 0.5 and (starts(0.0) == 0).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="start_noise must be from 0 to 1, not 1.5"):
        flow.Exploration(start_noise=1.5)
    with pytest.raises(ValueError, match="flow_sde"):
        flow.Exploration("sde")
    with pytest.raises(ValueError, match="noise_step must be"):
        flow.Exploration(step="first")
    with pytest.raises(ValueError, match="noise_correlation"):
        flow.Exploration(correlation=1.0)
    with pytest.raises(ValueError, match="deterministic"):
        flow.explore(partial(flow.walk, network), (1, 1), randomness.fresh_seeds(1), flow.Exploration("ode"), "cpu")
    with pytest.raises(ValueError, match="adds no noise"):
        flow.explore(partial(flow.walk, network), (1, 1), randomness.fresh_seeds(1), flow.Exploration("flow_cps", steps=1), "cpu")
