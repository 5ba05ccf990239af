"""What the attention benchmark runs on: shapes, q and k captured from pocket, kept blocks, and a sampled reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from . import schema
from .attention import Call, DenseParts, Executor, Meter, Plan, Request, Session, count_pairs
from .kernels import dense as dense_kernel
from .kernels.select import box_plan, full_plan, keep_per_row
from .layout import Box, Layout, box_sizes, permutation
from .methods.dense import Dense
from .methods.draft import Draft

MASKS = ("captured", "balanced", "trimmed")  # see `sparse_cases`
NOISE = 0.05  # of a standard deviation, on tiled q and k: copies of a region must not tie in a draft map


@dataclass(frozen=True)
class Shape:
    """One attention call: grid in tokens, heads, head dim, text tokens, draft's region, whether regions run on from
    frame to frame (`Box.stacked`), and the overrides of the pocket model whose q and k are tiled up to it. Bfloat16 on
    a GPU; float32 on a CPU, with `threads` threads."""

    grid: tuple[int, int, int]
    heads: int
    dim: int
    text: int = 0
    device: str = "cuda"
    region: tuple[int, int] = (8, 16)
    stacked: bool = False
    capture: tuple[str, ...] = ("model=pocket_large",)
    threads: int | None = None

    @property
    def layout(self) -> Layout:
        """Grid and text."""
        return Layout(self.grid, self.text)

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def box(self) -> Box:
        """Draft's region."""
        return Box(1, *self.region, stacked=self.stacked)


TINY = ("model=pocket", "model.frames=4", "model.height=32", "model.width=48", "model.steps=2")
SHAPES = {
    "hunyuan_768p": Shape((33, 48, 80), 24, 128, 256),
    "hunyuan_720p": Shape((33, 45, 80), 24, 128, 256, stacked=True),  # ragged: regions of 8x16 do not divide 45 rows
    "wan_768p": Shape((21, 48, 80), 40, 128),
    "wan_480p": Shape((21, 30, 52), 40, 128, region=(16, 8), stacked=True),  # ragged
    "sta_768p": Shape((30, 48, 80), 24, 128, 256),  # a canvas that FastVideo's sliding tile kernel takes
    "pocket_large": Shape((16, 32, 48), 6, 64, 8),  # the embedded model's own, at head dim 64
    "cpu": Shape((8, 16, 32), 4, 64, device="cpu", capture=("model=pocket",), threads=2),
    "tiny": Shape((3, 6, 10), 2, 64, 5, device="cpu", region=(4, 4), capture=TINY, threads=1),  # ragged; for the tests
}


@dataclass
class Case:
    """q, k, v [1, S, H, D] of a shape, and the blocks to keep; mask is "dense" or one of `MASKS`."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    sparsity: float
    mask: str
    plan: Plan

    def call(self, executor: Executor) -> Call:
        """A call of this shape as an adapter would make it; nothing is counted meanwhile."""
        return _call(self.shape, self.q.device, executor)

    @property
    def draft(self) -> Draft:
        """Draft at this sparsity and region."""
        return Draft(sparsity=self.sparsity, region=self.shape.region, stacked=self.shape.stacked)

    def pairs(self, plan: Plan) -> dict[str, float]:
        """Real (query, key) pairs that a plan's lists keep, of all, and the same of video by video alone."""
        kept, video = (float(x) for x in count_pairs(plan, self.shape.layout))
        layout, heads = self.shape.layout, self.shape.heads
        return {"kept": kept, "all": layout.length**2 * heads, "video": video, "all_video": layout.video**2 * heads}


