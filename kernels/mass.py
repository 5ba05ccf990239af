"""True attention mass between boxes: the map that estimates are judged by, in plain torch and as Triton kernels.

softmax(q k^T / sqrt(D)) over all real keys, video and text, summed over the token pairs of each two boxes.

The kernels meet each score once. The first runs flash attention without V and writes, for each query token, the log of
its sum of exponentials over each key box, and over all keys; the second sums exp(the one - the other) over the rows of
each query box. At 24,576 tokens and D = 64 the first is 2 S^2 D = 0.08 TFLOP a head, .15 ms at 500 TFLOP/s (two passes
over the scores, one for the LSE and one for the masses, would be .31 ms), and S^2 = 0.6 G exponentials, .16 ms at 16 a
clock, SM and 1.75 GHz on 132 SMs; the second reads S x boxes floats, 19 MB a head with boxes of 128 tokens, 6 us at
3 TB/s. These are sums, not measurements.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
from draftbench.kernels.devices import on_device_of
from torch import Tensor

from ..attention import Call
from ..layout import Box, Layout, box_order, box_sizes, offsets, permutation

WORKSPACE = 2**30  # bytes for the sums of each query token over each key box; heads that do not fit wait their turn


def attention_mass(q: Tensor, k: Tensor, box: Box, call: Call) -> Tensor:
    """Attention mass between boxes, q and k [B, S, H, D] -> [B, H, boxes, boxes] float32; chosen by device alone.

    A row sums to its box's number of tokens less what they give to text. `run` on a GPU, else `reference`.
    """
    with on_device_of(q):
        return (run if q.device.type == "cuda" else reference)(q, k, box, call.layout, call.text_lengths)


def reference(q: Tensor, k: Tensor, box: Box, layout: Layout, text_lengths: Tensor, rows: int = 1024) -> Tensor:
    """See `attention_mass`; forms every score, `rows` query rows at a time, in float32 (float64 if q is)."""
    batch, _, heads, dim = q.shape
    device, dtype = q.device, torch.promote_types(q.dtype, torch.float32)
    order = box_order(box, layout.grid, device)
    sizes = box_sizes(box, layout.grid, device).long()
    member = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    onehot = torch.nn.functional.one_hot(member, len(sizes)).to(dtype)
    mass = torch.zeros(batch, heads, len(sizes), len(sizes), dtype=dtype, device=device)
    for b in range(batch):
        real = torch.arange(q.shape[1], device=device) < layout.video + text_lengths[b]
        for h in range(heads):
            queries = q[b, order, h].to(dtype)
            keys = torch.cat([k[b, order, h], k[b, layout.video :, h]]).to(dtype)
            for start in range(0, layout.video, rows):
                part = slice(start, start + rows)
                scores = queries[part] @ keys.T / dim**0.5
                weights = scores.masked_fill(~real, -torch.inf).softmax(-1)[:, : layout.video]
                mass[b, h].index_add_(0, member[part], weights @ onehot)
    return mass.float()


def run(q: Tensor, k: Tensor, box: Box, layout: Layout, text_lengths: Tensor) -> Tensor:
    """See `attention_mass`; Triton, for bfloat16, float16 and float32. Bit-identical from run to run.

    Beside q and k in box order it takes S x boxes floats a head, for as many heads as fit `WORKSPACE` or for one.
    """
    batch, _, heads, dim = q.shape
    if dim not in (16, 32, 64, 128):
        raise ValueError(f"head_dim must be 16, 32, 64 or 128, got {dim}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k.dtype != q.dtype:
        raise ValueError(f"dtypes must be the same: bfloat16, float16 or float32, got {q.dtype} and {k.dtype}")
    score, reduce = _kernels()
    device, video, block = q.device, layout.video, box.t * box.h * box.w
    q = q.index_select(1, box_order(box, layout.grid, device)).contiguous()
    k = k.index_select(1, permutation(box, layout, device)[0, 0]).contiguous()  # type: ignore[index]
    sizes = box_sizes(box, layout.grid, device)
    starts = offsets(sizes, layout, text_lengths, block).contiguous()
    boxes, blocks = len(sizes), starts.shape[-1] - 1
    half = q.element_size() == 2
    m, n = (128 if half else 64), min(128 if half else 32, _tile(block))
    at_once = min(batch * heads, max(1, WORKSPACE // (4 * video * (blocks + 1))))
    parts = torch.empty(at_once, blocks, video, dtype=torch.float32, device=device)
    lse = torch.empty(at_once, video, dtype=torch.float32, device=device)
    mass = torch.empty(batch, heads, boxes, boxes, dtype=torch.float32, device=device)
    for first in range(0, batch * heads, at_once):
        count = min(at_once, batch * heads - first)
        score[(-(-video // m), count)](
            q, k, parts, lse, starts, math.log2(math.e) / math.sqrt(dim), first, heads, video, blocks,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            D=dim, M=m, N=n, TILES=-(-block // n),
            UPCAST=os.environ.get("TRITON_INTERPRET") == "1" and half, PRECISION="ieee",
            num_warps=8, num_stages=3, maxnreg=128,  # two programs an SM: one's exponentials hide the other's products
        )  # fmt: skip
        reduce[(boxes, -(-boxes // 32), count)](
            parts, lse, starts, mass, first, video, boxes, blocks, M=min(128, _tile(block)), N=32, num_warps=4
        )
    return mass


def _tile(block: int) -> int:
    """The tile that holds `block` tokens: a power of two, at least 16 (what tl.dot takes)."""
    return max(16, 1 << (block - 1).bit_length())


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The two kernels, made at first use: Triton is optional, and reads TRITON_INTERPRET when it is imported."""
    global tl  # where both the compiler and the interpreter look for it
    import triton
    import triton.language as tl

    @triton.jit
    def score(
        Q, K, PARTS, LSE, STARTS, scale, first, heads, video, blocks, q_b, q_s, q_h, k_b, k_s, k_h,
        D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Log2 of each query token's sum of exponentials over each key block [heads, blocks, video] and all.

        STARTS [B, blocks + 1]: where the key boxes begin, then the text blocks. A box is TILES tiles of N keys.
        """
        slot = tl.program_id(1).to(tl.int64)
        b, h = (first + slot) // heads, (first + slot) % heads
        rows = tl.program_id(0) * M + tl.arange(0, M)
        real = rows < video
        d = tl.arange(0, D)
        q = Q + b * q_b + h * q_h + rows.to(tl.int64)[:, None] * q_s + d[None, :]
        q = tl.load(q, mask=real[:, None], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        keys = K + b * k_b + h * k_h + d[None, :]
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)  # of exp2(score - top), over all keys so far
        inside = tl.zeros([M], tl.float32)  # the same, over this box's keys so far
        for i in range(0, blocks * TILES):
            block = i // TILES
            start = STARTS + b * (blocks + 1) + block
            cols = tl.load(start) + (i % TILES) * N + tl.arange(0, N)
            live = cols < tl.load(start + 1)
            k = tl.load(keys + cols.to(tl.int64)[:, None] * k_s, mask=live[:, None], other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.where(live[None, :], s, -float("inf"))
            new = tl.maximum(top, tl.max(s, 1) * scale)  # finite: the first box has a token
            here = tl.sum(tl.math.exp2(s * scale - new[:, None]), 1)
            decay = tl.math.exp2(top - new)
            total = total * decay + here
            inside = tl.where(i % TILES == 0, 0.0, inside * decay) + here
            top = new
            # A box's last tile writes last.
            tl.store(PARTS + (slot * blocks + block) * video + rows, top + tl.math.log2(inside), mask=real)
        tl.store(LSE + slot * video + rows, top + tl.math.log2(total), mask=real)

    @triton.jit
    def reduce(PARTS, LSE, STARTS, MASS, first, video, boxes, blocks, M: tl.constexpr, N: tl.constexpr):
        """Sum exp2(part - lse) over the rows of a query box, for N key boxes; STARTS begins with one item's boxes."""
        row, slot = tl.program_id(0), tl.program_id(2).to(tl.int64)
        cols = tl.program_id(1) * N + tl.arange(0, N)
        end = tl.load(STARTS + row + 1)
        mass = tl.zeros([N], tl.float32)
        for start in range(tl.load(STARTS + row), end, M):
            rows = start + tl.arange(0, M)
            real = rows < end
            lse = tl.load(LSE + slot * video + rows, mask=real, other=0.0)
            part = PARTS + (slot * blocks + cols.to(tl.int64))[:, None] * video + rows[None, :]
            part = tl.load(part, mask=real[None, :] & (cols < boxes)[:, None], other=-float("inf"))
            mass += tl.sum(tl.math.exp2(part - lse[None, :]), 1)
        tl.store(MASS + ((first + slot) * boxes + row) * boxes + cols, mass, mask=cols < boxes)

    return score, reduce
