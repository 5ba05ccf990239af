"""Jenga's attention carving (Zhang et al., 2025, arXiv 2505.16864; github.com/dvlab-research/Jenga).

Tokens in the order of a generalised Hilbert curve, cut into blocks of 128. For each query block the softmax of pooled
scores over the video's blocks keeps max(floor((1 - drop) n), 1 + the number whose sorted sum stays within p), united
with the blocks that hold a neighbour (of 26) of one of its tokens. Text stays dense.
Deviations: the order is applied in each call's plan and not once to the model's input, which changes no result; a last
block that is not whole is pooled over its own tokens. Jenga's other parts (fewer steps, lower resolutions at first) are
no attention and are left out.

Its knob here is p, the original's .3 beside a drop of .75. `sparsity` means one calibrated p and no drop: then the
cumulative rule alone decides. The neighbours remain, so a sparsity that they rule out is refused; with
`neighbours: false` it can be calibrated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..hints import Count, Share, Switch
from ..kernels.select import draft_map, keep_share, plan_from_mask, pool
from ..knob import FARTHEST, Knobbed, OutOfReach
from ..layout import Box, Index, even_sizes

Vector = tuple[int, int, int]


@dataclass
class Jenga(Knobbed):
    """p: the original's knob; drop: counts beside a given p only; neighbours: keep them; block: tokens."""

    p: float | None = None
    drop: Share = 0.75
    neighbours: Switch = True
    block: Count = 128
    knob: ClassVar[str] = "p"

    def reach(self, grid: Vector, sparsity: float) -> None:
        """See `Calibrated.reach`: the neighbours are always kept."""
        sizes = even_sizes(math.prod(grid), self.block, torch.device("cpu")).double()
        kept = sizes @ adjacent(grid, self.block, sizes.device).double() @ sizes / sizes.sum() ** 2
        if self.neighbours and sparsity > 1 - kept + FARTHEST:
            raise OutOfReach(
                f"sparsity={sparsity:g} is out of reach of jenga at {'x'.join(map(str, grid))}, where its neighbours "
                f"alone keep {kept:.3f}; method.neighbours=false leaves them out"
            )

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        grid, video = call.layout.grid, call.layout.video
        order = curve(grid, q.device)
        sizes = even_sizes(video, self.block, q.device)
        line, length = Box(1, 1, self.block), (1, 1, video)
        weights = draft_map(*(pool(x.index_select(1, order), line, length) for x in (q, k)))
        least = 1 if self.asked else max(1, int((1 - self.drop) * len(sizes)))
        mask = keep_share(weights, self.value, least)
        if self.neighbours:
            mask = mask | adjacent(grid, self.block, q.device)
        return plan_from_mask(mask, Index(order[None, None]), sizes, self.block, call)


@functools.lru_cache(maxsize=16)
def curve(grid: Vector, device: torch.device) -> Tensor:
    """Frame-major token index of each place along the curve, int64 [video]; the longest side is walked first."""
    sides = sorted((2, 1, 0), key=lambda axis: -grid[axis])  # a tie goes to the width, then the height
    a, b, c = (_along(axis, grid[axis]) for axis in sides)
    tokens = [(t * grid[1] + y) * grid[2] + x for t, y, x in _walk((0, 0, 0), a, b, c)]
    return torch.tensor(tokens, device=device)


@functools.lru_cache(maxsize=16)
def adjacent(grid: Vector, block: int, device: torch.device) -> Tensor:
    """Which blocks [n, n] of the curve hold tokens that touch, themselves included."""
    order = curve(grid, torch.device("cpu"))
    n = -(-len(order) // block)
    owner = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) // block).view(grid)
    touch = torch.zeros(n, n, dtype=torch.bool)
    near = torch.nn.functional.pad(owner, (1, 1, 1, 1, 1, 1), value=-1)
    for t in range(3):
        for y in range(3):
            for x in range(3):
                other = near[t : t + grid[0], y : y + grid[1], x : x + grid[2]]
                touch[owner[other >= 0], other[other >= 0]] = True
    return touch.to(device)


def _along(axis: int, length: int) -> Vector:
    return tuple(length if i == axis else 0 for i in range(3))  # type: ignore[return-value]


def _plus(*vectors: Vector) -> Vector:
    return tuple(sum(parts) for parts in zip(*vectors, strict=True))  # type: ignore[return-value]


def _minus(a: Vector) -> Vector:
    return -a[0], -a[1], -a[2]


def _unit(a: Vector) -> Vector:
    return tuple((x > 0) - (x < 0) for x in a)  # type: ignore[return-value]


def _halves(a: Vector) -> tuple[Vector, Vector]:
    """A side in two, the first even if it can be, so that the walk can come back beside where it began."""
    length = abs(sum(a))
    half = abs(sum(a) // 2)  # of an odd side that is walked backwards the larger part
    if half % 2 and length > 2:
        half += 1
    t, y, x = _unit(a)
    first = half * t, half * y, half * x
    return first, _plus(a, _minus(first))


def _walk(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """The curve over the box that three signed sides span, from the corner `at` to that at the end of the side a."""
    width, height, depth = (abs(sum(side)) for side in (a, b, c))
    if not width * height * depth:
        return
    if sorted((width, height, depth))[1] == 1:
        yield from _line(at, max(a, b, c, key=lambda side: abs(sum(side))))
        return
    (a1, a2), (b1, b2), (c1, c2) = map(_halves, (a, b, c))
    end, up, out = _plus(a, _minus(_unit(a))), _minus(_unit(b)), _minus(_unit(c))
    if 2 * width > 3 * height and 2 * width > 3 * depth:  # long: two boxes along it
        yield from _walk(at, a1, b, c)
        yield from _walk(_plus(at, a1), a2, b, c)
    elif 3 * height > 4 * depth:  # flat: there along b, across, back
        yield from _walk(at, b1, c, a1)
        yield from _walk(_plus(at, b1), a, b2, c)
        yield from _walk(_plus(at, end, b1, up), _minus(b1), c, _minus(a2))
    elif 3 * depth > 4 * height:
        yield from _walk(at, c1, a1, b)
        yield from _walk(_plus(at, c1), a, b, c2)
        yield from _walk(_plus(at, end, c1, out), _minus(c1), _minus(a2), b)
    else:
        yield from _walk(at, b1, c1, a1)
        yield from _walk(_plus(at, b1), c, a1, b2)
        yield from _walk(_plus(at, b1, up, c, out), a, _minus(b1), _minus(c2))
        yield from _walk(_plus(at, end, b1, c, out), _minus(c), _minus(a2), b2)
        yield from _walk(_plus(at, end, b1, up), _minus(b1), c1, _minus(a2))


def _line(at: Vector, side: Vector) -> Iterator[Vector]:
    for _ in range(abs(sum(side))):
        yield at
        at = _plus(at, _unit(side))
