import pytest
import torch

from vlahub_policies.parts import gemma

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels run on CUDA only")


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_layer_equals_the_plain_layer(adaptive):
    from vlahub_policies.parts import kernels

    torch.manual_seed(0)
    config = gemma.GemmaConfig(1024, 1, 4096, 8, 1, 256)
    layer = gemma.GemmaLayer(config, adaptive).cuda()
    for parameter in layer.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    exact = gemma.GemmaLayer(config, adaptive).cuda()
    for module in (layer.self_attn, layer.mlp):
        module.to(torch.bfloat16)
    exact.load_state_dict(layer.state_dict())
    gemma.pack(layer)
    past_length, length = 611, 51
    cos, sin = gemma.rotation(torch.arange(length, device="cuda")[None] + past_length, 256)
    visible = torch.rand(1, 1, length, past_length + length, device="cuda") > 0.2
    bias = torch.zeros_like(visible, dtype=torch.bfloat16).masked_fill(~visible, gemma.MASKED)
    past = tuple(torch.randn(1, past_length, 1, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1, length, 1024, device="cuda", dtype=torch.bfloat16)
    modulations = [0.3 * torch.randn(1, 1, 3072, device="cuda") for _ in range(2)] if adaptive else [None, None]
    with torch.no_grad():
        plain, _ = layer(x, cos, sin, bias, past, *modulations)
        quick, _ = kernels.layer(layer, x, cos, sin, bias, past, *modulations)
        true, _ = exact(x.float(), cos, sin, bias.float(), tuple(tensor.float() for tensor in past), *modulations)
    error, allowed = ((found.float() - true).norm() / true.norm() for found in (quick, plain))
    assert error < 1.5 * allowed + 1e-4  # as near to the float32 result as the plain bf16 layer is


@pytest.mark.parametrize("batch, queries, past", [(1, 51, 611), (3, 20, 0), (8, 560, 0), (2, 1, 70)])
def test_attention_equals_the_plain_one(batch, queries, past):
    from vlahub_policies.parts import kernels

    torch.manual_seed(0)

    def random(length: int, heads: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, 256, device="cuda", dtype=torch.bfloat16)

    q, own, before = random(queries, 8), (random(queries, 1), random(queries, 1)), (random(past, 1), random(past, 1)) if past else None
    visible = torch.rand(batch, 1, queries, past + queries, device="cuda") > 0.3
    visible[0, 0, 0] = False  # a padded token sees nothing: its row is the mean, not NaN
    bias = torch.zeros_like(visible, dtype=torch.bfloat16).masked_fill(~visible, gemma.MASKED)
    k, v = own if before is None else (torch.cat([old, new], 1) for old, new in zip(before, own, strict=True))
    expected = gemma.attend(q.float(), k.float(), v.float(), bias.float())
    torch.testing.assert_close(kernels.attend(q, before, own, bias).float(), expected, atol=2e-2, rtol=2e-2)
