"""The attention benchmark on a CPU: the command end to end, what is refused, what is failed, tables and picture."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from draftbench.kernels import reference

from draftbench import attention_bench, attention_tables, bench, cases, contest, kernels, peers, records, tables
from draftbench.cases import SHAPES, Shape
from draftbench.peers import Absent, Contestant, Ready
from draftbench.promote import promote

PROMPT = "turn left in the cage hall"
BLOCKS = Shape((2, 16, 32), 2, 64, 128, device="cpu", capture=cases.TINY, threads=1)  # every block has 128 tokens
FAST = ["bench.shapes=tiny", "bench.budget_s=0.01"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one run of the tiny shape."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    levels = "bench.sparsities=[0.0,0.5,0.9]"
    assert bench.main(["+bench=attention", *FAST, levels, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def rows(run):
    return records.read_all([run])


def case(shape, sparsity=0.5, mask="captured"):
    dense = cases.dense_case(shape, PROMPT, 0)
    return next(c for c in (dense, *cases.sparse_cases(dense, sparsity, cases.MASKS, 0)) if c.mask == mask)


def kept_tokens(plan, layout, heads):
    """Token mask [H, S, S] of a plan, by brute force."""
    mask = torch.zeros(heads, layout.length, layout.length, dtype=torch.bool)
    for h in range(heads):
        starts = plan.q_offsets[0, h % plan.q_offsets.shape[1]].tolist()
        for row, count in enumerate(plan.counts[0, h].tolist()):
            for block in plan.blocks[0, h, row, :count].tolist():
                mask[h, starts[row] : starts[row + 1], starts[block] : starts[block + 1]] = True
    return mask


def test_a_run_has_every_row(rows):
    seen = {(row["contestant"], row["mask"], row["sparsity"]): row for row in rows}
    assert len(seen) == len(rows)
    for level in (0.0, 0.5, 0.9):
        assert seen["draft_cpu", "captured", level]["status"] == "ok"
        assert seen["kernel_cpu", "captured", level]["status"] == "ok"
        assert all(("kernel_cpu", mask, level) in seen for mask in cases.MASKS) or level == 0
        assert ("draft_cpu", "balanced", level) not in seen
    assert seen["draft_paper", "captured", 0.5]["status"].startswith("absent: the paper's code takes whole regions")
    row = seen["draft_cpu", "captured", 0.9]
    assert row["kind"] == "attention" and row["cell_id"] and row["commit"] and isinstance(row["dirty"], bool)
    assert {"torch", "flash_attn_4", "fastvideo_kernel"} <= set(row["versions"])
    assert row["ms"]["n"] >= attention_bench.LEAST and row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    assert row["sparsity_achieved"] == pytest.approx(0.9, abs=0.02) and row["error"]["worst"] < row["tolerance"]
    assert set(row["parts_ms"]) >= {"pool", "score", "select", "list", "kernel", "rest"}
    other = seen["kernel_cpu", "captured", 0.9]
    assert other["parts_ms"] is None and other["plan_ms"] is None and other["error"]["lse"] < 1e-4
    assert row["plan_ms"]["n"] == row["ms"]["n"] and 0 < row["plan_ms"]["p20"] <= row["plan_ms"]["p80"]
    asked = row["requested"]
    assert asked["shapes"] == ["tiny"] and asked["sparsities"] == [0, 0.5, 0.9] and asked["masks"] == [*cases.MASKS]
    assert set(asked["contestants"]) == {"draft_cpu", "kernel_cpu", "sdpa", "draft_paper"} and asked["others"] == []


def test_rates(rows):
    for row in rows:
        if row["status"] == "ok":
            ms, dense = row["ms"]["p50"], row["dense"]
            assert row["tflops"] == pytest.approx(4 * 64 * row["kept_pairs"] / (ms / 1000) / 1e12)
            assert dense["contestant"] == "sdpa" and row["speedup"] == pytest.approx(dense["ms"] / ms)
            assert row["ideal_share"] == pytest.approx(dense["ms"] * row["density"] / ms)
    (dense,) = [row for row in rows if row["mask"] == "dense"]
    assert dense["speedup"] == dense["ideal_share"] == dense["density"] == 1


def test_share_of_the_ideal():
    row = {"ms": {"p50": 40.0}, "kept_pairs": 1e10, "all_pairs": 1e11, "dense": {"ms": 300.0}}
    attention_bench.rate(row, Shape((1, 1, 1), 1, 128))
    assert row["ideal_share"] == pytest.approx(0.75) and row["speedup"] == 7.5
    assert row["tflops"] == pytest.approx(4 * 128 * 1e10 / 0.04 / 1e12)


@pytest.mark.parametrize("mask", ["dense", *cases.MASKS])
def test_kept_pairs_are_those_of_a_brute_force_count(mask):
    tiny = SHAPES["tiny"]
    made = case(tiny, mask=mask)
    pairs = made.pairs(made.plan)
    mask = kept_tokens(made.plan, tiny.layout, tiny.heads)
    video = tiny.layout.video
    assert pairs["kept"] == mask.sum() and pairs["all"] == mask.numel()
    assert pairs["video"] == mask[:, :video, :video].sum() and pairs["all_video"] == tiny.heads * video**2


def test_captured_rows_are_unequal_and_balanced_and_trimmed_rows_equal_at_one_density():
    shape = replace(SHAPES["cpu"], capture=cases.TINY)
    made = [case(shape, 0.75, mask) for mask in cases.MASKS]
    assert [len(one.plan.counts.unique()) for one in made][1:] == [1, 1] and len(made[0].plan.counts.unique()) > 3
    pairs = [one.pairs(one.plan)["video"] / one.pairs(one.plan)["all_video"] for one in made]
    assert pairs == pytest.approx([0.25] * 3, abs=0.02)
    captured, balanced, trimmed = (listed(one.plan.counts, one.plan.blocks, 1) for one in made)
    # A trimmed row is a captured one cut or filled; a random one has little of it.
    inside = (captured & trimmed).sum(-1) == torch.minimum(captured.sum(-1), trimmed.sum(-1))
    assert inside.all() and (captured & balanced).sum() < 0.5 * captured.sum()


def test_tiling_keeps_logits_and_goes_round():
    tiny = SHAPES["tiny"]
    q, _, source = cases.captured(tiny.capture, PROMPT, 0, torch.device("cpu"))
    made = cases._tiled(q, source, Shape((5, 9, 13), 7, 128, 9, device="cpu"), torch.Generator().manual_seed(0))
    (frames, height, width), token = source.grid, (4 * 9 + 8) * 13 + 12
    other = ((4 % frames) * height + 8 % height) * width + 12 % width
    assert made.shape == (1, 5 * 9 * 13 + 9, 7, 128)
    off = made[0, token, 6] * 2**0.25 - q[0, other, 6 % q.shape[2]].repeat(2)
    assert off.norm() < 0.1 * made[0, token, 6].norm()
    assert made[0, -1].sub(made[0, -1 - source.text]).norm() < 0.1 * made[0, -1].norm()
    with pytest.raises(ValueError, match="multiple of pocket's 64, got 96"):
        cases._tiled(q, source, Shape((1, 1, 1), 1, 96), torch.Generator())


def test_the_sampled_reference_sees_what_is_wrong():
    made = case(SHAPES["tiny"], 0.75)
    out, _ = reference.run(made.q, made.k, made.v, made.plan, made.shape.layout)
    found = cases.sampled_error(out, made, made.plan)
    assert found["all"] < 1e-5 and found["worst"] < 1e-5 and found["rows"] > 20
    text = out.clone()
    text[0, -1, -1] *= 1.01  # one text row of one head
    assert cases.sampled_error(text, made, made.plan)["worst"] == pytest.approx(0.01, rel=1e-2)
    for wrong, reason in ((out[:, :-1], "shape"), (out.where(out < out.max(), torch.nan), "not finite")):
        with pytest.raises(ValueError, match=reason):
            cases.sampled_error(wrong, made, made.plan)
    lse = reference.run(made.q, made.k, made.v, made.plan, made.shape.layout)[1]
    assert cases.sampled_error(out, made, made.plan, lse=lse)["lse"] < 1e-5
    assert cases.sampled_error(out, made, made.plan, lse=lse + 0.5)["lse"] == pytest.approx(0.5, abs=1e-3)
    made.plan.blocks[..., 1] = made.plan.blocks[..., 0]
    with pytest.raises(ValueError, match="names a block twice"):
        cases.sampled_error(out, made, made.plan)


def test_the_difference_of_two_outputs():
    out = torch.randn(1, 50, 3, 8)
    assert cases.difference(out, out) == {"all": 0, "worst": 0}
    other = out.clone()
    other[0, 7, 2] *= 2  # the same row, and half of the other one
    assert cases.difference(out, other)["worst"] == pytest.approx(0.5)
    assert cases.difference(out, other)["all"] == pytest.approx(float(out[0, 7, 2].norm() / other.norm()))
    other[0, 7, 2, 3] = torch.nan
    for pair in ((out, other), (other, out)):
        assert not attention_bench.within(cases.difference(*pair), 1e9)
    with pytest.raises(ValueError, match="shape"):
        cases.difference(out, out[:, 1:])


def started(monkeypatch, folder, *extra):
    """Run the tiny shape at 0.5 with contestants that are added: exit code, and the last row of each of them all."""
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, *extra))
    code = bench.main([*FAST, "bench.sparsities=0.5", "bench.masks=captured", f"hydra.run.dir={folder}"])
    return code, {row["contestant"]: row for row in records.read_all([folder])}


def executed(case, change=lambda out, call: out):
    """A contestant's whole operation: the case's plan on the CPU, with a change from a call (counted from 1) on."""
    calls = []

    def run():
        calls.append(0)
        out = kernels.run("cpu")(case.q, case.k, case.v, case.plan, case.shape.layout)[0]
        return change(out, len(calls))

    return Ready(run, lambda: case.plan)


@pytest.mark.parametrize("value", [7.0, torch.nan])
def test_a_race_in_the_steady_state_is_seen(value, monkeypatch, tmp_path):
    def late(out, call):
        if call > 10:
            out[0, 3, 1, 5] = value
        return out

    racing = Contestant("racing", "kernel", lambda case: executed(case, late), "", "cpu")
    code, rows = started(monkeypatch, tmp_path / "run", racing)
    assert code == 1 and rows["racing"]["ms"] is None and rows["kernel_cpu"]["status"] == "ok"
    assert rows["racing"]["status"].startswith("failed: the last timed output is not the checked one: relative diff")


def test_an_output_that_no_other_agrees_with_on_the_same_plan_fails(monkeypatch, tmp_path):
    def unsampled(made):
        def off(out, call):
            out[0, 0, 1] += 5  # of a head that is not sampled here
            return out

        return executed(made, off)

    monkeypatch.setattr(cases, "_sampled_blocks", lambda *_: [(0, 0), (0, 1)])
    extra = [Contestant(name, "kernel", make, "", "cpu") for name, make in (("odd", unsampled), ("fine", executed))]
    code, rows = started(monkeypatch, tmp_path / "run", *extra)
    assert code == 1 and rows["fine"]["status"] == rows["kernel_cpu"]["status"] == "ok"
    assert rows["odd"]["status"].startswith("failed: its output differs from all others on the same plan, relative: ")
    assert "kernel_cpu 0." in rows["odd"]["status"] and rows["odd"]["ms"] is rows["odd"]["speedup"] is None


def test_a_wrong_lse_fails():
    made = case(SHAPES["tiny"])
    ready = peers.contestants()["kernel_cpu"].make(made)
    wrong = replace(ready, lse=lambda result: result[1] + 0.1)
    with pytest.raises(ValueError, match=r"wrong LSE: off by 0\.1 in a sampled row, above 0\.01"):
        attention_bench.check(wrong, made, {"tolerance": 1e-4})
    row = {"tolerance": 1e-4}
    with pytest.raises(ValueError, match="wrong LSE: off by nan"):
        attention_bench.check(replace(ready, lse=lambda result: result[1] * torch.nan), made, row)
    assert "lse" not in row["error"]  # JSON has no NaN


def test_rows_say_that_the_dense_kernel_failed(monkeypatch, tmp_path, capsys):
    usual, calls = peers._sdpa, []

    def breaking(backend, case):
        ready = usual(backend, case)

        def run():
            calls.append(0)
            if len(calls) > 30:  # after its own rows, among the sparse ones
                raise RuntimeError("out of\nluck")
            return ready.run()

        return replace(ready, run=run)

    sdpa = Contestant("sdpa", "dense", lambda case: breaking(None, case), "", "cpu")
    monkeypatch.setattr(attention_bench, "timings", lambda budget_s, once_ms: 20)
    code, rows = started(monkeypatch, tmp_path / "run", sdpa)
    assert code == 1 and "lack their dense time or their parts" in capsys.readouterr().err
    row = rows["kernel_cpu"]
    assert row["status"] == "ok" and row["ms"] and row["tflops"] and row["speedup"] is row["ideal_share"] is None
    assert row["dense"] == {"contestant": "sdpa", "ms": None, "failed": "RuntimeError: out of"}
    assert rows["sdpa"]["status"] == "ok"
    text = (tmp_path / "run" / "table.md").read_text()
    assert "- kernel_cpu (captured 0.5): no dense time (sdpa): RuntimeError: out of" in text
    drawn = []
    monkeypatch.setattr(attention_tables, "save", lambda picture, *_: drawn.append(picture))
    attention_tables.figure(list(rows.values()), tmp_path / "a.png", "digest")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert len({lines[name].get_marker() for name in ("sdpa", "kernel_cpu", "draft_cpu")}) == 3


def test_a_pass_for_the_parts_that_raises_loses_no_row(monkeypatch, tmp_path):
    def broken(ready, shape):
        raise RuntimeError("no parts today")

    monkeypatch.setattr(attention_bench, "parts_ms", broken)
    code, rows = started(monkeypatch, tmp_path / "run")
    row = rows["draft_cpu"]
    assert code == 1 and row["status"] == "ok" and row["ms"] and row["speedup"] and row["parts_ms"] is None
    assert row["parts_failed"] == "RuntimeError: no parts today"
    text = (tmp_path / "run" / "table.md").read_text()
    assert "- draft_cpu (captured 0.5): no parts: RuntimeError: no parts today" in text

    def stopped(ready, shape):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_bench, "parts_ms", stopped)
    code, rows = started(monkeypatch, tmp_path / "other")
    assert code == 130 and rows["kernel_cpu"]["ms"] and rows["draft_cpu"]["ms"]


@pytest.mark.parametrize(
    ("once_ms", "count"), [(1e-9, 100), (2, 50), (20, 20), (99, 20), (100, 5), (4000, 5)]
)  # fmt: skip
def test_timings_of_a_row(once_ms, count):
    assert attention_bench.timings(0.1, once_ms) == count


def test_lying_absent_and_crashing_contestants(monkeypatch, tmp_path, capsys):
    def lying(case):
        return Ready(
            lambda: kernels.run("cpu")(case.q, case.k, case.v, case.plan, case.shape.layout)[0] * 1.001, plan(case)
        )

    def unwritten(case):
        return Ready(lambda: torch.empty_like(case.q).fill_(torch.nan), plan(case))

    def crashing(case):
        raise KeyError("no such block\nand more")

    def missing(case):
        peers.need("no_such_module.inner", "no-such-package")

    def plan(case):
        return lambda: case.plan

    made = [("lying", lying), ("unwritten", unwritten), ("crashing", crashing), ("missing", missing)]
    extra = tuple(Contestant(name, "kernel", function, name, "cpu") for name, function in made)
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, *extra))
    folder = tmp_path / "run"
    assert bench.main([*FAST, "bench.sparsities=0.5", "bench.masks=captured", f"hydra.run.dir={folder}"]) == 1
    status = {row["contestant"]: (row["status"], row["ms"], row["ideal_share"]) for row in records.read_all([folder])}
    assert status["lying"][0].startswith("failed: ValueError: wrong output: relative error 0.001 over ")
    assert "were never written" in status["unwritten"][0]
    assert status["crashing"][0] == "failed: KeyError: 'no such block\\nand more'"
    assert status["missing"][0] == "absent: package no-such-package is not installed"
    assert all(status[name][1:] == (None, None) for name, _ in made)
    assert status["kernel_cpu"][0] == "ok" and "3 of 8 rows failed" in capsys.readouterr().err
    text = (folder / "table.md").read_text()
    assert "- lying: failed: ValueError: wrong output" in text and "| lying |" not in text


def test_nothing_but_absent_contestants_is_a_failure_with_the_reason(monkeypatch, tmp_path, capsys):
    def missing(case):
        peers.need("no_such_module", "no-such-package")

    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, Contestant("gone", "dense", missing, "gone", "cpu")))
    argv = [*FAST, "bench.contestants=[gone]", f"hydra.run.dir={tmp_path / 'run'}"]
    assert bench.main(argv) == 1
    assert "no contestant can run here: gone: package no-such-package is not installed" in capsys.readouterr().err


def test_what_was_computed_is_kept_when_interrupted(monkeypatch, tmp_path, capsys):
    def stop(case):
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, Contestant("stop", "kernel", stop, "stop", "cpu")))
    assert bench.main([*FAST, f"hydra.run.dir={tmp_path}/run"]) == 130
    assert [row["contestant"] for row in records.read_all([tmp_path / "run"])] == ["sdpa"]
    assert "interrupted" in capsys.readouterr().err and (tmp_path / "run" / "table.md").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bench=foo", "bench must be one of attention, methods, step, got 'foo'"),
        ("bench.shape=[x]", "unknown key bench.shape=[x]; did you mean bench.shapes?"),
        ("+extra=1", "unknown key extra=1"),
        ("bench.shapes=[x]", "bench.shapes must be one of all, hunyuan_768p, "),
        ("bench.sparsities=[0,2]", "bench.sparsities must be a non-empty list of distinct numbers in [0, 1), got 2"),
        ("bench.masks=[odd]", "bench.masks must be a list of captured, balanced, trimmed, each once, got 'odd'"),
        ("bench.contestants=[nope]", "bench.contestants must be one of all, draft_cpu, "),
        (
            "bench.contestants=[draft_cpu]",
            "bench.contestants must have a dense one to compare with for the shape cpu (sdpa; or all), got draft_cpu",
        ),
        (
            "bench.contestants=[cudnn,kernel_cpu]",
            "bench.contestants must be of all, draft_cpu, kernel_cpu, sdpa, draft_paper for the shape cpu, got 'cudnn'",
        ),
        ("bench.budget_s=0", "bench.budget_s must be a number above 0, got 0"),
        ("bench.seed=-1", "bench.seed must be an integer from 0 to 2^31 - 1, got -1"),
        ("bench.prompt=fly", "bench.prompt: prompt has words pocket does not know"),
        ("bench.shapes=wan_480p", "bench.shapes: wan_480p needs a CUDA GPU, and torch sees none; here: cpu"),
        ("-m", "there is no option -m (see --help)"),
        ("hydra.run.dir=/proc/x", "hydra.run.dir must be a folder that can be written, got /proc/x"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_line(argument, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("draftbench: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_of_another_run_are_not_added_to(run, capsys):
    assert bench.main([*FAST, f"hydra.run.dir={run}"]) == 2
    assert "without rows of another run" in capsys.readouterr().err


def test_help(capsys):
    assert bench.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(text in page for text in ("hunyuan_720p", "bench=attention", "budget_s: 0.5", "fastvideo_sta"))


def test_promote_tables_and_picture(run, rows, tmp_path, capsys):
    source = promote([run], "some", tmp_path / "in", allow_dirty=True)
    promoted = records.read_all([source])
    assert sorted(row["cell_id"] for row in promoted) == sorted(row["cell_id"] for row in rows)
    folders = [f"{name}={tmp_path / name}" for name in ("out", "figures")]
    folders += [f"records={tmp_path / 'in'}", f"readme={tmp_path / 'R.md'}", f"quoted={tmp_path}"]
    (tmp_path / "R.md").write_text("<!-- table some -->\n<!-- end -->\n")
    assert tables.main([*folders, "--check"]) == 1 and not (tmp_path / "figures").exists()
    assert "some.png is out of date" in capsys.readouterr().err
    assert tables.main(folders) == 0 and tables.main([*folders, "--check"]) == 0
    assert (tmp_path / "out" / "some.md").read_text() == attention_tables.page(promoted, "some").markdown()
    assert "| tiny | 90% | 0." in (tmp_path / "R.md").read_text()
    source.write_text(source.read_text().replace("sdpa", "spda"))
    capsys.readouterr()
    assert tables.main([*folders, "--check"]) == 1 and "some.png is out of date" in capsys.readouterr().err
    (tmp_path / "figures" / "some.png").write_bytes(b"no picture")
    assert tables.main(folders) == 0 and tables.main([*folders, "--check"]) == 0


def test_kinds_do_not_mix(run, tmp_path):
    records.write(records.new(cell_id="a", status="ok"), tmp_path / "record.json")
    with pytest.raises(ValueError, match=r"kinds \['attention', 'cell'\] do not mix"):
        promote([run, tmp_path], "some", tmp_path / "in", allow_dirty=True)


@pytest.mark.parametrize("name", ["device", "versions", "commit", "run", "budget_s"])
def test_tables_never_mix(rows, name):
    with pytest.raises(ValueError, match=f"^some: rows with different {name}.* share no table: "):
        attention_tables.page([*rows[:-1], rows[-1] | {name: "another"}], "some").markdown()
    with pytest.raises(ValueError, match="rows with different device"):
        attention_tables.check_same([*rows, *(row | {"shape": "b", "run": "b", "device": "c"} for row in rows)], "x")
    attention_tables.check_same([*rows, *(row | {"shape": "b", "run": "b"} for row in rows)], "some")


def test_a_table_names_the_commit_of_each_shape(rows):
    rows = [row | {"dirty": False} for row in rows]
    text = attention_tables.page(rows, "some").markdown()
    assert f"; commit `{rows[0]['commit'][:12]}`. " in text
    later = [row | {"shape": "later", "run": "b", "commit": "f" * 40} for row in rows]
    text = attention_tables.page([*rows, *later], "some").markdown()
    assert f"; commit `{rows[0]['commit'][:12]}`, but `ffffffffffff` (later)" in text


def test_what_matters_most_is_computed_from_the_rows(rows):
    by = {(row["contestant"], row["mask"], row["sparsity"]): row for row in rows}
    whole, kernel, even = (
        by[key, mask, 0.9]
        for key, mask in (("draft_cpu", "captured"), ("kernel_cpu", "captured"), ("kernel_cpu", "balanced"))
    )
    trimmed = by["kernel_cpu", "trimmed", 0.9]
    whole |= {"ideal_share": 0.5, "ms": spread(13.25), "plan_ms": spread(1.5)}
    kernel |= {"ms": spread(12.0), "kept_pairs": 100, "tflops": 456.0, "ideal_share": 0.625}
    even |= {"ms": spread(10.0), "kept_pairs": 125, "ideal_share": 0.7}
    trimmed |= {"ms": spread(15.0), "kept_pairs": 125}
    text = attention_tables.executors(rows).grid().splitlines()
    assert text[0] == "| | cpu |" and text[1] == "|---|---|"
    lines = [
        "ms, whole operation | 13.25 [12.25, 14.25] |", "share of the ideal, whole operation | 0.50 |",
        "ms of the selection | 1.500 [0.500, 2.500] |", "TFLOP/s of the kernel, captured | 456 |",
        "ms of the kernel, share of the ideal, captured | 12.00 [11.00, 13.00], 0.62 |",
        "ms of the kernel, share of the ideal, balanced | 10.00 [9.000, 11.00], 0.70 |",
        "time a pair, captured over random | 1.500 |", "time a pair, captured over trimmed | 1.000 |",
    ]  # fmt: skip
    assert all(f"| tiny, 90%: {line}" in text for line in lines)

    # The fastest of others, and one whose times overlap with its; neither the one behind nor a kernel of ours.
    others = [
        ("near", 9.5, "captured"),
        ("best", 8.0, "captured"),
        ("slow", 10.5, "captured"),
        ("slow", 3.0, "balanced"),
    ]
    rows += [kernel | {"contestant": name, "ms": spread(ms), "mask": mask} for name, ms, mask in others]
    text = attention_tables.executors(rows).grid().splitlines()
    assert text[0] == "| | cpu | other kernel |" and f"| tiny, 90%: {lines[0]} - |" in text
    assert f"| tiny, 90%: {lines[4]} best 8.000 [7.000, 9.000], 0.62; near 9.500 [8.500, 10.50], 0.62 |" in text
    assert f"| tiny, 90%: {lines[5]} slow 3.000 [2.000, 4.000], 0.62 |" in text


def test_what_draft_gains_is_told_of_its_fastest_executor_on_its_own_blocks(rows):
    here = {row["contestant"]: row for row in rows if row["mask"] == "captured" and row["sparsity"] == 0.9}
    whole, kernel = here["draft_cpu"], here["kernel_cpu"]
    whole |= {"ms": spread(13.25), "plan_ms": spread(1.5), "speedup": 4.5, "ideal_share": 0.5}
    whole |= {"dense": {"contestant": "sdpa", "ms": 60.0}, "parts_ms": {"pool": 9.0, "order": 0.25, "restore": 0.5}}
    kernel |= {"tflops": 456.0}
    others = [
        whole | {"contestant": "draft_slow", "ms": spread(20.0)},
        whole | {"contestant": "draft_paper", "ms": spread(5.0)},
        kernel | {"contestant": "peer", "ms": spread(12.0), "ideal_share": 0.55},
        kernel | {"contestant": "peer", "ms": spread(2.0), "mask": "balanced"},
    ]
    table = attention_tables.short([*rows, *others])
    (line,) = [cells for cells in table.cells() if cells[1] == "90%"]
    assert line == [
        "tiny", "90%", "60, sdpa", "13.25 [12.25, 14.25], cpu", "4.50", "0.50", "2.250", "456",
        "peer 12.00 [11.00, 13.00], 0.55",
    ]  # fmt: skip
    whole |= {"dense": None}  # as where the comparisons were stopped
    assert next(cells for cells in attention_tables.short(rows).cells() if cells[1] == "90%")[2] == "-"
    failed = [row | {"status": "failed: it broke"} for row in rows]
    assert attention_tables.short(failed).cells() == []
    few = [row | {"sparsity": level} for row in rows if row["sparsity"] == 0.9 for level in (0.8, 0.9)]
    shown = [[cells[1] for cells in attention_tables.short(few, levels).cells()] for levels in ((0.9,), (0.5,))]
    assert shown == [["90%"], ["80%", "90%"]]


def spread(ms):
    return {"n": 9, "p20": ms - 1, "p50": ms, "p80": ms + 1}


def test_rows_of_older_runs_have_a_table(rows):
    text = attention_tables.page(rows, "some").markdown()
    assert "Asked for: draft_cpu, " in text and "not asked for: none." in text and f": {attention_bench.RULE}." in text
    old = [{k: v for k, v in row.items() if k not in records.ATTENTION_LATER} for row in rows]
    text = attention_tables.page(old, "some").markdown()
    assert not any(
        word in text for word in ("Asked for", "selection |", "Selection", attention_bench.RULE, "Incomplete")
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (0.08914, "0.089"), (0.99996, "1.000"), (9.87654, "9.877"), (99.996, "100.0"), (306.282, "306.3"),
     (999.96, "1000"), (12345.6, "12350")],
)  # fmt: skip
def test_four_digits(value, text):
    assert attention_tables.number(value) == text


def test_a_reason_that_holds_the_word_absent_is_a_failure(rows):
    row = rows[-1] | {"status": "failed: KeyError: absent", "ms": None}
    text = attention_tables.page([*rows[:-1], row], "some").markdown()
    assert f"- {row['contestant']}: failed: KeyError: absent ({row['mask']} {row['sparsity']:g})" in text
    with pytest.raises(ValueError, match=r"'ok' or 'failed: <reason>' or 'absent: <reason>', got 'odd'"):
        records.new(kind="attention", status="odd")
    with pytest.raises(ValueError, match=r"'ok' or 'failed: <reason>', got 'absent: x'"):
        records.new(status="absent: x")


def sparse(q, k, v, mask):
    """Attention [B, H, S, D] under a token mask [H, S, S]."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])


