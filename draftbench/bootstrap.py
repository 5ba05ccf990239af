"""What can be said of a mean over clips: a seeded bootstrap of prompts, then of seeds within them, and Holm's rule.

The 95% interval lies between the 2.5% and 97.5% quantiles of the drawn means. The two-sided p-value of "the mean is 0"
is read from the same draws: twice the share of means on the far side of 0 (those at 0 count as far), with one added to
the count and to the draws, so that it is never 0. Holm (1979) multiplies the smallest of m p-values by m, the next by
m - 1 and so on, never below the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_CHUNK = 500  # draws at once


@dataclass(frozen=True)
class Estimate:
    """A mean over clips, its 95% interval and the p-value of 0 (None for a single clip); bound: no draw crossed 0, so
    that p is the least that so many draws can tell."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    bound: bool = False


def estimate(by_prompt: Mapping[str, Sequence[float]], draws: int, seed: int) -> Estimate:
    """The mean of all clips of all prompts; `draws` resamples from `seed`, the same for the same numbers of clips."""
    groups = [np.asarray(by_prompt[prompt], float) for prompt in sorted(by_prompt)]
    values = np.concatenate(groups)
    if len(values) == 1:
        return Estimate(float(values[0]), None, None, None)
    counts, drawn = _counts(tuple(map(len, groups)), draws, seed)
    means = counts @ values / drawn
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, float(1 + tail) * least_p(draws))
    return Estimate(float(values.mean()), float(low), float(high), p, bool(tail == 0))


def least_p(draws: int) -> float:
    """The p-value of a mean of which no draw lies on the far side of 0."""
    return 2 / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number, in the order given."""
    corrected, floor = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        floor = max(floor, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = floor
    return corrected


@lru_cache(maxsize=2)
def _counts(sizes: tuple[int, ...], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each clip is in each draw, [draws, clips], and how many each draw has; float64, for a product.

    sizes: the clips of each prompt, which lie together.
    """
    rng = np.random.default_rng(seed)
    groups, clips = np.array(sizes), sum(sizes)
    starts, most = np.cumsum(groups) - groups, groups.max()
    counts = np.empty((draws, clips))
    for first in range(0, draws, _CHUNK):
        n = min(_CHUNK, draws - first)
        prompts = rng.integers(len(groups), size=(n, len(groups)))
        size = groups[prompts][..., None]
        drawn = starts[prompts][..., None] + (rng.random((n, len(groups), most)) * size).astype(int)
        live = np.arange(most) < size  # as many clips of a prompt as it has
        at = (np.arange(n)[:, None, None] * clips + drawn)[live]
        counts[first : first + n] = np.bincount(at, minlength=n * clips).reshape(n, clips)
    return counts, counts.sum(1)
