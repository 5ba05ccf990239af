"""The Triton executor: a block-sparse flash-attention forward with LSE.

Tokens are read through the plan's permutation, so no reordered copy of q, k, v or the output is made. Blocks of any
size: a block larger than a tile is walked in tiles, the places beyond its end are masked.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if q.device.type != "cuda" and not INTERPRETED:
        return f"it needs a CUDA device, got tensors on {q.device.type}"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head_dim must be 16, 32, 64 or 128, got {q.shape[-1]}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype must be bfloat16, float16 or float32, got {q.dtype}"
    return None


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, Q_ORDER, KV_ORDER, Q_START, KV_START, COUNTS, BLOCKS,
    scale, heads, q_blocks, capacity,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, l_b, l_h,
    qo_b, qo_h, ko_b, ko_h, qs_b, qs_h, ks_b, ks_h,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q_TILES: tl.constexpr, KV_TILES: tl.constexpr,
    Q_MOVED: tl.constexpr, KV_MOVED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // Q_TILES
    # 64 bits: an item's offset passes 2^31 at the largest shapes
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q_start = Q_START + b * qs_b + h * qs_h + block
    rows = tl.load(q_start) + (tl.program_id(0) % Q_TILES) * M + tl.arange(0, M)
    real = rows < tl.load(q_start + 1)
    tokens = rows
    if Q_MOVED:
        tokens = tl.load(Q_ORDER + b * qo_b + h * qo_h + rows, mask=real, other=0)
    tokens = tokens.to(tl.int64)
    d = tl.arange(0, D)
    q = tl.load(Q + b * q_b + h * q_h + tokens[:, None] * q_s + d[None, :], mask=real[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    row = (b * heads + h).to(tl.int64) * q_blocks + block
    for j in range(0, tl.load(COUNTS + row) * KV_TILES):
        kv_start = KV_START + b * ks_b + h * ks_h + tl.load(BLOCKS + row * capacity + j // KV_TILES)
        cols = tl.load(kv_start) + (j % KV_TILES) * N + tl.arange(0, N)
        live = cols < tl.load(kv_start + 1)
        keys = cols
        if KV_MOVED:
            keys = tl.load(KV_ORDER + b * ko_b + h * ko_h + cols, mask=live, other=0)
        keys = keys.to(tl.int64)
        k = tl.load(K + b * k_b + h * k_h + keys[:, None] * k_s + d[None, :], mask=live[:, None], other=0.0)
        v = tl.load(V + b * v_b + h * v_h + keys[:, None] * v_s + d[None, :], mask=live[:, None], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where(live[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)  # a row that has met only empty tiles
        p = tl.math.exp2(s - base[:, None])
        decay = tl.math.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.math.log2(total)) * 0.6931471805599453
    lse = tl.where(total == 0.0, -float("inf"), lse)
    tl.store(OUT + b * o_b + h * o_h + tokens[:, None] * o_s + d[None, :], out.to(OUT.dtype.element_ty), real[:, None])
    tl.store(LSE + b * l_b + h * l_h + tokens, lse, real)


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; the last axis of q, k and v must be contiguous."""
    batch, length, heads, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.zeros(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=q.device)
    orders = [permutation(order, layout, q.device) for order in (plan.q_order, plan.kv_order)]
    # An unused order still needs a pointer; the kernel never reads it.
    q_order, kv_order = ((lse.new_zeros(1, 1, 1, dtype=torch.int32) if o is None else o.int()) for o in orders)
    widest = 128 if q.element_size() == 2 else 64
    m = min(widest, max(16, triton.next_power_of_2(plan.q_block)))
    n = min(widest if q.element_size() == 2 else 32, max(16, triton.next_power_of_2(plan.kv_block)))
    q_tiles = -(-plan.q_block // m)
    counts, blocks = plan.counts.contiguous(), plan.blocks.contiguous()
    q_blocks = counts.shape[2]

    def step(x: Tensor) -> tuple[int, int]:
        """Strides over items and heads, 0 where the axis is shared."""
        return (x.stride(0) if len(x) > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)

    _forward[(q_blocks * q_tiles, batch * heads)](
        q, k, v, out, lse, q_order, kv_order, plan.q_offsets, plan.kv_offsets, counts, blocks,
        math.log2(math.e) / math.sqrt(dim), heads, q_blocks, blocks.shape[-1],
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), out.stride(0), out.stride(1), out.stride(2),
        lse.stride(0), lse.stride(1),
        *step(q_order), *step(kv_order), *step(plan.q_offsets), *step(plan.kv_offsets),
        D=dim, M=m, N=n, Q_TILES=q_tiles, KV_TILES=-(-plan.kv_block // n),
        Q_MOVED=orders[0] is not None, KV_MOVED=orders[1] is not None,
        UPCAST=INTERPRETED and q.dtype != torch.float32, PRECISION="ieee",
        num_warps=8 if m == 128 else 4, num_stages=2,
    )  # fmt: skip
    return out, lse
