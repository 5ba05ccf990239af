"""Sliding tile attention (Zhang et al., 2025, arXiv 2502.04507; github.com/hao-ai-lab/FastVideo), "uniform" windows.

Tiles of t x h x w tokens; a query tile keeps the tiles within a window around it, the window shifted inwards at the
grid's edges. The paper searches windows per step, layer and head, as `sta_searched` does; this is the ablation without
the search: all layers and steps have the same windows, and the heads are split between the two that meet the sparsity
together. Any grid, edge tiles may be smaller. A window of an even number of tiles has that many and reaches one
further back; the official code makes it one more, where there is one.

Its own knob is a window, in tiles, for all heads: 3x3x3 is one of the paper's, of 18x24x24 tokens. It has no default.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Call, Method, Plan
from ..hints import Tile
from ..kernels.select import box_plan
from ..layout import Box, owners

Window = tuple[int, int, int]
BLOCK = 128  # tokens; a larger tile is listed as parts of it, which more kernels take and all run as fast


@dataclass
class STA(Method):
    """tile: (t, h, w) tokens; window: (t, h, w) tiles, all of an axis that has fewer; if given, sparsity must be 0."""

    tile: Tile = (6, 8, 8)
    window: Window | None = None
    windows: str = field(default="uniform", init=False)  # for the records
    knob: ClassVar[str] = "window"
    label: ClassVar[str] = "uniform windows"

    def __post_init__(self) -> None:
        super().__post_init__()
        tiles = self.window if isinstance(self.window, Sequence) else ()
        if self.window is not None and (len(tiles) != 3 or not all(isinstance(n, int) and n >= 1 for n in tiles)):
            raise ValueError(f"method.window must be null or three numbers of tiles, 1 or more, got {self.window}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`; the windows depend on the grid alone."""
        box, grid, heads = Box(*(int(n) for n in self.tile)), call.layout.grid, q.shape[2]
        if self.window is None:
            windows = choose_windows(box, grid, heads, round(1 - self.sparsity, 9))
        else:
            t, h, w = (min(n, most) for n, most in zip(self.window, box.counts(grid), strict=True))
            windows = ((t, h, w),) * heads
        return window_plan(box, windows, q, call)


def window_plan(box: Box, windows: Sequence[Window], q: Tensor, call: Call) -> Plan:
    """The plan of a window in tiles for each head."""
    grid = call.layout.grid
    mask = torch.stack([window_mask(box, grid, window, q.device) for window in windows])
    part = box.cut(BLOCK)
    if part != box:
        owner = owners(part, box, grid, q.device)
        mask = mask[:, owner][:, :, owner]
    return box_plan(mask.expand(len(q), -1, -1, -1), part, call)


def _axis_masks(box: Box, grid: tuple[int, int, int], window: Window) -> list[Tensor]:
    """Kept tiles along each axis, [n, n] bool."""
    masks = []
    for n, size in zip(box.counts(grid), window, strict=True):
        tile = torch.arange(n)
        first = (tile - size // 2).clamp(0, n - size)
        masks.append((tile >= first[:, None]) & (tile < first[:, None] + size))
    return masks


@functools.lru_cache(maxsize=256)
def window_mask(box: Box, grid: tuple[int, int, int], window: Window, device: torch.device) -> Tensor:
    """Kept tiles [n, n] of a window of (t, h, w) tiles."""
    t, y, x = _axis_masks(box, grid, window)
    mask = t[:, None, None, :, None, None] & y[None, :, None, None, :, None] & x[None, None, :, None, None, :]
    n = t.shape[0] * y.shape[0] * x.shape[0]
    return mask.reshape(n, n).to(device)


def window_density(box: Box, grid: tuple[int, int, int], window: Window) -> float:
    """Kept token pairs of a window over all video pairs; the axes are independent, so it is a product."""
    density = 1.0
    sides = zip(grid, (box.t, box.h, box.w), _axis_masks(box, grid, window), strict=True)
    for n, b, mask in sides:
        sizes = torch.full((len(mask),), float(b))
        sizes[-1] = n - b * (len(mask) - 1)
        density *= float(sizes @ mask.float() @ sizes) / n**2
    return density


@functools.lru_cache(maxsize=256)
def choose_windows(box: Box, grid: tuple[int, int, int], heads: int, density: float) -> tuple[Window, ...]:
    """One window a head, of two whose mix is nearest to `density`, the least lopsided among near-equals."""
    choices = []
    for a, b in itertools.combinations_with_replacement(nearest_windows(box, grid, density, 24), 2):
        for mix in range(1, heads + 1):
            miss = abs(mix * a[0] + (heads - mix) * b[0] - heads * density) / heads
            choices.append((max(0.0, miss - 0.005) * 20 + a[1] + b[1], mix, a, b))
    best = min(choices)
    _, mix, a, b = best
    return (a[2],) * mix + (b[2],) * (heads - mix)


@functools.lru_cache(maxsize=256)
def nearest_windows(
    box: Box, grid: tuple[int, int, int], density: float, count: int
) -> list[tuple[float, float, Window]]:
    """(Density, how lopsided it is, window) of the windows nearest to a density."""
    counts, family = box.counts(grid), []
    for t, h, w in itertools.product(*(range(1, n + 1) for n in counts)):
        shares = [size / n for size, n in zip((t, h, w), counts, strict=True)]
        family.append((window_density(box, grid, (t, h, w)), max(shares) - min(shares), (t, h, w)))
    return sorted(family, key=lambda item: abs(item[0] - density))[:count]
