"""Every executor as a PyTorch operator, `torch.ops.draftbench.<name>`: a plan flattened to tensors and integers.

torch.compile, export and FakeTensor see one node whose output is known; they never look inside an executor.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Box, Identity, Index, Layout, Order

NAMES = ("reference", "cpu", "triton", "gluon", "flex", "fa4")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, Tensor counts, Tensor blocks,"
    " Tensor? q_index, Tensor? kv_index, int[] q_box, int[] kv_box, int q_block, int kv_block, int[] grid, int text)"
    " -> (Tensor, Tensor)"
)


def flatten(plan: Plan, layout: Layout) -> tuple[Any, ...]:
    """An operator's arguments behind q, k, v; an order is a box's sizes, an index, or neither (as tokens come)."""
    orders = (plan.q_order, plan.kv_order)
    index = [order.tokens if isinstance(order, Index) else None for order in orders]
    box = [[order.t, order.h, order.w] if isinstance(order, Box) else [] for order in orders]
    lists = (plan.q_offsets, plan.kv_offsets, plan.counts, plan.blocks)
    return *lists, *index, *box, plan.q_block, plan.kv_block, list(layout.grid), layout.text


def unflatten(
    q_offsets: Tensor, kv_offsets: Tensor, counts: Tensor, blocks: Tensor, q_index: Tensor | None,
    kv_index: Tensor | None, q_box: list[int], kv_box: list[int], q_block: int, kv_block: int, grid: list[int],
    text: int,
) -> tuple[Plan, Layout]:  # fmt: skip
    """The plan and layout that `flatten` took apart."""
    orders = (_order(q_index, q_box), _order(kv_index, kv_box))
    plan = Plan(q_offsets, kv_offsets, counts, blocks, q_block, kv_block, *orders)
    return plan, Layout((grid[0], grid[1], grid[2]), text)


def _order(index: Tensor | None, box: list[int]) -> Order:
    if index is not None:
        return Index(index)
    return Box(*box) if box else Identity()


def call(name: str, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Run an executor; ValueError with its reason if it refuses."""
    plan, layout = unflatten(*arguments)
    module = importlib.import_module(f".{name}", __package__)
    reason = module.refuse(q, plan)
    if reason:
        raise ValueError(f"executor={name} cannot run this plan: {reason}")
    out, lse = module.run(q, k, v, plan, layout)
    return out.contiguous(), lse.contiguous()


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
