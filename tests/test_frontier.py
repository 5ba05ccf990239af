"""The picture of quality over time: what meets, what does not, and whose numbers each axis shows."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from draftbench import frontier, records, tables, tabular
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


def two(*arguments):
    return [cell(*arguments, seed=seed) for seed in (0, 1)]


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
    frontier.figure(frontier.drawing(CELLS, TIMES, names, RULE), tmp_path / "a.png", "abc")
    assert Image.open(tmp_path / "a.png").info["digest"] == "abc"
    axes, other = drawn[0].axes
    assert "pocket at 16x32x48" in axes.get_ylabel() and "(pocket_headline)" in axes.get_ylabel()
    assert axes.get_title() == "hunyuan_768p at 90% sparsity" and [text.get_text() for text in axes.texts] == ["draft"]
    assert "as their timed calls drop another share: svg." in drawn[0].get_suptitle()
    assert drawn[0].get_suptitle().endswith("as their means are of some clips only: svg at 90% (1 of 2).")
    assert "hunyuan_768p on H200 (methods)" in axes.get_xlabel() and "wan_720p on H200" in other.get_xlabel()
    near = [*TIMES, timed("oracle", ms=8.0), timed("sta")]
    cells = [row | {"dense": {"steps": 0.25, "layers": 0}} for row in (*CELLS, *two("oracle"), *two("sta"))]
    cells = [row for row in cells if row["sparsity"] != 0.5]
    frontier.figure(frontier.drawing(cells, near, names, RULE), tmp_path / "c.png", "abc")
    axes = drawn[1].axes[0]
    assert (
        axes.get_ylabel().endswith("first 25% of steps dense")
        and "dense" not in other.get_ylabel().split("to dense")[1]
    )
    assert "`" not in drawn[1].get_suptitle() and "sta (uniform windows)." in drawn[1].get_suptitle()


def test_names_lie_apart_and_inside(monkeypatch, tmp_path):
    """Of four methods in one spot, and of one beside dense's line and the right edge."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    methods = ["draft", "jenga", "sparge", "sta_searched"]
    cells = [cell("dense", 0.0), *two("oracle"), *(one for method in methods for one in two(method))]
    times = [timed("oracle", ms=8.9), *(timed(method, ms=2 + i / 20) for i, method in enumerate(methods))]
    frontier.figure(frontier.drawing(cells, times, ("a", "b"), RULE), tmp_path / "a.png", "abc")
    axes = drawn[0].axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    (dense,) = (line for line in axes.lines if line.get_label() == "dense")
    assert [text.get_text() for text in axes.texts] == sorted([*methods, "oracle"])
    others = [*boxes, dense.get_window_extent(), axes.get_legend().get_window_extent()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in others[i + 1 :])
    assert all(axes.bbox.count_contains(box.corners()) == 4 for box in boxes)


def test_it_is_drawn_once_both_files_are_there_and_again_when_what_it_is_made_of_changes(tmp_path, monkeypatch):
    figures = f"figures={tmp_path / 'figures'}"
    config = tables._configured([figures])
    names = config.frontier.quality, config.frontier.time
    files = {name: tmp_path / f"{name}.jsonl" for name in names}
    for path in files.values():
        path.write_text(path.name)
    rows = dict(
        zip(files, (CELLS, [row | {"plan_ms": row["ms"], "kernel_ms": row["ms"]} for row in TIMES]), strict=True)
    )
    path = tmp_path / "figures" / "pocket_headline_frontier.png"
    assert path not in tables._pictures(config, files, {names[0]: CELLS})

    def made(config=config):
        return tables._pictures(config, files, rows)

    for picture, (digest, draw) in made().items():
        twice = [tmp_path / f"{number}.png" for number in (0, 1)]
        for one in twice:
            draw(one, digest)
        assert twice[0].read_bytes() == twice[1].read_bytes() and tabular.drawn_from(twice[0]) == digest, picture
    digests = [made()[path][0], made(tables._configured([figures, "contrasts.draws=5000"]))[path][0]]
    files[names[1]].write_text("other")
    digests.append(made()[path][0])
    (tmp_path / "draws.py").write_text("other")
    monkeypatch.setattr(frontier, "__file__", str(tmp_path / "draws.py"))
    digests.append(made()[path][0])
    monkeypatch.setattr(tabular, "__file__", str(tmp_path / "draws.py"))
    digests.append(made()[path][0])
    assert len(set(digests)) == 5


def test_nothing_is_drawn_where_nothing_meets():
    names = ("quality", "time")
    assert frontier.drawing([cell(sparsity=0.5)], [timed()], names, RULE) is None
    few = [*two("vsa", 0.5), cell()]  # of two clips, one at 90%
    assert frontier.drawing(few, [timed()], names, RULE) is None
    made = frontier.drawing([*few, *two("sta")], [timed(), timed("sta")], names, RULE)
    assert [[point.method for point in panel.points] for panel in made.panels] == [["sta"]]
    assert made.about.endswith("only: draft at 90% (1 of 2).")
