"""The Triton kernels that keep blocks row by row keep what the torch reference keeps."""

import pytest
import torch
from draftbench.kernels import rows, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def on_reference(monkeypatch):
    """`select` is the reference here, also on a GPU."""
    monkeypatch.setattr(select, "fast", lambda x: False)


def scores(kind, m):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2, m, device=DEVICE)
    return {"signed": x, "ties": x.round(), "equal": torch.ones_like(x), "tiny": x * 1e-40, "wide": x.exp() ** 20}[kind]


@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize("kind", ["signed", "ties", "equal", "tiny", "wide"])
def test_the_largest_of_each_row(kind, m):
    x = scores(kind, m)
    for counts in (torch.full(x.shape[:-1], m, device=DEVICE), torch.randint(0, m + 1, x.shape[:-1], device=DEVICE)):
        kept = rows.most(x, counts)
        assert torch.equal(kept, select.keep_per_row(x, counts))
        assert torch.equal(kept.sum(-1), counts)
    assert torch.equal(rows.most(x.mT.contiguous().mT, counts), kept)


def test_zeros_of_both_signs_are_equal():
    x = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0], device=DEVICE).view(1, 1, 1, -1)
    assert rows.most(x, torch.full((1, 1, 1), 2, device=DEVICE)).tolist() == [[[[True, True, False, False, False]]]]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000])  # of a GPU, of torch
def test_a_row_that_is_no_number_ends(bits):
    x = torch.full((1, 1, 1, 8), bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert rows.share(x, 0.5, 3, True).sum() >= 3


def weights(kind, m):
    """Multiples of 2^-20 that sum to one in every row, so that every sum of them is exact."""
    x = scores(kind, m).abs().clamp(1e-30, 1e4)
    whole = (x / x.sum(-1, keepdim=True) * 2**20).floor()
    whole[..., 0] += 2**20 - whole.sum(-1)
    return whole / 2**20


@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize("kind", ["signed", "ties", "equal", "tiny", "wide"])
def test_a_share_of_each_row(kind, m, crossing):
    x = weights(kind, m)
    assert torch.equal(x.sum(-1), torch.ones_like(x[..., 0]))
    cases = [(0.0, 0), (2**-20, 1), (0.1, min(3, m)), (0.75, 1), (1 - 2**-20, 0), (float(x[0, 0, 0].max()), 1)]
    for part, least in cases:
        found = rows.share(x, part, least, crossing)
        assert torch.equal(found, select.keep_share(x, part, least, crossing)), (part, least)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("m", [990, 1980, rows.WIDEST])
def test_no_synchronisation_and_a_graph(m, no_waiting):
    x = torch.rand(1, 2, 40, m, device=DEVICE).softmax(-1)
    counts = torch.full(x.shape[:-1], m // 10, device=DEVICE)
    assert torch.equal(rows.most(x, counts), select.keep_per_row(x, counts))
    rows.share(x, 0.9, 1, True)
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        made = rows.most(x, counts), rows.share(x, 0.9, 1, True)
    x.copy_(x.flip(-1))
    graph.replay()
    assert torch.equal(made[0], select.keep_per_row(x, counts))
    assert (made[1].sum(-1) - select.keep_share(x, 0.9).sum(-1)).abs().max() <= 1
