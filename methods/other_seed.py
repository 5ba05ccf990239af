"""Control: the dense video of another seed: how far two dense videos of one prompt lie apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from draftbench.methods.dense import Dense

from ..attention import Request


@dataclass
class OtherSeed(Dense):
    """offset: added to every seed."""

    offset: int = 1_000_003

    def request(self, request: Request) -> Request:
        """See `Method.request`."""
        return replace(request, seeds=tuple(seed + self.offset for seed in request.seeds))
