"""The kernels of the Gluon executor and their launches; imports Triton, so only gluon.py imports it.

Names: a *tile* is a block in shared memory; *step* j of a program's list brings the keys of kept block j and the values
of block j - 1 into slot j % STAGES, since scores are one block ahead of values; *place* is a token's index in a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Named anew in Triton 3.9.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

WIDTH = 64  # channels a copy: 128 bytes, the widest swizzle


def forward(
    q: Tensor, k: Tensor, v: Tensor, v_text: Tensor | None, out: Tensor, lse: Tensor, rows: Tensor, counts: Tensor,
    whole: Tensor, blocks: Tensor, starts: Tensor, grid: tuple[int, int, int], box: tuple[int, int, int], text: int,
    stages: int,
) -> None:  # fmt: skip
    """Attention of contiguous q, k, v [B, S, H, D] over kept blocks into out and lse [B, H, S].

    rows: the order in which a head's query blocks start, int32 [B * H, blocks]. counts, whole, blocks: kept key blocks
    of each query block, the first `whole` of them of 128 tokens. starts: int32 [B, blocks + 1]. v_text: values of text
    [B, text, H, D], finite also where it is padding; None takes them from v.
    """
    batch, length, heads, dim = q.shape
    half = (box[0] // 2, *box[1:]) if box[0] > 1 else (1, box[1] // 2, box[2]) if box[1] > 1 else (1, 1, box[2] // 2)
    sides = [(q, half), (k, box), (v, box), (out, half)]
    video = [_video(x, grid, part) for x, part in sides]
    behind = [_text(x[:, math.prod(grid) :] if text else x, text, math.prod(part)) for x, part in sides]
    if v_text is not None:
        behind[2] = _text(v_text, text, math.prod(box))
    scale = math.log2(math.e) / math.sqrt(dim)
    attention[(counts.shape[2], batch * heads)](
        *video, *behind, lse, rows, counts, whole, blocks, starts, scale, heads, counts.shape[2], blocks.shape[-1],
        length, *grid, BOX=box, HALF=half, D=dim, STAGES=stages, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _video(x: Tensor, grid: tuple[int, int, int], box: tuple[int, int, int]) -> TensorDescriptor:
    """The video tokens of x [B, S, H, D] as [B, T, Y, X, H * D], copied by boxes."""
    row = x.shape[2] * x.shape[3]
    shape = [len(x), *grid, row]
    strides = [x.shape[1] * row, grid[1] * grid[2] * row, grid[2] * row, row, 1]
    layout = gl.NVMMASharedLayout(128, 16, rank=5)
    return TensorDescriptor(x, shape, strides, [1, *box, WIDTH], layout)


def _text(x: Tensor, text: int, tokens: int) -> TensorDescriptor:
    """Text tokens x [B, text, H, D] as [B, text, H * D]; without text, a descriptor that no copy uses."""
    row = x.shape[2] * x.shape[3]
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return TensorDescriptor(x, [len(x), max(text, 1), row], [x.stride(0), row, 1], [1, tokens, WIDTH], layout)


def whole_first(counts: Tensor, blocks: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Counts, how many of them are whole, lists) with blocks of `size` tokens first and empty ones left out."""
    batch, heads, rows = counts.shape
    kept, whole, sorted_blocks = torch.empty_like(counts), torch.empty_like(counts), torch.empty_like(blocks)
    _whole_first[(rows, batch * heads)](
        counts, blocks, starts, kept, whole, sorted_blocks, heads, rows, starts.shape[-1], blocks.shape[-1],
        SIZE=size, CHUNK=1024, num_warps=4,
    )  # fmt: skip
    return kept, whole, sorted_blocks


@triton.jit
def _whole_first(
    COUNTS, BLOCKS, STARTS, KEPT, WHOLE, OUT, heads, rows, ends, capacity, SIZE: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    starts = STARTS + tl.program_id(1) // heads * ends
    count = tl.load(COUNTS + row)
    written = 0
    for smaller in tl.static_range(2):
        for first in range(0, count, CHUNK):
            at = first + tl.arange(0, CHUNK)
            block = tl.load(BLOCKS + row * capacity + at, mask=at < count, other=0)
            size = tl.load(starts + block + 1) - tl.load(starts + block)
            chosen = (size < SIZE) & (size > 0) if smaller else size == SIZE
            chosen = chosen & (at < count)
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(OUT + row * capacity + written + place, block, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), 0)
        tl.store((KEPT if smaller else WHOLE) + row, written)


@gluon.jit
def _corner(block, grid, BOX: gl.constexpr):
    """The first token (t, y, x) of a box."""
    _, Y, X = grid
    columns = (X + BOX[2] - 1) // BOX[2]
    in_frame = (Y + BOX[1] - 1) // BOX[1] * columns
    return block // in_frame * BOX[0], block % in_frame // columns * BOX[1], block % columns * BOX[2]


