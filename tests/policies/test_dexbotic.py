import torch

from tests.policies import published
from vlahub_policies.dexbotic import DexboticConfig, DexboticPolicy
from vlahub_policies.parts import robots
from vlahub_policies.pi0 import Pi0Policy


def test_names_map_one_to_one():
    policy = published.network()
    ours = policy.state_dict().keys()
    mapped = {DexboticPolicy.rename(published.dexbotic_names(name)) for name in ours}
    assert mapped == set(ours)
    assert DexboticPolicy.rename("model.action_expert.embed_tokens.weight") is None
    assert DexboticPolicy.rename("value_head.weight") == "value_head.mlp.0.weight"


def test_padded_actions_are_minus_the_state():
    """All dimensions but the gripper are relative to the padded state, so what the robot lacks is trained towards -state."""
    policy = DexboticPolicy.tiny(robots.LIBERO, relative=DexboticConfig().relative)
    state, actions = torch.randn(2, 8), torch.randn(2, 10, 7)
    target = policy._from_robot(actions, state)
    torch.testing.assert_close(target[:, :, 7], -state[:, 7:8].expand(-1, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(target[:, :, 6], actions[:, :, 6], atol=1e-5, rtol=0)
    torch.testing.assert_close(target[:, :, 8:], torch.zeros(2, 10, 24))
    torch.testing.assert_close(policy._to_robot(target, state), actions, atol=1e-5, rtol=0)


def test_the_network_is_pi0s():
    torch.manual_seed(0)
    dexbotic = DexboticPolicy.tiny(robots.LIBERO).eval()
    openpi = Pi0Policy.tiny(robots.LIBERO).eval()
    openpi.load_state_dict(dexbotic.state_dict())
    inputs = dexbotic.prepare(published.observation())
    noise = torch.randn(2, 10, 32)
    from vlahub_policies.parts import flow

    with torch.no_grad():
        chains = [policy._run(inputs, noise, flow.euler(4), None)[0].chain for policy in (dexbotic, openpi)]
    torch.testing.assert_close(*chains)
