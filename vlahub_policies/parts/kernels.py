"""Triton kernels for inference in bf16 on CUDA: a Gemma layer in five launches instead of some fifteen, and attention of many query heads to one key/value head.

One decision at batch 1 runs 50 tokens through 18 layers ten times. Each product then takes a few microseconds, as much as a launch, so what surrounds a product
(norm before; rotation, gate, residual after) is done where the product is. A product with few columns is divided along its depth too, and a kernel starts, and
asks for its weights, while the one before it still runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vlahub_policies.parts.gemma import GemmaLayer, KeysValues

ROWS = 64  # rows of a tile; more tokens than this take the ordinary path


@dataclass(frozen=True)
class Tile:
    """How one product is cut up."""

    columns: int
    depth: int  # of one step along the product
    warps: int
    stages: int  # steps in flight
    splits: int = 1  # parts of the product's depth that run side by side


# Measured on an H200, `python benchmarks/kernel_tiles.py`. Fixed rather than chosen at the first call, so that results repeat from run to run.
TILES = {"qkv": Tile(16, 128, 4, 4), "out": Tile(32, 128, 4, 4, 4), "gate_up": Tile(32, 128, 8, 3), "down": Tile(32, 128, 4, 4, 4)}
ATTENTION = (16, 4, 4)


@functools.cache
def _overlaps(device: torch.device) -> int:
    """Whether a kernel can start before the one ahead of it has ended (programmatic dependent launch)."""
    return 2 if torch.version.cuda is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else 0


# ------------------------------------------------------------------------------------------------ products


@triton.jit
def _fetch(weights, columns, low, N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr):
    """Ask for a program's part of the weights, rows `columns` and DEPTH numbers from `low` on, into the level-2 cache."""
    PIECES: tl.constexpr = 128 // columns.shape[0] if columns.shape[0] < 128 else 1  # a piece per thread of four warps
    SIZE: tl.constexpr = DEPTH // PIECES
    piece = tl.arange(0, PIECES)
    rows = tl.minimum(columns, N - 1)
    start = weights + rows[:, None] * K + (low + piece * SIZE)[None, :]
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }", "=r,l,r", [start.to(tl.int64), SIZE * 2], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _rows_by_weights(x, weights, norm, shift, columns, rows, low, M, K: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """x [M, low .. low + DEPTH of K] times the rows `columns` of weights [N, K] -> [BM, BN]. NORM: of x's RMS norm times (1 + norm); SHIFT: plus shift, as the adaptive norm has it."""
    total = tl.zeros((BM, BN), tl.float32)
    if NORM:
        squares = tl.zeros((BM, BK), tl.float32)
    if SHIFT:
        moved = tl.zeros((BN, BK), tl.float32)
    for step in range(0, DEPTH, BK):
        k = low + step + tl.arange(0, BK)
        a_inside, b_inside = rows[:, None] < M, columns[:, None] < N
        if K % DEPTH != 0:
            a_inside, b_inside = a_inside & (k[None, :] < K), b_inside & (k[None, :] < K)
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=a_inside, other=0.0)
        b = tl.load(weights + columns[:, None] * K + k[None, :], mask=b_inside, other=0.0)
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
def _begin(weights, columns, low, N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr):
    """Let the next kernel start, ask for the weights, and wait for the kernel before to end: only then is its output there."""
    if OVERLAP > 0:
        gdc_launch_dependents()
        if OVERLAP > 1:
            _fetch(weights, columns, low, N, K, DEPTH)
        gdc_wait()


