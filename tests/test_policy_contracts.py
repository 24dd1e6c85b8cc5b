"""What every registered policy family must do, on its tiny form with random weights: `policy_class.tiny(interface)`."""

import dataclasses

import numpy as np
import pytest
import torch

import vlahub
from vlahub import catalog
from vlahub.interface import Camera
from vlahub_policies.parts import robots

FAMILIES = sorted(catalog.FAMILIES)
SEEDS = torch.tensor([[3, 0], [3, 5]])


@pytest.fixture(params=FAMILIES)
def policy(request):
    torch.manual_seed(0)
    return catalog.load(catalog.FAMILIES[request.param].policy).tiny(robots.LIBERO).eval()


def observation_for(interface, batch: int = 2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def pictures(cameras: tuple[Camera, ...], stacked: bool) -> np.ndarray:
        shape = (batch, 64, 64, 3) if len(cameras) == 1 and not stacked else (batch, len(cameras), 64, 64, 3)
        return rng.integers(0, 256, shape, dtype=np.uint8)

    observation = {"main_images": pictures((interface.main,), False)}
    if interface.wrists:
        observation["wrist_images"] = pictures(interface.wrists, False)
    if interface.extras:
        observation["extra_view_images"] = pictures(interface.extras, True)
    low, high = (
        (np.clip(bound, -1, 1) for bound in (interface.state_space().low, interface.state_space().high)) if interface.state else (np.zeros(8), np.ones(8))
    )
    observation["states"] = rng.uniform(low, high, (batch, len(low))).astype(np.float32)
    observation["task_descriptions"] = ["pick up the black bowl", "open the middle drawer of the cabinet"][:batch]
    return observation


def test_it_declares_what_it_is(policy):
    assert catalog.FAMILIES[policy.family].name == policy.family
    assert 1 <= policy.execute <= policy.horizon
    assert policy.interface.action_dim == 7
    assert sum(parameter.numel() for parameter in policy.parameters()) < 4e6


def test_act_is_deterministic_and_independent_of_the_batch(policy):
    observation = observation_for(policy.interface)
    actions = policy.act(observation, seeds=SEEDS.tolist())
    assert actions.shape == (2, policy.horizon, 7) and actions.dtype == np.float32 and np.isfinite(actions).all()
    np.testing.assert_array_equal(actions, policy.act(observation, seeds=SEEDS.tolist()))
    alone = policy.act({key: value[1] for key, value in observation.items()}, seeds=SEEDS[1:].tolist())
    assert alone.shape == (policy.horizon, 7)
    np.testing.assert_allclose(alone, actions[1], atol=1e-4)


def test_evaluate_repeats_sample(policy):
    sample = policy.sample(observation_for(policy.interface), SEEDS)
    assert sample.actions.shape == (2, policy.horizon, 7) and sample.actions.dtype == torch.float32
    assert not sample.log_prob.requires_grad
    assert all(isinstance(tensor, torch.Tensor) and len(tensor) == 2 for tensor in sample.trace.values())
    evaluation = policy.evaluate(sample.trace)
    assert evaluation.log_prob.requires_grad and evaluation.log_prob.shape == sample.log_prob.shape
    torch.testing.assert_close(evaluation.log_prob, sample.log_prob, atol=1e-5, rtol=0)
    if sample.value is not None:
        torch.testing.assert_close(evaluation.value, sample.value, atol=1e-5, rtol=0)


def test_a_row_of_a_sample_depends_on_its_seeds_alone(policy):
    observation = observation_for(policy.interface)
    both = policy.sample(observation, SEEDS)
    other = policy.sample({key: value[1:] for key, value in observation.items()}, SEEDS[1:])
    torch.testing.assert_close(other.actions[0], both.actions[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(other.log_prob[0], both.log_prob[1], atol=1e-3, rtol=0)
    assert not torch.equal(policy.sample(observation, SEEDS + 1).actions, both.actions)


def test_sft_loss_trains(policy):
    observation = observation_for(policy.interface)
    batch = {**observation, "actions": np.random.default_rng(0).uniform(-1, 1, (2, policy.horizon, 7)).astype(np.float32)}
    policy.train()
    loss = policy.sft_loss(batch, SEEDS)
    assert loss.ndim == 0 and loss.requires_grad
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.parameters())
    with torch.no_grad():
        assert torch.isfinite(policy.sft_loss({**batch, "action_is_pad": np.zeros((2, policy.horizon), bool)}, SEEDS))


def test_it_survives_saving(policy, tmp_path):
    policy.save_pretrained(tmp_path / "here")
    loaded = vlahub.Policy.from_pretrained(tmp_path / "here")
    assert type(loaded) is type(policy) and loaded.interface == policy.interface
    observation = observation_for(policy.interface)
    np.testing.assert_allclose(loaded.act(observation), policy.act(observation), atol=1e-5)


def test_it_names_a_camera_that_is_missing(policy):
    robot = dataclasses.replace(policy.interface, main=dataclasses.replace(policy.interface.main, turned=90))
    with pytest.raises(vlahub.InterfaceError, match=r"cameras\.main"):
        vlahub.check(robot, policy)
    observation = observation_for(policy.interface)
    del observation["main_images"]
    with pytest.raises(ValueError, match="main_images"):
        policy.act(observation)
