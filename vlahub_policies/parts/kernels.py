"""Triton kernels for inference in bf16 on CUDA: a Gemma layer in five launches instead of some fifteen, and attention of many query heads to one key/value head.

One decision at batch 1 runs 50 tokens through 18 layers ten times. Each product then takes a few microseconds, as much as a launch, so what surrounds a product
(norm before; rotation, gate, residual after) is done where the product is.
"""

import torch
import triton
import triton.language as tl

from vlahub_policies.parts.gemma import GemmaLayer, KeysValues

ROWS = 64  # rows of a tile; more tokens than this take the ordinary path


def _tiles(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    """(columns of a tile, depth of a step, warps, steps in flight): the quickest on this machine is found at the first call."""
    return [triton.Config({"BN": columns, "BK": depth}, num_warps=warps, num_stages=stages) for columns, depth, warps, stages in choices]


@triton.jit
def _rows_by_weights(x, weights, norm, shift, columns, rows, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """x [M, K] times the rows `columns` of weights [N, K] -> [BM, BN]. NORM: of x's RMS norm times (1 + norm); SHIFT: plus shift, as the adaptive norm has it."""
    total = tl.zeros((BM, BN), tl.float32)
    if NORM:
        squares = tl.zeros((BM, BK), tl.float32)
    if SHIFT:
        moved = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(weights + columns[:, None] * K + k[None, :], mask=(columns[:, None] < N) & (k[None, :] < K), other=0.0)
        if NORM:
            exact = a.to(tl.float32)
            squares += exact * exact
            a = (exact * (1.0 + tl.load(norm + k, mask=k < K, other=0.0))[None, :]).to(a.dtype)
        if SHIFT:
            moved += b.to(tl.float32) * tl.load(shift + k, mask=k < K, other=0.0)[None, :]
        total = tl.dot(a, tl.trans(b), total)
    if NORM:
        total = total * tl.rsqrt(tl.sum(squares, 1) / K + 1e-6)[:, None]
    if SHIFT:
        total = total + tl.sum(moved, 1)[None, :]
    return total


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, 2 BN] -> its first and its last BN columns."""
    return tl.split(tl.permute(tl.reshape(total, (BM, 2, BN)), (0, 2, 1)))


@triton.autotune(_tiles((16, 128, 4, 4), (16, 128, 8, 3), (16, 64, 4, 5)), key=["K"])
@triton.jit
def _norm_qkv(x, norm, shift, weights, cos, sin, q, k, v, M, K: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Norm, the q / k / v product, and the rotation of q and k. One program: BN columns of a head's first half and their partners in its second half."""
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = (HALF + BN - 1) // BN
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rows = tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    N: tl.constexpr = (HEADS + 2) * D
    both = tl.arange(0, 2 * BN)
    both = head * D + tile * BN + tl.where(both < BN, both, both - BN + HALF)
    a, b = _halves(_rows_by_weights(x, weights, norm, shift, both, rows, M, K, N, BM, 2 * BN, BK, True, SHIFT), BM, BN)
    inside = (rows[:, None] < M) & (columns[None, :] < HALF)
    if head <= HEADS:
        c = tl.load(cos + rows[:, None] * HALF + columns[None, :], mask=inside, other=0.0)
        s = tl.load(sin + rows[:, None] * HALF + columns[None, :], mask=inside, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if head < HEADS:
        out = q + rows[:, None] * HEADS * D + head * D + columns[None, :]
    elif head == HEADS:
        out = k + rows[:, None] * D + columns[None, :]
    else:
        out = v + rows[:, None] * D + columns[None, :]
    tl.store(out, a.to(out.dtype.element_ty), mask=inside)
    tl.store(out + HALF, b.to(out.dtype.element_ty), mask=inside)


@triton.autotune(_tiles((32, 128, 8, 3), (32, 64, 4, 4), (16, 128, 4, 4)), key=["K", "N"])
@triton.jit
def _norm_gate_up(x, norm, shift, weights, out, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Norm, both products of the gated MLP, and the gate: gelu(gate) * up."""
    first, rows = tl.program_id(0) * BN, tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    both = tl.arange(0, 2 * BN)
    both = first + tl.where(both < BN, both, both - BN + N)
    gate, up = _halves(_rows_by_weights(x, weights, norm, shift, both, rows, M, K, 2 * N, BM, 2 * BN, BK, True, SHIFT), BM, BN)
    gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # gelu by tanh, written with a sigmoid
    tl.store(out + rows[:, None] * N + columns[None, :], (gate * up).to(out.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.autotune(_tiles((16, 256, 4, 3), (16, 128, 4, 5), (16, 512, 8, 2), (32, 256, 8, 3)), key=["K", "N"])
@triton.jit
def _add_product(x, weights, residual, gate, out, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """residual + gate * (x by weights)"""
    first, rows = tl.program_id(0) * BN, tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    update = _rows_by_weights(x, weights, x, x, columns, rows, M, K, N, BM, BN, BK, False, False)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if GATE:
        update = update * tl.load(gate + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * N + columns[None, :]
    tl.store(out + place, (tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + update).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _see(q, k, v, bias, token, start, end, offset, T, best, weight, total, D: tl.constexpr, BN: tl.constexpr, scale):
    """Attention of q [BM, D] to the keys start .. end of one block, added to the running sums. `offset`: where these keys stand in the bias."""
    keys, d = start + tl.arange(0, BN), tl.arange(0, D)
    inside = keys < end
    block = tl.load(k + keys[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(block)) * scale
    scores += tl.load(bias + token[:, None] * T + (offset + keys)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    # The mask's -2.4e38 times log2(e) overflows inside exp; at -1e38 a row that sees nothing comes out as the mean, as in the plain form.
    scores = tl.where(inside[None, :], tl.maximum(scores, -1e38), float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    old = tl.exp(best - new)
    shares = tl.exp(scores - new[:, None])
    block = tl.load(v + keys[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    total = total * old[:, None] + tl.dot(shares.to(block.dtype), block)
    return new, weight * old + tl.sum(shares, 1), total


@triton.jit
def _attention(q, past_k, past_v, k, v, bias, out, bests, weights, S, P, OWN, scale, HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Queries [B, S * HEADS, D] against [B, P, D] past keys and then [B, OWN, D] own ones, which all heads share. One program: BM queries, one part of the keys."""
    block, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T = P + OWN
    count = S * HEADS
    rows, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    token = tl.where(rows < count, rows // HEADS, 0)
    bias += batch.to(tl.int64) * S * T
    queries = tl.load(q + (batch.to(tl.int64) * count + rows[:, None]) * D + d[None, :], mask=rows[:, None] < count, other=0.0)
    best = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    past_blocks = (P + BN - 1) // BN
    blocks = past_blocks + (OWN + BN - 1) // BN
    each = (blocks + SPLITS - 1) // SPLITS
    low, high = part * each, tl.minimum((part + 1) * each, blocks)
    for i in range(low, tl.minimum(high, past_blocks)):
        best, weight, total = _see(queries, past_k + batch.to(tl.int64) * P * D, past_v + batch.to(tl.int64) * P * D, bias, token, i * BN, P, 0, T, best, weight, total, D, BN, scale)  # fmt: skip
    for i in range(tl.maximum(low, past_blocks), high):
        best, weight, total = _see(queries, k + batch.to(tl.int64) * OWN * D, v + batch.to(tl.int64) * OWN * D, bias, token, (i - past_blocks) * BN, OWN, P, T, best, weight, total, D, BN, scale)  # fmt: skip
    if SPLITS == 1:
        total = total / weight[:, None]
    place = (batch.to(tl.int64) * SPLITS + part) * count + rows
    tl.store(out + place[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=rows[:, None] < count)
    if SPLITS > 1:
        tl.store(bests + place, best, mask=rows < count)
        tl.store(weights + place, weight, mask=rows < count)


@triton.jit
def _join(parts, bests, weights, out, count, D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr):
    """Attention over parts of the keys -> over all of them."""
    block, batch = tl.program_id(0), tl.program_id(1)
    rows, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = rows < count
    best = tl.full((BM,), float("-inf"), tl.float32)
    for part in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(bests + (batch * SPLITS + part) * count + rows, mask=inside, other=0.0))
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for part in tl.static_range(SPLITS):
        place = (batch * SPLITS + part) * count + rows
        share = tl.exp(tl.load(bests + place, mask=inside, other=0.0) - best)
        weight += share * tl.load(weights + place, mask=inside, other=0.0)
        total += share[:, None] * tl.load(parts + place[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    total = total / tl.where(inside, weight, 1.0)[:, None]
    tl.store(out + (batch * count + rows)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside[:, None])


def attend(q: torch.Tensor, past: KeysValues | None, own: KeysValues, bias: torch.Tensor, tile: tuple[int, int] | None = None) -> torch.Tensor:
    """q [B, S, heads, D], past and own keys and values [B, T, 1, D], bias [B, 1, S, past + own] -> [B, S, heads * D]"""
    batch, length, heads, size = q.shape
    q, bias = q.contiguous(), bias.contiguous()
    k, v = (x.contiguous() for x in own)
    past_k, past_v = (k, v) if past is None else (x.contiguous() for x in past)
    before, after, count = 0 if past is None else past_k.shape[1], k.shape[1], length * heads
    # measured on an H200: many small tiles for few queries; the largest tiles for a batch of prefixes
    rows, warps = tile or ((16, 4) if batch * count <= 1024 else (32, 4) if count <= 512 else (64, 4) if batch == 1 else (128, 8))
    # few queries fill few processors, so their keys are divided; many fill them alone
    splits = max(1, min(8, 128 // (batch * -(-count // rows))))
    out = torch.empty(batch, length, heads * size, dtype=q.dtype, device=q.device)
    parts = out if splits == 1 else torch.empty(batch, splits, count, size, dtype=torch.float32, device=q.device)
    sums = torch.empty(2, batch, splits, count, dtype=torch.float32, device=q.device)
    _attention[(-(-count // rows), splits, batch)](
        q, past_k, past_v, k, v, bias, parts, sums[0], sums[1], length, before, after, size**-0.5, heads, size, rows, 64, splits, num_warps=warps, num_stages=2
    )  # fmt: skip
    if splits > 1:
        _join[(-(-count // 4), batch)](parts, sums[0], sums[1], out, count, size, splits, 4)
    return out


@torch.library.custom_op("vlahub::attend", mutates_args=())
def _attend(q: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return attend(q, None if past_k is None else (past_k, past_v), (k, v), bias)


@_attend.register_fake
def _(q, past_k, past_v, k, v, bias):
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])


def attend_opaque(q: torch.Tensor, past: KeysValues | None, own: KeysValues, bias: torch.Tensor) -> torch.Tensor:
    """`attend` as one operation that torch.compile leaves alone."""
    return _attend(q, *(past or (None, None)), *own, bias)


def layer(
    layer: GemmaLayer,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    past: KeysValues | None = None,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, KeysValues]:
    """What `GemmaLayer.forward` computes, in five launches where the tokens fit one tile, else with the attention kernel. Needs packed matrices (`gemma.pack`)."""
    attention, mlp = layer.self_attn, layer.mlp
    batch, length, width = x.shape
    if batch > 1 or length > ROWS:
        return layer(x, cos, sin, bias, past, before, after, attention=attend)
    heads, size, hidden = attention.heads, attention.head_dim, mlp.gate_proj.out_features
    x, cos, sin = x.contiguous().view(length, width), cos.contiguous(), sin.contiguous()
    norms = []
    for norm, modulation in ((layer.input_layernorm, before), (layer.post_attention_layernorm, after)):
        norms.append((norm.weight, norm.weight, None) if modulation is None else modulation.contiguous().view(3, width).unbind(0))
    q, k, v = (torch.empty(1, length, count, size, dtype=x.dtype, device=x.device) for count in (heads, 1, 1))
    shifted = before is not None
    scale, shift, gate = norms[0]
    _norm_qkv[lambda meta: ((heads + 2) * triton.cdiv(size // 2, meta["BN"]),)](
        x, scale, shift, attention.q_proj.packed[0], cos, sin, q, k, v, length, width, heads, size, ROWS, SHIFT=shifted
    )  # fmt: skip
    seen = attend(q, past, (k, v), bias)
    middle, inner, out = torch.empty_like(x), torch.empty(length, hidden, dtype=x.dtype, device=x.device), torch.empty_like(x)

    def columns(meta: dict) -> tuple[int]:
        return (triton.cdiv(width, meta["BN"]),)

    _add_product[columns](seen, attention.o_proj.weight, x, gate, middle, length, heads * size, width, ROWS, GATE=shifted)
    scale, shift, gate = norms[1]
    _norm_gate_up[lambda meta: (triton.cdiv(hidden, meta["BN"]),)](
        middle, scale, shift, mlp.gate_proj.packed[0], inner, length, width, hidden, ROWS, SHIFT=shifted
    )
    _add_product[columns](inner, mlp.down_proj.weight, middle, gate, out, length, hidden, width, ROWS, GATE=shifted)
    return out[None], (k, v)
