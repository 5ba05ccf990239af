"""What a method is, what it is told, and the meter that counts what was really executed.

A method decides a `Plan` for one attention call; an executor (draftbench.kernels) runs the plan and counts the
(query, key) pairs of the lists it read, so density is measured and never claimed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor

from . import hints
from .layout import Identity, Layout, Order
from .parts import part

if TYPE_CHECKING:
    from .models import Model


@dataclass
class Plan:
    """Which (query, key) blocks one attention call executes.

    q_order, kv_order: how the video tokens are arranged before they are cut into blocks; text stays behind.
    q_offsets, kv_offsets: block starts and the end in the ordered sequence, int32 [B, H or 1, blocks + 1].
    counts: kept key blocks of each query block, int32 [B, H, q_blocks].
    blocks: their indices, int32 [B, H, q_blocks, capacity]; entries from counts on are never read.
    q_block, kv_block: upper bounds of the block sizes in tokens.
    fallbacks: query blocks of each item that kept nothing and were given their best block, int64 [B] or None.
    regular: the blocks are the order's boxes in turn, or `q_block` tokens each as they come, and behind them the text's
    in `q_block` tokens each; the last of each kind may be smaller. What offsets on a device cannot tell the host.
    """

    q_offsets: Tensor
    kv_offsets: Tensor
    counts: Tensor
    blocks: Tensor
    q_block: int
    kv_block: int
    q_order: Order = field(default_factory=Identity)
    kv_order: Order = field(default_factory=Identity)
    fallbacks: Tensor | None = None
    regular: bool = False

    @property
    def live(self) -> Tensor:
        """Which entries of `blocks` count, bool of their shape."""
        return torch.arange(self.blocks.shape[-1], device=self.blocks.device) < self.counts[..., None]


class Executor(Protocol):
    """Runs a plan: (q, k, v [B, S, H, D], plan, layout) -> (output [B, S, H, D], LSE [B, H, S], natural log)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]: ...


@dataclass
class Meter:
    """Counts (query, key) pairs of each clip on the device, by the lists that the executor read; reading it waits.

    `clips` is their number; a batch that holds both guidance branches, one behind the other, counts to its clips.
    """

    clips: int = 1
    video_kept: Tensor | float = 0.0
    video_all: Tensor | float = 0.0
    kept: Tensor | float = 0.0
    all: Tensor | float = 0.0
    fallbacks: Tensor | float = 0.0
    counting: bool = True  # off in timed runs on a GPU, whose dense calls have no lists to sum
    calls: int = 0
    sparse_calls: int = 0

    def _per_clip(self, items: Tensor) -> Tensor:
        return items.double().view(-1, self.clips).sum(0)

    def add_dense(self, layout: Layout, text_lengths: Tensor, heads: int) -> None:
        """One dense call: every real pair is executed."""
        self.calls += 1
        if not self.counting:
            return
        pairs = self._per_clip((layout.video + text_lengths.double()) ** 2 * heads)
        self.kept, self.all = self.kept + pairs, self.all + pairs

    def add_plan(self, plan: Plan, layout: Layout, text_lengths: Tensor, heads: int, more: bool = False) -> None:
        """One executed plan, summed from its lists; more: of a call of which another plan is counted as a whole."""
        if not more:
            self.calls, self.sparse_calls = self.calls + 1, self.sparse_calls + 1
        if not self.counting:
            return
        kept, video = count_pairs(plan, layout)
        self.kept, self.video_kept = self.kept + self._per_clip(kept), self.video_kept + self._per_clip(video)
        if more:
            return
        real = layout.video + text_lengths.double()
        self.all = self.all + self._per_clip(real**2 * heads)
        self.video_all = self.video_all + self._per_clip(torch.full_like(real, float(layout.video) ** 2 * heads))
        if plan.fallbacks is not None:
            self.fallbacks = self.fallbacks + self._per_clip(plan.fallbacks)

    def sparsity(self) -> list[float]:
        """Of each clip: 1 - density over the video-by-video pairs of the calls where the method was active; else 0."""
        return [1 - x for x in self._shares(self.video_kept, self.video_all, 1.0)]

    def density(self) -> list[float]:
        """Of each clip: executed over all real pairs, of all steps, layers, heads, text and dense exceptions."""
        return self._shares(self.kept, self.all, 1.0)

    def fallback_rows(self) -> list[int]:
        """Of each clip: rows of blocks that kept nothing and were given their best block."""
        return [int(x) for x in self._shares(self.fallbacks, torch.ones(self.clips), 0.0)]

    def _shares(self, part: Tensor | float, whole: Tensor | float, empty: float) -> list[float]:
        if not (isinstance(part, Tensor) and isinstance(whole, Tensor)):
            return [empty] * self.clips
        shares: list[float] = (part.cpu() / whole.cpu()).tolist()
        return shares


