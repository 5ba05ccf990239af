"""Radial attention (Li et al., 2025, arXiv 2506.19852; github.com/mit-han-lab/radial-attention).

Tokens of frames d apart attend within a band |x - y| <= w(d) of their places in the frame: all of it up to one frame
apart, then, with d in [2^(g-1), 2^g), decay * 2^bits(frame) / 2^g, at least a block; where a band of that reach without
the decay is below a block, only every so-many-th frame distance is kept. A block is kept if more than 60% of the
columns that have kept tokens have over a third of them. The mask depends on the grid alone.

`sparsity`: blocks are taken in the order of the decay at which they enter, those that enter together nearest first, up
to the pairs that it allows; so no calibration is needed. Below decay 0 all bands shrink together, which the original
does not do: it cannot drop more than its bands of a block and its three full diagonals of frames leave. Of frames that
do not divide into blocks, under 1% of the blocks in our tests leave again at a larger decay; here they stay.
Deviations: any frame size (the official code cuts each pair of frames alone, and so loses pieces of frames that do not
divide into blocks); the sink on the first frame, which it has for Wan only, is a switch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..attention import Call, Method, Plan
from ..hints import Count
from ..kernels.select import plan_from_mask
from ..layout import Identity, even_sizes

MOST = 64.0  # decay: every band is wider than a frame long before
ROUNDS = 24
CHUNK = {"cpu": 2**18}  # (query block, key) pairs at a time; elsewhere 2^24


@dataclass
class Radial(Method):
    """decay: the original's knob (.95 for HunyuanVideo, .2 for Wan), of at least 0; if given, sparsity must be 0.

    block: tokens; first_frame_sink keeps the first frame's columns too.
    """

    decay: Annotated[float | None, "null or a number of at least 0", lambda x: x >= 0] = None
    block: Count = 128
    first_frame_sink: bool = False
    knob: ClassVar[str] = "decay"

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`; the mask depends on the grid alone."""
        frames, frame = call.layout.grid[0], call.layout.frame
        if self.decay is None:
            density = round(1 - self.sparsity, 9)
            mask = asked_mask(frames, frame, self.block, density, self.first_frame_sink, q.device)
        else:
            mask = decay_mask(frames, frame, self.block, self.decay, self.first_frame_sink, q.device)
        sizes = even_sizes(call.layout.video, self.block, q.device)
        mask = mask.expand(len(q), q.shape[2], -1, -1)
        return plan_from_mask(mask, Identity(), sizes, self.block, call, regular=True)


def widths(distance: Tensor, reach: Tensor, frame: int, block: int) -> Tensor:
    """Half the band between frames at a distance, in tokens, -1 for none; reach: decay, or less than 0 down to -1."""
    group = torch.floor(torch.log2(distance.clamp(min=1).double())) + 1
    length = 2.0 ** (frame.bit_length() - group)
    band = torch.where(distance <= 1, frame, (length * reach.clamp(min=0)).clamp(min=block))
    every = torch.where(length < block, (block / length).floor(), 1)
    return torch.where((distance > 1) & (distance % every != 0), -1, band * (1 + reach.clamp(max=0)))


def kept_blocks(frames: int, frame: int, block: int, reach: Tensor) -> Tensor:
    """Kept blocks [n, n], each at its own reach [n, n]."""
    video, n, device = frames * frame, len(reach), reach.device
    token = torch.arange(video, device=device)
    place = (token % frame).int()
    # Pieces of key blocks that lie in one frame each: the band has one width in a piece.
    pieces = torch.cat([token[::block], token[::frame]]).unique()
    piece = torch.searchsorted(pieces, token, right=True) - 1
    kept = torch.empty_like(reach, dtype=torch.bool)
    for rows in torch.arange(n, device=device)[:, None].split(max(1, CHUNK.get(device.type, 2**24) // video)):
        start, end = rows * block, (rows * block + block).clamp(max=video)
        own = reach[rows[:, 0]][:, pieces // block]
        inside = torch.zeros(len(rows), video, dtype=torch.int32, device=device)
        for later in range((block - 1) // frame + 2):  # the frames that a block may touch
            t = start // frame + later
            first, last = (start - t * frame).clamp(min=0).int(), (end - t * frame).clamp(max=frame).int() - 1
            width = widths((pieces // frame - t).abs(), own, frame, block).floor().int()[:, piece]
            inside += (torch.minimum(place + width, last) - torch.maximum(place - width, first) + 1).clamp(min=0)
        dense, some = (_sums(x, block) for x in (inside * 3 > end - start, inside > 0))
        kept[rows[:, 0]] = dense > 0.6 * some
    return kept


def _sums(x: Tensor, block: int) -> Tensor:
    """Sums [r, n] over blocks of the columns of x, the last of which may be smaller."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block)).unflatten(1, (-1, block)).sum(-1)


def _sink(n: int, frame: int, block: int, on: bool, device: torch.device) -> Tensor:
    return (torch.arange(n, device=device) * block < frame) & on


@functools.lru_cache(maxsize=16)
def decay_mask(frames: int, frame: int, block: int, decay: float, sink: bool, device: torch.device) -> Tensor:
    """The original's blocks [n, n] at a decay."""
    n = -(-frames * frame // block)
    reach = torch.full((n, n), decay, dtype=torch.float64, device=device)
    return kept_blocks(frames, frame, block, reach) | _sink(n, frame, block, sink, device)


@functools.lru_cache(maxsize=8)
def entry(frames: int, frame: int, block: int, device: torch.device) -> Tensor:
    """The least reach at which each block is kept, float64 [n, n]; MOST for those that no decay keeps."""
    n = -(-frames * frame // block)
    # Halved in log(2 + reach): half of the range would else be spent on decays that no longer matter.
    low = torch.zeros(n, n, dtype=torch.float64, device=device)
    high = torch.full_like(low, math.log(2 + MOST))
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        kept = kept_blocks(frames, frame, block, middle.exp() - 2)
        low, high = torch.where(kept, low, middle), torch.where(kept, middle, high)
    return (high.exp() - 2).float()  # what enters together is equal


@functools.lru_cache(maxsize=16)
def asked_mask(frames: int, frame: int, block: int, density: float, sink: bool, device: torch.device) -> Tensor:
    """The first blocks [n, n] to enter, as many as a density of token pairs allows, the sink's before all others."""
    when = entry(frames, frame, block, device).clone()
    n = len(when)
    index = torch.arange(n, device=device)
    when[:, _sink(n, frame, block, sink, device)] = -2
    when[index, index] = -3  # no row is left with nothing
    nearest = (index[:, None] - index).abs().flatten().argsort(stable=True)
    ranked = nearest[when.flatten()[nearest].argsort(stable=True)]
    sizes = even_sizes(frames * frame, block, device).double()
    pairs = (sizes[:, None] * sizes).flatten()[ranked].cumsum(0)
    kept = pairs <= density * (frames * frame) ** 2 + 0.5
    mask = torch.empty_like(kept).scatter_(0, ranked, kept).view(n, n)
    return mask | (index[:, None] == index)
