import pytest
import torch

from vlahub_policies.parts import gemma
from vlahub_policies.parts.capture import Captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels run on CUDA only")


def expert(adaptive: bool, depth: int) -> gemma.Gemma:
    made = gemma.Gemma(gemma.GemmaConfig(1024, depth, 4096, 8, 1, 256), adaptive).cuda()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
    return made


def suffix(adaptive: bool, depth: int) -> tuple:
    """What the action expert is given: x, rotation, bias, past and modulations."""
    past, length = 611, 51
    return (
        torch.randn(1, length, 1024, device="cuda"),
        gemma.rotation(torch.arange(length, device="cuda")[None] + past, 256),
        gemma.bias_of(torch.rand(1, length, past + length, device="cuda") > 0.2, torch.bfloat16),
        [tuple(torch.randn(1, past, 1, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(depth)],
        [0.3 * torch.randn(1, 1, 3072, device="cuda") for _ in range(2 * depth + 1)] if adaptive else None,
    )


def in_bf16(made: gemma.Gemma) -> gemma.Gemma:
    """As a policy is cast, with packed matrices."""
    for layer in made.layers:
        for module in (layer.self_attn, layer.mlp):
            module.to(torch.bfloat16)
    gemma.pack(made)
    return made


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("depth", [1, 6])
@torch.no_grad()
def test_a_stack_equals_the_plain_layers(adaptive, depth):
    from vlahub_policies.parts import kernels

    torch.manual_seed(0)
    made, exact = expert(adaptive, depth), expert(adaptive, depth)
    exact.load_state_dict(in_bf16(made).state_dict())
    x, turn, bias, past, modulations = suffix(adaptive, depth)
    plain, _ = made(x, turn, bias, past, modulations)
    quick, kept = kernels.stack(made, x, turn, bias, past, modulations)
    true, same = exact(x, turn, bias.float(), [tuple(tensor.float() for tensor in pair) for pair in past], modulations)
    error, allowed = ((found.float() - true).norm() / true.norm() for found in (quick, plain))
    assert error < 1.5 * allowed + 1e-4  # as near to the float32 result as the plain bf16 layers are
    for found, wanted in zip(kept, same, strict=True):
        torch.testing.assert_close(found[0].float(), wanted[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("adaptive", [False, True])
@torch.no_grad()
def test_kernels_that_overlap_give_the_same_numbers_every_time(adaptive, monkeypatch):
    from vlahub_policies.parts import kernels

    torch.manual_seed(0)
    made = in_bf16(expert(adaptive, 6))
    x, *rest = suffix(adaptive, 6)
    found = Captured(lambda inputs: {"x": kernels.stack(made, inputs["x"], *rest)[0]})
    outs = [found({"x": x})["x"].clone() for _ in range(50)]
    monkeypatch.setattr(kernels, "_overlaps", lambda device: False)
    alone = kernels.stack(made, x, *rest)[0]
    assert alone.isfinite().all() and all(torch.equal(out, alone) for out in outs)


@pytest.mark.parametrize("tile", [None, (16, 4, 3)])
@torch.no_grad()
def test_attention_of_grouped_heads_reads_any_layout(tile):
    from vlahub_policies.parts import kernels, qwen_vl

    torch.manual_seed(0)
    batch, heads, groups, length, before, room, size = 3, 16, 2, 51, 216, 5, 128
    q = torch.randn(batch, length, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    own = [torch.randn(batch, length, groups, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    past = [torch.randn(batch, groups, before + room, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    visible = torch.rand(batch, length, before + length, device="cuda") > 0.3
    bias = qwen_vl.attention_bias(visible, heads // groups, torch.bfloat16)
    k, v = (torch.cat([old[:, :, :before], new], 2) for old, new in zip(past, own, strict=True))
    expected = qwen_vl.joint_attention(q.float(), k.float(), v.float(), bias.float()).transpose(1, 2).flatten(2)
    got = kernels.attend(*qwen_vl.by_token(q, tuple(own), tuple(old[:, :, :before] for old in past)), bias, tile)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


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
    # on the CPU: on a GPU, torch's own attention gives 0 for the row that sees nothing
    expected = gemma.attend(*(tensor.float().cpu() for tensor in (q, k, v, bias)))
    torch.testing.assert_close(kernels.attend(q, before, own, bias).float().cpu(), expected, atol=2e-2, rtol=2e-2)
