"""`draftbench.accelerate`: sparse attention in a diffusers pipeline of one's own, through the adapters' hook."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from draftbench.kernels import dense as dense_kernel
from draftbench.kernels import resolve, run

from ..attention import DenseParts, Method, Session
from ..knob import Calibrated, name
from .hook import Hook, transformers

# The class of a pipeline, and where its hook is; named here so that no family is imported for another.
HOOKS = {
    "CogVideoXPipeline": "cogvideox.CogVideoXHook",
    "HunyuanVideoPipeline": "hunyuan_video.HunyuanVideoHook",
    "HunyuanVideo15Pipeline": "hunyuan_video_15.HunyuanVideo15Hook",
    "LTXPipeline": "ltx.LTXHook",
    "MochiPipeline": "mochi.MochiHook",
    "WanPipeline": "wan.WanHook",
}


@contextmanager
def accelerate(
    pipe: Any, method: str | Method = "draft", sparsity: float = 0.9, dense: DenseParts | None = None,
    executor: str = "auto",
) -> Iterator[Session]:  # fmt: skip
    """Inside, every call of a diffusers pipeline runs its self-attention sparsely; afterwards it is as it was.

    pipe: one of `HOOKS`, at any size that it takes. method: a name in methods/ with its default settings at `sparsity`,
    or a method made with its own. dense: the steps and layers that stay dense, by default the first quarter of the
    steps. executor: as in conf/config.yaml. Gives the session, whose `meter` has the sparsity of the last call.
    Raises ValueError, naming what is allowed, for another pipeline, one on several devices, a wrong argument or a
    method that must be calibrated; RuntimeError for an executor that can't run here.
    """
    family = type(pipe).__name__
    if family not in HOOKS:
        raise ValueError(f"pipe must be one of {', '.join(HOOKS)}, got {family}")
    module, _, hooked = HOOKS[family].partition(".")
    if not isinstance(method, str | Method):
        raise ValueError(f"method must be the name of one, or one made as methods.draft.Draft(0.9), got {method!r}")
    if not isinstance(sparsity, Real):
        raise ValueError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
    if not isinstance(dense, DenseParts | None):
        raise ValueError(f"dense must be a draftbench.attention.DenseParts or None, got {dense!r}")
    hook: type[Hook] = getattr(importlib.import_module(f".{module}", __package__), hooked)
    kind = named(method) if isinstance(method, str) else type(method)
    if kind.request is not Method.request:
        raise ValueError(f"method={kind.__name__} changes seeds or steps, which are not the hook's to change")
    chosen = kind(sparsity=sparsity) if isinstance(method, str) else method
    if isinstance(chosen, Calibrated) and chosen.asked and chosen.sparsity and not chosen.calibrated:
        file, own = name(chosen), f"{kind.__name__}({chosen.knob}=...)"
        raise ValueError(
            f"method={file!r} at sparsity={chosen.sparsity:g} needs a calibration, which one's own pipeline has not"
            f"{f'; give draftbench.methods.{file}.{own}' if chosen.givable else ''}"
        )
    parts = dense or DenseParts()
    if chosen.sparse:
        parts.check(min(len(hook.blocks(network)) for network in transformers(pipe)))
    plans = run(resolve(executor, pipe._execution_device))
    session = Session(chosen, plans, dense_kernel.run, parts)
    with hook(pipe, session).patched():
        yield session


def named(given: str) -> type[Method]:
    """A method by the name of its file in methods/; ValueError with the known ones for another."""
    methods = importlib.import_module("draftbench.methods")
    known = sorted(path.stem for path in Path(methods.__path__[0]).glob("*.py") if path.stem != "__init__")
    if given not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {given!r}")
    module = importlib.import_module(f"{methods.__name__}.{given}")
    (kind,) = (
        kind for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    )  # fmt: skip
    return kind
