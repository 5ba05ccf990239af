"""draftbench: sparse attention for video diffusion transformers, compared fairly."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`accelerate`, on first use: this package alone imports nothing."""
    if name == "accelerate":
        from .models.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