def listed(counts, blocks, size):
    """Token mask of kept-block lists [1, H, rows, capacity]."""
    mask = torch.zeros(*blocks.shape[1:3], blocks.shape[2], dtype=torch.bool)
    for h, row in np.ndindex(*counts.shape[1:]):
        mask[h, row, blocks[0, h, row, : counts[0, h, row]].long()] = True
    return mask.repeat_interleave(size, 1).repeat_interleave(size, 2)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the packages of the peers, which take what those take."""

    def fa4(q, k, v, block_sparse_tensors=None):
        lists, full = block_sparse_tensors, torch.ones(q.shape[2], q.shape[1], q.shape[1], dtype=torch.bool)
        assert lists is None or (lists.block_size == (128, 128) and not lists.mask_block_cnt.any())
        assert lists is None or lists.full_block_idx.max() < q.shape[1] // 128
        mask = full if lists is None else listed(lists.full_block_cnt, lists.full_block_idx, 128)
        return sparse(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2), None

    def fastvideo(q, k, v, blocks, counts, sizes):
        assert (sizes == 64).all() and blocks.is_contiguous() and blocks.dtype == torch.int32
        assert blocks.min() >= 0 and blocks.max() < q.shape[2] // 64
        return sparse(q, k, v, listed(counts, blocks, 64)), None

    def mit(q, k, v, ends, _, heads, streaming, mask, longest, __, dropout):
        assert ends.tolist() == [0, len(q)] and heads.tolist() == [1] * q.shape[1] and (streaming, dropout) == (None, 0)
        tokens = mask[0].repeat_interleave(128, 1).repeat_interleave(128, 2)
        return sparse(*(x.transpose(0, 1)[None] for x in (q, k, v)), tokens)[0].transpose(0, 1)

    def flex(q, k, v, block_mask):
        assert not block_mask.kv_num_blocks.any() and block_mask.BLOCK_SIZE == (128, 128)
        assert block_mask.full_kv_indices.max() < q.shape[2] // 128
        return sparse(q, k, v, listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, 128))

    def fa3(q, k, v):
        return fa4(q, k, v)[0]

    made = {
        "flash_attn.cute.interface": {"_flash_attn_fwd": fa4}, "flash_attn_interface": {"flash_attn_func": fa3},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": types.SimpleNamespace},
        "fastvideo_kernel": {"block_sparse_attn_from_indices": fastvideo},
        "block_sparse_attn": {"block_sparse_attn_func": mit}, "flash_attn": {}, "flash_attn.cute": {},
    }  # fmt: skip
    for name, values in made.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "_compiled_flex", lambda: flex)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *((name, "dense") for name in ("sdpa", "fa3", "fa4")),
        *((name, "balanced") for name in ("fa4_sparse", "fastvideo", "mit", "flexattention", "kernel_cpu")),
        *((name, "captured") for name in ("draft_paper", "draft_cpu", "fa4_sparse", "fastvideo", "mit")),
    ],
)
def test_a_contestant_computes_what_its_plan_says(name, mask, packages):
    made, contestant = case(BLOCKS, 0.6, mask), peers.contestants()[name]
    assert contestant.takes(made)
    live = torch.arange(made.plan.blocks.shape[-1]) < made.plan.counts[..., None]
    made.plan.blocks[~live] = 2**30  # what lies behind the counts may be anything
    row = {"tolerance": 1e-4}
    attention_bench.check(contestant.make(made), made, row)
    assert row["error"]["worst"] < 1e-5
    assert row["sparsity_achieved"] == pytest.approx(0 if mask == "dense" else 0.6, abs=0.1)


def test_the_papers_way_selects_what_draft_selects():
    made = case(BLOCKS, 0.6)
    ready = peers.contestants()["draft_paper"].make(made)
    ready.run()
    paper, ours = (listed(plan.counts, plan.blocks, 1) for plan in (ready.plan(), made.plan))
    # Its threshold is the highest score to drop, which it keeps: one block a head more.
    assert (paper | ours).equal(paper) and (paper & ~ours).sum((1, 2)).tolist() == [1] * BLOCKS.heads


@pytest.mark.parametrize("name", ["fa4_sparse", "fastvideo", "mit", "flexattention"])
def test_ragged_blocks_are_told(name, packages):
    with pytest.raises(Absent, match="blocks of 128 tokens each, and at the edges"):
        peers.contestants()[name].make(case(SHAPES["tiny"]))
    with pytest.raises(Absent, match="takes the grid"):
        peers.contestants()["fastvideo_sta"].make(case(SHAPES["tiny"]))


def test_an_executor_that_cannot_run_here_is_absent(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Absent, match=r"^executor=triton .*needs a (cuda|CUDA) device, got device=cpu"):
        peers.contestants()["kernel_triton"].make(case(SHAPES["tiny"]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = case(replace(SHAPES["tiny"], dim=192))  # no head dim of any kernel's
    with pytest.raises(Absent, match=r"^executor=triton cannot run this plan: "):
        peers.contestants()["kernel_triton"].make(made).run()


def test_turns():
    log = []

    def run(name, fails=False):
        def timed():
            log.append(name)
            if fails:
                raise RuntimeError("broke\ndown")
            return float(len(log))

        return timed

    a, b, c = attention_bench.in_turn([run("a"), run("b"), run("c", True)], [4, 2, 4])
    assert len(a) == 4 and len(b) == 2 and c == "RuntimeError: broke"
    assert "".join(log) == "cba" + "abaaba" and log.count("c") == 1  # a round that is not timed, then four
    assert min(a + b) > 3
    assert attention_bench.in_turn([], []) == []


def test_a_line_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    for i in range(2):
        records.append({"schema_version": 1, "i": i}, path)
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == [0, 1]
    with pytest.raises(ValueError):
        records.append({"x": float("nan")}, path)
    with pytest.raises(OSError, match="cannot write"):
        records.append({}, tmp_path / "none" / "rows.jsonl")


def test_all_shapes_are_those_that_this_machine_can_run_and_the_others_are_told(monkeypatch, capsys, tmp_path):
    away = "hunyuan_768p, hunyuan_720p, wan_768p, wan_480p, sta_768p, pocket_large"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert contest.runnable("bench.shapes", ["all"], cases.SHAPES) == [*away.split(", "), "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert contest.runnable("bench.shapes", ["all"], cases.SHAPES) == ["cpu"]
    seen = []
    monkeypatch.setattr(attention_bench.Bench, "run", lambda self, jobs: seen.extend(shape for shape, _ in jobs))
    assert bench.main(["bench.shapes=all", f"hydra.run.dir={tmp_path}/run"]) == 0 and seen == ["cpu"]
    assert capsys.readouterr().err == f"draftbench: bench.shapes=all leaves out {away}: torch sees no CUDA GPU\n"
