"""The FlexAttention executor: torch.nn.attention.flex_attention, compiled, from the plan's kept-block lists.

Dong et al., 2024, arXiv 2412.05496. Blocks are filled up to one size; those with padding are FlexAttention's partial
blocks, whose padded keys a mask_mod drops; the others are its full blocks, which no mask touches.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from draftbench.kernels.padded import Ordered, real_keys, split
from torch import Tensor

from ..attention import Plan
from ..layout import Layout
from ..parts import part

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1" and q.device.type == "cuda":
        return "it is compiled, which TRITON_INTERPRET=1 rules out"
    if q.dtype not in DTYPES:
        return f"dtype must be bfloat16, float16 or float32, got {q.dtype}"
    if q.device.type == "cuda" and q.shape[-1] not in (16, 32, 64, 128, 256):
        return f"head_dim must be 16, 32, 64, 128 or 256 on a GPU, got {q.shape[-1]}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; the first call of a shape compiles for 10 to 30 s.

    FlexAttention has no LSE on a CPU: it comes out as NaN there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    plan = dataclasses.replace(plan, q_block=_multiple(plan.q_block), kv_block=_multiple(plan.kv_block))
    with part("order"):
        ordered = Ordered(plan, layout, len(q), q.device)
        filled = [x.transpose(1, 2) for x in (ordered.q(q), ordered.kv(k), ordered.kv(v))]
        held = real_keys(plan, q.shape[2], plan.kv_block)
        if ordered.even:
            # Both lists contiguous, in memory of their own: inductor mixes up shared ones, and one that it lays out
            # itself may have other strides than the kernel reads the second list by.
            blocks = plan.blocks.contiguous()
            lists = (torch.zeros_like(plan.counts), torch.zeros_like(blocks), plan.counts, blocks)
        else:
            lists = split(plan.counts, plan.blocks, held, plan.kv_block)
        width = held.shape[-1]  # FlexAttention takes lists as wide as there are key blocks
        counts, blocks, full_counts, full_blocks = (
            F.pad(x, (0, width - x.shape[-1])) if x.ndim == 4 and x.shape[-1] < width else x for x in lists
        )
    mask = BlockMask.from_kv_blocks(
        counts, blocks, full_counts, full_blocks, (plan.q_block, plan.kv_block), _keep_real(held, plan.kv_block),
        (filled[0].shape[2], filled[1].shape[2]), compute_q_blocks=False,
    )  # fmt: skip
    if q.device.type == "cpu":
        out = _attend(*filled, block_mask=mask)
        lse = torch.full(out.shape[:3], torch.nan, dtype=torch.float32)
    else:
        options = {"FORCE_USE_FLEX_ATTENTION": True, **_tiles(plan)}
        out, lse = _attend(*filled, block_mask=mask, return_lse=True, kernel_options=options)
    with part("restore"):
        return ordered.restore(out.transpose(1, 2), lse)


def _multiple(block: int) -> int:
    """The size that blocks are filled up to: tl.dot takes tiles of at least 16."""
    return -(-block // 16) * 16


def _tiles(plan: Plan) -> dict[str, int]:
    """Tiles that divide the blocks, where FlexAttention's own, of up to 128, would not."""
    if plan.q_block % 128 == 0 and plan.kv_block % 128 == 0:
        return {}
    return {"BLOCK_M": min(128, plan.q_block & -plan.q_block), "BLOCK_N": min(64, plan.kv_block & -plan.kv_block)}


def _keep_real(held: Tensor, block: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Keeps the real keys of a block; held: how many there are, int32 [B, H, blocks]."""

    def keep(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv % block < held[b, h, kv // block]

    return keep


def _attend(*args: Any, **kwargs: Any) -> Any:
    """Compiled flex_attention; uncompiled it would hold S x S scores, which is what torch does past the limit."""
    with torch._dynamo.config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True):
        return compiled()(*args, **kwargs)


@functools.cache
def compiled() -> Callable[..., Any]:
    """torch's flex_attention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