@gluon.jit
def _part_corner(block, grid, BOX: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr):
    """The first token of a box, or of its half PART where HALF is the half's box."""
    t, y, x = _corner(block, grid, BOX)
    if BOX[0] != HALF[0]:
        t += PART * HALF[0]
    if BOX[1] != HALF[1]:
        y += PART * HALF[1]
    if BOX[2] != HALF[2]:
        x += PART * HALF[2]
    return t, y, x


@gluon.jit
def _real(block, place, starts, grid, boxes, BOX: gl.constexpr):
    """Which places of a block hold a token."""
    T, Y, X = grid
    t, y, x = _corner(block, grid, BOX)
    inside = (t + place // (BOX[1] * BOX[2]) < T) & (y + place // BOX[2] % BOX[1] < Y) & (x + place % BOX[2] < X)
    size = gl.load(starts + block + 1) - gl.load(starts + block)
    return ((block < boxes) & inside) | ((block >= boxes) & (place < size))


@gluon.jit
def _copy_in(
    video, text, tile, barrier, block, b, column, grid, boxes,
    BOX: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Start copying a block, or half PART of it where HALF is its box, into a tile."""
    ROWS: gl.constexpr = HALF[0] * HALF[1] * HALF[2]
    t, y, x = _part_corner(block, grid, BOX, PART, HALF)
    for i in gl.static_range(D // 64):
        piece = tile.slice(i * 64, 64, dim=1)
        if block < boxes:
            _load(video, [b, t, y, x, column + i * 64], barrier, piece)
        else:
            row = (block - boxes) * (BOX[0] * BOX[1] * BOX[2]) + PART * ROWS
            _load(text, [b, row, column + i * 64], barrier, piece)


@gluon.jit
def _copies(arguments, BOX: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """The group that starts copies: the queries, then step after step as slots fall empty."""
    q_video, k_video, v_video, q_text, k_text, v_text, tiles, barriers, where, blocks, count, grid, boxes = arguments
    q_tile, k_tiles, v_tiles = tiles
    q_full, full, empty = barriers
    block, b, h = where
    BYTES: gl.constexpr = BOX[0] * BOX[1] * BOX[2] * D * 2
    M: gl.constexpr = HALF[0] * HALF[1] * HALF[2]
    mbarrier.expect(q_full, BYTES)
    for part in gl.static_range(2):
        half = q_tile.slice(part * M, M, dim=0)
        _copy_in(q_video, q_text, half, q_full, block, b, h * D, grid, boxes, BOX, part, HALF, D)
    kept = gl.load(blocks)
    before = gl.to_tensor(0)  # not `kept`: the compiler would take two names of one value for one variable of the loop
    for j in range(gl.where(count > 0, count + 1, 0)):
        after = gl.load(blocks + j + 1, mask=j + 1 < count, other=0)
        slot = j % STAGES
        mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)
        ready = full.index(slot)
        both = (j > 0) & (j < count)
        mbarrier.expect(ready, 2 * BYTES, pred=both)
        mbarrier.expect(ready, BYTES, pred=both ^ True)
        if j < count:
            _copy_in(k_video, k_text, k_tiles.index(slot), ready, kept, b, h * D, grid, boxes, BOX, 0, BOX, D)
        if j > 0:
            _copy_in(v_video, v_text, v_tiles.index(slot), ready, before, b, h * D, grid, boxes, BOX, 0, BOX, D)
        before = kept
        kept = after


@gluon.jit
def _grouped(x):
    """[M, N] as [M, 4, N // 32, 4, 2]: all but the fourth axis lies within a thread."""
    return x.reshape([x.shape[0], 4, x.shape[1] // 32, 4, 2])


@gluon.jit
def _in_thread_sum(x):
    """Row sums short of the last step, over the four threads that share a row: [M, N] -> [M, 4]; short chains."""
    return gl.sum(gl.sum(gl.sum(_grouped(x), 4), 2), 1)


@gluon.jit
def _row_max(x, layout: gl.constexpr):
    """Row maxima [M, N] -> [M]; in short chains, where one reduction would be one long chain."""
    return gl.convert_layout(gl.max(gl.max(gl.max(gl.max(_grouped(x), 4), 2), 1), 1), layout)


@gluon.jit
def _rows(
    arguments, PART: gl.constexpr, BOX: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """A group that holds half PART of the query rows."""
    out_video, out_text, lse, tiles, barriers, where, blocks, whole, count, starts, scale, grid, boxes = arguments
    q_tile, k_tiles, v_tiles = tiles
    q_full, full, empty = barriers
    block, b, h = where
    N: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    M: gl.constexpr = N // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    places = gl.arange(0, N, layout=gl.SliceLayout(0, s_layout))
    q = q_tile.slice(PART * M, M, dim=0)
    zero = gl.zeros([M, N], gl.float32, s_layout)
    o = gl.zeros([M, D], gl.float32, o_layout)
    top = gl.full([M], -float("inf"), gl.float32, rows_layout)
    total = gl.zeros([M], gl.float32, rows_layout)
    mbarrier.wait(q_full, 0)
    if count > 0:
        mbarrier.wait(full.index(0), 0)
        s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(empty.index(0))
        if whole == 0:
            s = gl.where(_real(gl.load(blocks), places, starts, grid, boxes, BOX)[None, :], s, -float("inf"))
        top = _row_max(s, rows_layout) * scale  # finite: a block in the list has a token
        p32 = gl.exp2(s * scale - top[:, None])
        sums = _in_thread_sum(p32)
        p = gl.convert_layout(p32.to(dtype), p_layout)
        for masked in gl.static_range(2):
            first = gl.maximum(whole, 1) if masked else 1
            last = count if masked else whole
            for j in range(first, last):
                slot = j % STAGES
                mbarrier.wait(full.index(slot), j // STAGES & 1)
                s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                o = warpgroup_mma(p, v_tiles.index(slot), o, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                if masked:
                    real = _real(gl.load(blocks + j), places, starts, grid, boxes, BOX)
                    s = gl.where(real[None, :], s, -float("inf"))
                new = gl.maximum(top, _row_max(s, rows_layout) * scale)
                decay = gl.exp2(top - new)
                p32 = gl.exp2(s * scale - new[:, None])
                faded = sums * gl.convert_layout(decay, gl.SliceLayout(1, sums.type.layout))[:, None]
                sums = faded + _in_thread_sum(p32)
                top = new
                after = gl.convert_layout(p32.to(dtype), p_layout)
                # Passes at once. Without a branch here ptxas waits for the values before the softmax, not behind it.
                mbarrier.wait(q_full, 0)
                o, p, _ = warpgroup_mma_wait(0, deps=[o, p, after])
                mbarrier.arrive(empty.index(slot))
                o = o * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
                p = after
        slot = count % STAGES
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        o = warpgroup_mma(p, v_tiles.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        total = gl.convert_layout(gl.sum(sums, 1), rows_layout)
    place = PART * M + gl.arange(0, M, layout=rows_layout)
    real = _real(block, place, starts, grid, boxes, BOX)
    held = gl.convert_layout(real & (total > 0.0), gl.SliceLayout(1, o_layout))
    o = o / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    q.store(gl.where(held[:, None], o, 0.0).to(dtype))  # a place without a token may hold NaN
    fence_async_shared()
    T, Y, X = grid
    t, y, x = _corner(block, grid, BOX)
    token = ((t + place // (BOX[1] * BOX[2])) * Y + y + place // BOX[2] % BOX[1]) * X + x + place % BOX[2]
    token = gl.where(block < boxes, token, T * Y * X + (block - boxes) * N + place)
    t, y, x = _part_corner(block, grid, BOX, PART, HALF)
    for i in gl.static_range(D // 64):
        piece = q.slice(i * 64, 64, dim=1)
        if block < boxes:
            _store(out_video, [b, t, y, x, h * D + i * 64], piece)
        else:
            _store(out_text, [b, (block - boxes) * N + PART * M, h * D + i * 64], piece)
    value = gl.where(total > 0.0, (top + gl.log2(total)) * 0.6931471805599453, -float("inf"))
    gl.store(lse + token, value, mask=real)
    tma.store_wait(0)


@gluon.jit
def attention(
    q_video, k_video, v_video, out_video, q_text, k_text, v_text, out_text, LSE, ROWS, COUNTS, WHOLE, BLOCKS, STARTS,
    scale, heads, q_blocks, capacity, length, T, Y, X,
    BOX: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One query block of one head: see `forward`."""
    N: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    dtype: gl.constexpr = q_video.dtype
    item = gl.program_id(1)
    b = item // heads
    block = gl.load(ROWS + item * q_blocks + gl.program_id(0))
    row = item.to(gl.int64) * q_blocks + block  # 64 bits: with longer videos a list's offset passes 2^31
    count = gl.load(COUNTS + row)
    whole = gl.load(WHOLE + row)
    blocks = BLOCKS + row * capacity
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tile = gl.allocate_shared_memory(dtype, [N, D], layout)  # the output's too, in the end
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles = (q_tile, k_tiles, v_tiles)
    barriers = (q_full, full, empty)
    where = (block, b, item % heads)
    grid = (T, Y, X)
    boxes = ((T + BOX[0] - 1) // BOX[0]) * ((Y + BOX[1] - 1) // BOX[1]) * ((X + BOX[2] - 1) // BOX[2])
    starts = STARTS + b * (q_blocks + 1)
    lse = LSE + item.to(gl.int64) * length
    ours = (out_video, out_text, lse, tiles, barriers, where, blocks, whole, count, starts, scale, grid, boxes)
    theirs = (q_video, k_video, v_video, q_text, k_text, v_text, tiles, barriers, where, blocks, count, grid, boxes)
    gl.warp_specialize(
        [
            (_rows, (ours, 0, BOX, HALF, D, STAGES, dtype)),
            (_rows, (ours, 1, BOX, HALF, D, STAGES, dtype)),
            (_copies, (theirs, BOX, HALF, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
