"""The Gluon executor: block-sparse attention for Hopper GPUs in blocks of 128 tokens, reading regions where they lie.

Three warp groups share a program: one starts copies, two hold 64 query rows each, as in FlashAttention-3 (Shah et al.,
2024, arXiv 2407.08608), and start their products in strict turns: a row group's softmax runs while the other's products
do. A block of 128 tokens is a box of the token grid, and the tensor copy engine takes boxes from frame-major memory and
puts them back there, so contiguous q, k, v and the output need no reordered copy; places beyond the grid's edge are
filled with zeros by the engine, masked as keys and never written. Blocks that are no boxes (clusters, orders of their
own for each head) are gathered into one row first and may hold fewer tokens: a list names such a block by its first
token and its size, the engine takes the 128 tokens from there, and the output goes straight to where its tokens lie.

Floor at 33x48x80 tokens, 256 of text, 24 heads of 128, 90% sparsity: 20.5 TFLOP of kept work, 26 ms at 788 TFLOP/s (a
bf16 matrix product on an H200); q and the output once, 1.6 GB, .4 ms at 4.3 TB/s; k and v from L2, 64 KB a kept block,
160 GB, the rate of which is not known. What it reaches is in results/tables/attention_h200.md. Order takes .2 to .3 ms
there, so ordering tokens and RoPE once a forward, not in each layer, had no more than that to save and was not tried.

Tried, TFLOP/s of kept work at 90, 75 and 50% on that shape, one H100, each call right after a dense one by
FlashAttention-4 (675), on the blocks that draft keeps of pocket's q and k, and on as many random ones in every row:
turns 665, 690, 695 and 656, 697, 702; none 651, 682, 692 and 649, 673, 658; turns only in rows of 200 blocks or more
657, 692, 705 and 662, 680, 678. In other runs, on the first kind and without turns: a turn passed on when the scores
are there, not when both products are issued, within 2% or slower; every 8th, 4th or 2nd power by a polynomial beside
the special function unit, slower by 9, 21 and 24% at 90%; a running maximum instead of the first block's (see
`passes`), slower by 5% at 50%.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from draftbench.kernels.devices import needs_triton, not_for_tensor_cores, not_hopper, side_by_side
from draftbench.kernels.padded import even
from torch import Tensor

from ..attention import Plan
from ..layout import Box, Identity, Layout
from ..parts import part

BLOCK = 128
HEAD_DIMS = (64, 128)
LONGEST = 2**23  # tokens: the lists name a loose block by its first one and its size in 32 bits
STAGES = 3  # pairs of key and value tiles in flight: 64 KB each at head_dim 128, beside 32 KB for the queries


def unavailable(device: torch.device) -> str | None:
    """Why this executor cannot run on a device at all, or None."""
    return not_hopper(device) or needs_triton((3, 6))


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if reason := unavailable(q.device) or not_for_tensor_cores(q, HEAD_DIMS):
        return reason
    if plan.q_block != BLOCK or plan.kv_block != BLOCK:
        return f"blocks must be of {BLOCK} tokens, got {plan.q_block} and {plan.kv_block}"
    if q.shape[1] >= LONGEST and not _in_boxes(plan):
        return f"of blocks that are no boxes in turn it takes fewer than {LONGEST} tokens in all, got {q.shape[1]}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`."""
    return (_boxes if _in_boxes(plan) else _loose)(q, k, v, plan, layout)


def _boxes(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """Regions where they lie."""
    from draftbench.kernels.gluon_forward import forward
    from draftbench.kernels.triton import schedule

    batch, length, heads, _ = q.shape
    box = _box(plan)
    grid = plan.q_order.over(layout.grid) if isinstance(plan.q_order, Box) else (1, 1, layout.video)
    out, v_text = q.new_empty(q.shape), None
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=q.device)
    with part("order"):
        q, k, v = (x if side_by_side(x) and x.stride(2) == x.shape[3] else x.contiguous() for x in (q, k, v))
        starts = plan.kv_offsets[:, :1].contiguous()
        rows, counts, whole, blocks = schedule(plan, layout, batch)
        if layout.text and not even(plan, layout, batch):  # what pads it may be NaN, and 0 times NaN is NaN
            v_text = v[:, layout.video :].masked_fill(_padding(plan, layout), 0)
    forward(q, k, v, v_text, out, lse, rows, counts, whole, blocks, starts, grid, box, layout.text, STAGES)
    return out, lse


def _loose(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """Any blocks of at most 128 tokens, brought side by side first; the kernel puts the output back.

    Behind a smaller block its neighbour's tokens are read and have weight 0, so values must be finite.
    """
    from draftbench.kernels.gluon_forward import forward
    from draftbench.kernels.triton import in_order, schedule

    batch, length, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # padding of text lies in no block
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=q.device)
    with part("order"):
        q, k, v, q_order, kv_order = in_order(q, k, v, plan, layout)
        q, k, v = (x if x.stride(2) == x.shape[3] else x.contiguous() for x in (q, k, v))
        if layout.text and not even(plan, layout, batch):
            v = v.clone() if kv_order is None else v  # a gathered one is ours
            v[:, layout.video :].masked_fill_(_padding(plan, layout), 0)
        rows, counts, whole, blocks = schedule(plan, layout, batch, "start and size")
    starts = plan.q_offsets.contiguous()
    line, box = (1, 1, length), (1, 1, BLOCK)
    forward(q, k, v, None, out, lse, rows, counts, whole, blocks, starts, line, box, 0, STAGES, True, q_order)
    return out, lse


def _in_boxes(plan: Plan) -> bool:
    """Whether a plan's blocks are boxes that the engine can take from memory as it is, the same of queries and keys."""
    if not plan.regular or plan.q_order != plan.kv_order or not isinstance(plan.q_order, Box | Identity):
        return False
    box = _box(plan)
    return math.prod(box) == BLOCK and not any(side & (side - 1) for side in box)


def _box(plan: Plan) -> tuple[int, int, int]:
    order: Any = plan.q_order
    return (order.t, order.h, order.w) if isinstance(order, Box) else (1, 1, BLOCK)


def _padding(plan: Plan, layout: Layout) -> Tensor:
    """Which places of text [B, text, 1, 1] hold none."""
    end = plan.kv_offsets[:, 0, -1:]
    return (torch.arange(layout.video, layout.length, device=end.device) >= end)[..., None, None]
