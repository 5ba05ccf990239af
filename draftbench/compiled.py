"""A network's attention as one operator of its compiled blocks, `torch.ops.draftbench.attend(q, k, v, handle)`, or
`attend_joint` where text with padding takes part.

What changes from call to call must not be a Python value: torch.compile guards on integers, so a step or a layer would
recompile the block each time, and after eight the block would silently run uncompiled. The handle is a tensor; what it
stands for, and what the session knows of the step and of the text's length, is looked up when the operator runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_open: dict[int, Attend] = {}
_numbers = itertools.count()


@contextmanager
def handles(attend: Attend, layers: int) -> Iterator[list[Tensor]]:
    """One handle a layer, int64 [2] on the CPU, that the operators take until the block ends.

    attend(q, k, v, layer) gets q, k, v [B, S, H, D] and returns [B, S, H, D], or fewer tokens if it leaves padding at
    the end out, which `attend_joint` fills up; it is never compiled itself.
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


def _attend_joint(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, text: int) -> tuple[Tensor, Tensor]:
    number, layer = handle.tolist()
    out, video = _open[number](q, k, v, layer), q.shape[1] - text
    return out[:, :video].contiguous(), F.pad(out[:, video:], (0, 0, 0, 0, 0, q.shape[1] - out.shape[1]))


def _joint_shapes(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, text: int) -> tuple[Tensor, Tensor]:
    batch, length, *head = q.shape
    return q.new_empty((batch, length - text, *head)), q.new_empty((batch, text, *head))


# The last `text` of the S tokens come out on their own, zero where they are padding: what is padded to a fixed length
# inside the operator costs no copy of the video.
torch.library.custom_op(
    "draftbench::attend_joint", _attend_joint, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor handle, SymInt text) -> (Tensor, Tensor)",
).register_fake(_joint_shapes)  # fmt: skip
