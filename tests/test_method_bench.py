"""The benchmark of methods' estimates on a CPU: a tiny shape end to end, what fails, and its table and picture."""

import pytest
from draftbench.methods.svg import SVG

from draftbench import bench, estimate_tables, method_bench, records

TINY = ["bench=methods", "bench.shapes=tiny", "bench.budget_s=0.001"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every method but the slow oracle, whose svg fails."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    chosen = ",".join(name for name in method_bench.methods() if name != "oracle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVG, "plan", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory\nand more")))
        code = bench.main([*TINY, f"bench.methods=[{chosen}]", "bench.sparsities=[0.6]", f"hydra.run.dir={folder}"])
    return code, folder, {row["method"]: row for row in records.read_all([folder])}


def test_every_method_has_its_times_or_its_reason(run):
    code, folder, rows = run
    assert code == 1 and set(rows) == set(method_bench.methods()) - {"oracle"}
    assert {"draft", "svg2", "re_ttention", "sta_searched", "efficient_vdit"} <= set(rows)
    assert not {"dense", "other_kernel", "other_seed", "fewer_steps"} & set(rows)
    svg, jenga = rows.pop("svg"), rows.pop("jenga")
    assert svg["status"] == "failed: RuntimeError: CUDA out of memory" and svg["plan_ms"] is None
    assert jenga["status"].startswith("absent: sparsity=0.6 is out of reach")  # its neighbours, at so small a grid
    for name, row in rows.items():
        assert row["status"] == "ok", row["status"]
        for key in ("ms", "plan_ms", "kernel_ms"):
            assert 0 < row[key]["p20"] <= row[key]["p50"] <= row[key]["p80"] and row[key]["n"] >= 5
        assert row["dense"]["ms"] > 0 and row["first_plan_ms"] > 0 and row["executors_run"] == ["cpu"]
        assert row["share"] == row["plan_ms"]["p50"] / row["kernel_ms"]["p50"]
        assert row["error"]["all"] < row["tolerance"]
        if name in ("svg2", "xattention", "sparge"):  # a knob that was set for this call
            assert abs(row["sparsity_achieved"] - 0.6) < 0.01
    text = (folder / "table.md").read_text()
    off = {name for name, row in rows.items() if abs(row["sparsity_achieved"] - 0.6) > 0.02}
    cells = [line.split(" | ")[2:4] for line in text.splitlines() if line.startswith("| tiny | 0.6 | ")]
    assert {name.split()[0] for name, achieved in cells if achieved.endswith(" *")} == off and "re_ttention" in off
    assert "| sparge (mask only) |" in text
    assert all(name in text for name in (*rows, "svg", "jenga"))


def test_a_plan_runs_on_the_executor_that_is_asked_for(tmp_path):
    argv = [*TINY, "bench.methods=draft", "bench.sparsities=0.6", "bench.executor=reference"]
    assert bench.main([*argv, f"hydra.run.dir={tmp_path}"]) == 0
    (row,) = records.read_all([tmp_path])
    assert row["executors_run"] == ["reference"] and row["requested"]["executor"] == "reference"
    assert "| reference |" in (tmp_path / "table.md").read_text()


def test_rows_of_two_executors_share_no_page(run):
    ran = run[2]["draft"]
    other = ran | {"requested": ran["requested"] | {"executor": "reference"}}
    with pytest.raises(ValueError, match="x: rows with different executor share no table: 'auto', 'reference'"):
        estimate_tables.page([ran, other], "x")


def test_what_a_method_keeps_between_steps_is_there_and_stays_as_it_was():
    case = method_bench.dense_case(method_bench.SHAPES["tiny"], "turn left", 0)
    one = method_bench.Midway(case, method_bench.made_for(case.shape, "re_ttention", 0.6))
    assert set(one.state) == {"rho", "residual"}
    before = {name: id(value) for name, value in one.state.items()}
    assert (one.attend() == one.attend()).all()  # each from the same state
    two = method_bench.Midway(case, method_bench.made_for(case.shape, "svg2", 0.6))
    centroids = two.state["q"].clone()
    two.plan()
    assert (two.state["q"] == centroids).all() and {n: id(v) for n, v in one.state.items()} == before


def test_the_picture_and_rows_that_share_no_table(run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from PIL import Image

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    rows = list(run[2].values())
    estimate_tables.figure(rows, tmp_path / "x.png", "abc")
    assert Image.open(tmp_path / "x.png").info["digest"] == "abc"
    (axes,) = drawn[0].axes
    bars = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.containers[0], strict=True))
    dropped = run[2]["re_ttention"]["sparsity_achieved"]
    assert bars[f"re_ttention {dropped:.3f} (asked 0.6) tiny"].get_hatch() and not bars["draft 0.6 tiny"].get_hatch()
    assert "hatched" in axes.get_xlabel() and not any(patch.get_hatch() for patch in axes.get_legend().get_patches())
    with pytest.raises(ValueError, match="x: rows with different device share no table"):
        estimate_tables.page([rows[0], rows[0] | {"device": "another"}], "x")


@pytest.mark.parametrize(
    "override, reason",
    [
        ("bench.methods=[dense]", "bench.methods must be one of all, draft"),
        ("bench.sparsities=[0]", r"bench.sparsities must be a non-empty list of distinct numbers in (0, 1), got 0"),
        ("bench.shapes=[nope]", "bench.shapes must be one of all, hunyuan_768p"),
        ("bench.prompt=fly", "bench.prompt: prompt has words pocket does not know"),
        ("bench.masks=[captured]", "unknown key bench.masks"),
        ("bench.executor=nope", "executor must be one of auto, reference, cpu"),
        ("bench.executor=fa4", "executor=fa4 cannot run here: it needs a"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(override, reason, capsys, tmp_path):
    assert bench.main([*TINY, override, f"hydra.run.dir={tmp_path}/x"]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "x").exists()
