"""Control: everything is kept, but run by the sparse executor's kernel: the noise floor of another dense kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention import Call, Method, Plan
from ..kernels.select import full_plan


@dataclass
class OtherKernel(Method):
    """Whatever sparsity a sweep asks of it, it drops nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sparsity = 0.0

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        return full_plan(call, q.shape[2])
