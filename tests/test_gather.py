"""The Triton kernel that brings tokens into an order takes what torch's gather takes."""

import pytest
import torch
from draftbench.kernels import gather, padded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shared", [(1, 3), (2, 1), (2, 3)], ids=["items", "heads", "neither"])
@pytest.mark.parametrize("places", [5, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_is_torchs_gather(shared, places, dtype, monkeypatch):
    """Of views of one projection, as a model's q, k and v are, and of one whose channels lie apart."""
    monkeypatch.setattr(padded, "fast", lambda x: False)
    torch.manual_seed(0)
    projection = torch.randn(2, 90, 3, 3, 16, device=DEVICE).to(dtype)
    tokens = torch.randint(90, (*shared, places), device=DEVICE)
    for x in (*projection.unbind(2), projection[:, :, 0].mT.contiguous().mT):
        found = gather.rows(x, tokens)
        assert found.is_contiguous() and torch.equal(found, padded.take(x, tokens.expand(2, 3, -1)))


@pytest.mark.parametrize("dim", [16, 24])
def test_it_runs_where_it_can(dim, monkeypatch):
    """For an order of each head's own, of a power of two of channels."""
    ran, rows = [], gather.rows
    monkeypatch.setattr(padded, "fast", lambda x: True)
    monkeypatch.setattr(gather, "rows", lambda x, tokens: ran.append(tokens.shape) or rows(x, tokens))
    x = torch.randn(2, 7, 3, dim, device=DEVICE)
    orders = [torch.stack([torch.randperm(7, device=DEVICE) for _ in range(n)])[None] for n in (1, 3)]
    for order in orders:
        expected = x.gather(1, order.expand(2, 3, -1).transpose(1, 2)[..., None].expand(-1, -1, -1, dim))
        assert torch.equal(padded.take(x, order), expected)
    assert ran == ([(1, 3, 7)] if dim == 16 else [])
