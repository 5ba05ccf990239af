"""Every executor as a PyTorch operator, `torch.ops.draftbench.<name>`: a plan flattened to tensors and integers.

torch.compile, export and FakeTensor see one node whose output is known; they never look inside an executor.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from draftbench.kernels.devices import on_device_of
from torch import Tensor

from ..attention import Plan
from ..layout import Box, Identity, Index, Layout, Order

NAMES = ("reference", "cpu", "triton", "gluon", "flex", "fa4")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, Tensor counts, Tensor blocks,"
    " Tensor? q_index, Tensor? kv_index, int[] q_box, int[] kv_box, int q_block, int kv_block, bool regular,"
    " int[] grid, int text) -> (Tensor, Tensor)"
)


def flatten(plan: Plan, layout: Layout) -> tuple[Any, ...]:
    """An operator's arguments behind q, k, v; an order is a box's fields, an index, or neither (as tokens come)."""
    orders = (plan.q_order, plan.kv_order)
    index = [order.tokens if isinstance(order, Index) else None for order in orders]
    box = [[order.t, order.h, order.w, order.stacked] if isinstance(order, Box) else [] for order in orders]
    lists = (plan.q_offsets, plan.kv_offsets, plan.counts, plan.blocks)
    return *lists, *index, *box, plan.q_block, plan.kv_block, plan.regular, list(layout.grid), layout.text


def unflatten(
    q_offsets: Tensor, kv_offsets: Tensor, counts: Tensor, blocks: Tensor, q_index: Tensor | None,
    kv_index: Tensor | None, q_box: list[int], kv_box: list[int], q_block: int, kv_block: int, regular: bool,
    grid: list[int], text: int,
) -> tuple[Plan, Layout]:  # fmt: skip
    """The plan and layout that `flatten` took apart."""
    orders = (_order(q_index, q_box), _order(kv_index, kv_box))
    plan = Plan(q_offsets, kv_offsets, counts, blocks, q_block, kv_block, *orders, regular=regular)
    return plan, Layout((grid[0], grid[1], grid[2]), text)


def _order(index: Tensor | None, box: list[int]) -> Order:
    if index is not None:
        return Index(index)
    return Box(*box[:3], stacked=bool(box[3])) if box else Identity()


def call(name: str, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Run an executor; ValueError if it refuses, with its reason, or if the tensors do not go together."""
    plan, layout = unflatten(*arguments)
    module = importlib.import_module(f".{name}", __package__)
    reason = mismatch(q, k, v, plan, layout) or module.refuse(q, plan)
    if reason:
        raise ValueError(f"executor={name} cannot run this plan: {reason}")
    with on_device_of(q):
        out, lse = module.run(q, k, v, plan, layout)
    return out.contiguous(), lse.contiguous()


def mismatch(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> str | None:
    """What does not go together, or None; a kernel would read beyond the end of the smaller tensor."""
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        return f"q, k and v must have one shape [B, S, H, D], got {', '.join(str(list(x.shape)) for x in (q, k, v))}"
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        return f"q, k and v must have one dtype on one device, got {kinds}"
    if q.shape[1] != layout.length:
        return f"q must have the layout's {layout.length} tokens, got {q.shape[1]}"
    if plan.counts.shape[:2] != (q.shape[0], q.shape[2]) or plan.blocks.shape[:-1] != plan.counts.shape:
        return (
            f"lists must be for {q.shape[0]} items and {q.shape[2]} heads, got counts {list(plan.counts.shape)} and "
            f"blocks {list(plan.blocks.shape)}"
        )
    return None


def fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What `call` returns, without its values: output like q and LSE [B, H, S], both contiguous."""
    batch, length, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=dtype)


def _register(name: str) -> None:
    def body(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return call(name, q, k, v, *arguments)

    torch.library.custom_op(f"draftbench::{name}", body, mutates_args=(), schema=SCHEMA).register_fake(fake)


for _name in NAMES:
    _register(_name)
