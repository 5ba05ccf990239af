"""The Gluon executor: block-sparse attention for Hopper GPUs, reading and writing regions where they lie.

Three warp groups share a program: one starts copies, two hold 64 query rows each, as in FlashAttention-3 (Shah et al.,
2024, arXiv 2407.08608): a row group's softmax runs while its own and the other's products do. A block of 128 tokens is
a box of the token grid, and the tensor copy engine takes boxes from frame-major memory and puts them back there, so no
reordered copy of q, k, v or the output is made; places beyond the grid's edge are filled with zeros by the engine,
masked as keys and never written.

Floor at 33x48x80 tokens, 256 of text, 24 heads of 128, 90% sparsity: 20.5 TFLOP of kept work, 26 ms at 788 TFLOP/s (a
bf16 matrix product on an H200); q and the output once, 1.6 GB, .4 ms at 4.3 TB/s; k and v from L2, 64 KB a kept block,
160 GB, the rate of which is not known.
"""

from __future__ import annotations

import importlib.util
import math
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Box, Identity, Layout

BLOCK = 128
HEAD_DIMS = (64, 128)
STAGES = 3  # pairs of key and value tiles in flight: 64 KB each at head_dim 128, beside 32 KB for the queries


def unavailable(device: torch.device) -> str | None:
    """Why this executor cannot run on a device at all, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got device={device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs a Hopper GPU (compute capability 9.x), got {major}.{minor}"
    if not importlib.util.find_spec("triton"):
        return "it needs Triton: pip install 'draftbench[triton]'"
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 6):
        return f"it needs Triton 3.6 or newer, got {version('triton')}"
    return None


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if reason := unavailable(q.device):
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}"
    if plan.q_order != plan.kv_order or not isinstance(plan.q_order, Box | Identity):
        return "queries and keys must lie in the same boxes, or both as they come"
    if plan.q_block != BLOCK or plan.kv_block != BLOCK:
        return f"blocks must be of {BLOCK} tokens, got {plan.q_block} and {plan.kv_block}"
    box = _box(plan)
    if math.prod(box) != BLOCK or any(side & (side - 1) for side in box):
        return f"a block must be a box whose sides are powers of two, got {'x'.join(map(str, box))}"
    if plan.q_offsets.shape[1] > 1 or plan.q_offsets.shape != plan.kv_offsets.shape:
        return "blocks must be the same for all heads, for queries and for keys"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; the offsets must be those of boxes in grid order, text behind them."""
    from draftbench.kernels.gluon_forward import forward
    from draftbench.kernels.triton import schedule

    batch, length, heads, _ = q.shape
    box = _box(plan)
    grid = layout.grid if isinstance(plan.q_order, Box) else (1, 1, layout.video)
    boxes = math.prod(-(-n // b) for n, b in zip(grid, box, strict=True))
    if plan.counts.shape[2] != boxes + -(-layout.text // BLOCK):
        raise ValueError(f"executor=gluon needs {boxes} boxes and the text's blocks, got {plan.counts.shape[2]} blocks")
    q, k, v = (x if _side_by_side(x) else x.contiguous() for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=q.device)
    rows, counts, whole, blocks = schedule(plan, layout, batch)
    starts = plan.kv_offsets[:, 0].contiguous()
    forward(q, k, v, out, lse, rows, counts, whole, blocks, starts, grid, box, layout.text, STAGES)
    return out, lse


def _side_by_side(x: Tensor) -> bool:
    """Whether the copy engine can read x [B, S, H, D] where it lies: heads and channels together, 16-byte steps."""
    steps = [x.stride(0) if len(x) > 1 else 0, x.stride(1), x.storage_offset()]
    return x.stride(3) == 1 and x.stride(2) == x.shape[3] and not any(step % 8 for step in steps)


def _box(plan: Plan) -> tuple[int, int, int]:
    order: Any = plan.q_order
    return (order.t, order.h, order.w) if isinstance(order, Box) else (1, 1, BLOCK)
