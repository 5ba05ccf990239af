"""The Triton executor: a block-sparse flash-attention forward with LSE, for any plan on any GPU that Triton knows.

q, k and v are gathered into the plan's order first: rows that lie side by side are what the compiler can fetch ahead,
and fetching each through an index took twice the time of the products. Blocks of any size: a block larger than a tile
is walked in tiles. Within a row's list the blocks of full size come first, as the token each starts at: the compiler
does not fetch ahead through a second look-up, and only the other blocks pay for a mask. Tiles of keys and values are
read by tensor descriptors, which are the copy engine's where the GPU has one.
"""

from __future__ import annotations

import contextvars
import functools
import math
import os
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from draftbench.kernels.devices import side_by_side
from draftbench.kernels.padded import even, take
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation
from ..parts import part

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT: tl.constexpr = tl.constexpr(2.0**64)  # of a row's sum; its products with values below 2^63 cannot overflow


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if q.device.type != "cuda" and not INTERPRETED:
        return f"it needs a CUDA device, got tensors on {q.device.type}"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head_dim must be 16, 32, 64 or 128, got {q.shape[-1]}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype must be bfloat16, float16 or float32, got {q.dtype}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; the first call of a shape tries the launch parameters in `CONFIGS`."""
    batch, length, heads, dim = q.shape
    with part("order"):
        q, k, v, q_order, _ = in_order(q, k, v, plan, layout)
        rows, counts, whole, blocks = schedule(plan, layout, batch, "start")
    out = torch.zeros(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=q.device)
    m = min(128 if q.element_size() == 2 else 64, max(16, triton.next_power_of_2(plan.q_block)))
    q_tiles, q_blocks = -(-plan.q_block // m), counts.shape[2]
    q_starts, kv_starts = plan.q_offsets.contiguous(), plan.kv_offsets.contiguous()
    forward = _tuned(q.element_size() == 2, triton.next_power_of_2(plan.kv_block))[q_blocks * q_tiles, batch * heads]
    again = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=q.device)
    for running, flagged in passes(q.dtype):
        contextvars.copy_context().run(
            _with_scratch, forward,
            q, k, v, out, lse, q_starts, kv_starts, rows, counts, whole, blocks, again,
            math.log2(math.e) / math.sqrt(dim), heads, q_blocks, kv_starts.shape[-1] - 1, blocks.shape[-1], length,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *shared(q_starts), *shared(kv_starts),
            D=dim, M=m, Q_TILES=q_tiles, KV_BLOCK=plan.kv_block, RUNNING=running, FLAGGED=flagged,
            UPCAST=INTERPRETED and q.dtype != torch.float32, PRECISION="ieee",
        )  # fmt: skip
    if q_order is None:
        return out, lse
    with part("restore"):
        back = q_order.argsort(-1)
        return take(out, back), lse.gather(2, back.expand(batch, heads, -1))


def passes(dtype: torch.dtype) -> tuple[tuple[bool, bool], ...]:
    """The launches of a forward kernel: (relative to a running maximum, only what is flagged).

    A softmax is the same whatever its powers are relative to, as long as none overflows. Relative to a row's maximum in
    its first kept tile it needs no maximum of the others and no rescaling. Query blocks of which a row's sum passes
    `LIMIT` (or is no number) are flagged on the device, and a second launch, which else ends at once, computes them
    again with a running maximum. float16 has not the range for that.
    """
    return ((True, False),) if dtype == torch.float16 else ((False, False), (True, True))


def _with_scratch(launch: Any, *arguments: Any, **options: Any) -> None:
    """Launch with room for tensor descriptors, which Triton asks a hook for; its own context keeps the caller's."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    launch(*arguments, **options)