def count_pairs(plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """(All, video-by-video) real pairs of each item that the plan's lists execute, float64 [B]; no synchronisation."""
    heads = plan.counts.shape[1]

    def sizes(starts: Tensor) -> tuple[Tensor, Tensor]:
        size = starts.diff(dim=-1).expand(-1, heads, -1).double()
        return size, size * (starts[..., :-1] < layout.video)

    q_size, q_video = sizes(plan.q_offsets)
    kv_size, kv_video = sizes(plan.kv_offsets)
    live = plan.live
    where = torch.where(live, plan.blocks, 0).long().flatten(2)

    def keys(size: Tensor) -> Tensor:
        return (size.expand(len(where), -1, -1).gather(2, where).view(live.shape) * live).sum(-1)

    return (keys(kv_size) * q_size).sum((1, 2)), (keys(kv_video) * q_video).sum((1, 2))


@dataclass
class Call:
    """What a method is told of one attention call.

    step counts from 0 of `steps`, from the scheduler; layer and branch identify the call: "cond", "uncond" or, when the
    guidance branches are one batch, "both" (conditional items first) or "both_reversed"; text_lengths is the real text
    of each item, int64 [B] on the device; seeds has one entry an item. `state` is kept by (layer, branch) and reset for
    each video and each network; spans tells the first active step, those from which another network of the pipeline
    runs (as Wan 2.2's second), and `steps`.
    """

    layout: Layout
    step: int
    steps: int
    layer: int
    branch: str
    text_lengths: Tensor
    seeds: tuple[int, ...]
    head_offset: int
    state: dict[str, Any]
    executor: Executor
    meter: Meter
    spans: tuple[int, ...]

    def execute(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the plan and count it; output [B, S, H, D]."""
        return self.execute_lse(plan, q, k, v)[0]

    def execute_lse(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, more: bool = False) -> tuple[Tensor, Tensor]:
        """As `execute`, with the log-sum-exp of the scaled scores [B, H, S] too; more: of several plans of one call,
        all but one, so that the call counts once and every plan's pairs do."""
        with part("kernel"):
            result = self.executor(q, k, v, plan, self.layout)
        self.meter.add_plan(plan, self.layout, self.text_lengths, q.shape[2], more)
        return result

    def generator(self, item: int, device: torch.device) -> torch.Generator:
        """A generator fixed by the item's seed, the step, the layer and the branch, whatever else is in the batch."""
        second = item >= len(self.seeds) // 2
        branch = {"cond": 0, "uncond": 1, "both": second, "both_reversed": not second}[self.branch]
        key = hashlib.sha256(repr((self.seeds[item], self.step, self.layer, int(branch))).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(key[:4], "big"))  # a CPU's takes 32 bits


@dataclass(frozen=True)
class Request:
    """One batch of clips: a prompt and a seed each, and the sampler's steps."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds) or not self.prompts:
            raise ValueError(f"one seed a prompt, at least one: got {len(self.prompts)} and {len(self.seeds)}")


@dataclass
class Method:
    """A sparse attention method; a subclass is one file in methods/ and decides a `Plan`.

    sparsity: the share of video-by-video pairs to drop, in [0, 1). Raises ValueError for a setting that is not what its
    hint (hints.py) allows.
    """

    sparsity: float = 0.0
    sparse: ClassVar[bool] = True  # False for the dense baseline, whose every call runs the dense kernel
    knob: ClassVar[str | None] = None  # the field, if any, that is null or the original's own knob
    steady: ClassVar[bool] = True  # one active step costs about as much as the next
    label: ClassVar[str] = ""  # what tables say behind its name: how it falls short of what the name promises

    def __post_init__(self) -> None:
        hints.check(self, "method.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        for name, given in (self.given or {}).items():
            if self.sparsity != 0:
                raise ValueError(
                    f"sparsity={self.sparsity:g} and method.{name}={given} both say how much is kept: "
                    f"give method.{name} with sparsity=0, or leave it null"
                )

    @property
    def given(self) -> dict[str, Any] | None:
        """The original's own knob and its value, if that is given in place of a sparsity."""
        value = getattr(self, self.knob) if self.knob else None
        return None if self.knob is None or value is None else {self.knob: value}

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """Decide the plan of one call; q, k, v are [B, S, H, D], [video | text], after QK-norm and RoPE."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention output [B, S, H, D]; a method that is more than a plan overrides this."""
        with part("estimate"):
            plan = self.plan(q, k, v, call)
        return call.execute(plan, q, k, v)

    @property
    def target(self) -> float:
        """The sparsity that its records stand at: what was asked for, and 0 for a control that no sparsity changes."""
        return self.sparsity

    def request(self, request: Request) -> Request:
        """What to generate in place of `request`; only controls of the dense run change it (seeds, steps)."""
        return request

    @property
    def changes_request(self) -> bool:
        """Whether it is a control of the dense run that generates something else than it is asked for."""
        return type(self).request is not Method.request

    def meet(self, model: Model, parts: DenseParts) -> None:
        """Called once before a job, with what it will run on; raises ValueError for what it has no setting for."""

    def prepare(self, seconds: Callable[[Method], float]) -> None:
        """Called once before a job; `seconds` times a whole generation of its first clip under a method."""


@dataclass(frozen=True)
class DenseParts:
    """Which steps and layers stay dense, the same for every method.

    steps: share of the steps from the first, rounded up; timestep: also dense while the scheduler's timestep is above
    it; layers: number of layers from the first. Raises ValueError for a value that is not what its hint allows.
    """

    steps: hints.Share = 0.25
    timestep: Annotated[float | None, "null or a number of at least 0", lambda x: x >= 0] = None
    layers: Annotated[int, "an integer of at least 0", lambda x: x >= 0] = 0

    def __post_init__(self) -> None:
        hints.check(self, "dense.")

    def check(self, layers: int, steps: int | None = None) -> None:
        """Raise ValueError unless some of a model's layers and steps (None: not known) are left for a method."""
        if self.layers >= layers:
            allowed = f"an integer from 0 to {layers - 1}, below the model's layers"
            raise hints.wrong("dense.layers", allowed, self.layers)
        if self.steps == 1 or (steps and self.covers(steps - 1, steps, -math.inf, self.layers)):
            most = f"at most {steps - 1}/{steps}" if steps else "below 1"
            raise hints.wrong("dense.steps", f"{most}, to leave the method a step", self.steps)

    def covers(self, step: int, steps: int, timestep: float, layer: int) -> bool:
        """Whether this call stays dense."""
        early = step < math.ceil(self.steps * steps - 1e-9)
        return early or layer < self.layers or (self.timestep is not None and timestep > self.timestep)


class Watch:
    """Sees the steps and the attention calls of a generation go by; this one does nothing (latency.py's times them)."""

    def step(self, index: int) -> None:
        """A step begins."""

    def finish(self) -> None:
        """The last step has ended."""

    def attention(self) -> AbstractContextManager[None]:
        """Entered around every self-attention call."""
        return nullcontext()


DenseKernel = Callable[[Tensor, Tensor, Tensor, Layout, Sequence[int]], Tensor]


class Session:
    """One generation under one method: routes every self-attention call to the method or to the dense kernel.

    An adapter calls `at_step` from its scheduler and the session itself from its attention hook.
    """

    def __init__(
        self, method: Method, executor: Executor, dense: DenseKernel, parts: DenseParts, watch: Watch | None = None,
        counting: bool = True,
    ):  # fmt: skip
        self.method, self.executor, self.dense, self.parts = method, executor, dense, parts
        self.meter, self.watch, self.counting = Meter(), watch or Watch(), counting
        self.step, self.steps, self.timestep = 0, 1, math.inf
        self.states: dict[tuple[int, str], dict[str, Any]] = {}
        self.sparse_steps: set[int] = set()  # those in which the method was asked
        self.switches: tuple[int, ...] = ()
        self.first: int | None = None  # of this generation's steps in which the method is asked
        self._read: tuple[Tensor | None, Sequence[int]] = (None, ())

    def start(self, clips: int, switches: tuple[int, ...] = ()) -> None:
        """Begin a new batch of `clips` clips: forget the methods' state, count anew; switches: see `Model`."""
        self.states.clear()
        self.switches, self.first = switches, None
        self.meter = Meter(clips, counting=self.counting)

    def finish(self) -> None:
        """The last step is done; what follows (decoding, moving frames) is not part of a step, and needs no state."""
        self.states.clear()
        self.watch.finish()

    def at_step(self, step: int, steps: int, timestep: float) -> None:
        """Tell the step (from 0), the number of steps and the scheduler's timestep of the calls that follow."""
        self.step, self.steps, self.timestep = step, steps, timestep
        self.watch.step(step)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, text_lengths: Tensor, layer: int, branch: str,
        seeds: tuple[int, ...], head_offset: int = 0,
    ) -> Tensor:  # fmt: skip
        """Attention over [video | text] q, k, v [B, S, H, D]; padding rows of the result are zero."""
        with self.watch.attention():
            return self._route(q, k, v, layout, text_lengths, layer, branch, seeds, head_offset)

    def on_host(self, text_lengths: Tensor) -> Sequence[int]:
        """The lengths as numbers, read once a tensor: a wait at every call would slow the dense baseline alone."""
        if text_lengths is not self._read[0]:
            self._read = text_lengths, text_lengths.tolist()
        return self._read[1]

    def _route(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Tensor, layer: int, branch: str,
        seeds: tuple[int, ...], head_offset: int,
    ) -> Tensor:  # fmt: skip
        if not self.method.sparse or self.parts.covers(self.step, self.steps, self.timestep, layer):
            self.meter.add_dense(layout, text_lengths, q.shape[2])
            return self.dense(q, k, v, layout, self.on_host(text_lengths))
        self.sparse_steps.add(self.step)
        self.first = self.step if self.first is None else self.first
        state = self.states.setdefault((layer, branch), {})
        call = Call(
            layout, self.step, self.steps, layer, branch, text_lengths, seeds, head_offset, state, self.executor,
            self.meter, spans(self.first, self.switches, self.steps),
        )  # fmt: skip
        return self._attend(q, k, v, call)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        before = self.meter.sparse_calls
        result = self.method.attend(q, k, v, call)
        if self.meter.sparse_calls == before:
            raise RuntimeError(f"{type(self.method).__name__} executed no plan, so its density cannot be measured")
        return result


def spans(first: int, switches: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """See `Call.spans`: the first active step, the later ones from which another network runs, the number of steps."""
    return (first, *(step for step in switches if first < step < steps), steps)
