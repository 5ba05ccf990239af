"""Pictures of what a method keeps: beside draft's map and the true one, over the frames, and what mass it recalls.

Maps are between regions of h x w tokens of a frame, of one head at one call of the dense trajectory: draft's pooled
map, the true attention mass that each query region gives each key region, and the share of token pairs executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import Call, Plan
from .kernels.mass import attention_mass
from .kernels.select import draft_map, pool
from .layout import Box, Layout, Order, box_order, box_sizes, permutation
from .records import replacing

COLUMNS = 8  # frames at most


@dataclass
class Maps:
    """Float32 [regions, regions] on the CPU, rows are queries; rows of `true` lack what they give to text."""

    call: str  # in words
    box: Box
    grid: tuple[int, int, int]
    draft: Tensor
    true: Tensor
    kept: Tensor


def maps(q: Tensor, k: Tensor, plan: Plan, call: Call, box: Box, head: int) -> Maps:
    """The maps of the first item of a call; q, k [B, S, H, D], head one of H."""
    one_q, one_k = q[:1, :, head : head + 1], k[:1, :, head : head + 1]
    estimate = draft_map(*(pool(x, box, call.layout.grid) for x in (one_q, one_k)))[0, 0]
    sizes = box_sizes(box, call.layout.grid, q.device)
    true = attention_mass(one_q, one_k, box, replace(call, text_lengths=call.text_lengths[:1]))[0, 0] / sizes[:, None]
    kept = kept_share(plan, call.layout, box, head)
    where = f"step {call.step} of {call.steps}, layer {call.layer}, head {head}"
    return Maps(where, box, call.layout.grid, estimate.float().cpu(), true.cpu(), kept.cpu())


def kept_share(plan: Plan, layout: Layout, box: Box, head: int) -> Tensor:
    """The share of token pairs of each two regions that the plan executes, for its first item: float32 [n, n]."""
    blocks = torch.zeros(plan.q_offsets.shape[-1] - 1, plan.kv_offsets.shape[-1] - 1, device=plan.blocks.device)
    live = plan.live[0, head]
    rows = torch.arange(len(live), device=live.device)[:, None].expand_as(live)
    blocks[rows[live], plan.blocks[0, head][live].long()] = 1
    q_parts = _tokens(plan.q_order, plan.q_offsets, layout, box, head)
    kv_parts = _tokens(plan.kv_order, plan.kv_offsets, layout, box, head)
    sizes = box_sizes(box, layout.grid, blocks.device)
    return q_parts.T @ blocks @ kv_parts / (sizes[:, None] * sizes)


def _tokens(order: Order, offsets: Tensor, layout: Layout, box: Box, head: int) -> Tensor:
    """How many tokens of each region lie in each block: float32 [blocks, regions]."""
    device = offsets.device
    sizes = box_sizes(box, layout.grid, device).long()
    region = torch.empty(layout.video, dtype=torch.long, device=device)
    region[box_order(box, layout.grid, device)] = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), sizes
    )
    places = torch.arange(layout.video, device=device)
    token = permutation(order, layout, device)
    if token is not None:
        region = region[token[0, min(head, token.shape[1] - 1), : layout.video]]
    starts = offsets[0, min(head, offsets.shape[1] - 1)].contiguous()
    block = torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1
    counts = torch.zeros(len(starts) - 1, len(sizes), device=device)
    return counts.index_put_((block, region), torch.ones((), device=device), accumulate=True)


def draw_maps(found: Maps, title: str, path: Path) -> None:
    """Draft's map, the true one on the same scale, and what was kept."""
    from matplotlib.colors import LogNorm

    figure = _figure(13, 4.6)
    panels = figure.subplots(1, 3)
    high = float(max(found.draft.max(), found.true.max()))
    norm = LogNorm(min(0.01 / len(found.draft), high / 10), high)
    for axes, values, name in zip(panels, (found.draft, found.true), ("draft's map", "true attention"), strict=False):
        image = axes.imshow(values.clamp(min=norm.vmin).numpy(), norm=norm, cmap="magma", interpolation="nearest")
        axes.set(title=name, xlabel="key region")
    panels[0].set_ylabel("query region")
    figure.colorbar(image, ax=panels[:2].tolist(), label="share of the row's attention")
    image = panels[2].imshow(found.kept.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    panels[2].set(title=f"kept, {float(found.kept.mean()):.0%} of it", xlabel="key region")
    figure.colorbar(image, ax=panels[2], label="share of token pairs")
    _save(figure, f"{title}, {found.call}; regions of {found.box.h}x{found.box.w} tokens, frame by frame", path)


def draw_frames(found: Maps, frames: Tensor, title: str, path: Path) -> None:
    """Frames uint8 [T, 3, h, w], darkened where the region in the middle of a middle frame does not look."""
    from matplotlib.patches import Rectangle

    counts = found.box.counts(found.grid)
    shown = sorted({round(i * (counts[0] - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    query = shown[len(shown) // 2], counts[1] // 2, counts[2] // 2
    row = found.kept.unflatten(0, counts)[query].unflatten(0, counts)
    figure = _figure(2.6 * len(shown), 2.6)
    height, width = frames.shape[-2:]
    tall, wide = height / found.grid[1], width / found.grid[2]  # pixels a token
    for axes, at in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        pixels = frames[round(at * (len(frames) - 1) / max(1, counts[0] - 1))].permute(1, 2, 0).float() / 255
        y = (torch.arange(height) / (found.box.h * tall)).long().clamp(max=counts[1] - 1)
        x = (torch.arange(width) / (found.box.w * wide)).long().clamp(max=counts[2] - 1)
        bright = 0.2 + 0.8 * row[at][y[:, None], x]
        axes.imshow((pixels * bright[..., None]).numpy(), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{'query, ' if at == query[0] else ''}frame {at}", fontsize=9)
        if at == query[0]:
            corner = (query[2] * found.box.w * wide - 0.5, query[1] * found.box.h * tall - 0.5)
            axes.add_patch(Rectangle(corner, found.box.w * wide, found.box.h * tall, fill=False, color="red", lw=2))
    _save(figure, f"{title}, {found.call}: where the outlined region looks", path)


def draw_recall(calls: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """The attention mass that kept blocks recall, by layer and step; the mean where a layer has several branches."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for call in calls:
        cells[call["layer"], call["step"]].append(call["mass"])
    layers, steps = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    values = torch.full((len(layers), len(steps)), torch.nan)
    for (layer, step), masses in cells.items():
        values[layers.index(layer), steps.index(step)] = sum(masses) / len(masses)
    figure = _figure(max(4.5, 1.8 + 0.28 * len(steps)), max(3.2, 1.4 + 0.18 * len(layers)))
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    every_step, every_layer = (max(1, -(-len(names) // 16)) for names in (steps, layers))
    axes.set_xticks(range(0, len(steps), every_step), steps[::every_step])
    axes.set_yticks(range(0, len(layers), every_layer), layers[::every_layer])
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=axes, label="recalled attention mass")
    _save(figure, title, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