def schedule(
    plan: Plan, layout: Layout, batch: int, names: Literal["number", "start", "start and size"] = "number"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, counts, whole, blocks): in which order query blocks start, and their lists, blocks of full size first.

    rows: int32 [B * H, q_blocks], those with the most keys first, so that none is left for the end, and as they lie
    where they have as many (rows side by side keep more of the same keys); heads stay in turn, for the keys in L2.
    counts, whole: int32 [B, H, q_blocks], kept blocks that have a token, and how many of them are of `plan.kv_block`
    tokens. names: what stands for a block in the lists, its number; "start": of a whole one its first token; "start and
    size": of each its first token times 2^8, and its size, of at most 128 tokens. No synchronisation.
    """
    counts, blocks = plan.counts.contiguous(), plan.blocks.contiguous()
    whole = counts
    if names != "number" or not even(plan, layout, batch):
        offsets = plan.kv_offsets.contiguous()
        q_blocks, heads = counts.shape[2], counts.shape[1]
        counts, whole, blocks = (torch.empty_like(x) for x in (counts, counts, blocks))
        _whole_first[(q_blocks, batch * heads)](
            plan.counts.contiguous(), plan.blocks.contiguous(), offsets, counts, whole, blocks,
            heads, q_blocks, blocks.shape[-1], *shared(offsets), SIZE=plan.kv_block, CHUNK=1024, NAMES=names,
            num_warps=4,
        )  # fmt: skip
    return counts.flatten(0, 1).argsort(dim=-1, descending=True, stable=True).int(), counts, whole, blocks


def in_order(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v [B, S, H, D] in a plan's orders, as the copy engine can read them, and both orders (`permutation`)."""
    q_order, kv_order = (permutation(order, layout, q.device) for order in (plan.q_order, plan.kv_order))
    return _ordered(q, q_order), _ordered(k, kv_order), _ordered(v, kv_order), q_order, kv_order


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    if order is not None:
        return take(x, order)
    return x if side_by_side(x) else x.contiguous()


