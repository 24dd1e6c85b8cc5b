"""Triton kernels for inference in bf16 on CUDA: a Gemma layer in five launches instead of some fifteen, and attention of query heads that share keys.

One decision at batch 1 runs 50 tokens through 18 layers ten times. Each product then takes a few microseconds, as much as a launch, so what surrounds a product
(norm before; rotation, gate, residual after) is done where the product is. A product with few columns is divided along its depth too, and a kernel starts, and
asks for its weights, while the one before it still runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vlahub_policies.parts.gemma import Gemma, KeysValues

ROWS = 64  # rows of a tile; as many tokens or more take the ordinary path
COUNTERS = 512  # more than any product has tiles


@dataclass(frozen=True)
class Tile:
    """How one product is cut up."""

    columns: int
    depth: int  # of one step along the product
    warps: int
    stages: int  # steps in flight
    splits: int = 1  # parts of the product's depth that run side by side


# Measured on an H200, `python benchmarks/kernel_tiles.py`. Fixed rather than chosen at the first call, so that results repeat from run to run.
TILES = {"qkv": Tile(16, 256, 4, 3), "out": Tile(32, 128, 4, 4, 4), "gate_up": Tile(32, 128, 4, 4), "down": Tile(32, 128, 4, 4, 8)}
ATTENTION = (16, 4, 5)  # queries, warps, parts of the keys


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it has ended (programmatic dependent launch)."""
    return torch.version.cuda is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
def _begin(weights, columns, low, N: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr):
    """Let the next kernel start, ask for the weights, and wait for the kernel before to end: only then is its output there."""
    if OVERLAP:
        gdc_launch_dependents()
        if K % DEPTH == 0 and DEPTH % 128 == 0:  # else a piece could reach beyond the weights, or be no multiple of 16 bytes
            _fetch(weights, columns, low, N, K, DEPTH)
        gdc_wait()


