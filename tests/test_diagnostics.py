"""Output error and recalled mass against one softmax in float64; the trajectory stays dense."""

import numpy as np
import pytest
import torch
from draftbench.kernels import dense, run
from draftbench.kernels.select import box_plan
from draftbench.methods.dense import Dense
from draftbench.methods.draft import Draft
from draftbench.methods.sta import STA
from draftbench.methods.svg import SVG
from PIL import Image

from draftbench import heatmaps
from draftbench.attention import Call, DenseParts, Meter, Method, Request, Session, count_pairs
from draftbench.diagnostics import Probe, Spot
from draftbench.layout import Box, Layout, box_sizes
from draftbench.models.pocket.adapter import Pocket

BOX = Box(1, 2, 3)
LAYOUT = Layout((2, 5, 7), 4)  # ragged: 2 x 3 x 3 boxes
LENGTHS = torch.tensor([4, 2])


class Known(Method):
    """Keeps the blocks that the test chose."""

    mask: torch.Tensor

    def plan(self, q, k, v, call):
        return box_plan(self.mask, BOX, call)


def known():
    method = Known(0.5)
    torch.manual_seed(1)
    method.mask = torch.rand(2, 3, 18, 18) < 0.4
    method.mask |= torch.eye(18, dtype=torch.bool)
    return method


def probed(method, executor="reference"):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, LAYOUT.length, 3, 16) for _ in range(3))
    probe = Probe(method, run(executor), dense.run, DenseParts(0), spot=Spot(1, None, 2, BOX))
    probe.start(2)
    probe.at_step(1, 3, 0.5)
    where = dict(layout=LAYOUT, text_lengths=LENGTHS, layer=4, branch="cond", seeds=(0, 1))
    return probe(2 * q, k, v, **where), probe.rows, (2 * q, k, v), probe.maps


def truth(mask, q, k, v):
    """(Error, mass) of kept blocks, from scores in float64 and a token mask made by hand."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in LAYOUT.grid), indexing="ij")
    box = (t * 9 + y // 2 * 3 + x // 3).flatten()
    kept = torch.ones(2, 3, LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    kept[:, :, : LAYOUT.video, : LAYOUT.video] = mask[:, :, box][..., box]
    real = torch.arange(LAYOUT.length) < LAYOUT.video + LENGTHS[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    full = scores.softmax(-1)
    part = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    rows = real[:, None, :, None]
    outs = [torch.einsum("bhqk,bkhd->bhqd", weights, v.double()) * rows for weights in (full, part)]
    mass = (full * kept).sum(-1)[..., : LAYOUT.video].mean()
    return float((outs[1] - outs[0]).norm() / outs[0].norm()), float(mass)


@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_error_and_mass_are_those_of_one_softmax(executor):
    method = known()
    _, rows, qkv, _ = probed(method, executor)
    error, mass = truth(method.mask, *qkv)
    assert error > 0.1 and mass < 0.9
    assert rows == [{"step": 1, "layer": 4, "branch": "cond", "error": rows[0]["error"], "mass": rows[0]["mass"]}]
    assert rows[0]["error"] == pytest.approx(error, rel=1e-4) and rows[0]["mass"] == pytest.approx(mass, rel=1e-4)


@pytest.mark.parametrize("method", [Draft(0.0, (2, 3)), SVG(0.0, 8)], ids=["draft", "svg"])
def test_keeping_everything_has_no_error_and_all_the_mass(method):
    _, (row,), *_ = probed(method)
    assert row["error"] < 1e-5 and row["mass"] == pytest.approx(1, abs=1e-5)


def test_what_goes_on_is_dense():
    out, _, (q, k, v), _ = probed(known())
    assert torch.equal(out, dense.run(q, k, v, LAYOUT, LENGTHS))


def test_the_trajectory_is_the_dense_one(tiny, one_thread):
    pocket = Pocket(weights=str(tiny()), frames=3, height=32, width=48, steps=3, device="cpu")
    request = Request(("turn left",), (0,), 3)
    parts = DenseParts(0.25, layers=1)
    probe = Probe(Draft(0.75, (4, 4)), run("cpu"), dense.run, parts)
    frames = pocket.generate(request, probe)
    assert torch.equal(frames, pocket.generate(request, Session(Dense(), run("cpu"), dense.run, parts)))
    assert [(row["step"], row["layer"], row["branch"]) for row in probe.rows] == [(1, 1, "both"), (2, 1, "both")]
    assert not torch.equal(frames, pocket.generate(request, Session(probe.method, run("cpu"), dense.run, parts)))


def test_maps_are_those_of_one_head_of_the_first_item():
    method = known()
    _, _, (q, k, _), maps = probed(method)
    assert torch.equal(maps.kept, method.mask[0, 2].float()) and maps.call == "step 1 of 3, layer 4, head 2"
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in LAYOUT.grid), indexing="ij")
    region = (t * 9 + y // 2 * 3 + x // 3).flatten()
    member = torch.nn.functional.one_hot(region).double()
    sizes = member.sum(0)
    weights = (q[0, :, 2].double() @ k[0, :, 2].double().T / 4).softmax(-1)[: LAYOUT.video, : LAYOUT.video]
    assert torch.allclose(maps.true.double(), member.T @ weights @ member / sizes[:, None], atol=1e-5)
    low_q, low_k = (member.T @ x[0, : LAYOUT.video, 2].double() / sizes[:, None] for x in (q, k))
    assert torch.allclose(maps.draft.double(), (low_q @ low_k.T / 4).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("method", [Draft(0.6, (2, 3)), SVG(0.5, 8), STA(0.5, (1, 2, 3))], ids=["draft", "svg", "sta"])
def test_kept_pairs_of_any_order_add_up_to_what_was_executed(method):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LAYOUT.length, 3, 16) for _ in range(3))
    call = Call(LAYOUT, 1, 3, 0, "cond", LENGTHS[:1], (0,), 0, {}, run("reference"), Meter(), (0, 3))
    plan = method.plan(q, k, v, call)
    box = Box(1, 3, 4)  # not the method's
    sizes = box_sizes(box, LAYOUT.grid, q.device)
    shares = [heatmaps.kept_share(plan, LAYOUT, box, head) for head in range(3)]
    assert all(((share >= 0) & (share <= 1)).all() for share in shares)
    pairs = sum((share * sizes[:, None] * sizes).sum() for share in shares)
    assert float(pairs) == pytest.approx(float(count_pairs(plan, LAYOUT)[1]))


def test_pictures(tmp_path):
    """What looks nowhere is dark, what is kept is not; and a picture says which call it is of."""
    pytest.importorskip("matplotlib")
    _, rows, _, maps = probed(known())
    rows = [row | {"step": step, "layer": layer} for row in rows for step in range(30) for layer in range(3)]
    heatmaps.draw_recall(rows, "some", tmp_path / "recall.png")
    heatmaps.draw_maps(maps, "some", tmp_path / "maps.png")
    maps.kept.zero_()
    white = torch.full((2, 3, 20, 28), 255, dtype=torch.uint8)
    heatmaps.draw_frames(maps, white, "some", tmp_path / "none.png")
    maps.kept.fill_(1)
    heatmaps.draw_frames(maps, white, "some", tmp_path / "all.png")
    none, everything = (np.array(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("none", "all"))
    middle = none.shape[0] * 3 // 5, none.shape[1] // 4
    assert none[middle] == pytest.approx(51, abs=2) and everything[middle] == 255
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "maps.png", "none.png", "recall.png"]
