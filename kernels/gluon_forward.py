"""The kernel of the Gluon executor and its launch; imports Triton, so only gluon.py imports it.

Names: a *tile* is a block in shared memory; *step* j of a program's list brings the keys of kept block j and the values
of block j - 1 into slot j % STAGES, since scores are one block ahead of values; *place* is a token's index in a block.
"""

from __future__ import annotations

import math

import torch
from draftbench.kernels.triton import LIMIT, passes, shared
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
    stages: int, loose: bool = False, order: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of q, k, v [B, S, H, D], heads and channels side by side, over kept blocks into out and lse [B, H, S].

    rows: the order in which a head's query blocks start, int32 [B * H, blocks]. counts, whole, blocks: kept key blocks
    of each query block, the first `whole` of them of 128 tokens. starts: int32 [B, 1, blocks + 1]. v_text: values of
    text [B, text, H, D], finite also where it is padding; None takes them from v.
    loose: blocks lie anywhere in one row of tokens, text among them, as `schedule` names them by start and size; then
    starts are those of query blocks, int32 [B, H or 1, blocks + 1], and out and lse get row i at token order[i], int64
    [B or 1, H or 1, S], or at i.
    """
    batch, length, heads, dim = q.shape
    half = (box[0] // 2, *box[1:]) if box[0] > 1 else (1, box[1] // 2, box[2]) if box[1] > 1 else (1, 1, box[2] // 2)
    sides = [(q, half), (k, box), (v, box), (out, half)]
    video = [_video(x, grid, part) for x, part in sides]
    behind = [_text(x[:, math.prod(grid) :] if text else x, text, math.prod(part)) for x, part in sides]
    if v_text is not None:
        behind[2] = _text(v_text, text, math.prod(box))
    scale = math.log2(math.e) / math.sqrt(dim)
    cut = tuple(n % b != 0 for n, b in zip(grid, box, strict=True))
    strides = (*shared(starts), *((0, 0) if order is None else shared(order)))
    # A counter of query blocks taken for each launch, and the flags; aligned to 16 bytes, or Triton compiles anew.
    scratch = torch.zeros(8 + counts.numel() + 1, dtype=torch.int32, device=q.device)
    programs = min(counts.numel(), torch.cuda.get_device_properties(q.device).multi_processor_count)
    for launch, (running, flagged) in enumerate(passes(q.dtype)):
        attention[(programs,)](
            *video, *behind, out, lse, rows, counts, whole, blocks, starts, starts if order is None else order,
            scratch[4 * launch :], scratch[8:],
            scale, batch * heads, heads, counts.shape[2], blocks.shape[-1], length, *grid, *strides,
            BOX=box, CUT=cut, HALF=half, D=dim, STAGES=stages, RUNNING=running, FLAGGED=flagged, LOOSE=loose,
            ORDERED=order is not None, num_warps=4, maxnreg=168,
        )  # fmt: skip


def _video(x: Tensor, grid: tuple[int, int, int], box: tuple[int, int, int]) -> TensorDescriptor:
    """The video tokens of x [B, S, H, D] as [B, T, Y, X, H * D], copied by boxes."""
    item, row = x.stride(0), x.stride(1)
    shape = [len(x), *grid, x.shape[2] * x.shape[3]]
    strides = [item, grid[1] * grid[2] * row, grid[2] * row, row, 1]
    layout = gl.NVMMASharedLayout(128, 16, rank=5)
    return TensorDescriptor(x, shape, strides, [1, *box, WIDTH], layout)


def _text(x: Tensor, text: int, tokens: int) -> TensorDescriptor:
    """Text tokens x [B, text, H, D] as [B, text, H * D]; without text, a descriptor that no copy uses."""
    shape = [len(x), max(text, 1), x.shape[2] * x.shape[3]]
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return TensorDescriptor(x, shape, [x.stride(0), x.stride(1), 1], [1, tokens, WIDTH], layout)


@gluon.jit
def _corner(block, grid, BOX: gl.constexpr, LOOSE: gl.constexpr):
    """The first token (t, y, x) of a box, or of a loose block in one row."""
    _, Y, X = grid
    columns = (X + BOX[2] - 1) // BOX[2]
    in_frame = (Y + BOX[1] - 1) // BOX[1] * columns
    t = block // in_frame * BOX[0]
    y = block % in_frame // columns * BOX[1]
    x = block % columns * BOX[2]
    if LOOSE:
        t = gl.to_tensor(0)
        y = gl.to_tensor(0)
        x = block >> 8
    return t, y, x


@gluon.jit
def _part_corner(
    block, grid, BOX: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr, LOOSE: gl.constexpr,
):  # fmt: skip
    """The first token of a box, or of its half PART where HALF is the half's box."""
    t, y, x = _corner(block, grid, BOX, LOOSE)
    if BOX[0] != HALF[0]:
        t += PART * HALF[0]
    if BOX[1] != HALF[1]:
        y += PART * HALF[1]
    if BOX[2] != HALF[2]:
        x += PART * HALF[2]
    return t, y, x