def dense_case(shape: Shape, prompt: str, seed: int) -> Case:
    """The case that keeps everything.

    q and k [1, S, H, D] are pocket's at its middle step and layer, from `prompt` and `seed`, tiled: the token at
    (t, y, x) is the captured one at (t, y, x) modulo the captured grid, text goes round likewise, head h is head h
    modulo pocket's; the head dim is repeated r times and scaled by r^-1/4, which leaves the logits as they were. Noise
    of `NOISE` standard deviations keeps the copies from being equal. v is normal noise, so that two copies of a region
    cannot stand in for one another.
    """
    device = torch.device(shape.device)
    q, k, source = captured(shape.capture, prompt, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    q, k = (_tiled(x, source, shape, generator) for x in (q, k))
    v = torch.randn(q.shape, device=device, dtype=torch.float32, generator=generator).to(shape.dtype)
    plan = full_plan(_call(shape, device, no_executor), shape.heads)
    return Case(shape, q, k, v, 0.0, "dense", plan)


def sparse_cases(dense: Case, sparsity: float, masks: Sequence[str], seed: int) -> Iterator[Case]:
    """The same tensors at a sparsity: draft's own blocks ("captured"), and the mean of draft's counts in every row, at
    random ("balanced") or the highest of draft's map, so that captured rows are cut or filled ("trimmed")."""
    case = replace(dense, sparsity=sparsity, mask="captured")
    call = case.call(no_executor)
    case.plan = case.draft.plan(case.q, case.k, case.v, call)
    if "captured" in masks:
        yield case
    boxes = len(box_sizes(case.shape.box, case.shape.grid, case.q.device))
    text = case.plan.counts.shape[-1] - boxes  # blocks of text, which every row keeps
    each = (case.plan.counts[..., :boxes] - text).double().mean().round().clamp(min=1).int()
    for name in ("balanced", "trimmed"):
        if name not in masks:
            continue
        if name == "balanced":
            generator = torch.Generator(case.q.device).manual_seed(seed)
            scores = torch.rand(1, case.shape.heads, boxes, boxes, device=case.q.device, generator=generator)
        else:
            scores = case.draft.scores(case.q, case.k, call)
        mask = keep_per_row(scores, each.expand(scores.shape[:-1]))
        yield replace(case, mask=name, plan=box_plan(mask, case.shape.box, call))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's CPU threads while inside; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Capture(Session):
    """Dense attention that keeps q and k of the first item at one step and layer."""

    at = (0, 0)
    kept: tuple[Tensor, Tensor, Layout] | None = None

    def _route(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *others: Any) -> Tensor:
        if (self.step, others[1]) == self.at:
            self.kept = q[:1].clone(), k[:1].clone(), layout
        return super()._route(q, k, v, layout, *others)


@functools.lru_cache(maxsize=1)
def captured(overrides: tuple[str, ...], prompt: str, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Layout]:
    """q, k [1, S, H, D] and the layout of the conditional branch of pocket at its middle step and layer."""
    with initialize_config_module("draftbench.conf", version_base="1.3"):
        config = compose("config", [*overrides, f"device={device.type}"])
    model: Any = schema.model(config)
    model.check([prompt])
    session = _Capture(Dense(), no_executor, dense_kernel.run, DenseParts())
    session.at = (model.steps // 2, model.network.config.depth // 2)
    model.generate(Request((prompt,), (seed,), model.steps), session, last_step=session.at[0] + 1)
    assert session.kept is not None
    return session.kept


def _tiled(x: Tensor, source: Layout, shape: Shape, generator: torch.Generator) -> Tensor:
    """See `dense_case`."""
    if shape.dim % x.shape[-1]:
        raise ValueError(f"the head dim of a shape must be a multiple of pocket's {x.shape[-1]}, got {shape.dim}")
    t, y, w = (torch.arange(n, device=x.device) % m for n, m in zip(shape.grid, source.grid, strict=True))
    _, height, width = source.grid
    video = ((t[:, None, None] * height + y[:, None]) * width + w).flatten()
    text = source.video + torch.arange(shape.text, device=x.device) % source.text
    heads = torch.arange(shape.heads, device=x.device) % x.shape[2]
    repeats = shape.dim // x.shape[-1]
    x = x[:, torch.cat([video, text])][:, :, heads].float().repeat(1, 1, 1, repeats) * repeats**-0.25
    noise = torch.randn(x.shape, device=x.device, generator=generator)
    return (x + noise * (NOISE * x.std())).to(shape.dtype)


def _call(shape: Shape, device: torch.device, executor: Executor) -> Call:
    lengths = torch.full((1,), shape.text, device=device)
    return Call(shape.layout, 0, 1, 0, "cond", lengths, (0,), 0, {}, executor, Meter(counting=False), (0, 1))


def no_executor(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """Stands where a plan is made and never run."""
    raise AssertionError("nothing is to be executed here")


def difference(out: Tensor, other: Tensor) -> dict[str, float]:
    """How far out [1, S, H, D] is from another one, relative, in every value; NaN anywhere comes out as NaN.

    Returns all: ||out - other|| / ||other||; worst: the same of the worst row. Raises ValueError for unequal shapes.
    """
    if out.shape != other.shape:
        raise ValueError(f"the output has the shape {tuple(out.shape)}, not {tuple(other.shape)}")
    wrong, right = [], []
    for head in range(out.shape[2]):  # one at a time, as a float32 copy of everything is large
        a, b = out[0, :, head].float(), other[0, :, head].float()
        wrong.append((a - b).norm(dim=-1))
        right.append(b.norm(dim=-1))
    return _relative(torch.cat(wrong), torch.cat(right))


def _relative(error: Tensor, size: Tensor) -> dict[str, float]:
    """From norms of rows."""
    return {"all": float(error.norm() / size.norm()), "worst": float((error / size.clamp(min=1e-30)).max())}


def sampled_error(
    out: Tensor, case: Case, plan: Plan, seed: int = 0, more: int = 4, lse: Tensor | None = None
) -> dict[str, float]:
    """How far out [1, S, H, D] is from float32 attention over the plan's kept keys, relative, on sampled query blocks.

    Returns all: ||out - ref|| / ||ref|| over all sampled rows; worst: the same of the worst row; rows: their number;
    lse: if `lse` [1, H, S] is given, its largest absolute error, in nats.
    The blocks are those with the most and the fewest kept blocks, the smallest, the last of the video, the text's last
    in the first and last head, and `more` drawn at random. Every value of `out` must be finite. Only the sampled
    blocks' keys are gathered, so nothing quadratic is held. Raises ValueError for a value that is not finite, a shape
    that is wrong, or a list that names a block twice.
    """
    if out.shape != case.q.shape:
        raise ValueError(f"the output has the shape {tuple(out.shape)}, not {tuple(case.q.shape)}")
    if not out.isfinite().all():
        raise ValueError(f"{int((~out.isfinite()).sum())} values of the output are not finite, or were never written")
    layout, heads = case.shape.layout, case.shape.heads
    q_tokens, kv_tokens = (_tokens(order, layout, case.q) for order in (plan.q_order, plan.kv_order))
    q_starts, kv_starts = (x[0].expand(heads, -1).long() for x in (plan.q_offsets, plan.kv_offsets))
    wrong, right, off = [], [], []
    for head, row in _sampled_blocks(plan, layout, heads, seed, more):
        kept = plan.blocks[0, head, row, : int(plan.counts[0, head, row])].long()
        if len(kept.unique()) < len(kept):
            raise ValueError(f"the list of query block {row} of head {head} names a block twice")
        queries = q_tokens[head % len(q_tokens)][q_starts[head, row] : q_starts[head, row + 1]]
        block = torch.repeat_interleave(kv_starts[head].diff())
        keys = kv_tokens[head % len(kv_tokens)][: len(block)][torch.isin(block, kept)]
        scores = case.q[0, queries, head].float() @ case.k[0, keys, head].float().T / case.shape.dim**0.5
        reference = scores.softmax(-1) @ case.v[0, keys, head].float()
        wrong.append((out[0, queries, head].float() - reference).norm(dim=-1))
        right.append(reference.norm(dim=-1))
        if lse is not None:
            expected, found = scores.logsumexp(-1), lse[0, head, queries].float()
            off.append(torch.where(expected == found, 0, (expected - found).abs()))  # both are -inf in an empty row
    error = _relative(torch.cat(wrong), torch.cat(right)) | {"rows": sum(map(len, wrong))}
    return error | ({"lse": float(torch.cat(off).max())} if off else {})


def _tokens(order: Any, layout: Layout, like: Tensor) -> Tensor:
    """Token of each place, [H or 1, length]."""
    found = permutation(order, layout, like.device)
    return torch.arange(layout.length, device=like.device)[None] if found is None else found[0]


def _sampled_blocks(plan: Plan, layout: Layout, heads: int, seed: int, more: int) -> list[tuple[int, int]]:
    """See `sampled_error`: (head, query block)."""
    starts = plan.q_offsets[0].expand(heads, -1).cpu()
    counts, sizes = plan.counts[0].cpu(), starts.diff(dim=-1)
    video = (starts[:, :-1] < layout.video) & (sizes > 0)

    def lowest(value: Tensor) -> tuple[int, int]:
        return divmod(int(value.masked_fill(~video, torch.iinfo(value.dtype).max).argmin()), value.shape[1])

    last = int(video[0].nonzero()[-1])
    found = [lowest(-counts), lowest(counts), lowest(sizes), (heads - 1, last)]
    if layout.text:
        text = int((sizes[0] > 0).nonzero()[-1])
        found += [(0, text), (heads - 1, text)]
    where = video.nonzero()
    draws = torch.randint(len(where), (more,), generator=torch.Generator().manual_seed(seed))
    return list(dict.fromkeys([*found, *((int(h), int(row)) for h, row in where[draws])]))
