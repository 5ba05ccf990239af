"""The Triton kernels of draft attention keep exactly the blocks that the torch reference keeps."""

from types import SimpleNamespace

import pytest
import torch
from draftbench.kernels import draft, select
from draftbench.methods.draft import Draft

from draftbench.attention import count_pairs
from draftbench.layout import Box, Layout, box_sizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
# grid, box, real text of each item
CASES = {
    "even": ((3, 8, 16), Box(1, 4, 4), (5, 0)),
    "ragged_h": ((2, 9, 16), Box(1, 4, 8), (300, 129)),
    "ragged_w": ((2, 8, 13), Box(1, 4, 4), (0, 0)),
    "ragged_all": ((3, 7, 11), Box(2, 3, 4), (40, 1)),
    "stacked": ((3, 7, 12), Box(1, 4, 4, stacked=True), (40, 1)),
    "one_frame": ((1, 17, 27), Box(1, 4, 4), (17,)),
    "one_block": ((1, 3, 5), Box(1, 4, 8), (33, 2)),
}
KINDS = ["spread", "narrow", "equal", "zeros", "steps"]


@pytest.fixture(autouse=True)
def on_reference(monkeypatch):
    """`select` is the reference here, also on a GPU; a test that wants the choice undoes this."""
    monkeypatch.setattr(select, "fast", lambda x: False)


@pytest.fixture
def on_path(monkeypatch):
    """The ways through `draft.select`: all of a map listed, a bracket from a sample, and what is done if that fails."""

    def take(path):
        monkeypatch.setitem(draft.LAUNCH, "split", draft.LAUNCH["split"] | {"TILE": 256})
        monkeypatch.setitem(draft.LAUNCH, "finish", draft.LAUNCH["finish"] | {"TILE": 512})
        monkeypatch.setitem(draft.LAUNCH, "list", draft.LAUNCH["list"] | {"COLS": 32})
        if path != "all":
            monkeypatch.setattr(draft, "SAMPLES", 16)
        if path == "misled":  # a bracket of no width, nowhere near
            monkeypatch.setattr(draft, "DEVIATIONS", 0)
        if path == "overflowing":
            monkeypatch.setattr(draft, "LISTED", 0.0)

    return take