@gluon.jit
def _real(block, place, starts, grid, boxes, BOX: gl.constexpr, CUT: gl.constexpr, LOOSE: gl.constexpr):
    """Which places of a block hold a token, by one comparison where it will do; CUT: axes whose last box is smaller."""
    if LOOSE:
        return place < (block & 255)
    else:
        return _real_of_box(block, place, starts, grid, boxes, BOX, CUT)


@gluon.jit
def _real_of_box(block, place, starts, grid, boxes, BOX: gl.constexpr, CUT: gl.constexpr):
    T, Y, X = grid
    t, y, x = _corner(block, grid, BOX, False)
    limit = gl.load(starts + block + 1) - gl.load(starts + block)  # of a text block
    y_end = gl.to_tensor(BOX[1])
    x_end = gl.to_tensor(BOX[2])
    if block < boxes:
        limit = gl.to_tensor(BOX[0] * BOX[1] * BOX[2])
        if CUT[0]:
            limit = gl.minimum(limit, (T - t) * (BOX[1] * BOX[2]))
        if CUT[1]:
            if BOX[0] == 1:
                limit = gl.minimum(limit, (Y - y) * BOX[2])
            else:
                y_end = Y - y
        if CUT[2]:
            if BOX[0] * BOX[1] == 1:
                limit = gl.minimum(limit, X - x)
            else:
                x_end = X - x
    real = place < limit
    if CUT[1] and BOX[0] > 1:
        real = real & (place % (BOX[1] * BOX[2]) < y_end * BOX[2])
    if CUT[2] and BOX[0] * BOX[1] > 1:
        real = real & (place % BOX[2] < x_end)
    return real


