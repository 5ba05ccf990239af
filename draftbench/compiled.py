"""A network's attention as one operator of its compiled blocks, `torch.ops.draftbench.attend(q, k, v, handle)`.

What changes from call to call must not be a Python value: torch.compile guards on integers, so a step or a layer would
recompile the block each time, and after eight the block would silently run uncompiled. The handle is a tensor; what it
stands for, and what the session knows of the step, is looked up when the operator runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_open: dict[int, Attend] = {}
_numbers = itertools.count()


@contextmanager
def handles(attend: Attend, layers: int) -> Iterator[list[Tensor]]:
    """One handle a layer, int64 [2] on the CPU, that `torch.ops.draftbench.attend` takes until the block ends.

    attend(q, k, v, layer) gets q, k, v [B, S, H, D] and returns [B, S, H, D]; it is never compiled itself.
    """
    number = next(_numbers)
    _open[number] = attend
    try:
        yield [torch.tensor([number, layer]) for layer in range(layers)]
    finally:
        del _open[number]


def _attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    number, layer = handle.tolist()
    return _open[number](q, k, v, layer).contiguous()


torch.library.custom_op(
    "draftbench::attend", _attend, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor handle) -> Tensor"
).register_fake(lambda q, k, v, handle: q.new_empty(q.shape))
