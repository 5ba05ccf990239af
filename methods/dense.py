"""Dense attention: the baseline. Every call runs the dense kernel, so there is nothing to plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..attention import Method


@dataclass
class Dense(Method):
    """Whatever sparsity a sweep asks of it, it drops nothing: its sparsity is 0, and so is its records'."""

    sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sparsity = 0.0