def maps(kind, n):
    """Scores [2, 1, n, n], as a softmax gives them or worse."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, n, n, device=DEVICE)
    return {
        "spread": (4 * x).softmax(-1),
        "narrow": (0.01 * x).softmax(-1),
        "equal": torch.full_like(x, 1 / n),
        "zeros": (4 * x).softmax(-1) * (torch.rand_like(x) < 0.03),  # nearly all underflow, whole rows too
        "steps": (x.abs() * 2).round() / 16,
    }[kind]


def kept(counts, blocks):
    """The mask [B, H, m, m] of lists that must be ascending."""
    live = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    assert ((blocks.diff(dim=-1) > 0) | ~live[..., 1:]).all()
    mask = torch.zeros(*blocks.shape[:-1], blocks.shape[-1] + 1, device=blocks.device, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(live, blocks, blocks.shape[-1]).long(), True)[..., :-1]


@pytest.mark.pairs(
    case=["even", "ragged_all", "one_block"],
    kind=KINDS,
    sparsity=[0.0, 0.5, 0.95],
    path=["all", "sampled", "misled", "overflowing"],
)
def test_the_same_blocks_are_kept(case, kind, sparsity, path, on_path):
    on_path(path)
    grid, box, _ = CASES[case]
    n = len(box_sizes(box, grid, DEVICE))
    scores = maps(kind, n)
    mask, fallbacks = select.fill_empty_rows(select.keep_over_threshold(scores, sparsity, box, grid), scores)
    counts, blocks, filled = draft.lists(scores, draft.select(scores, sparsity, box, grid), 3)
    assert counts.dtype == blocks.dtype == torch.int32
    assert torch.equal(kept(counts, blocks), torch.nn.functional.pad(mask, (0, 3, 0, 3), value=True))
    assert torch.equal(filled, fallbacks)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.95])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_density_is_at_most_a_block_above_the_request(case, kind, sparsity):
    grid, box, _ = CASES[case]
    sizes = box_sizes(box, grid, DEVICE).long()
    mask = select.keep_over_threshold(maps(kind, len(sizes)), sparsity, box, grid)
    pairs, total = (mask * sizes[:, None] * sizes).sum((2, 3)), sizes.sum() ** 2
    assert (pairs <= (1 - sparsity) * total + sizes.max() ** 2).all()
    assert (pairs >= (1 - sparsity) * total - sizes.max() ** 2).all()


def test_ties_are_kept_in_the_order_of_the_map():
    scores = torch.full((1, 1, 4, 4), 0.25, device=DEVICE)
    mask = select.keep_over_threshold(scores, 0.6, Box(1, 2, 2), (1, 4, 4))
    assert mask.flatten().tolist() == [True] * 7 + [False] * 9


def tokens(layout, batch, heads, dim, dtype):
    torch.manual_seed(0)
    return [torch.randn(batch, layout.length, heads, dim, device=DEVICE).to(dtype) for _ in range(3)]


@pytest.mark.pairs(
    case=list(CASES),
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    dim=[16, 48, 64],
    how=["average", "max", "direction"],
)
def test_pooled_values(case, dtype, dim, how):
    grid, box, text = CASES[case]
    layout = Layout(grid, max(text))
    q = tokens(layout, len(text), 3, dim, dtype)[0]
    q[:, layout.video :] = torch.nan
    expected = select.pool(q, box, grid, how)
    torch.testing.assert_close(draft.pool(q, box, grid, how), expected, atol=2e-6, rtol=2e-6)
    wide = torch.stack([q, q], 2).transpose(2, 3)[:, :, :, 0]  # heads that do not lie side by side
    assert torch.equal(draft.pool(wide, box, grid, how), draft.pool(q, box, grid, how))


def call(layout, text):
    return SimpleNamespace(layout=layout, text_lengths=torch.tensor(text, device=DEVICE))


@pytest.mark.parametrize("kind", ["average", "max"])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_of_the_kernels_is_the_references(case, kind, monkeypatch):
    grid, box, text = CASES[case]
    layout = Layout(grid, max(text))
    q, k, _ = tokens(layout, len(text), 2, 16, torch.float32)
    where = call(layout, text)
    scores = select.draft_map(*(select.pool(x, box, grid, kind) for x in (q, k)))
    expected = select.threshold_plan(scores, 0.8, box, where)
    monkeypatch.setattr(select, "fast", lambda x: True)
    plan = select.threshold_plan(scores, 0.8, box, where)
    assert torch.equal(plan.q_offsets, expected.q_offsets) and torch.equal(plan.counts, expected.counts)
    assert torch.equal(kept(plan.counts, plan.blocks), kept(expected.counts, expected.blocks))
    assert torch.equal(plan.fallbacks, expected.fallbacks)
    for found, pairs in zip(count_pairs(plan, layout), count_pairs(expected, layout), strict=True):
        assert torch.equal(found, pairs)


@pytest.mark.parametrize("knobs", [{}, {"per_row": True}, {"first_frame_sink": True}, {"same_frame": True}], ids=str)
def test_every_option_gives_the_references_plan(knobs, monkeypatch):
    layout = Layout((3, 9, 16), 20)
    q, k, v = tokens(layout, 2, 2, 16, torch.float32)
    method = Draft(0.8, region=(4, 4), **knobs)
    expected = method.plan(q, k, v, call(layout, (20, 3)))
    monkeypatch.setattr(select, "fast", lambda x: True)
    plan = method.plan(q, k, v, call(layout, (20, 3)))
    assert torch.equal(kept(plan.counts, plan.blocks), kept(expected.counts, expected.blocks))
    assert torch.equal(plan.fallbacks, expected.fallbacks)


def test_rows_of_a_mask():
    torch.manual_seed(0)
    mask = torch.rand(1, 2, 40, 51, device=DEVICE) < 0.2
    mask[:, :, 3] = False
    counts, blocks = draft.mask_lists(mask.expand(2, -1, -1, -1), 2, 3)
    expected = select.lists(mask.expand(2, -1, -1, -1), 2, 3)
    assert torch.equal(counts, expected[0]) and torch.equal(kept(counts, blocks), kept(*expected))


@pytest.mark.gpu
@needs_gpu
def test_no_synchronisation_and_a_graph(monkeypatch, no_waiting):
    monkeypatch.undo()
    layout = Layout((5, 45, 80), 256)
    q, k, v = tokens(layout, 1, 4, 128, torch.bfloat16)
    method, where = Draft(0.9), call(layout, (200,))
    eager = method.plan(q, k, v, where)  # compiles, and makes what is kept on the device
    with no_waiting():
        method.plan(q, k, v, where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = method.plan(q, k, v, where)
    for _ in range(2):
        graph.replay()
        assert torch.equal(plan.counts, eager.counts) and torch.equal(plan.fallbacks, eager.fallbacks)
        assert torch.equal(kept(plan.counts, plan.blocks), kept(eager.counts, eager.blocks))
    assert (count_pairs(plan, layout)[1] <= 0.1001 * 4 * layout.video**2).all()