@gluon.jit
def _copy_in(
    video, text, tile, barrier, block, b, column, grid, boxes,
    BOX: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, LOOSE: gl.constexpr,
):  # fmt: skip
    """Start copying a block, or half PART of it where HALF is its box, into a tile."""
    ROWS: gl.constexpr = HALF[0] * HALF[1] * HALF[2]
    t, y, x = _part_corner(block, grid, BOX, PART, HALF, LOOSE)
    for i in gl.static_range(D // 64):
        piece = tile.slice(i * 64, 64, dim=1)
        if block < boxes:
            _load(video, [b, t, y, x, column + i * 64], barrier, piece)
        else:
            row = (block - boxes) * (BOX[0] * BOX[1] * BOX[2]) + PART * ROWS
            _load(text, [b, row, column + i * 64], barrier, piece)


@gluon.jit
def _list_of(job, lists):
    """(Item, query block, list) of a job; in 64 bits, as with longer videos a list's offset passes 2^31."""
    ROWS, _, _, _, _, _, q_blocks, _, _ = lists
    item = job // q_blocks
    block = gl.load(ROWS + job)
    return item, block, item.to(gl.int64) * q_blocks + block


@gluon.jit
def _of_item(shared, b, h):
    """Where the numbers of an item's head begin: (pointer, strides over items and heads, 0 where they are shared)."""
    pointer, s_b, s_h = shared
    return pointer + b.to(gl.int64) * s_b + h * s_h


@gluon.jit
def _named(block, starts, LOOSE: gl.constexpr):
    """A query block as the lists name key blocks: by its number, or by its first token and size."""
    if LOOSE:
        start = gl.load(starts + block)
        block = start * 256 + gl.load(starts + block + 1) - start
    return block


@gluon.jit
def _wanted(job, TAKEN, lists, FLAGGED: gl.constexpr):
    """This job or, if only flagged rows are to be computed, the next one taken that is flagged."""
    _, _, _, _, AGAIN, _, _, _, total = lists
    if FLAGGED:
        skip = job < total
        while skip:
            _, _, row = _list_of(job, lists)
            skip = gl.load(AGAIN + row) == 0
            if skip:
                job = gl.atomic_add(TAKEN, 1) + gl.num_programs(0)
                skip = job < total
    return job


@gluon.jit
def _copies(
    arguments, BOX: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, FLAGGED: gl.constexpr,
    LOOSE: gl.constexpr,
):  # fmt: skip
    """The group that hands out query blocks and starts copies, step after step as slots fall empty."""
    q_video, k_video, v_video, q_text, k_text, v_text, TAKEN, STARTS, tiles, barriers, mail, lists, grid, boxes = (
        arguments
    )
    q_tile, k_tiles, v_tiles = tiles
    q_full, q_empty, full, empty, mail_full, mail_empty, _ = barriers
    _, COUNTS, _, BLOCKS, _, heads, _, capacity, total = lists
    BYTES: gl.constexpr = BOX[0] * BOX[1] * BOX[2] * D * 2
    M: gl.constexpr = HALF[0] * HALF[1] * HALF[2]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = gl.to_tensor(0)
    at = gl.to_tensor(0)
    job = _wanted(gl.program_id(0), TAKEN, lists, FLAGGED)
    while job < total:
        slot = n % 2
        mbarrier.wait(mail_empty.index(slot), (n // 2 & 1) ^ 1)
        mail.index(slot).store(gl.full([1], job, gl.int32, one))
        mbarrier.arrive(mail_full.index(slot))
        upcoming = gl.atomic_add(TAKEN, 1) + gl.num_programs(0)
        item, block, row = _list_of(job, lists)
        b = item // heads
        column = item % heads * D
        block = _named(block, _of_item(STARTS, b, item % heads), LOOSE)
        count = gl.load(COUNTS + row)
        blocks = BLOCKS + row * capacity
        kept = gl.load(blocks)
        before = gl.to_tensor(0)
        for j in range(gl.where(count > 0, count + 1, 1)):
            after = gl.load(blocks + j + 1, mask=j + 1 < count, other=0)
            if count > 0:
                step = at + j
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                ready = full.index(slot)
                both = (j > 0) & (j < count)
                mbarrier.expect(ready, 2 * BYTES, pred=both)
                mbarrier.expect(ready, BYTES, pred=both ^ True)
                if j < count:
                    _copy_in(
                        k_video, k_text, k_tiles.index(slot), ready, kept, b, column, grid, boxes, BOX, 0, BOX, D, LOOSE
                    )
            if j == 0:
                for part in gl.static_range(2):
                    mbarrier.wait(q_empty.index(part), (n & 1) ^ 1)
                    mbarrier.expect(q_full.index(part), BYTES // 2)
                    half = q_tile.slice(part * M, M, dim=0)
                    ready = q_full.index(part)
                    _copy_in(q_video, q_text, half, ready, block, b, column, grid, boxes, BOX, part, HALF, D, LOOSE)
            else:
                step = at + j
                slot = step % STAGES
                ready = full.index(slot)
                values = v_tiles.index(slot)
                _copy_in(v_video, v_text, values, ready, before, b, column, grid, boxes, BOX, 0, BOX, D, LOOSE)
            before = kept
            kept = after
        at += gl.where(count > 0, count + 1, 0)
        n += 1
        job = _wanted(upcoming, TAKEN, lists, FLAGGED)
    slot = n % 2
    mbarrier.wait(mail_empty.index(slot), (n // 2 & 1) ^ 1)
    mail.index(slot).store(gl.full([1], -1, gl.int32, one))
    mbarrier.arrive(mail_full.index(slot))


@gluon.jit
def _next(mail, mail_full, mail_empty, n):
    """The query block that the copying group has handed out, or -1."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = n % 2
    mbarrier.wait(mail_full.index(slot), n // 2 & 1)
    job = gl.max(mail.index(slot).load(one), 0)
    mbarrier.arrive(mail_empty.index(slot))
    return job


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
def _step(
    one, known, state, at, j,
    MASKED: gl.constexpr, RUNNING: gl.constexpr, BOX: gl.constexpr, CUT: gl.constexpr, STAGES: gl.constexpr,
    LOOSE: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Scores of kept block j, values of block j - 1: both products start, the softmax runs while the second does."""
    q, k_tiles, v_tiles, q_full, full, empty, n, scale, zero, mine, other = one
    blocks, places, starts, grid, boxes = known
    o, p, decay, sums, top = state
    rows: gl.constexpr = top.type.layout
    slot = (at + j) % STAGES
    mbarrier.wait(full.index(slot), (at + j) // STAGES & 1)
    mbarrier.wait(mine, at + j - 1 & 1)  # a list takes two turns fewer than it adds to `at`, which no parity shows
    s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if RUNNING:
        o = o * gl.convert_layout(decay, gl.SliceLayout(1, o.type.layout))[:, None]  # while the first product runs
    o = warpgroup_mma(p, v_tiles.index(slot), o, is_async=True)
    mbarrier.arrive(other)
    s = warpgroup_mma_wait(1, deps=[s])
    if MASKED:
        real = _real(gl.load(blocks + j), places, starts, grid, boxes, BOX, CUT, LOOSE)
        s = gl.where(real[None, :], s, -float("inf"))
    if RUNNING:
        new = gl.maximum(top, _row_max(s, rows) * scale)
        decay = gl.exp2(top - new)
        sums = sums * gl.convert_layout(decay, gl.SliceLayout(1, sums.type.layout))[:, None]
        top = new
    p32 = gl.exp2(s * scale - top[:, None])
    sums = sums + _in_thread_sum(p32)
    after = gl.convert_layout(p32.to(dtype), p.type.layout)
    # Passes at once. Without a branch here ptxas waits for the values before the softmax, not behind it.
    mbarrier.wait(q_full, n & 1)
    o, _, _ = warpgroup_mma_wait(0, deps=[o, p, after])
    mbarrier.arrive(empty.index(slot))
    return o, after, decay, sums, top


@gluon.jit
def _rows(
    arguments, PART: gl.constexpr, BOX: gl.constexpr, CUT: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, RUNNING: gl.constexpr, LOOSE: gl.constexpr, ORDERED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """A group that holds half PART of the query rows."""
    out_video, out_text, OUT, LSE, STARTS, ORDER, scale, length, tiles, barriers, mail, lists, grid, boxes = arguments
    _, COUNTS, WHOLE, BLOCKS, AGAIN, heads, _, capacity, jobs = lists
    q_tile, k_tiles, v_tiles = tiles
    q_full, q_empty, full, empty, mail_full, mail_empty, turns = barriers
    N: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    M: gl.constexpr = N // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    places = gl.arange(0, N, layout=gl.SliceLayout(0, s_layout))
    q = q_tile.slice(PART * M, M, dim=0)
    zero = gl.zeros([M, N], gl.float32, s_layout)
    T, Y, X = grid
    n = gl.to_tensor(0)
    at = gl.to_tensor(0)
    job = _next(mail, mail_full, mail_empty, n)
    while job >= 0:
        item, block, row = _list_of(job, lists)
        b = item // heads
        h = item % heads
        count = gl.load(COUNTS + row)
        whole = gl.load(WHOLE + row)
        blocks = BLOCKS + row * capacity
        starts = _of_item(STARTS, b, h)
        block = _named(block, starts, LOOSE)
        lse = LSE + item.to(gl.int64) * length
        o = gl.zeros([M, D], gl.float32, o_layout)
        top = gl.full([M], -float("inf"), gl.float32, rows_layout)
        total = gl.zeros([M], gl.float32, rows_layout)
        mbarrier.wait(q_full.index(PART), n & 1)
        if count > 0:
            slot = at % STAGES
            mbarrier.wait(full.index(slot), at // STAGES & 1)
            s = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(slot))
            if whole == 0:
                real = _real(gl.load(blocks), places, starts, grid, boxes, BOX, CUT, LOOSE)
                s = gl.where(real[None, :], s, -float("inf"))
            top = _row_max(s, rows_layout) * scale  # finite: a block in the list has a token
            p32 = gl.exp2(s * scale - top[:, None])
            sums = _in_thread_sum(p32)
            p = gl.convert_layout(p32.to(dtype), p_layout)
            decay = gl.full([M], 1.0, gl.float32, rows_layout)
            mine, other = turns.index(PART), turns.index(1 - PART)
            one = (q, k_tiles, v_tiles, q_full.index(PART), full, empty, n, scale, zero, mine, other)
            known = (blocks, places, starts, grid, boxes)
            state = (o, p, decay, sums, top)
            pairs = gl.maximum(whole - 1, 0) // 2  # two steps at once: p and its successor swap registers
            for i in range(pairs):
                state = _step(one, known, state, at, 1 + 2 * i, False, RUNNING, BOX, CUT, STAGES, LOOSE, dtype)
                state = _step(one, known, state, at, 2 + 2 * i, False, RUNNING, BOX, CUT, STAGES, LOOSE, dtype)
            if 1 + 2 * pairs < whole:
                state = _step(one, known, state, at, 1 + 2 * pairs, False, RUNNING, BOX, CUT, STAGES, LOOSE, dtype)
            for j in range(gl.maximum(whole, 1), count):
                state = _step(one, known, state, at, j, True, RUNNING, BOX, CUT, STAGES, LOOSE, dtype)
            o, p, decay, sums, top = state
            slot = (at + count) % STAGES
            mbarrier.wait(full.index(slot), (at + count) // STAGES & 1)
            if RUNNING:
                o = o * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
            o = warpgroup_mma(p, v_tiles.index(slot), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(empty.index(slot))
            at += count + 1
            total = gl.convert_layout(gl.sum(sums, 1), rows_layout)
        place = PART * M + gl.arange(0, M, layout=rows_layout)
        real = _real(block, place, starts, grid, boxes, BOX, CUT, LOOSE)
        if not RUNNING:
            over = real & ((total <= LIMIT) == 0)  # or no number
            gl.store(AGAIN + row + gl.zeros_like(place), 1, mask=over)
            gl.store(AGAIN + jobs + gl.zeros_like(place), 1, mask=over)
        held = gl.convert_layout(real & (total != 0.0), gl.SliceLayout(1, o_layout))  # what is no number stays so
        o = o / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
        o = gl.where(held[:, None], o, 0.0).to(dtype)  # a place without a token may hold NaN
        value = gl.where(total != 0.0, (top + gl.log2(total)) * 0.6931471805599453, -float("inf"))
        t, y, x = _corner(block, grid, BOX, LOOSE)
        token = ((t + place // (BOX[1] * BOX[2])) * Y + y + place // BOX[2] % BOX[1]) * X + x + place % BOX[2]
        if LOOSE:  # the rows behind a block are another's, so no copy of a whole tile
            if ORDERED:
                token = gl.load(_of_item(ORDER, b, h) + token, mask=real, other=0).to(gl.int32)
            line = gl.convert_layout(token, gl.SliceLayout(1, o_layout))
            inside = gl.convert_layout(real, gl.SliceLayout(1, o_layout))
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
            base = OUT + ((b.to(gl.int64) * length + line) * heads + h) * D
            gl.store(base[:, None] + channel[None, :], o, mask=inside[:, None])
        else:
            q.store(o)
            fence_async_shared()
            token = gl.where(block < boxes, token, T * Y * X + (block - boxes) * N + place)
            t, y, x = _part_corner(block, grid, BOX, PART, HALF, LOOSE)
            for i in gl.static_range(D // 64):
                piece = q.slice(i * 64, 64, dim=1)
                if block < boxes:
                    _store(out_video, [b, t, y, x, h * D + i * 64], piece)
                else:
                    _store(out_text, [b, (block - boxes) * N + PART * M, h * D + i * 64], piece)
        gl.store(lse + token, value, mask=real)
        if not LOOSE:
            tma.store_wait(0)
        mbarrier.arrive(q_empty.index(PART))
        n += 1
        job = _next(mail, mail_full, mail_empty, n)


@gluon.jit
def attention(
    q_video, k_video, v_video, out_video, q_text, k_text, v_text, out_text, OUT, LSE, ROWS, COUNTS, WHOLE, BLOCKS,
    STARTS, ORDER, TAKEN, AGAIN, scale, items, heads, q_blocks, capacity, length, T, Y, X, s_b, s_h, o_b, o_h,
    BOX: gl.constexpr, CUT: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    RUNNING: gl.constexpr, FLAGGED: gl.constexpr, LOOSE: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The whole kernel.

    RUNNING, FLAGGED: see `passes`; AGAIN [lists + 1] holds the flags of query blocks, and last whether there is any.
    """
    N: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    dtype: gl.constexpr = q_video.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_tile = gl.allocate_shared_memory(dtype, [N, D], layout)  # the output's too, in the end
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    mail = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(mail_full.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
        mbarrier.init(mail_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles = (q_tile, k_tiles, v_tiles)
    barriers = (q_full, q_empty, full, empty, mail_full, mail_empty, turns)
    mbarrier.arrive(turns.index(0))  # half 0 begins
    grid = (T, Y, X)
    boxes = ((T + BOX[0] - 1) // BOX[0]) * ((Y + BOX[1] - 1) // BOX[1]) * ((X + BOX[2] - 1) // BOX[2])
    if LOOSE:
        boxes = gl.to_tensor(2147483647)  # names are no numbers, and none is of text apart
    total = items * q_blocks
    if FLAGGED:
        total = gl.where(gl.load(AGAIN + total) > 0, total, 0)
    lists = (ROWS, COUNTS, WHOLE, BLOCKS, AGAIN, heads, q_blocks, capacity, total)
    starts = (STARTS, s_b, s_h)
    order = (ORDER, o_b, o_h)
    ours = (out_video, out_text, OUT, LSE, starts, order, scale, length, tiles, barriers, mail, lists, grid, boxes)
    theirs = (
        q_video, k_video, v_video, q_text, k_text, v_text, TAKEN, starts, tiles, barriers, mail, lists, grid, boxes,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_rows, (ours, 0, BOX, CUT, HALF, D, STAGES, RUNNING, LOOSE, ORDERED, dtype)),
            (_rows, (ours, 1, BOX, CUT, HALF, D, STAGES, RUNNING, LOOSE, ORDERED, dtype)),
            (_copies, (theirs, BOX, HALF, D, STAGES, FLAGGED, LOOSE)),
        ],
        [4, 1],
        [240, 24],
    )
