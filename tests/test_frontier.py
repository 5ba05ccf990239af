"""The picture of quality over time: what meets, what does not, and whose numbers each axis shows."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from draftbench import frontier, records, tables
from draftbench.contrasts import Contrasts

RULE = Contrasts(("random", "draft"), ("psnr_db",), 1000, 0)


def cell(method="draft", sparsity=0.9, seed=0, psnr=30.0, **values):
    known = {
        "model": "pocket", "weights_hash": "a" * 64, "device": "H200", "versions": {"torch": "2.11"}, "commit": "c",
        "grid": [16, 32, 48], "status": "ok", "prompt": "turn left", "seed": seed, "psnr_db": psnr, "method": method,
        "sparsity": sparsity,
    }  # fmt: skip
    return records.new(**known | values)


def timed(method="draft", sparsity=0.9, ms=2.0, shape="hunyuan_768p", **values):
    """As a row of bench=methods."""
    known = {
        "kind": "methods", "shape": shape, "method": method, "sparsity": sparsity, "status": "ok", "device": "H200",
        "versions": {"torch": "2.11"}, "commit": "d" * 40, "ms": {"n": 20, "p20": ms - 0.1, "p50": ms, "p80": ms + 0.2},
        "dense": {"contestant": "cudnn", "ms": 9.0}, "sparsity_achieved": sparsity,
    }  # fmt: skip
    return known | values


CELLS = [cell(seed=s, psnr=p) for s, p in ((0, 30.0), (1, 32.0))] + [cell("dense", 0.0), cell("svg"), cell("sta", 0.5)]
TIMES = [timed(), timed(shape="wan_720p", ms=5.0), timed("sta"), timed("vsa"), timed("svg", status="failed: x", ms=1.0)]
TIMES += [timed("svg", sparsity_achieved=0.97)]  # no time of 90%


def test_what_meets_is_of_one_method_and_sparsity():
    shapes = frontier.join(CELLS, TIMES, RULE).items()
    assert {shape: [(p.method, p.sparsity, p.ms, p.quality.mean) for p in points] for shape, points in shapes} == {
        "hunyuan_768p": [("draft", 0.9, (1.9, 2.0, 2.2), 31.0)], "wan_720p": [("draft", 0.9, (4.9, 5.0, 5.2), 31.0)]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "times", "message"),
    [
        ([cell(), cell(device="H100")], [timed()], "quality: rows with different device"),
        ([cell()], [timed(), timed(device="H100")], "time: rows with different device"),
        ([cell(dense={"steps": s, "layers": 0}, seed=0) for s in (0.0, 0.25)], [timed()], "one share of dense first"),
    ],
)
def test_neither_side_mixes(cells, times, message):
    with pytest.raises(ValueError, match=message):
        frontier.join(cells, times, RULE)


def test_each_axis_names_its_source(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    names = ("pocket_headline", "methods")
    frontier.figure(CELLS, TIMES, names, RULE, tmp_path / "a.png", "abc")
    assert Image.open(tmp_path / "a.png").info["records"] == "abc"
    axes, other = drawn[0].axes
    assert "pocket at 16x32x48" in axes.get_ylabel() and "(pocket_headline)" in axes.get_ylabel()
    assert axes.get_title() == "hunyuan_768p at 90% sparsity" and [text.get_text() for text in axes.texts] == ["draft"]
    assert drawn[0].get_suptitle().endswith("as their timed calls drop another share: svg.")
    assert "hunyuan_768p on H200 (methods)" in axes.get_xlabel() and "wan_720p on H200" in other.get_xlabel()
    with pytest.raises(ValueError, match="and methods have no method at a sparsity in common"):
        frontier.figure(CELLS, [timed("vsa")], names, RULE, tmp_path / "b.png", "abc")


def test_it_is_drawn_once_both_files_are_there(tmp_path, capsys):
    config = tables._configured([f"figures={tmp_path / 'figures'}"])
    check = tables._configured([f"figures={tmp_path / 'figures'}", "check=true"])
    files = {name: tmp_path / f"{name}.jsonl" for name in (config.frontier.quality, config.frontier.time)}
    for path in files.values():
        path.write_text(path.name)
    rows = dict(zip(files, (CELLS, TIMES), strict=True))
    assert not tables._frontier(config, files, {config.frontier.quality: CELLS})
    assert tables._frontier(check, files, rows)
    assert "pocket_headline_frontier.png is out of date" in capsys.readouterr().err
    assert tables._frontier(config, files, rows) and not tables._frontier(check, files, rows)
    files[config.frontier.time].write_text("other")
    assert tables._frontier(check, files, rows)