@triton.jit
def _last(counters, index, SPLITS: tl.constexpr):
    """Whether this program is the last of SPLITS to get here; what the others stored before is then there to read."""
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(counters + index, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(counters + index, 0)  # for the next product
    return last


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, 2 BN] -> its first and its last BN columns."""
    return tl.split(tl.permute(tl.reshape(total, (BM, 2, BN)), (0, 2, 1)))


@triton.jit
def _norm_qkv(x, norm, shift, weights, cos, sin, q, k, v, M, K: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Norm, the q / k / v product, and the rotation of q and k. One program: BN columns of a head's first half and their partners in its second half."""
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = (HALF + BN - 1) // BN
    DEPTH: tl.constexpr = (K + BK - 1) // BK * BK
    N: tl.constexpr = (HEADS + 2) * D
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rows = tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    both = tl.arange(0, 2 * BN)
    both = head * D + tile * BN + tl.where(both < BN, both, both - BN + HALF)
    _begin(weights, both, 0, N, K, DEPTH, OVERLAP)
    a, b = _halves(_rows_by_weights(x, weights, norm, shift, both, rows, 0, M, K, N, DEPTH, BM, 2 * BN, BK, True, SHIFT), BM, BN)
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


@triton.jit
def _norm_gate_up(x, norm, shift, weights, out, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Norm, both products of the gated MLP, and the gate: gelu(gate) * up."""
    DEPTH: tl.constexpr = (K + BK - 1) // BK * BK
    first, rows = tl.program_id(0) * BN, tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    both = tl.arange(0, 2 * BN)
    both = first + tl.where(both < BN, both, both - BN + N)
    _begin(weights, both, 0, 2 * N, K, DEPTH, OVERLAP)
    gate, up = _halves(_rows_by_weights(x, weights, norm, shift, both, rows, 0, M, K, 2 * N, DEPTH, BM, 2 * BN, BK, True, SHIFT), BM, BN)
    gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # gelu by tanh, written with a sigmoid
    tl.store(out + rows[:, None] * N + columns[None, :], (gate * up).to(out.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _add_product(x, weights, residual, gate, out, parts, counters, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """residual + gate * (x by weights). One program: BN columns of one of SPLITS parts of the depth; the last of them to end adds the parts up, always in the same order."""
    DEPTH: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BK - 1) // BK * BK
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    _begin(weights, columns, split * DEPTH, N, K, DEPTH, OVERLAP)
    update = _rows_by_weights(x, weights, x, x, columns, rows, split * DEPTH, M, K, N, DEPTH, BM, BN, BK, False, False)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    place = rows[:, None] * N + columns[None, :]
    last = True
    if SPLITS > 1:
        tl.store(parts + split * M * N + place, update, mask=inside)
        last = _last(counters, tile, SPLITS)
    if last:
        if SPLITS > 1:
            update = tl.zeros((BM, BN), tl.float32)
            for part in range(SPLITS):
                update += tl.load(parts + part * M * N + place, mask=inside, other=0.0, cache_modifier=".cg")
        if GATE:
            update = update * tl.load(gate + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, (tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + update).to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ attention


@triton.jit
def _see(q, k, v, k_token, v_token, bias, start, end, token, bias_token, best, weight, total, D: tl.constexpr, BN: tl.constexpr, scale):
    """Attention of q [BM, D] to the keys start .. end of one block, added to the running sums. `bias` points at what is added to the scores of key 0."""
    keys, d = start + tl.arange(0, BN), tl.arange(0, D)
    inside = keys < end
    block = tl.load(k + keys[:, None] * k_token + d[None, :], mask=inside[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(block)) * scale
    scores += tl.load(bias + token[:, None] * bias_token + keys[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    # The mask's -2.4e38 times log2(e) overflows inside exp; at -1e38 a row that sees nothing comes out as the mean, as in the plain form.
    scores = tl.where(inside[None, :], tl.maximum(scores, -1e38), float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    old = tl.exp(best - new)
    shares = tl.exp(scores - new[:, None])
    block = tl.load(v + keys[:, None] * v_token + d[None, :], mask=inside[:, None], other=0.0)
    total = total * old[:, None] + tl.dot(shares.to(block.dtype), block)
    return new, weight * old + tl.sum(shares, 1), total


@triton.jit
def _attention(
    q, past_k, past_v, k, v, bias, out, parts, bests, weights, counters, S, P, OWN, scale, bias_row, bias_token,
    q_row, q_token, q_head, past_k_row, past_k_token, past_k_head, past_v_row, past_v_token, past_v_head, k_row, k_token, k_head, v_row, v_token, v_head,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Queries [B, S, GROUPS * HEADS, D] against [B, P, GROUPS, D] past keys and then [B, OWN, GROUPS, D] own ones, each shared by HEADS heads.

    One program: BM queries of a group, token by token, and one of SPLITS parts of the keys; the last of them to end joins the parts.
    """
    block, part, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) % GROUPS, (tl.program_id(2) // GROUPS).to(tl.int64)
    if OVERLAP > 0:
        gdc_launch_dependents()
        gdc_wait()
    count = S * HEADS
    rows, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = rows < count
    token, head = tl.where(inside, rows // HEADS, 0), group * HEADS + rows % HEADS
    bias += row * bias_row
    queries = tl.load(q + row * q_row + (token * q_token + head * q_head)[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    past_k, past_v = past_k + row * past_k_row + group * past_k_head, past_v + row * past_v_row + group * past_v_head
    k, v = k + row * k_row + group * k_head, v + row * v_row + group * v_head
    best = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    past_blocks = (P + BN - 1) // BN
    blocks = past_blocks + (OWN + BN - 1) // BN
    each = (blocks + SPLITS - 1) // SPLITS
    low, high = part * each, tl.minimum((part + 1) * each, blocks)
    for i in range(low, tl.minimum(high, past_blocks)):
        best, weight, total = _see(queries, past_k, past_v, past_k_token, past_v_token, bias, i * BN, P, token, bias_token, best, weight, total, D, BN, scale)
    for i in range(tl.maximum(low, past_blocks), high):
        best, weight, total = _see(queries, k, v, k_token, v_token, bias + P, (i - past_blocks) * BN, OWN, token, bias_token, best, weight, total, D, BN, scale)
    last = True
    if SPLITS > 1:
        index = (tl.program_id(2) * SPLITS + part) * count + rows
        tl.store(parts + index[:, None] * D + d[None, :], total, mask=inside[:, None])
        tl.store(bests + index, best, mask=inside)
        tl.store(weights + index, weight, mask=inside)
        last = _last(counters, tl.program_id(2) * tl.num_programs(0) + block, SPLITS)
    if last:
        if SPLITS > 1:
            best = tl.full((BM,), float("-inf"), tl.float32)
            for j in range(SPLITS):
                index = (tl.program_id(2) * SPLITS + j) * count + rows
                best = tl.maximum(best, tl.load(bests + index, mask=inside, other=0.0, cache_modifier=".cg"))
            weight = tl.zeros((BM,), tl.float32)
            total = tl.zeros((BM, D), tl.float32)
            for j in range(SPLITS):
                index = (tl.program_id(2) * SPLITS + j) * count + rows
                share = tl.exp(tl.load(bests + index, mask=inside, other=0.0, cache_modifier=".cg") - best)
                weight += share * tl.load(weights + index, mask=inside, other=0.0, cache_modifier=".cg")
                total += share[:, None] * tl.load(parts + index[:, None] * D + d[None, :], mask=inside[:, None], other=0.0, cache_modifier=".cg")
        total = total / tl.where(inside, weight, 1.0)[:, None]
        place = ((row * S + token) * GROUPS * HEADS + head)[:, None] * D + d[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[:, None])


def attend(
    q: torch.Tensor,
    past: KeysValues | None,
    own: KeysValues,
    bias: torch.Tensor,
    tile: tuple[int, int, int] | None = None,
    counters: torch.Tensor | None = None,
    overlap: int = 0,
) -> torch.Tensor:
    """q [B, S, heads, D], past and own keys and values [B, T, kv heads, D], bias [B, 1, S, past + own] -> [B, S, heads * D]

    Of the bias, further rows and columns are not read. `tile`: (queries, warps, parts of the keys). `counters`: zeros, which it leaves as zeros. `overlap`: the kernel before belongs to the same layer and lets this one start.
    """
    batch, length, heads, size = q.shape
    q, k, v, past_k, past_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, *own, *(past or own)))
    groups, before, after = k.shape[2], 0 if past is None else past_k.shape[1], k.shape[1]
    count = length * heads // groups
    # measured on an H200: many small tiles for few queries; the largest tiles for a batch of prefixes
    many = batch * groups * count
    rows, warps = tile[:2] if tile else (16, 4) if many <= 1024 else (32, 4) if count <= 512 else (64, 4) if batch == 1 else (128, 8)
    # few queries fill few processors, so their keys are divided; many fill them alone
    blocks = -(-count // rows)
    splits = tile[2] if tile else max(1, min(8, 128 // (batch * groups * blocks)))
    out = torch.empty(batch, length, heads * size, dtype=q.dtype, device=q.device)
    parts, sums = out, (out, out)
    if splits > 1:
        parts = torch.empty(batch * groups, splits, count, size, dtype=torch.float32, device=q.device)
        sums = torch.empty(2, batch * groups, splits, count, dtype=torch.float32, device=q.device).unbind(0)
        counters = torch.zeros(batch * groups * blocks, dtype=torch.int32, device=q.device) if counters is None else counters
    steps = [step for x in (q, past_k, past_v, k, v) for step in x.stride()[:3]]
    _attention[(blocks, splits, batch * groups)](
        q, past_k, past_v, k, v, bias, out, parts, *sums, out if counters is None else counters, length, before, after, size**-0.5, bias.stride(0), bias.stride(2), *steps,
        heads // groups, groups, size, rows, 64, splits, overlap, num_warps=warps, num_stages=2, launch_pdl=overlap > 0,
    )  # fmt: skip
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


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros that every product leaves as zeros. One layer runs at a time."""
    return torch.zeros(512, dtype=torch.int32, device=device)


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
    middle, inner, out = torch.empty_like(x), torch.empty(length, hidden, dtype=x.dtype, device=x.device), torch.empty_like(x)
    shifted, overlap, counters = before is not None, _overlaps(x.device), _counters(x.device)

    def start(name: str, columns: int) -> tuple[int, dict]:
        tile = TILES[name]
        return -(-columns // tile.columns), dict(
            BM=ROWS, BN=tile.columns, BK=tile.depth, OVERLAP=overlap, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlap > 0
        )

    def add_product(name: str, x: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor | None, out: torch.Tensor) -> None:
        tiles, how = start(name, width)
        splits = TILES[name].splits
        parts = torch.empty(splits, length, width, dtype=torch.float32, device=x.device) if splits > 1 else out
        _add_product[(tiles, splits)](x, weights, residual, gate, out, parts, counters, length, weights.shape[1], width, SPLITS=splits, GATE=shifted, **how)

    scale, shift, gate = norms[0]
    tiles, how = start("qkv", size // 2)
    _norm_qkv[((heads + 2) * tiles,)](x, scale, shift, attention.q_proj.packed[0], cos, sin, q, k, v, length, width, heads, size, SHIFT=shifted, **how)
    seen = attend(q, past, (k, v), bias, ATTENTION, counters, overlap)
    add_product("out", seen, attention.o_proj.weight, x, gate, middle)
    scale, shift, gate = norms[1]
    tiles, how = start("gate_up", hidden)
    _norm_gate_up[(tiles,)](middle, scale, shift, mlp.gate_proj.packed[0], inner, length, width, hidden, SHIFT=shifted, **how)
    add_product("down", inner, mlp.down_proj.weight, middle, gate, out)
    return out[None], (k, v)
