"""Where tokens lie: the grid of a video, its text, and how an order and its blocks cut the sequence.

No torch.nn, no model: integers and index tensors only. The canonical sequence is [video | text], video tokens frame by
frame, rows, then columns (frame-major). An *order* rearranges the video tokens; text always stays behind them.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The token grid (T, H, W) after patching, and the longest real text of the batch in tokens."""

    grid: tuple[int, int, int]
    text: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be three positive sizes (frames, height, width), got {self.grid}")
        if self.text < 0:
            raise ValueError(f"text must be at least 0 tokens, got {self.text}")

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def frame(self) -> int:
        """Number of tokens in a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        """Number of tokens, text included."""
        return self.video + self.text


@dataclass(frozen=True)
class Identity:
    """Frame-major order, as the tokens come."""


@dataclass(frozen=True)
class Box:
    """Boxes of t x h x w tokens in grid order, each box contiguous; boxes at the grid's edge may be smaller.

    stacked: the frames stand on one another as a single tall one, so that a box may end in the next frame's top and
    only the last frame's are cut; for a height that does not divide.
    """

    t: int
    h: int
    w: int
    stacked: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(f"box sizes must be positive, got {self.t}x{self.h}x{self.w}")

    def over(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid that the boxes cut."""
        return (1, grid[0] * grid[1], grid[2]) if self.stacked else grid

    def counts(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Number of boxes along each axis of `over(grid)`."""
        return tuple(-(-n // b) for n, b in zip(self.over(grid), (self.t, self.h, self.w), strict=True))  # type: ignore[return-value]

    def cut(self, tokens: int) -> Box:
        """The box in equal parts of `tokens` tokens, cut along t first; as it is if it has none such."""
        parts = itertools.product(*(_divisors(side) for side in (self.w, self.h, self.t)))
        fit = next(((t, h, w) for w, h, t in parts if t * h * w == tokens), (self.t, self.h, self.w))
        return Box(*fit, stacked=self.stacked)


def _divisors(number: int) -> list[int]:
    """The largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


@dataclass(frozen=True, eq=False)
class Index:
    """A permutation of the video tokens for each batch item and head: int tensor [B or 1, H or 1, video]."""

    tokens: Tensor


Order: TypeAlias = Identity | Box | Index


@functools.lru_cache(maxsize=64)
def box_order(box: Box, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Frame-major token index of each place in box order, int64 [video]."""
    axes = [torch.arange(n, device=device) for n in box.over(grid)]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    _, height, width = box.counts(grid)
    region = ((t // box.t) * height + y // box.h) * width + x // box.w
    return torch.argsort(region.flatten(), stable=True)


@functools.lru_cache(maxsize=64)
def box_sizes(box: Box, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Number of tokens in each box, int32 [boxes], in box order."""
    sides = []
    for n, b in zip(box.over(grid), (box.t, box.h, box.w), strict=True):
        side = torch.full((-(-n // b),), b, dtype=torch.int32)
        side[-1] = n - b * (len(side) - 1)
        sides.append(side)
    return (sides[0][:, None, None] * sides[1][:, None] * sides[2]).flatten().to(device)


@functools.lru_cache(maxsize=64)
def owners(part: Box, box: Box, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """The box that each of its parts lies in, int64 [parts], both in grid order; sides of a box are multiples."""
    axes = [torch.arange(n, device=device) for n in part.counts(grid)]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    _, height, width = box.counts(grid)
    owner = (t * part.t // box.t * height + y * part.h // box.h) * width + x * part.w // box.w
    return owner.flatten()


def permutation(order: Order, layout: Layout, device: torch.device) -> Tensor | None:
    """Token index of each place of the ordered sequence, int64 [B or 1, H or 1, length]; None for `Identity`."""
    if isinstance(order, Identity):
        return None
    video = box_order(order, layout.grid, device)[None, None] if isinstance(order, Box) else order.tokens.long()
    text = torch.arange(layout.video, layout.length, device=device).expand(*video.shape[:2], -1)
    return torch.cat([video, text], -1)


@functools.lru_cache(maxsize=64)
def even_sizes(total: int, block: int, device: torch.device) -> Tensor:
    """Sizes of consecutive blocks of `block` tokens that cut `total`, int32; the last may be smaller."""
    sizes = [block] * (total // block) + ([total % block] if total % block else [])
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def offsets(video_sizes: Tensor, layout: Layout, text_lengths: Tensor, block: int) -> Tensor:
    """Starts of the video blocks, then of text blocks of `block` tokens, and the end: int32 [B, H or 1, blocks + 1].

    video_sizes: [n] or [B or 1, H or 1, n], summing to the video tokens. text_lengths: real text tokens [B]; blocks
    beyond an item's real text are empty, which is how padding stays out of every kernel and every count.
    """
    if video_sizes.ndim == 1:
        video_sizes = video_sizes[None, None]
    start = torch.nn.functional.pad(video_sizes.cumsum(-1), (1, 0))
    batch = len(text_lengths)
    start = start.expand(batch, *start.shape[1:])
    if layout.text:
        ends = torch.arange(block, layout.text + block, block, device=start.device).clamp(max=layout.text)
        text = layout.video + torch.minimum(ends[None, None], text_lengths.to(start.device)[:, None, None])
        start = torch.cat([start, text.expand(*start.shape[:2], -1)], -1)
    return start.to(torch.int32)
