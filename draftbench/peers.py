"""The contestants of the attention benchmark: our operation and kernels, and the kernels of others, one function each.

A contestant's `make(case)` prepares what its users would keep between calls (for a bare kernel also the order of q, k
and v and the form of its lists), off the clock, and returns a `Ready`; it raises `Absent` with the reason if it cannot
run here or on this case. Packages are imported when they are asked for, so none of them is needed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import kernels
from .attention import Executor, Plan
from .cases import MASKS, Case, no_executor
from .kernels.dense import everything
from .kernels.flex import compiled as _compiled_flex
from .kernels.select import box_plan, plan_from_mask
from .layout import Box, Identity, Layout, box_sizes, permutation
from .methods.sta import window_density, window_mask
from .parts import part


class Absent(RuntimeError):
    """A contestant cannot run; the message is the reason."""


@dataclass
class Ready:
    """What is timed, the plan that it carries out (known once it has run), and the way from what it returns to the
    output [1, S, H, D] and, where it has one, the LSE [1, H, S], off the clock; select: the selection of its blocks
    alone, timed too, of a contestant that can tell it from the rest."""

    run: Callable[[], Any]
    plan: Callable[[], Plan]
    output: Callable[[Any], Tensor] = lambda result: result
    lse: Callable[[Any], Tensor] | None = None
    select: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Contestant:
    """kind: "dense" (keeps everything), "whole" (selects its blocks itself), "kernel" (is given the kept blocks) or
    "window" (keeps blocks of its own choice, whatever the case); device: where it belongs, None is anywhere."""

    name: str
    kind: Literal["dense", "whole", "kernel", "window"]
    make: Callable[[Case], Ready]
    about: str
    device: str | None = "cuda"

    def takes(self, case: Case) -> bool:
        """Whether a case of this mask is for it."""
        return case.mask in {"dense": ["dense"], "kernel": MASKS}.get(self.kind, ["captured"])


def contestants() -> dict[str, Contestant]:
    """All, by name: ours on every executor of draftbench.kernels (but `reference`, which is no one's to time), then the
    peers."""
    ours = []
    for name in [name for name in kernels.NAMES if name != "reference"]:
        device = "cpu" if name == "cpu" else "cuda"
        ours += [
            Contestant(f"draft_{name}", "whole", functools.partial(_draft, name), "draft, all of it", device),
            Contestant(f"kernel_{name}", "kernel", functools.partial(_kernel, name), "our executor alone", device),
        ]
    return {contestant.name: contestant for contestant in (*ours, *PEERS)}


def need(module: str, package: str) -> Any:
    """A module; raises Absent if its package is not installed, and what it raises if it is there and broken."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise Absent(f"package {package} is not installed") from error


def _executor(name: str, case: Case) -> Executor:
    """An executor; Absent, now or when it is called, with its own reason if it can't run here or can't take a plan."""
    try:
        execute = kernels.run(kernels.resolve(name, case.q.device))
    except ModuleNotFoundError as error:
        raise Absent(f"package {error.name} is not installed") from error
    except (ImportError, RuntimeError) as error:
        raise Absent(str(error)) from error

    def call(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
        try:
            return execute(q, k, v, plan, layout)
        except ValueError as error:
            if "cannot run this plan" in str(error):
                raise Absent(str(error)) from error
            raise

    return call


def _draft(executor: str, case: Case) -> Ready:
    execute, seen, method = _executor(executor, case), [case.plan], case.draft

    def spy(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
        seen[0] = plan
        return execute(q, k, v, plan, layout)

    def select() -> Plan:
        return method.plan(case.q, case.k, case.v, case.call(no_executor))

    return Ready(lambda: method.attend(case.q, case.k, case.v, case.call(spy)), lambda: seen[0], select=select)


def _kernel(executor: str, case: Case) -> Ready:
    execute = _executor(executor, case)
    run = functools.partial(execute, case.q, case.k, case.v, case.plan, case.shape.layout)
    return Ready(run, lambda: case.plan, lambda result: result[0], lambda result: result[1])


def _paper(case: Case) -> Ready:
    """Draft as the paper's code runs it, on the default executor: one gather a tensor into region order, mean pooling
    (here by a reshape) and the map in the model's dtype, `topk` head by head, lists by a sort, and a gather back.

    The threshold is the highest dropped score, and what ties with it is kept, as there. Its index lists, which that
    code builds anew at every call, are kept.
    """
    grid, box = case.shape.grid, case.shape.box
    if box.stacked or grid[1] % box.h or grid[2] % box.w:
        raise Absent(f"the paper's code takes whole regions of {box.h}x{box.w} only, got the grid {grid}")
    execute, seen = _executor("auto", case), [case.plan]
    order = _order(case.plan, case)
    back, video = order.argsort(), case.shape.layout.video
    sizes = box_sizes(box, grid, case.q.device)

    def pool(x: Tensor) -> Tensor:
        return x[0, :video].unflatten(0, (len(sizes), -1)).mean(1).transpose(0, 1)

    def run() -> Tensor:
        call = case.call(execute)
        with part("order"):
            q, k, v = (x.index_select(1, order) for x in (case.q, case.k, case.v))
        with part("pool"):
            low_q, low_k = pool(q), pool(k)
        with part("score"):
            scores = (low_q @ low_k.transpose(1, 2) / case.shape.dim**0.5).softmax(-1)
        with part("select"):
            drop = int(case.sparsity * scores[0].numel())
            cuts = [head.flatten().topk(drop, largest=False).values.max() if drop else 0 for head in scores]
            kept = [head >= cut for head, cut in zip(scores, cuts, strict=True)]
            mask = torch.stack(kept)[None]
        with part("estimate"):
            seen[0] = plan_from_mask(mask, Identity(), sizes, box.h * box.w, call, regular=True)
        out = call.execute(seen[0], q, k, v)
        with part("restore"):
            return out.index_select(1, back)

    def plan() -> Plan:
        """As it was executed, but told in the order of the case's tokens."""
        return replace(seen[0], q_order=case.plan.q_order, kv_order=case.plan.kv_order)

    return Ready(run, plan)


def _sdpa(backend: SDPBackend | None, case: Case) -> Ready:
    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))

    def run() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return Ready(run, lambda: case.plan, lambda out: out.transpose(1, 2))


def _fa3(case: Case) -> Ready:
    attend = need("flash_attn_interface", "flash_attn_3").flash_attn_func
    run = functools.partial(attend, case.q, case.k, case.v)
    return Ready(run, lambda: case.plan, lambda result: result[0] if isinstance(result, tuple) else result)


def _fa4(case: Case) -> Ready:
    attend = need("flash_attn.cute.interface", "flash-attn-4")._flash_attn_fwd
    run = functools.partial(attend, case.q, case.k, case.v)
    return Ready(run, lambda: case.plan, lambda result: result[0])


def _gluon(case: Case) -> Ready:
    execute = _executor("gluon", case)
    return Ready(
        lambda: execute(case.q, case.k, case.v, *everything(case.q)), lambda: case.plan,
        lambda result: result[0], lambda result: result[1],
    )  # fmt: skip


def _fa4_sparse(case: Case) -> Ready:
    attend = need("flash_attn.cute.interface", "flash-attn-4")._flash_attn_fwd
    sparsity = need("flash_attn.cute.block_sparsity", "flash-attn-4")
    q, k, v = _whole_blocks(case, 128)
    counts, blocks = _lists(case.plan)
    lists = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(blocks[..., :1]),
        full_block_cnt=counts, full_block_idx=blocks, block_size=(128, 128),
    )  # fmt: skip
    run = functools.partial(attend, q, k, v, block_sparse_tensors=lists)
    return Ready(run, lambda: case.plan, lambda result: _restored(result[0], case))


