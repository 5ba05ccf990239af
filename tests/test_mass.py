"""The attention mass between boxes, in torch and in Triton, is the softmax summed in float64."""

from types import SimpleNamespace

import pytest
import torch
from draftbench.kernels import mass

from draftbench.layout import Box, Layout

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2 of a text block's empty sum
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# grid, real text of each item, box, head dim
CASES = {
    "even": ((2, 8, 16), (0,), Box(1, 8, 16), 64),
    "ragged": ((3, 6, 11), (5, 0), Box(1, 4, 8), 32),
    "ragged_in_time": ((3, 4, 12), (40, 37), Box(2, 4, 6), 64),
    "several_tiles": ((3, 9, 10), (70, 3), Box(2, 9, 10), 128),
    "tiny_boxes": ((1, 5, 7), (1, 0), Box(1, 2, 2), 16),
    "one_box": ((2, 3, 7), (0, 0), Box(2, 4, 8), 64),
}


def inputs(grid, text, dim, dtype, heads=2):
    """q, k with every item's text padding poisoned, the layout and the text lengths."""
    layout = Layout(grid, max(text) + 3)
    torch.manual_seed(0)
    q, k = (torch.randn(len(text), layout.length, heads, dim, device=DEVICE) for _ in range(2))
    for b, real in enumerate(text):
        q[b, layout.video + real :] = k[b, layout.video + real :] = torch.nan
    return 2 * q.to(dtype), k.to(dtype), layout, torch.tensor(text, device=DEVICE)


def truth(q, k, box, layout, text):
    """(Masses [B, H, boxes, boxes], tokens of each box) in float64, from one softmax over all tokens."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in layout.grid), indexing="ij")
    _, rows, columns = box.counts(layout.grid)
    member = ((t // box.t * rows + y // box.h) * columns + x // box.w).flatten()
    onehot = torch.nn.functional.one_hot(member).double().to(DEVICE)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, : layout.video].double(), k.double()) / q.shape[-1] ** 0.5
    real = torch.arange(layout.length, device=DEVICE) < layout.video + text[:, None, None, None]
    weights = scores.masked_fill(~real, -torch.inf).softmax(-1)[..., : layout.video]
    return torch.einsum("bhqk,qi,kj->bhij", weights, onehot, onehot), onehot.sum(0)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# float16 once: in the interpreter it takes bfloat16's path
EACH = [(name, dtype) for name in CASES for dtype in BOUNDS if dtype != torch.float16 or name == "ragged"]


@pytest.mark.parametrize("name, dtype", EACH, ids=str)
def test_kernel_is_the_softmax_summed(name, dtype):
    grid, text, box, dim = CASES[name]
    q, k, layout, lengths = inputs(grid, text, dim, dtype)
    expected, _ = truth(q, k, box, layout, lengths)
    found = mass.run(q, k, box, layout, lengths)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert error(found, expected) <= BOUNDS[dtype]
    assert max(error(*pair) for pair in zip(found.flatten(0, 2), expected.flatten(0, 2), strict=True)) <= BOUNDS[dtype]


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_softmax_summed(name):
    grid, text, box, dim = CASES[name]
    q, k, layout, lengths = inputs(grid, text, dim, torch.bfloat16)
    found = mass.reference(q, k, box, layout, lengths, rows=50)
    assert found.dtype == torch.float32
    assert error(found, truth(q, k, box, layout, lengths)[0]) <= 1e-5


@pytest.mark.parametrize("path", [mass.run, mass.reference], ids=["run", "reference"])
def test_a_row_sums_to_its_tokens_less_what_they_give_to_text(path):
    grid, text, box, dim = CASES["ragged"]
    q, k, layout, lengths = inputs(grid, text, dim, torch.float32)
    sums = path(q, k, box, layout, lengths).sum(-1)
    expected, tokens = truth(q, k, box, layout, lengths)
    torch.testing.assert_close(sums[1].double(), tokens.expand_as(sums[1]), atol=0, rtol=1e-5)
    assert (sums[0] < tokens).all()
    torch.testing.assert_close(sums.double(), expected.sum(-1), atol=0, rtol=1e-5)


def test_heads_that_do_not_fit_the_workspace_wait(monkeypatch):
    grid, text, box, dim = CASES["tiny_boxes"]
    q, k, layout, lengths = inputs(grid, text, dim, torch.float32, heads=3)
    whole = mass.run(q, k, box, layout, lengths)
    blocks = whole.shape[-1] + layout.text // 4
    for room in (4 * 4 * layout.video * (blocks + 1), 0):  # four of the six heads; not even one
        monkeypatch.setattr(mass, "WORKSPACE", room)
        assert torch.equal(mass.run(q, k, box, layout, lengths), whole)


def test_rows_far_apart_and_scores_of_any_size():
    grid, text, box, dim = CASES["tiny_boxes"]
    q, k, layout, lengths = inputs(grid, text, dim, torch.float32)
    q, k = (x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (q, k))
    for scale in (0.0, 30.0):  # all alike; nearly all mass on one key, the rest beyond float32
        expected, _ = truth(q * scale, k, box, layout, lengths)
        assert error(mass.run(q * scale, k, box, layout, lengths), expected) <= 1e-4


def test_the_device_chooses_the_path():
    grid, text, box, dim = CASES["ragged"]
    q, k, layout, lengths = inputs(grid, text, dim, torch.float32)
    path = mass.run if DEVICE.type == "cuda" else mass.reference
    call = SimpleNamespace(layout=layout, text_lengths=lengths)
    assert torch.equal(mass.attention_mass(q, k, box, call), path(q, k, box, layout, lengths))


@pytest.mark.parametrize("dim, dtype, reason", [(48, torch.float32, "head_dim"), (64, torch.float64, "dtypes")])
def test_refuses_what_it_cannot_take(dim, dtype, reason):
    q = torch.zeros(1, 4, 1, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=reason):
        mass.run(q, q, Box(1, 2, 2), Layout((1, 2, 2)), torch.zeros(1, dtype=torch.int64, device=DEVICE))
