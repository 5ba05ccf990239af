"""The FlashAttention-4 executor: the block-sparse forward of `flash-attn-4` (CuTe DSL) on Hopper GPUs.

Source: github.com/Dao-AILab/flash-attention, flash_attn/cute/interface.py and block_sparse_utils.py, 4.0.0b36. The
kernel reads whole tiles of 128 keys. Blocks of a ragged plan are filled up to whole tiles; a tile with padding goes to
the kernel's masked list, where a mask_mod sets the scores of padded keys to -inf before the softmax, so the result is
exact. Tiles without a real key go to no list. Only masked tiles pay for the mask, and an even plan builds none.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from draftbench.kernels.devices import not_for_tensor_cores, not_hopper
from draftbench.kernels.padded import Ordered, pieces, real_keys, split
from torch import Tensor

from ..attention import Plan
from ..layout import Layout
from ..parts import part

TILE = 128
HEAD_DIMS = (64, 128)


@functools.cache
def installed() -> bool:
    """Whether `flash_attn.cute` is there; it is not imported, since that takes seconds."""
    spec = importlib.util.find_spec("flash_attn")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders or ())


def unavailable(device: torch.device) -> str | None:
    """Why this executor cannot run on a device at all, or None."""
    if reason := not_hopper(device):  # on Blackwell the kernel joins two query tiles, so blocks of 128 do not fit
        return reason
    return None if installed() else "it needs flash-attn-4: pip install 'draftbench[hopper]'"


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    if reason := unavailable(q.device) or not_for_tensor_cores(q, HEAD_DIMS):
        return reason
    if plan.q_block % TILE or plan.kv_block % TILE:
        return f"block sizes must be multiples of {TILE} tokens, got {plan.q_block} and {plan.kv_block}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; the first call with a new dtype, head_dim or kind of plan compiles for seconds."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    with part("order"):
        ordered = Ordered(plan, layout, len(q), q.device)
        filled = ordered.q(q), ordered.kv(k), ordered.kv(v)
        counts, blocks = pieces(plan, plan.kv_block // TILE)
        mask: dict[str, Any] = {}
        if ordered.even:
            lists = (torch.zeros_like(counts), counts.new_zeros(*counts.shape, 1), counts, blocks)
        else:
            held = real_keys(plan, q.shape[2], TILE)
            lists = split(counts, blocks, held, TILE)
            mask = {"mask_mod": _mask(), "aux_tensors": [held]}
        sparse = BlockSparseTensorsTorch(*(x.contiguous() for x in lists), block_size=(plan.q_block, TILE))
    out, lse = _flash_attn_fwd(*filled, block_sparse_tensors=sparse, return_lse=True, **mask)[:2]
    with part("restore"):
        return ordered.restore(out, lse)


@functools.cache
def _mask() -> Callable[..., Any]:
    """Keeps the real keys of a tile; the kernel passes the keys that each tile holds, int32 [B, H, tiles]."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    tile = TILE

    @cute.jit
    def keep_real(
        batch: cute.TensorSSA,
        head: cute.TensorSSA,
        m_idx: cute.TensorSSA,
        n_idx: cute.TensorSSA,
        seqlen_info: Any,
        aux_tensors: Any,
    ) -> cute.TensorSSA:
        size = utils.scalar_to_ssa(tile, cutlass.Int32)
        where = n_idx // size
        held = utils.scalar_to_ssa(aux_tensors[0][batch[0], head[0], where[0]], cutlass.Int32)
        return n_idx % size < held

    return keep_real  # type: ignore[no-any-return]