def shared(x: Tensor) -> tuple[int, int]:
    """Strides over items and heads, 0 where the axis is shared."""
    return (x.stride(0) if len(x) > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


# (Keys of a tile, warps, stages), of which the fastest is kept for a shape, on disk too. A look-up in the list comes
# before each fetch, so 3 stages fetch one tile ahead, 5 two and 7 three; 32 keys are for a GPU of little shared memory.
CONFIGS = ((128, 8, 5), (128, 8, 3), (64, 8, 5), (64, 8, 7), (64, 8, 3), (64, 4, 5), (64, 4, 3), (32, 4, 3))


@functools.cache
def _tuned(half: bool, kv_block: int) -> Any:
    """The forward kernel with its launch parameters still to choose; float32 takes tiles of at most 32 keys."""
    widest = max(16, min(128 if half else 32, kv_block))
    tried = dict.fromkeys((min(n, widest), *others) for n, *others in CONFIGS)
    configs = [triton.Config({"N": n}, num_warps=warps, num_stages=stages) for n, warps, stages in tried]
    if INTERPRETED:  # whose autotuner takes one only
        configs = configs[:1]
    return triton.autotune(configs, key=["D", "M", "KV_BLOCK"], cache_results=not INTERPRETED)(_forward)


@triton.jit
def _whole_first(
    COUNTS, BLOCKS, STARTS, KEPT, WHOLE, OUT, heads, rows, capacity, s_b, s_h,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    starts = STARTS + tl.program_id(1) // heads * s_b + tl.program_id(1) % heads * s_h
    count = tl.load(COUNTS + row)
    written = 0
    for smaller in tl.static_range(2):
        for first in range(0, count, CHUNK):
            at = first + tl.arange(0, CHUNK)
            block = tl.load(BLOCKS + row * capacity + at, mask=at < count, other=0)
            start = tl.load(starts + block)
            size = tl.load(starts + block + 1) - start
            chosen = (size < SIZE) & (size > 0) if smaller else size == SIZE
            chosen = chosen & (at < count)
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
            what = block
            if NAMES == "start and size":
                what = start * 256 + size
            elif NAMES == "start" and not smaller:
                what = start
            tl.store(OUT + row * capacity + written + place, what, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), 0)
        tl.store((KEPT if smaller else WHOLE) + row, written)


@triton.jit
def _walk(
    q, acc, top, total, k, v, blocks, starts, first, last, scale,
    N: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, RUNNING: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax and products over the tiles of kept blocks first to last; k and v describe [tokens, channels].

    A list's whole blocks (those that WHOLE says, by first token) or its others; RUNNING: see `passes`.
    """
    TILES: tl.constexpr = (BLOCK + N - 1) // N
    MASKED: tl.constexpr = not WHOLE or BLOCK % N != 0
    # Three look-ups come before each fetch of another block: over 3 stages would take the shared memory of whole ones.
    for j in tl.range(first * TILES, last * TILES, num_stages=None if WHOLE else 3):
        start = tl.load(blocks + j // TILES)
        end = start + BLOCK
        if not WHOLE:
            end = tl.load(starts + start + 1)
            start = tl.load(starts + start)
        start += j % TILES * N
        keys, values = k.load([start, 0]), v.load([start, 0])  # beyond the block another's, beyond the end zeros
        if MASKED:
            live = start + tl.arange(0, N) < end
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            s = tl.where(live[None, :], s, -float("inf"))
            values = tl.where(live[:, None], values, 0.0)  # what is not a key may be NaN
        if RUNNING:
            new = tl.maximum(top, tl.max(s, 1) * scale)
            base = new
            if MASKED:
                base = tl.where(new == -float("inf"), 0.0, new)  # a row that has met only empty tiles
            decay = tl.math.exp2(top - base)
            total, acc, top = total * decay, acc * decay[:, None], new
        else:
            base = top
        p = tl.math.exp2(s * scale - base[:, None])
        total += tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, Q_START, KV_START, ROWS, COUNTS, WHOLE, BLOCKS, AGAIN,
    scale, heads, q_blocks, kv_blocks, capacity, length, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    qs_b, qs_h, ks_b, ks_h,
    D: tl.constexpr, M: tl.constexpr, Q_TILES: tl.constexpr, KV_BLOCK: tl.constexpr, RUNNING: tl.constexpr,
    FLAGGED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    lists = tl.num_programs(1) * q_blocks
    if FLAGGED and tl.load(AGAIN + lists) == 0:
        return
    # 64 bits: an item's offset passes 2^31 at the largest shapes
    item = tl.program_id(1).to(tl.int64)
    b, h = item // heads, item % heads
    block = tl.load(ROWS + item * q_blocks + tl.program_id(0) // Q_TILES)
    row = item * q_blocks + block
    if FLAGGED and tl.load(AGAIN + row) == 0:
        return
    q_start = Q_START + b * qs_b + h * qs_h + block
    rows = tl.load(q_start) + (tl.program_id(0) % Q_TILES) * M + tl.arange(0, M)
    real = rows < tl.load(q_start + 1)
    rows = rows.to(tl.int64)
    d = tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_s + d[None, :], mask=real[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    whole = tl.load(WHOLE + row)
    k = tl.make_tensor_descriptor(K + b * k_b + h * k_h, [length, D], [k_s, 1], [N, D])
    v = tl.make_tensor_descriptor(V + b * v_b + h * v_h, [length, D], [v_s, 1], [N, D])
    starts, blocks = KV_START + b * ks_b + h * ks_h, BLOCKS + row * capacity
    count = tl.load(COUNTS + row)
    if not RUNNING:
        start = tl.load(blocks, mask=count > 0, other=0)
        end = start + KV_BLOCK
        if whole == 0:
            end = tl.load(starts + start + 1)
            start = tl.load(starts + start)
        keys = k.load([start, 0])
        if UPCAST:
            keys = keys.to(tl.float32)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        top = tl.max(tl.where((start + tl.arange(0, N) < end)[None, :], s, -float("inf")), 1)
    acc, top, total = _walk(
        q, acc, top, total, k, v, blocks, starts, 0, whole, scale, N, KV_BLOCK, True, RUNNING, UPCAST, PRECISION
    )
    acc, top, total = _walk(
        q, acc, top, total, k, v, blocks, starts, whole, count, scale, N, KV_BLOCK, False, RUNNING, UPCAST, PRECISION
    )
    if not RUNNING:
        over = real & ((total <= LIMIT) == 0)  # or no number
        tl.store(AGAIN + row + tl.zeros_like(rows), 1, over)
        tl.store(AGAIN + lists + tl.zeros_like(rows), 1, over)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.math.log2(total)) * 0.6931471805599453
    lse = tl.where(total == 0.0, -float("inf"), lse)
    out_rows = OUT + ((b * length + rows[:, None]) * heads + h) * D + d[None, :]
    tl.store(out_rows, out.to(OUT.dtype.element_ty), real[:, None])
    tl.store(LSE + item * length + rows, lse, real)
