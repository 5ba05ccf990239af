"""What draft attention does beside the attention itself, as Triton kernels: pool, select and list.

`select.py` is the reference and chooses between the two; given the same scores both keep the same blocks. Nothing
synchronises with the host or depends on the data's values in shape, so a plan can be captured in a CUDA graph once a
first call has compiled the kernels and cached the sizes of the boxes on the device.

Floors in bytes at 33x48x80 tokens in 990 boxes, 24 heads of 128, bfloat16 (778 MB a tensor) and 4.3 TB/s:

- `pool` reads q and k once, 1.56 GB: .36 ms.
- Scores (`select.draft_map`) are torch's own: 6 GFLOP in float32 without TF32, .1 ms at 60 TFLOP/s, and a softmax that
  reads and writes 94 MB, .04 ms. A fused kernel would save that pass, but Triton has float32 products only as slow
  multiply-adds or as three TF32 products, and would form each twice where a row of the map does not fit a tile.
- `select` reads the 94 MB once, .02 ms: a sample brackets each head's threshold (`_bracket`), one pass adds up what
  lies above the bracket and lists what lies in it (`_split`), and the exact threshold is searched for in that list
  (`_finish`). A radix selection would read the map three or four times and build histograms. Where the sample misled,
  or the list overflows, `_finish` searches the whole map: as exact, and slower (milliseconds).
- `lists` reads the 94 MB once and writes the kept indices, 10 MB at 90%: .025 ms.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from draftbench.kernels.select import pair_budget
from torch import Tensor

from ..layout import Box, box_sizes

# Of each head's map, to bracket its threshold by; a map of less than four times as many is listed whole.
SAMPLES = 8192
DEVIATIONS = 4  # of the sample's share that a bracket reaches to either side
LISTED = 1 / 8  # of a sampled map that the list of what is in the bracket has room for
BEYOND = tl.constexpr(0x7F800001)  # above the bits of every float32 from 0 to infinity
# Launch parameters: rows x columns of a tile, elements of a tile, warps.
LAUNCH = {
    "pool": {"R": 16, "C": 512, "num_warps": 4},
    "bracket": {"num_warps": 16},
    "split": {"TILE": 1024, "num_warps": 4},
    "finish": {"TILE": 2048, "num_warps": 32},
    "list": {"COLS": 512, "num_warps": 1},
}


def pool(x: Tensor, box: Box, grid: tuple[int, int, int], how: str = "average") -> Tensor:
    """As `select.pool`: mean, maximum or mean direction over each box, [B, S, H, D] -> float32 [B, H, boxes, D]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, dim = x.shape
    grid, counts, block = box.over(grid), box.counts(grid), box.t * box.h * box.w
    boxes, launch = math.prod(counts), LAUNCH["pool"]
    low = torch.empty(batch, heads, boxes, dim, dtype=torch.float32, device=x.device)
    r, c = (min(launch[side], triton.next_power_of_2(n)) for side, n in (("R", block), ("C", heads * dim)))
    step, direction = c, how == "direction"
    if direction:  # a token's norm takes its whole head, and no other
        step, c = dim, triton.next_power_of_2(dim)
    _pool[(boxes, -(-heads * dim // step), batch)](
        x, low, heads, *grid, *counts[1:], boxes, *x.stride()[:3], BT=box.t, BH=box.h, BW=box.w, D=dim,
        AVERAGE=how != "max", DIRECTION=direction, STEP=step, **launch | {"R": r, "C": c},
    )  # fmt: skip
    return low


def select(scores: Tensor, sparsity: float, box: Box, grid: tuple[int, int, int]) -> Tensor:
    """Where each head's map is cut: int32 [B, H, 2], the bits of a float32 and a flat place in the map.

    scores: float32 [B, H, n, n], none below 0. Kept are the scores whose bits reach the first number, and of those one
    bit below it (ties that straddle the budget) those before the place: what `select.keep_over_threshold` keeps.
    """
    batch, heads, n, _ = scores.shape
    slots, device, scores = batch * heads, scores.device, scores.contiguous()
    sizes, budget = box_sizes(box, grid, device), pair_budget(sparsity, box, grid)
    bracket = torch.empty(slots, 2, dtype=torch.int32, device=device)
    share = budget / math.prod(grid) ** 2
    sampled = n * n >= 4 * SAMPLES
    # A small map is all bracket and all listed.
    margin = DEVIATIONS * (math.sqrt(share * (1 - share) / SAMPLES) + 2 / SAMPLES) if sampled else 1.0
    capacity = int(LISTED * n * n) if sampled else n * n
    _bracket[(slots, 2)](
        scores, sizes, bracket, n, share + margin, share - margin, SAMPLES=SAMPLES, **LAUNCH["bracket"]
    )
    sums = torch.zeros(
        slots, 3, dtype=torch.int64, device=device
    )  # pairs above the bracket, pairs in it, list's length
    listed = torch.empty(3, slots, capacity, dtype=torch.int32, device=device)  # bits, places, pairs
    launch = LAUNCH["split"]
    cols = min(launch["TILE"], 1024, triton.next_power_of_2(n))
    _split[(-(-n // cols) * -(-n * cols // launch["TILE"]), slots)](
        scores, sizes, bracket, sums, *listed, n, -(-n // cols), capacity, COLS=cols, **launch
    )
    cuts = torch.empty(batch, heads, 2, dtype=torch.int32, device=device)
    _finish[(slots,)](scores, sizes, bracket, sums, *listed, cuts, n, capacity, budget, **LAUNCH["finish"])
    return cuts


def lists(scores: Tensor, cuts: Tensor, text: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [B, H, m], blocks [B, H, m, m] and fallbacks int64 [B] as `Plan` has them, m = n + `text` blocks of text.

    scores [B, H, n, n] and cuts as in `select`. Video rows keep their blocks and then all text, and a row that keeps no
    block of the video its best one, counted in fallbacks; text rows keep everything.
    """
    return _list_rows(scores, cuts, text, text)


def mask_lists(mask: Tensor, text: int, key_text: int) -> tuple[Tensor, Tensor]:
    """As `lists`, of a bool mask [B, H, n, m]; rows that keep nothing stay so. `key_text`: columns of text."""
    return _list_rows(mask.contiguous().view(torch.uint8), None, text, key_text)[:2]


def _list_rows(kept: Tensor, cuts: Tensor | None, text: int, key_text: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, m = kept.shape
    kept, rows, columns = kept.contiguous(), n + text, m + key_text
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=kept.device)
    blocks = torch.empty(batch, heads, rows, columns, dtype=torch.int32, device=kept.device)
    fallbacks = torch.zeros(batch, dtype=torch.int64, device=kept.device)
    launch = LAUNCH["list"] | {"COLS": min(LAUNCH["list"]["COLS"], triton.next_power_of_2(columns))}
    _list[(rows, batch * heads)](
        kept, counts if cuts is None else cuts, fallbacks, counts, blocks, n, m, heads, columns, MASKED=cuts is None,
        **launch,
    )  # fmt: skip
    return counts, blocks, fallbacks


@triton.jit
def _pool(
    X, LOW, heads, frames, height, width, y_boxes, x_boxes, boxes, x_b, x_s, x_h,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, D: tl.constexpr, AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr, STEP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One box of STEP, at most C, of the heads * D columns; R of its tokens at a time."""
    box, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * STEP + tl.arange(0, C)
    inside = (tl.arange(0, C) < STEP) & (cols < heads * D)
    h, d = cols // D, cols % D
    columns = X + b * x_b + h.to(tl.int64) * x_h + d
    t, y, x = box // (y_boxes * x_boxes) * BT, box // x_boxes % y_boxes * BH, box % x_boxes * BW
    t_size, y_size, x_size = tl.minimum(BT, frames - t), tl.minimum(BH, height - y), tl.minimum(BW, width - x)
    pooled = tl.full([R, C], 0.0 if AVERAGE else -float("inf"), tl.float32)
    for first in range(0, BT * BH * BW, R):
        r = first + tl.arange(0, R)
        dt, dy, dx = r // (BH * BW), r // BW % BH, r % BW
        live = (dt < t_size) & (dy < y_size) & (dx < x_size)
        token = ((t + dt) * height + y + dy) * width + x + dx
        here = live[:, None] & inside[None, :]
        value = tl.load(columns[None, :] + token.to(tl.int64)[:, None] * x_s, mask=here, other=0.0).to(tl.float32)
        if DIRECTION:
            value /= tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12)[:, None]
        pooled = pooled + value if AVERAGE else tl.maximum(pooled, tl.where(here, value, -float("inf")))
    low = tl.sum(pooled, 0) / (t_size * y_size * x_size) if AVERAGE else tl.max(pooled, 0)
    tl.store(LOW + ((b * heads + h) * boxes + box) * D + d, low, mask=inside)


@triton.jit
def _bracket(SCORES, SIZES, BRACKET, n, more, less, SAMPLES: tl.constexpr):
    """The bits [slots, 2] down to which the shares `more` and `less` of a head's pairs lie, judged by a sample."""
    slot = tl.program_id(0).to(tl.int64)
    share = tl.where(tl.program_id(1) == 0, more, less)
    total = tl.cast(n, tl.int64) * n
    # A golden-ratio sequence: even over the map, whatever n is.
    at = (tl.arange(0, SAMPLES).to(tl.int64) * 2654435769 % 4294967296) * total >> 32
    bits = tl.load(SCORES + slot * total + at).to(tl.int32, bitcast=True)
    pairs = tl.load(SIZES + at // n).to(tl.float32) * tl.load(SIZES + at % n)
    allowed = tl.sum(pairs) * share
    low, high = tl.min(bits), tl.max(bits) + 1
    while low < high:
        middle = low + (high - low) // 2
        fits = tl.sum(tl.where(bits >= middle, pairs, 0.0)) <= allowed
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    low = tl.where(share >= 1.0, 0, low)
    tl.store(BRACKET + slot * 2 + tl.program_id(1), tl.where(share <= 0.0, BEYOND, low))


@triton.jit
def _split(
    SCORES, SIZES, BRACKET, SUMS, BITS, PLACES, PAIRS, n, chunks, capacity, COLS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Of TILE // COLS rows and COLS columns: the pairs above the bracket and in it, and a list of what is in it."""
    slot = tl.program_id(1).to(tl.int64)
    low, high = tl.load(BRACKET + slot * 2), tl.load(BRACKET + slot * 2 + 1)
    e = tl.arange(0, TILE)
    row = tl.program_id(0) // chunks * (TILE // COLS) + e // COLS
    col = tl.program_id(0) % chunks * COLS + e % COLS
    live = (row < n) & (col < n)
    at = row * n + col
    bits = tl.load(SCORES + slot * n * n + at, mask=live, other=0).to(tl.int32, bitcast=True)
    pairs = tl.load(SIZES + row, mask=live, other=0) * tl.load(SIZES + col, mask=live, other=0)
    among = live & (bits >= low) & (bits < high)
    tl.atomic_add(SUMS + slot * 3, tl.sum(tl.where(bits >= high, pairs, 0).to(tl.int64)))
    tl.atomic_add(SUMS + slot * 3 + 1, tl.sum(tl.where(among, pairs, 0).to(tl.int64)))
    found = among.to(tl.int32)
    # The list's order depends on who comes first; what is counted in it does not.
    first = tl.atomic_add(SUMS + slot * 3 + 2, tl.sum(found).to(tl.int64))
    place = first + tl.cumsum(found, 0) - 1
    fits = among & (place < capacity)
    place += slot * capacity
    tl.store(BITS + place, bits, mask=fits)
    tl.store(PLACES + place, at, mask=fits)
    tl.store(PAIRS + place, pairs, mask=fits)


@triton.jit
def _entries(SCORES, SIZES, BITS, PLACES, PAIRS, slot, first, count, n, capacity, listed, TILE: tl.constexpr):
    """(Bits, places, pairs) of TILE entries of the list, or of the whole map if it is not `listed`; beyond: 0 pairs."""
    e = first + tl.arange(0, TILE)
    live = e < count
    if listed:
        bits = tl.load(BITS + slot * capacity + e, mask=live, other=0)
        at = tl.load(PLACES + slot * capacity + e, mask=live, other=0)
        pairs = tl.load(PAIRS + slot * capacity + e, mask=live, other=0)
    else:
        bits = tl.load(SCORES + slot * n * n + e, mask=live, other=0).to(tl.int32, bitcast=True)
        at = e
        pairs = tl.load(SIZES + e // n, mask=live, other=0) * tl.load(SIZES + e % n, mask=live, other=0)
    return bits, at, pairs


@triton.jit
def _weigh(
    SCORES, SIZES, BITS, PLACES, PAIRS, slot, count, n, capacity, listed, least, most, before, TILE: tl.constexpr
):  # fmt: skip
    """Token pairs of the entries whose bits are in [least, most] and whose place is before `before`, int64.

    A lane's sum stays in 32 bits for fewer than 2^31 pairs a lane: the video's tokens squared over TILE.
    """
    sums = tl.zeros([TILE], tl.int32)
    for first in range(0, count, TILE):
        bits, at, pairs = _entries(SCORES, SIZES, BITS, PLACES, PAIRS, slot, first, count, n, capacity, listed, TILE)
        sums += tl.where((bits >= least) & (bits <= most) & (at < before), pairs, 0)
    return tl.sum(sums.to(tl.int64))


@triton.jit
def _finish(
    SCORES, SIZES, BRACKET, SUMS, BITS, PLACES, PAIRS, CUTS, n, capacity, budget, TILE: tl.constexpr
):  # fmt: skip
    """The least bits such that all pairs at and above them fit the budget, and the place up to which ties below do."""
    slot = tl.program_id(0).to(tl.int64)
    total = n * n
    low, high = tl.load(BRACKET + slot * 2), tl.load(BRACKET + slot * 2 + 1)
    above, inside = tl.load(SUMS + slot * 3), tl.load(SUMS + slot * 3 + 1)
    length = tl.load(SUMS + slot * 3 + 2).to(tl.int32)
    bracketed = (above <= budget) & ((low == 0) | (above + inside > budget))
    listed = bracketed & (length <= capacity)
    count = tl.where(listed, length, total)
    low, high = tl.where(bracketed, low, 0), tl.where(bracketed, high, BEYOND)
    left = budget - tl.where(bracketed, above, 0)  # of the budget, once all at and above `high` is kept
    room = budget - tl.where(listed, above, 0)  # for what the list holds
    while low < high:
        middle = low + (high - low) // 2
        spare = room - _weigh(
            SCORES, SIZES, BITS, PLACES, PAIRS, slot, count, n, capacity, listed, middle, BEYOND, total, TILE
        )
        fits = spare >= 0
        high, left = tl.where(fits, middle, high), tl.where(fits, spare, left)
        low = tl.where(fits, low, middle + 1)
    # Ties one bit below: the cut lies between the first and the last of them, which does not fit.
    firsts, lasts = tl.full([TILE], total, tl.int32), tl.full([TILE], -1, tl.int32)
    for first in range(0, count, TILE):
        bits, at, pairs = _entries(SCORES, SIZES, BITS, PLACES, PAIRS, slot, first, count, n, capacity, listed, TILE)
        tie = (bits == high - 1) & (pairs > 0)
        firsts, lasts = tl.where(tie, tl.minimum(firsts, at), firsts), tl.where(tie, tl.maximum(lasts, at), lasts)
    start, end = tl.min(firsts), tl.max(lasts)
    while start < end:
        middle = start + (end - start + 1) // 2
        fits = left >= _weigh(
            SCORES, SIZES, BITS, PLACES, PAIRS, slot, count, n, capacity, listed, high - 1, high - 1, middle, TILE
        )
        start, end = tl.where(fits, middle, start), tl.where(fits, end, middle - 1)
    tl.store(CUTS + slot * 2, high)
    tl.store(CUTS + slot * 2 + 1, start)


@triton.jit
def _list(KEPT, CUTS, FALLBACKS, COUNTS, BLOCKS, n, m, heads, columns, MASKED: tl.constexpr, COLS: tl.constexpr):
    """One row of blocks: the kept columns ascending, then the text's. KEPT: a map of scores, or 0 and 1 if MASKED."""
    row, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0)
    out = BLOCKS + (slot * rows + row) * columns
    kept = 0
    if row < n:
        line = KEPT + (slot * n + row) * m
        for first in range(0, m, COLS):
            cols = first + tl.arange(0, COLS)
            live = cols < m
            value = tl.load(line + cols, mask=live, other=0)
            if MASKED:
                keep = live & (value != 0)
            else:
                bits, least = value.to(tl.int32, bitcast=True), tl.load(CUTS + slot * 2)
                tie = (bits == least - 1) & (row * m + cols < tl.load(CUTS + slot * 2 + 1))
                keep = live & ((bits >= least) | tie)
            found = keep.to(tl.int32)
            tl.store(out + kept + tl.cumsum(found, 0) - 1, cols, mask=keep)
            kept += tl.sum(found)
        if not MASKED:  # noqa: SIM102 (as above)
            if kept == 0:
                top, best = -1, 0
                for first in range(0, m, COLS):
                    cols = first + tl.arange(0, COLS)
                    bits = tl.load(line + cols, mask=cols < m, other=-1.0).to(tl.int32, bitcast=True)
                    here = tl.max(bits)
                    at = tl.min(tl.where(bits == here, cols, m))
                    best = tl.where(here > top, at, best)
                    top = tl.maximum(here, top)
                tl.store(out, best)
                tl.atomic_add(FALLBACKS + slot // heads, 1)
                kept = 1
        first_dense = m
    else:
        first_dense = 0
    for first in range(first_dense, columns, COLS):
        cols = first + tl.arange(0, COLS)
        tl.store(out + kept + cols - first_dense, cols, mask=cols < columns)
    tl.store(COUNTS + slot * rows + row, kept + columns - first_dense)
