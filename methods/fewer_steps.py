"""Control: the dense model with fewer steps, as many as take the time of another method: the cheapest speed-up."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from draftbench.methods.dense import Dense

from ..attention import DenseParts, Method, Request
from ..models import Model

TIMINGS = 3  # of each, in turn with dense; of one alone came more steps at 90% than at 75%


@dataclass
class FewerSteps(Dense):
    """like: the method whose time is to be met, at the sparsity of this one; timed in this process before the job."""

    like: Method | None = None
    share: float = field(default=1.0, init=False)  # of the steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.like, Method):
            raise ValueError(f"method.like must be a method, got {self.like!r}")

    @property
    def target(self) -> float:
        """See `Method.target`: the sparsity of the method whose time it takes."""
        assert self.like is not None
        return self.like.sparsity

    def meet(self, model: Model, parts: DenseParts) -> None:
        """See `Method.meet`: for the method whose time it takes."""
        assert self.like is not None
        self.like.meet(model, parts)

    def prepare(self, seconds: Callable[[Method], float]) -> None:
        """See `Method.prepare`."""
        assert self.like is not None
        shares = [seconds(self.like) / seconds(Dense()) for _ in range(TIMINGS)]
        self.share = min(1.0, statistics.median(shares))

    def request(self, request: Request) -> Request:
        """See `Method.request`."""
        return replace(request, steps=max(1, round(self.share * request.steps)))