def _flex(case: Case) -> Ready:
    flex = need("torch.nn.attention.flex_attention", "torch")
    q, k, v = (x.transpose(1, 2).contiguous() for x in _whole_blocks(case, 128))
    counts, blocks = _lists(case.plan)
    none = torch.zeros_like(counts), torch.zeros_like(blocks)
    mask = flex.BlockMask.from_kv_blocks(*none, counts, blocks, BLOCK_SIZE=128)
    run = functools.partial(_compiled_flex(), q, k, v, block_mask=mask)
    return Ready(run, lambda: case.plan, lambda out: _restored(out.transpose(1, 2), case))


def _fastvideo(case: Case) -> Ready:
    attend = need("fastvideo_kernel", "fastvideo-kernel").block_sparse_attn_from_indices
    q, k, v = (x.transpose(1, 2).contiguous() for x in _whole_blocks(case, 128))
    # Each of our blocks is two of 64 tokens, side by side: kept block b of row i becomes 2b and 2b + 1 of two rows.
    counts, blocks = _lists(case.plan)
    blocks = torch.stack([2 * blocks, 2 * blocks + 1], -1).flatten(-2)
    blocks = blocks.repeat_interleave(2, 2).contiguous()
    counts = (2 * counts).repeat_interleave(2, 2).contiguous()
    sizes = torch.full((q.shape[2] // 64,), 64, dtype=torch.int32, device=q.device)
    run = functools.partial(attend, q, k, v, blocks, counts, sizes)
    return Ready(run, lambda: case.plan, lambda result: _restored(result[0].transpose(1, 2), case))


def _mit(case: Case) -> Ready:
    attend = need("block_sparse_attn", "block_sparse_attn (mit-han-lab/Block-Sparse-Attention)").block_sparse_attn_func
    q, k, v = (x[0].contiguous() for x in _whole_blocks(case, 128))
    live, width = case.plan.live, case.plan.kv_offsets.shape[-1] - 1
    mask = torch.zeros(*live.shape[:-1], width + 1, dtype=torch.bool, device=q.device)
    # What lies behind the counts goes to one column more, which is dropped.
    mask.scatter_(-1, torch.where(live, case.plan.blocks, width).long(), True)
    mask = mask[..., :-1].contiguous()
    ends = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    heads = torch.ones(case.shape.heads, dtype=torch.int32, device=q.device)
    run = functools.partial(attend, q, k, v, ends, ends, heads, None, mask, len(q), len(q), 0.0)
    return Ready(run, lambda: case.plan, lambda out: _restored(out[None], case))


def _fastvideo_sta(case: Case) -> Ready:
    """The window nearest to the sparsity among those of odd sizes, which the kernel centres as the paper says."""
    grid, text = case.shape.grid, case.shape.text
    if grid != (30, 48, 80) or not text:
        raise Absent(f"its kernel takes the grid (30, 48, 80) with text, got {grid}")
    attend = need("fastvideo_kernel", "fastvideo-kernel").sliding_tile_attention
    box = Box(6, 8, 8)
    t, h, w = (range(1, n + 1, 2) for n in box.counts(grid))
    windows = itertools.product(t, h, w)
    window = min(windows, key=lambda size: abs(window_density(box, grid, size) - (1 - case.sparsity)))
    mask = window_mask(box, grid, window, case.q.device).expand(1, case.shape.heads, -1, -1)
    plan = box_plan(mask, box, case.call(no_executor))
    order = permutation(box, case.shape.layout, case.q.device)
    assert order is not None
    q, k, v = (x.index_select(1, order[0, 0]).transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))
    run = functools.partial(attend, q, k, v, [list(window)] * case.shape.heads, text, True, "30x48x80")
    return Ready(run, lambda: plan, lambda out: _back(out.transpose(1, 2), order[0, 0]))


def _lists(plan: Plan) -> tuple[Tensor, Tensor]:
    """A plan's counts and blocks, with zeros behind the counts: what lies there may be any number, and a kernel of
    others might read it."""
    return plan.counts, torch.where(plan.live, plan.blocks, 0)


def _order(plan: Plan, case: Case) -> Tensor:
    """Token of each place in the order of a plan that all heads share."""
    order = permutation(plan.q_order, case.shape.layout, case.q.device)
    assert order is not None
    return order[0, 0]


def _whole_blocks(case: Case, block: int) -> tuple[Tensor, ...]:
    """q, k, v [1, S, H, D] in the plan's order; raises Absent unless every block is one of `block` tokens."""
    if bool((case.plan.q_offsets.diff(dim=-1) != block).any()):
        raise Absent(f"it takes blocks of {block} tokens each, and at the edges of this shape they are smaller")
    order = _order(case.plan, case)
    return tuple(x.index_select(1, order) for x in (case.q, case.k, case.v))


def _restored(out: Tensor, case: Case) -> Tensor:
    return _back(out, _order(case.plan, case))


def _back(out: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(out).index_copy_(1, order, out)


# 0.3.5 has compiled kernels too, which do not load beside torch 2.11.
TRITON = "fastvideo-kernel; its Triton one if the compiled ones do not load"
PEERS = (
    Contestant("sdpa", "dense", functools.partial(_sdpa, None), "torch's SDPA as it is called", "cpu"),
    Contestant("cudnn", "dense", functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION), "cuDNN through SDPA"),
    Contestant("fa2", "dense", functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION), "FlashAttention-2 through SDPA"),
    Contestant("fa3", "dense", _fa3, "FlashAttention-3 (flash_attn_interface)"),
    Contestant("fa4", "dense", _fa4, "FlashAttention-4 (flash-attn-4)"),
    Contestant("gluon", "dense", _gluon, "our executor on a list of all blocks"),
    Contestant("draft_paper", "whole", _paper, "draft, selected and reordered as the paper's code does", None),
    Contestant("fa4_sparse", "kernel", _fa4_sparse, "FlashAttention-4, block-sparse"),
    Contestant("flexattention", "kernel", _flex, "FlexAttention with a block mask"),
    Contestant("fastvideo", "kernel", _fastvideo, f"FastVideo's block-sparse kernel ({TRITON})"),
    Contestant("fastvideo_sta", "window", _fastvideo_sta, f"FastVideo's sliding tile kernel ({TRITON})"),
    Contestant("mit", "kernel", _mit, "MIT's Block-Sparse-Attention"),
)
PACKAGES = ("flash-attn-4", "flash_attn_3", "fastvideo-kernel", "nvidia-cutlass-dsl", "block_sparse_attn")