@triton.jit
def _product(x, weights, columns, rows, low, M, K: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x [M, low .. low + DEPTH of K] times the rows `columns` of weights [N, K] -> [BM, BN]"""
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, DEPTH, BK):
        k = low + step + tl.arange(0, BK)
        a_inside, b_inside = rows[:, None] < M, columns[:, None] < N
        if K % DEPTH != 0:
            a_inside, b_inside = a_inside & (k[None, :] < K), b_inside & (k[None, :] < K)
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=a_inside, other=0.0)
        b = tl.load(weights + columns[:, None] * K + k[None, :], mask=b_inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total)
    return total


# The RMS norm before a product is taken apart, so that the product's loop only loads and multiplies: the kernel that makes x also makes `scaled` = x (1 + scale)
# and the sums of squares over each of its tiles of columns; the product then multiplies its rows by 1 / rms. The adaptive norm's shift is one further row of `scaled`.


@triton.jit
def _hand_on(x, place, rows, columns, tile, inside, out, scaled, sums, scale, shift, M, N: tl.constexpr, SHIFT: tl.constexpr):
    """Store x [BM, BN], and what the next norm needs of it."""
    x = x.to(out.dtype.element_ty)
    tl.store(out + place, x, mask=inside)
    x = tl.where(inside, x.to(tl.float32), 0.0)
    tl.store(sums + tile * M + rows, tl.sum(x * x, 1), mask=rows < M)
    x = x * (1.0 + tl.load(scale + columns, mask=columns < N, other=0.0).to(tl.float32))[None, :]
    if SHIFT:
        x = tl.where(rows[:, None] == M, tl.load(shift + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :], x)
    tl.store(scaled + place, x.to(scaled.dtype.element_ty), mask=(rows[:, None] < M + SHIFT) & (columns[None, :] < N))


@triton.jit
def _inverse_rms(sums, rows, M, N: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    part = tl.arange(0, SLOTS)
    squares = tl.load(sums + part[:, None] * M + rows[None, :], mask=(part[:, None] < PARTS) & (rows[None, :] < M), other=0.0)
    return tl.rsqrt(tl.sum(squares, 0) / N + 1e-6)


@triton.jit
def _normed_product(scaled, sums, weights, columns, rows, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """The norm of x [M, K] times the rows `columns` of weights [N, K] -> [BM, BN]"""
    rms = _inverse_rms(sums, rows, M, K, PARTS, SLOTS)
    total = _product(scaled, weights, columns, rows, 0, M + SHIFT, K, N, (K + BK - 1) // BK * BK, BM, BN, BK)
    moved = tl.sum(tl.where((rows == M)[:, None], total, 0.0), 0) if SHIFT else 0.0
    return total * rms[:, None] + (moved[None, :] if SHIFT else 0.0)


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
def _start(x, scale, shift, out, scaled, sums, counters, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SHIFT: tl.constexpr, COUNTERS: tl.constexpr):  # fmt: skip
    """x [M, N] in bf16, what the first norm needs of it, and zeros to count with."""
    tile, rows = tl.program_id(0), tl.arange(0, BM)
    if tile == 0:
        tl.store(counters + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))
    columns = tile * BN + tl.arange(0, BN)
    place, inside = rows[:, None] * N + columns[None, :], (rows[:, None] < M) & (columns[None, :] < N)
    _hand_on(tl.load(x + place, mask=inside, other=0.0), place, rows, columns, tile, inside, out, scaled, sums, scale, shift, M, N, SHIFT)


@triton.jit
def _finish(scaled, sums, out, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """The last norm [M, N], in out's type."""
    rows, columns = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    place, inside = rows[:, None] * N + columns[None, :], (rows[:, None] < M) & (columns[None, :] < N)
    x = tl.load(scaled + place, mask=inside, other=0.0).to(tl.float32) * _inverse_rms(sums, rows, M, N, PARTS, SLOTS)[:, None]
    if SHIFT:
        x += tl.load(scaled + M * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_qkv(scaled, sums, weights, cos, sin, q, k, v, M, K: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Norm, the q / k / v product, and the rotation of q and k. One program: BN columns of a head's first half and their partners in its second half."""
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = (HALF + BN - 1) // BN
    N: tl.constexpr = (HEADS + 2) * D
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rows = tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    both = tl.arange(0, 2 * BN)
    both = head * D + tile * BN + tl.where(both < BN, both, both - BN + HALF)
    _begin(weights, both, 0, N, K, (K + BK - 1) // BK * BK, OVERLAP)
    a, b = _halves(_normed_product(scaled, sums, weights, both, rows, M, K, N, BM, 2 * BN, BK, SHIFT, PARTS, SLOTS), BM, BN)
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
def _norm_gate_up(scaled, sums, weights, out, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Norm, both products of the gated MLP, and the gate: gelu(gate) * up."""
    first, rows = tl.program_id(0) * BN, tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    both = tl.arange(0, 2 * BN)
    both = first + tl.where(both < BN, both, both - BN + N)
    _begin(weights, both, 0, 2 * N, K, (K + BK - 1) // BK * BK, OVERLAP)
    gate, up = _halves(_normed_product(scaled, sums, weights, both, rows, M, K, 2 * N, BM, 2 * BN, BK, SHIFT, PARTS, SLOTS), BM, BN)
    gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # gelu by tanh, written with a sigmoid
    tl.store(out + rows[:, None] * N + columns[None, :], (gate * up).to(out.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _add_product(x, weights, residual, gate, out, scaled, sums, scale, shift, parts, counters, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SHIFT: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """residual + gate * (x by weights). One program: BN columns of one of SPLITS parts of the depth; the last of them to end adds the parts up, always in the same order."""
    DEPTH: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BK - 1) // BK * BK
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    _begin(weights, columns, split * DEPTH, N, K, DEPTH, OVERLAP)
    update = _product(x, weights, columns, rows, split * DEPTH, M, K, N, DEPTH, BM, BN, BK)
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
        if SHIFT:  # the adaptive norm comes with a gate
            update = update * tl.load(gate + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        update += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        _hand_on(update, place, rows, columns, tile, inside, out, scaled, sums, scale, shift, M, N, SHIFT)


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
    q, past_k, past_v, k, v, bias, out, parts, bests, weights, counters, S, scale, bias_row, bias_token,
    q_row, q_token, q_head, past_k_row, past_k_token, past_k_head, past_v_row, past_v_token, past_v_head, k_row, k_token, k_head, v_row, v_token, v_head,
    P: tl.constexpr, OWN: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Queries [B, S, GROUPS * HEADS, D] against [B, P, GROUPS, D] past keys and then [B, OWN, GROUPS, D] own ones, each shared by HEADS heads.

    One program: BM queries of a group, token by token, and one of SPLITS parts of the keys; the last of them to end joins the parts.
    """
    block, part, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) % GROUPS, (tl.program_id(2) // GROUPS).to(tl.int64)
    if OVERLAP:
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
    overlap: bool = False,
) -> torch.Tensor:
    """q [B, S, heads, D], past and own keys and values [B, T, kv heads, D], bias [B, 1, S, past + own] -> [B, S, heads * D]

    Of the bias, further rows and columns are not read. `tile`: (queries, warps, parts of the keys). `counters`: zeros, which it leaves as zeros. `overlap`: the kernel before belongs to the same layer and lets this one start.
    """
    batch, length, heads, size = q.shape
    q, k, v, past_k, past_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, *own, *(past or own)))
    groups, before, after = k.shape[2], 0 if past is None else past_k.shape[1], k.shape[1]
    count = length * heads // groups
    # measured on an H200: large tiles where there are enough of them for all processors, else small ones
    if tile:
        rows, warps = tile[:2]
    elif batch * groups * -(-count // 128) >= 128:
        rows, warps = (128, 8) if size > 128 else (64, 4)
    else:
        rows, warps = (16, 4) if batch * groups * count <= 1024 else (32, 4) if count <= 512 else (64, 4)
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
        q, past_k, past_v, k, v, bias, out, parts, *sums, out if counters is None else counters, length, size**-0.5, bias.stride(0), bias.stride(2), *steps,
        before, after, heads // groups, groups, size, rows, 64, splits, overlap, num_warps=warps, num_stages=2, launch_pdl=overlap,
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


def stack(
    gemma: Gemma,
    x: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    past: list[KeysValues] | None = None,
    modulations: list[torch.Tensor] | None = None,
    through: Callable | None = None,
    wanted: bool = True,
) -> tuple[torch.Tensor | None, list[KeysValues]]:
    """What `Gemma.forward` computes, in five launches a layer where the tokens of one row fit a tile. Needs packed matrices (`gemma.pack`)."""
    batch, length, width = x.shape
    if batch > 1 or length >= ROWS or not wanted:  # one row of a tile is the shift's
        return gemma(x, turn, bias, past, modulations, through, wanted)
    first = gemma.layers[0]
    heads, size, hidden = first.self_attn.heads, first.self_attn.head_dim, first.mlp.gate_proj.out_features
    dtype, device, shifted = first.mlp.down_proj.weight.dtype, x.device, int(modulations is not None)
    overlap = _overlaps(device)
    cos, sin = (part.contiguous() for part in turn)
    norms = gemma.norms()
    if modulations is None:  # (scale, shift, gate): the gate belongs to the product before the next norm
        parts = [(norm.weight, norm.weight, norm.weight) for norm in norms]
    else:
        parts = [modulation.contiguous().view(3, width).unbind(0) for modulation in modulations]

    def buffer(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def how(name: str) -> dict:
        tile = TILES[name]
        return dict(BM=ROWS, BN=tile.columns, BK=tile.depth, SHIFT=shifted, OVERLAP=overlap, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=overlap)

    def norm_of(tiles: int) -> dict:
        return dict(PARTS=tiles, SLOTS=triton.next_power_of_2(tiles))

    def add_product(name: str, x: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor, after: tuple) -> tuple:
        splits, tiles = TILES[name].splits, -(-width // TILES[name].columns)
        out, scaled, sums = buffer(length, width), buffer(length + 1, width), buffer(tiles, length, dtype=torch.float32)
        pieces = buffer(splits, length, width, dtype=torch.float32) if splits > 1 else out
        _add_product[(tiles, splits)](
            x, weights, residual, gate, out, scaled, sums, *after[:2], pieces, counters, length, weights.shape[1], width, SPLITS=splits, **how(name)
        )
        return out, scaled, sums

    counters = buffer(COUNTERS, dtype=torch.int32)  # every product leaves them as zeros
    tiles = -(-width // 32)
    out, scaled, sums = buffer(length, width), buffer(length + 1, width), buffer(tiles, length, dtype=torch.float32)
    _start[(tiles,)](x.contiguous(), *parts[0][:2], out, scaled, sums, counters, length, width, ROWS, 32, shifted, COUNTERS)
    kept = []
    for i, layer in enumerate(gemma.layers):
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = (buffer(1, length, count, size) for count in (heads, 1, 1))
        _norm_qkv[((heads + 2) * -(-size // 2 // TILES["qkv"].columns),)](
            scaled, sums, attention.q_proj.packed[0], cos, sin, q, k, v, length, width, heads, size, **how("qkv"), **norm_of(len(sums))
        )
        kept.append((k, v))
        seen = attend(q, None if past is None else past[i], (k, v), bias, ATTENTION, counters, overlap)
        out, scaled, sums = add_product("out", seen, attention.o_proj.weight, out, parts[2 * i][2], parts[2 * i + 1])
        inner = buffer(length, hidden)
        _norm_gate_up[(-(-hidden // TILES["gate_up"].columns),)](
            scaled, sums, mlp.gate_proj.packed[0], inner, length, width, hidden, **how("gate_up"), **norm_of(len(sums))
        )
        out, scaled, sums = add_product("down", inner, mlp.down_proj.weight, out, parts[2 * i + 1][2], parts[2 * i + 2])
    final = buffer(1, length, width)
    _finish[(-(-width // 32),)](scaled, sums, final, length, width, ROWS, 32, shifted, **norm_of(len(sums)))
    return final, kept
