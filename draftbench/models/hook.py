"""What reaches into a diffusers pipeline (0.42.1): its self-attention goes to a session, then all is as it was.

A family subclasses `Hook` to say where its transformer keeps things and `Processor` for the arithmetic around its
attention. Which attentions are the video's own is known by where they are in a block; cross-attention and the text's
refiners stay untouched. The step is how often the scheduler has stepped in this generation, the branch comes from the
name that the pipeline gives each forward, the grid from the tensors of that forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import Session
from ..compiled import handles
from ..layout import Layout

BRANCHES = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}


class Processor:
    """A block's attention processor; a family's `__call__` repeats the arithmetic of the one that it replaces.

    replaces: the name of that class in diffusers; a block with another one is refused, for it may compute otherwise.
    """

    replaces: ClassVar[str]

    def __init__(self, handle: Tensor):
        self.handle = handle

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The session's attention over [video | text] q, k, v [B, S, H, D], heads joined: [B, S, H * D]."""
        out: Tensor = torch.ops.draftbench.attend(q, k, v, self.handle)
        return out.flatten(2, 3)

    def attend_joint(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """The same where the last `text` tokens are text with padding: the video's output and the text's, there zero.

        The padding is cropped in the operator, for the length of a prompt would be another graph here.
        """
        video, rest = torch.ops.draftbench.attend_joint(q, k, v, self.handle, text)
        return video.flatten(2, 3), rest.flatten(2, 3)


class Hook:
    """Follows one pipeline while it is `patched`: which step and branch run, how long the text is, which grid.

    seeds: one a clip, for methods that draw; None counts from 0. last: stop after that many steps, None for all.
    Raises ValueError, naming what it is, for a pipeline whose attention it cannot stand in for.
    """

    pipeline: ClassVar[str]  # the diffusers classes of the pipeline and its transformer
    transformer: ClassVar[str]
    processor: ClassVar[type[Processor]]
    attention: ClassVar[str] = "attn1"  # a block's attribute that holds the self-attention

    @staticmethod
    def blocks(transformer: Any) -> tuple[Any, ...]:
        """The transformer's blocks, a layer each, in the order they run; one list of them unless overridden."""
        return tuple(transformer.transformer_blocks)

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """The token grid (T, H, W) of a forward, by the transformer's config and its named arguments."""
        raise NotImplementedError

    @staticmethod
    def text_lengths(inputs: dict[str, Any]) -> Tensor:
        """Real text tokens of each item that take part in the self-attention, int64 [B]; none unless overridden."""
        hidden: Tensor = inputs["hidden_states"]
        return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)

    @staticmethod
    def switches(pipe: Any) -> tuple[int, ...]:
        """The steps of the generation that begins from which another transformer runs; none unless overridden."""
        return ()

    def __init__(self, pipe: Any, session: Session, seeds: tuple[int, ...] | None = None, last: int | None = None):
        self.pipe, self.session, self.seeds, self.last = pipe, session, seeds, last
        self.transformers = transformers(pipe)
        self.step, self.branch, self.both = -1, "cond", False
        # Steps that the scheduler made. Timesteps do not tell: some repeat them, and diffusers rounds some to bfloat16.
        self.taken = 0
        self.timesteps: Tensor | None = None  # of this generation; the scheduler makes new ones for each
        self.network: Any = None
        check(self)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside, the pipeline's self-attention goes to the session; afterwards, always, it is as it was."""
        with ExitStack() as stack:
            for transformer in self.transformers:
                blocks = self.blocks(transformer)
                found = stack.enter_context(handles(self.attend, len(blocks)))
                name_branch = functools.partial(self.cache_context, transformer.cache_context)
                stack.enter_context(shadowed(transformer, "cache_context", name_branch))
                stack.callback(transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove)
                for layer, block in enumerate(blocks):
                    attention = getattr(block, self.attention)
                    stack.callback(setattr, attention, "processor", attention.processor)
                    attention.processor = self.processor(found[layer])
            scheduler = self.pipe.scheduler
            stack.enter_context(shadowed(scheduler, "step", self.followed(scheduler.step)))
            stack.callback(self.session.states.clear)  # of a generation that was broken off
            yield

    @contextmanager
    def cache_context(self, name_branch: Callable[..., Any], name: str, **where: Any) -> Iterator[None]:
        """The pipeline names the guidance branch of each forward by entering this context."""
        if name not in (*BRANCHES, "cond_uncond"):
            raise ValueError(f"{self.pipeline} runs a guidance branch {name!r}; known: {', '.join(BRANCHES)}")
        self.branch = name
        with name_branch(name, **where):
            yield

    def before_forward(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Tell the session of a new generation and a new step; note the forward's text and grid."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        self.lengths = self.text_lengths(inputs)
        if scheduler.timesteps is not self.timesteps:
            self.timesteps, self.step, self.taken = scheduler.timesteps, -1, 0
            self.both = self.branch == "cond_uncond" and pipe.guidance_scale > 1  # one batch, unconditional items first
            self.clips = len(self.lengths) // (2 if self.both else 1)
            self.session.start(self.clips, self.switches(pipe))
        if module is not self.network:  # of several that share the steps, as in Wan 2.2
            self.network = module
            self.session.states.clear()
        if self.taken != self.step:
            self.step = self.taken
            # What the pipeline tells of the noise: Mochi's scheduler counts the other way round.
            self.session.at_step(self.step, len(scheduler.timesteps), float(pipe._current_timestep))
        self.layout = Layout(self.grid(module.config, inputs), int(self.lengths.max()))

    def followed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's step, counted, after the last of which the session is told; it keeps its signature."""

        @functools.wraps(step)
        def follow(*args: Any, **kwargs: Any) -> Any:
            result, steps = step(*args, **kwargs), len(self.pipe.scheduler.timesteps)
            self.taken += 1
            last = min(self.last or steps, steps)
            if self.taken == last:
                self.session.finish()
                if last < steps:
                    self.pipe._interrupt = True  # the pipeline's own switch: it skips the steps that are left
            return result

        return follow

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """The session's attention of one layer over q, k, v [B, S, H, D] without the padding that no item needs."""
        q, k, v = (x[:, : self.layout.length] for x in (q, k, v))
        seeds = tuple(range(self.clips)) if self.seeds is None else self.seeds
        branch = "both_reversed" if self.both else BRANCHES.get(self.branch, "cond")
        return self.session(
            q, k, v, layout=self.layout, text_lengths=self.lengths, layer=layer, branch=branch,
            seeds=seeds * 2 if self.both else seeds, head_offset=0,
        )  # fmt: skip


def transformers(pipe: Any) -> tuple[Any, ...]:
    """The denoisers of a pipeline; some have a second one for the later steps."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return tuple(transformer for transformer in found if transformer is not None)


def check(hook: Hook) -> None:
    """Raise ValueError, naming it, for what would run dense or wrong without a word."""
    for part in (hook.pipe, *hook.transformers):
        kind = type(part).__name__
        places = {str(place) for place in (getattr(part, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
        if len(places) > 1:
            raise ValueError(f"{kind} is spread over devices {', '.join(sorted(places))}; one is supported so far")
        if getattr(part, "_parallel_config", None) is not None:
            raise ValueError(f"{kind} has context or tensor parallelism enabled, which is not supported so far")
        if getattr(part, "_compiled_call_impl", None) is not None:  # it would trace what follows the pipeline
            raise ValueError(
                f"{kind} is compiled in place, by its own compile(); compile it by compile_repeated_blocks() or "
                f"torch.compile({kind.lower()}) instead"
            )
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and any("faster_cache" in name for name in registry.hooks):  # it halves batches inside
            raise ValueError(f"{kind} has FasterCache enabled, which is not supported so far")
    for transformer in hook.transformers:
        for block in hook.blocks(transformer):
            found = type(getattr(block, hook.attention).processor).__name__
            if found != hook.processor.replaces:
                kind = type(transformer).__name__
                raise ValueError(f"{kind} must have its {hook.processor.replaces} in every block, got {found}")


def project(x: Tensor, heads: int, linears: tuple[Any, ...], norms: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, S, C] to q, k, v [B, S, heads, D], q and k normalised by head."""
    q, k, v = (linear(x).unflatten(2, (heads, -1)) for linear in linears)
    q, k = (y if norm is None else norm(y) for y, norm in zip((q, k), norms, strict=True))
    return q, k, v


def in_patches(sizes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, int, int]:
    """A latent's (T, H, W) in patches."""
    return tuple(size // edge for size, edge in zip(sizes, patch, strict=True))  # type: ignore[return-value]


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this instance in front of its class's, or of one that the instance has of its user."""
    own = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(own)
