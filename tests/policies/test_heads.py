import torch

from vlahub_policies.parts.heads import NoiseHead, ValueHead


def test_value_head_starts_small_and_keeps_the_published_names():
    head = ValueHead(8, (6, 4))
    assert set(head.state_dict()) == {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert head(torch.randn(5, 8)).abs().max() < 1
    assert ValueHead(8, ()).mlp[0].out_features == 1


def test_noise_head_stays_within_its_bounds():
    torch.manual_seed(0)
    head = NoiseHead(8, 3, 0.08, 0.16)
    assert "mlp_logvar.moduleList.2.linear_1.weight" in head.state_dict()
    std = head(1000 * torch.randn(50, 8))
    assert std.shape == (50, 3) and std.min() >= 0.08 - 1e-6 and std.max() <= 0.16 + 1e-6 and std.std() > 0.003
