"""Tables from records: intervals, paired contrasts, warm-ups, ranks, what may not be mixed, and the committed ones."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from draftbench import contrasts, method_tables, rank_tables, records, tables
from draftbench.promote import promote

RULE = contrasts.Contrasts(("random", "draft"), ("psnr_db", "ssim", "lpips"), 2000, 0)
ROOT = Path(__file__).parent.parent
NOWHERE = ("readme=nowhere", "quoted=nowhere", "figures=nowhere")
COMMITTED = sorted((ROOT / "results" / "records").glob("*.jsonl"))


def row(method="draft", sparsity=0.75, prompt="turn left", seed=0, psnr=30.0, **values):
    quality = {name: {"motion_right": name == "dense", "scene_right": True} for name in ("method", "dense")}
    known = {
        "model": "pocket", "weights_hash": "a" * 64, "device": "H100", "versions": {"torch": "2.13", "cuda": None},
        "grid": [8, 16, 24], "commit": "c" * 40, "status": "ok", "ssim": psnr / 50, "lpips": psnr / 100,
        "quality": quality, "sparsity_achieved": sparsity, "density_effective": 0.4, "generate_s": 2.0,
        "speedup_generate": 1.5, "speedup_attention": 2.5,
    }  # fmt: skip
    names = {"method": method, "sparsity": sparsity, "prompt": prompt, "seed": seed, "psnr_db": psnr}
    return records.new(**known | names | values)


def failed(method, **values):
    unmeasured = dict.fromkeys(("psnr_db", "ssim", "lpips", "quality", "sparsity_achieved"))
    return row(method, **values) | unmeasured | {"status": "failed: out of memory"}


def markdown(rows, source, notes=()):
    return method_tables.page(rows, source, RULE, notes).markdown()


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_table_has_means_over_clips():
    rows = [row(seed=0, psnr=30.0), row(seed=1, psnr=34.0), row("dense", 0.0, psnr=100.0)]
    text = markdown(rows, "some")
    assert line(text, "| 0.75 | draft | 2") == [
        "0.75", "draft", "2", "0.750", "0.400", "32.00 [30.00, 34.00]", "0.640 [0.600, 0.680]", "0.320 [0.300, 0.340]",
        "0.00", "1.00", "2.00", "1.50", "2.50",
    ]  # fmt: skip
    assert line(text, "| 0.75 | draft | 30.0")[2] == "30.0 / 30.4 / 32.0 / 33.6 / 34.0 (2.8)"
    assert "Pocket's numbers are no evidence about larger models." in text
    assert text.index("| dense |") < text.index("| draft |")
    assert "The dense clips: motion 1.00, scene 1.00." in text
    assert "pocket, token grid 8x16x24, weights `aaaaaaaaaaaa`, on one H100, torch 2.13, commit `cccccccccccc`" in text
    guided = [one | {"model_settings": {"guidance": 4.5}} for one in rows]
    assert "weights `aaaaaaaaaaaa`, guidance 4.5, on one H100" in markdown(guided, "some")


def test_a_bound_is_told_from_a_value_and_draws_that_resolve_nothing_are_refused():
    rows = [row("random", prompt=str(p), seed=0, psnr=20.0) for p in range(9)]
    rows += [row(prompt=str(p), seed=0, psnr=20.0 + (9 if p else -9)) for p in range(9)]
    ((found,), _) = (table.rows for table in contrasts.contrasts(method_tables.grouped(rows), RULE))
    assert found["psnr_db_below"] == "" and found["psnr_db_p"] > 2 / 2001 and found["ssim_below"] == ""
    levels = (("random", 20.0), ("draft", 25.0), ("a", 30.0))
    rows = [row(method, prompt=str(p), psnr=psnr) for method, psnr in levels for p in range(12)]
    few = contrasts.Contrasts(("random", "draft"), ("psnr_db", "ssim", "lpips"), 238, 0)
    reason = "contrasts.draws must be at least 239 for 12 contrasts on a page, got 238: no corrected p-value would be"
    with pytest.raises(ValueError, match=reason):
        method_tables.page(rows, "some", few)
    assert "<0.05" in method_tables.page(rows, "some", replace(few, draws=239)).markdown()


def test_contrasts_are_paired_by_prompt_and_seed():
    rows = [row("random", prompt=p, seed=s, psnr=20.0 + 3 * s) for p in ("a", "b") for s in (0, 1)]
    rows += [row("draft", prompt=p, seed=s, psnr=25.0 + 3 * s) for p in ("b", "a") for s in (1, 0)]
    rows += [row("draft", prompt="a", seed=9, psnr=1000.0), row("random", prompt="c", psnr=-1000.0)]  # without a twin
    rows += [row("draft", 0.9, prompt="a", psnr=77.0)]  # another sparsity
    rows += [failed("draft", prompt="b", seed=7), row("random", prompt="b", seed=7, psnr=0.0)]
    text = markdown(rows, "some")
    minus_random, minus_draft = text.split("## Minus ")[1:]
    found = line(minus_random, "| 0.75 | draft")
    assert found[2::2] == ["+5.000 [+5.000, +5.000]", "+0.100 [+0.100, +0.100]", "+0.050 [+0.050, +0.050]"]
    assert set(found[3::2]) == {"1"}  # two prompts tell nothing
    assert "< stands where no drawn one is: 0.003, 6 times 1 of 2001, is the least" in minus_random
    assert line(minus_draft, "| 0.75 | random")[2] == "-5.000 [-5.000, -5.000]"
    assert "| 0.9 |" not in minus_random and "| random" not in minus_random


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("device", "H200"), ("versions", {"torch": "2.11"}), ("weights_hash", "b" * 64), ("grid", [16, 32, 48]),
        ("model", "hunyuan_video"), ("commit", "d" * 40), ("dense_kernel", "fa4"),
    ],
)  # fmt: skip
def test_a_table_never_mixes(name, other):
    with pytest.raises(ValueError, match=f"^some: rows with different {name} share no table: ") as error:
        markdown([row(), row(seed=1, **{name: other})], "some")
    assert repr(other) in str(error.value)


def test_a_method_at_its_own_knob_stands_apart():
    own = {"sparsity_achieved": 0.62, "knob": {"top_p": 0.9}, "psnr_db": 40.0}
    rows = [row("svg2"), row("svg2", 0.0, **own), row("svg2", 0.0, seed=1, **own), row("draft", 0.0, psnr=50.0), row()]
    text = markdown(rows, "some")
    assert line(text, "| top_p=0.9 | svg2 | 2")[3:6] == ["0.620", "0.400", "40.00 [40.00, 40.00]"]
    assert line(text, "| 0.75 | svg2 | 1")[5].startswith("30.00")
    assert "| top_p=0.9 |" not in text.split("## Minus draft")[1]  # no draft drops as much
    short = method_tables.short(rows).grid()
    assert short.splitlines()[0] == "| PSNR dB / LPIPS (clips) | 0% | 75% | own knob |"
    assert short.splitlines()[-1] == "| `svg2` | - | 30.0 / 0.300 (1) | 40.0 / 0.300 (2), 62% by top_p=0.9 |"


def test_labels_steps_and_missed_sparsities_are_shown():
    names = ("draft", "sparge", "vsa", "sta", "sta_searched")
    rows = [row(name, steps=20, seed=seed, sparsity_achieved=0.74) for name in names for seed in (0, 1)]
    rows += [row("svg", steps=20, seed=s, sparsity_achieved=x) for s, x in ((0, 0.6), (1, 0.7))]
    rows += [row("jenga", steps=20, seed=s, sparsity_achieved=x) for s, x in ((0, 0.7), (1, 0.79))]
    few = {"sparsity_achieved": 0.0, "method_settings": {"sparsity": 0.0, "like": {}}}
    rows += [row("fewer_steps", steps=14, seed=seed, **few) for seed in (0, 1)]
    text, short = markdown(rows, "some"), method_tables.short(rows).grid()
    for name, label in (("sparge", " (mask only)"), ("vsa", " (untrained)"), ("sta", " (uniform windows)")):
        assert text.count(f"| {name}{label} |") == 3  # means, spread, contrasts
        assert f"| `{name}`{label} | 30.0" in short
    assert line(text, "| 0.75 | draft | 2")[3] == "0.740" and line(text, "| 0.75 | sta_searched | 2")[3] == "0.740"
    assert line(text, "| 0.75 | fewer_steps | 2")[3] == "14 of 20 steps"
    assert line(text, "| 0.75 | svg | 2")[3] == "0.650 *" and line(text, "| 0.75 | jenga | 2")[3] == "0.745 (2 off)"
    assert "so no row of that sparsity: svg achieved 0.650 of 0.75." in text
    assert line(short, "| `fewer_steps`")[1] == "30.0 / 0.300 (2), 14 steps"
    assert line(short, "| `svg`")[1] == "30.0 / 0.300 (2), achieved 0.650 of 0.75"


UNTIMED = dict.fromkeys(("generate_s", "speedup_generate", "speedup_attention"))
DENSE = row("dense", 0.0, psnr=100.0, frames_sha256="e" * 64, **UNTIMED)


def test_two_records_of_a_clip_share_no_table():
    with pytest.raises(ValueError, match=r"draft at 0\.75 has two records of 'turn left', seed 0, of runs"):
        markdown([row(), row(cell_id="of a run with videos")], "some")


def test_clips_of_other_steps_or_another_lpips_net_share_no_table():
    for name, value in (("steps", 50), ("lpips_net", "vgg")):
        with pytest.raises(ValueError, match=f"some: rows with different {name}"):
            markdown(
                [row(steps=20, lpips_net="alex"), row(seed=1, **{"steps": 20, "lpips_net": "alex", name: value})],
                "some",
            )
    like = {"like": {"sparsity": 0.75}}
    assert "20 of 50 steps" in markdown([row(steps=50), row("fewer_steps", steps=20, method_settings=like)], "some")


def test_a_page_says_that_its_code_was_not_committed():
    assert "`cccccccccccc`, with changes that are not committed." in markdown([row(dirty=True)], "some")


def test_a_mean_over_some_of_the_clips_is_told():
    whole = [row("dense", 0.0, seed=seed) for seed in (0, 1)] + [row(seed=seed) for seed in (0, 1)]
    text = markdown([*whole, row("svg2"), failed("svg2", seed=1)], "some")
    assert "Means over some of the clips, to be compared by the contrasts alone: svg2 0.75 (1 of 2)." in text
    varied = [*whole, *(row("svg2", seed=seed, dense={"steps": share}) for share, seed in ((0, 0), (0.5, 0), (0.5, 1)))]
    assert "alone: svg2 0.75 (1 of 2)." in markdown([x | {"dense": x["dense"] or {"steps": 0}} for x in varied], "some")
    assert "Means over some" not in markdown(whole, "some")


def test_one_clip_has_no_spread_and_no_test():
    text = markdown([row(), row("svg2")], "some")
    assert "Spread" not in text and "Holm" not in text and "too few prompts for an interval or a test." in text


def test_near_sparsities_and_several_knobs_keep_their_places():
    rows = [row(sparsity=s, psnr=p) for s, p in ((0.975, 30.0), (0.98, 29.0), (0.55, 33.0))]
    rows += [row(sparsity=0.0, psnr=p, knob={"top_p": value}) for p, value in ((25.0, 0.5), (27.0, 0.9))]
    text = method_tables.short(rows).grid()
    assert "| 55% | 97.5% | 98% | own knob |" in text and "30.0 / 0.300 (1) | 29.0 / 0.290 (1)" in text
    assert "by top_p=0.5; 27.0 / 0.270 (1)" in text


def test_a_table_in_the_readme_needs_its_end():
    with pytest.raises(ValueError, match="'<!-- table a -->' in the README lacks its <!-- end -->"):
        tables.readme("<!-- table a -->\nwords\n<!-- table b -->\n<!-- end -->\n", {})


def of_another_commit(**values):
    return row("svg2", **UNTIMED | {"commit": "d" * 40, "reference_sha256": "e" * 64} | values)


def test_times_of_several_jobs_are_told():
    jobs = [row(seed=seed, baseline_id=f"b{seed}", speedup_generate=1.0 + seed) for seed in (0, 1)]
    one = row("svg", baseline_id="b2")
    said = "Of several jobs, the mean of theirs, each over its own dense timing: draft 0.75 (2)."
    assert said in markdown([*jobs, one], "some") and "Of several jobs" not in markdown([jobs[0], one], "some")


def test_methods_of_two_commits_share_a_table_if_their_dense_clips_do():
    text = markdown([DENSE, row(**UNTIMED), of_another_commit()], "some")
    assert "commit `cccccccccccc`, but `dddddddddddd` (svg2); the dense clips of all are the same bytes." in text
    assert markdown([DENSE, row(**UNTIMED), of_another_commit(dense_kernel="fa4")], "some") == text
    tied = row(reference_sha256="e" * 64, **UNTIMED)
    assert "commit `cccccccccccc`, but `dddddddddddd` (svg2)" in markdown([tied, of_another_commit()], "some")
    partly = [DENSE, row(**UNTIMED), row("svg2", sparsity=0.5, **UNTIMED), of_another_commit()]
    assert "commit `cccccccccccc`, but `dddddddddddd` (svg2 0.75)" in markdown(partly, "some")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([DENSE, row(**UNTIMED), of_another_commit(reference_sha256="f" * 64)], "different dense clips of 'turn left'"),
        ([DENSE, row(**UNTIMED), of_another_commit(reference_sha256=None)], "different commit"),
        ([row(**UNTIMED), of_another_commit()], "different commit"),  # no dense row ties them
        ([DENSE, row(**UNTIMED), of_another_commit(seed=7)], "different commit"),
        ([DENSE | {"commit": "d" * 40, "reference_sha256": "e" * 64}, row(**UNTIMED)], "different commit"),
        ([DENSE, row(**UNTIMED), of_another_commit(generate_s=2.0)], "different commit"),
        ([DENSE, row(**UNTIMED), row(seed=1, dense_kernel="fa4", **UNTIMED)], "different dense_kernel"),
        (
            [DENSE, row(**UNTIMED), of_another_commit(commit="c" * 40, dense_kernel="fa4", generate_s=2.0)],
            "different dense_kernel",
        ),
        ([DENSE, of_another_commit(), of_another_commit(commit="f" * 40)], "svg2 at 0.75 has different commit"),
    ],
)
def test_methods_of_two_commits_are_refused_otherwise(rows, reason):
    with pytest.raises(ValueError, match=f"^some: .*{reason}"):
        markdown(rows, "some")


def test_a_method_that_failed_is_shown_with_its_reason():
    text = markdown([row(), failed("oracle"), row("sta", seed=1), failed("sta")], "some")
    assert line(text, "| 0.75 | oracle")[2] == "failed: out of memory"
    assert line(text, "| 0.75 | sta")[2:4] == ["1 of 2; failed: out of memory", "0.750"]


def test_what_was_not_measured_is_a_dash():
    pairs = [row(method, seed=seed, psnr=20.0) for method in ("random", "draft") for seed in (0, 1)]
    text = markdown([r | {"psnr_db": None, "lpips": None} for r in pairs], "some")
    assert line(text, "| 0.75 | draft | 2")[5:8] == ["-", "0.400 [0.400, 0.400]", "-"]
    minus_random = text.split("## Minus ")[1]
    assert line(minus_random, "| 0.75 | draft")[2:] == ["-", "-", "+0.000 [+0.000, +0.000]", "1", "-", "-"]


def test_without_timings_no_column_speaks_of_time():
    unmeasured = dict.fromkeys(("generate_s", "speedup_generate", "speedup_attention"))
    text = markdown([row(**unmeasured), row(seed=1, **unmeasured)], "some")
    assert len(line(text, "| 0.75 | draft | 2")) == 10 and "nothing was timed" in text and "speed-up" not in text


def at(warmup, **values):
    return row(sparsity=0.9, dense={"steps": warmup, "timestep": None, "layers": 0}, **values)


def test_warm_ups_have_a_column_each_and_no_mean_over_them():
    levels = {"draft": 20.0, "random": 10.0}
    rows = [at(w, method=m, seed=s, psnr=levels[m] + 100 * w) for w in (0.0, 0.25) for m in levels for s in (0, 1)]
    text = markdown(rows, "some")
    pivot = text.split("## By dense first steps")[1].split("## ")[0]
    assert "| PSNR dB / LPIPS (clips) | 0% | 25% |" in pivot
    assert line(pivot, "| `draft`") == ["`draft`", "20.0 / 0.200 (2)", "45.0 / 0.450 (2)"]
    assert line(text, "| 25% | 0.9 | draft | 2")[6] == "45.00 [45.00, 45.00]"
    minus_random = text.split("## Minus random")[1]
    assert line(minus_random, "| 0% | 0.9 | draft")[3].startswith("+10.000")  # paired within a warm-up
    assert tables.short(rows).startswith("| PSNR dB / LPIPS (clips) | 0% | 25% |")
    other = at(0.25, seed=2) | {"dense": {"steps": 0.25, "timestep": None, "layers": 2}}
    with pytest.raises(ValueError, match="rows with different dense share no table"):
        markdown([*rows, other], "some")
    settings = {0.0: {"knob": 1.0}, 0.25: {"knob": 2.0}}  # as a calibrated one has
    assert markdown([r | {"method_settings": settings[r["dense"]["steps"]]} for r in rows], "some") == text


def test_a_table_has_no_prompt_and_no_seed_of_a_calibration():
    def calibrated(prompts, seeds):
        of = {"value": 0.5, "achieved": 0.75, "prompts": prompts, "seeds": seeds}
        return row("svg2", method_settings={"calibrated": of})

    text = markdown([calibrated(["step left"], [6, 7])], "some")
    assert "Calibrated on 1 prompts x 2 seeds, none of them of the clips here: svg2." in text
    for prompts, seeds, used in ((["turn left"], [7], "prompt of this table, 'turn left'"),
                                 (["step left"], [0, 7], "seed of this table, 0")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^some: svg2 was calibrated on a {used}$"):
            markdown([calibrated(prompts, seeds)], "some")


def test_the_readme_is_filled_between_its_markers(capsys):
    text = "before\n<!-- table a -->\nold\n<!-- end -->\nafter\n"
    rows = [row(psnr=30.0), row(seed=1, psnr=32.0), row("dense", 0.0, psnr=100.0), row("sta", 0.9, psnr=20.0)]
    filled = tables.readme(text, {"a": tables.short(rows)})
    assert filled.startswith("before\n<!-- table a -->\n| PSNR dB / LPIPS (clips) | 75% | 90% |\n")
    assert line(filled, "| `draft`") == ["`draft`", "31.0 / 0.310 (2)", "-"] and "`dense`" not in filled
    assert filled.endswith("\n<!-- end -->\nafter\n") and tables.readme(filled, {"a": tables.short(rows)}) == filled
    assert tables.readme(filled, {}) == "before\n<!-- table a -->\n<!-- end -->\nafter\n" == tables.readme(text, {})
    assert "there are no records for the table 'a' yet" in capsys.readouterr().err


def test_the_command_writes_checks_and_says_what_is_stale(tmp_path, capsys):
    keys = [f"{name}={tmp_path / path}" for name, path in (("records", "in"), ("out", "out"), ("readme", "R.md"))]
    keys += [f"figures={tmp_path / 'figures'}", "quoted=nowhere"]
    assert tables.main(keys) == 2 and "must be a folder with .jsonl files" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    records.write(row(), tmp_path / "record.json")
    promote([tmp_path / "record.json"], "some", tmp_path / "in", allow_dirty=True)
    (tmp_path / "R.md").write_text("<!-- table some -->\n<!-- end -->\n")
    page = tmp_path / "out" / "some.md"
    assert tables.main([*keys, "--check"]) == 1 and not page.exists()
    assert f"{page} is out of date; run `make tables`" in capsys.readouterr().err
    assert tables.main(keys) == 0 and page.read_text().startswith("# some\n\npocket, token grid 8x16x24")
    assert {path.name for path in page.parent.iterdir()} == {
        "some.md", "some.methods.csv", "some.methods.tex"
    }  # fmt: skip
    assert tables.main([*keys, "--check"]) == 0 == tables.main([*keys, "check=true"])
    for name in ("R.md", "out/some.methods.csv", "out/some.methods.tex"):
        (tmp_path / name).write_text("<!-- table some -->\nother\n<!-- end -->\n")
        assert tables.main([*keys, "--check"]) == 1 and f"{name} is out of date" in capsys.readouterr().err
        assert tables.main(keys) == 0
    left = [tmp_path / name for name in ("out/old.md", "out/some.old.csv", "out/some.old.tex", "figures/old.png")]
    (tmp_path / "figures").mkdir()
    for path in [*left, tmp_path / "out" / "notes.txt"]:
        path.write_text("of records that went")
    assert capsys.readouterr().err == "" and tables.main(keys) == 0 and all(path.exists() for path in left)
    told = capsys.readouterr().err
    assert tables.main([*keys, "--check"]) == 1 and capsys.readouterr().err == told
    assert told.splitlines() == [
        f"{path} is made from none of the records in {tmp_path / 'in'}; delete it" for path in sorted(left)
    ]


def test_a_damaged_row_is_named_and_the_others_have_their_tables(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    lines = [json.dumps(row(seed=seed, psnr=30.0 + seed)) for seed in (0, 1, 2)]
    lacking = [json.dumps({"schema_version": 4, "kind": kind}) for kind in ("cell", "attention", "some")]
    (tmp_path / "in" / "some.jsonl").write_text("\n".join([*lines[:2], lines[2][:99], *lacking]))
    (tmp_path / "in" / "none.jsonl").write_text("{")
    keys = [f"records={tmp_path / 'in'}", f"out={tmp_path / 'out'}", *NOWHERE]
    assert tables.main(keys) == 1 == tables.main([*keys, "--check"])
    error = capsys.readouterr().err
    assert "some.jsonl, line 3, is not a draftbench record" in error and "none.jsonl, line 1" in error
    assert "line 4, is not a draftbench record: it has no model" in error and "line 5, is not a draft" in error
    assert "line 6, is not a draftbench record: kind must be one of cell, attention, step, methods, got 'some'" in error
    assert line((tmp_path / "out" / "some.md").read_text(), "| 0.75 | draft | 2")[5] == "30.50 [30.00, 31.00]"


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_diagnostics_that_are_none_are_named(tmp_path, text, capsys):
    (tmp_path / "some.jsonl").write_text(json.dumps(row()))
    (tmp_path / "some.diagnostics.json").write_text(text)
    assert tables.main([f"records={tmp_path}", *NOWHERE, f"out={tmp_path / 'out'}"]) == 2
    assert f"{tmp_path / 'some.diagnostics.json'} holds no diagnostics: " in capsys.readouterr().err


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text(json.dumps(row()))
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "README.md").write_bytes(b"\xff")
    keys = [f"records={tmp_path}", f"out={tmp_path / 'out'}", *NOWHERE]
    assert tables.main([*keys, f"readme={tmp_path / 'README.md'}"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'none.jsonl'} holds no records that a table could take" in told
    assert f"readme={tmp_path / 'README.md'} cannot be read: " in told
    (tmp_path / "folder.jsonl").mkdir()
    assert tables.main(keys) == 0 and [r["seed"] for r in records.read_all([tmp_path])] == [0]
    assert f"{tmp_path / 'folder.jsonl'} holds no records that a table could take" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from draftbench import tables
where, *argv = sys.argv[1:]
def replace(source, target, original=os.replace):
    if str(target).endswith(where):
        os.truncate(source, 20)  # as if no more had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)
os.replace = replace
tables.main(argv)
"""


@pytest.mark.parametrize("where", ["out/some.md", "out/some.spread.csv", "R.md"])
def test_kill_9_in_a_write_cuts_no_table_and_the_same_command_makes_the_rest(where, tmp_path):
    def promoted(n):
        rows = (json.dumps(row(seed=seed, psnr=30.0 + seed)) for seed in range(n))
        (tmp_path / "in" / "some.jsonl").write_text("\n".join(rows))

    def tables_now():
        return {path: path.read_text() for path in tmp_path.rglob("[!.]*.*") if "in" not in path.parts}

    (tmp_path / "in").mkdir()
    (tmp_path / "R.md").write_text("<!-- table some -->\n<!-- end -->\n")
    keys = [
        f"records={tmp_path}/in",
        f"out={tmp_path}/out",
        f"readme={tmp_path}/R.md",
        "quoted=nowhere",
        f"figures={tmp_path}/figures",
    ]
    promoted(2)
    assert tables.main(keys) == 0
    before = tables_now()
    promoted(3)
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, where, *keys], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tables_now()
    assert tables.main([*keys, "--check"]) == 1
    assert tables.main(keys) == 0 == tables.main([*keys, "--check"])
    after = tables_now()
    assert left[tmp_path / where] == before[tmp_path / where] != after[tmp_path / where]
    assert left.keys() == after.keys() and all(text in (before[path], after[path]) for path, text in left.items())


@pytest.mark.parametrize(
    ("others", "prompts"), [("oracle sta svg a b", 80), ("oracle sta", 128)], ids=["cells", "clips"]
)
def test_ten_thousand_records_take_less_than_ten_seconds(tmp_path, others, prompts):
    """In many cells, or of many clips."""
    (tmp_path / "in").mkdir()
    methods, levels = ("dense", "draft", "random", *others.split()), (0.5, 0.75, 0.9, 0.95)
    cells = [(m, s, p, seed) for m in methods for s in levels for p in range(prompts) for seed in range(4)]
    noise = iter(np.random.default_rng(0).normal(30, 3, len(cells)))
    rows = (json.dumps(row(m, s, f"prompt {p}", seed, float(next(noise)))) for m, s, p, seed in cells)
    (tmp_path / "in" / "some.jsonl").write_text("\n".join(rows))
    assert len(cells) > 10_000
    start = time.monotonic()
    keys = [f"records={tmp_path / 'in'}", f"out={tmp_path / 'out'}", *NOWHERE]
    assert tables.main(keys) == 0
    assert time.monotonic() - start < 10
    text = (tmp_path / "out" / "some.md").read_text()
    lines = [line for line in text.split("## Minus draft")[1].splitlines() if line.startswith("| 0.")]
    assert len(lines) == (len(methods) - 2) * 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--records=x", "there is no option --records=x: keys are written key=value"),
        ("recrods=x", "unknown key recrods=x; did you mean records?"),
        ("contrasts.draws=9", "contrasts.draws must be an integer of at least 1000, got 9"),
        ("contrasts.metrics=[psnr]", "contrasts.metrics must be a list of psnr_db, ssim, lpips, each once, got 'psnr'"),
        ("paper=nope", "paper must be one of draft_attention, got 'nope'"),
    ],
)
def test_bad_keys_are_refused_in_a_line(argument, message, capsys):
    assert tables.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"draftbench: {message}") or message in error
    assert "Traceback" not in error and error.count("\n") <= 2


def test_contrasts_are_against_methods_that_there_are(tmp_path, capsys):
    """Ours, and those of the records, which may be a user's own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "some.jsonl").write_text("".join(json.dumps(row(name)) + "\n" for name in ("draft", "my_own")))
    folders = [f"records={tmp_path / 'in'}", f"out={tmp_path / 'out'}", *NOWHERE]
    assert tables.main([*folders, "contrasts.against=[draft,darft]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("draftbench: contrasts.against must be a list of dense, draft, ") and ", my_own, " in error
    assert error.endswith(", got 'darft'\n") and not (tmp_path / "out").exists()
    assert tables.main([*folders, "contrasts.against=[random,my_own]"]) == 0
    assert "## Minus my_own" in (tmp_path / "out" / "some.md").read_text()


def test_committed_tables_are_those_of_the_committed_records(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_every_committed_table_has_records():
    known = {path.stem for path in (*COMMITTED, *(ROOT / "results/quoted").glob("*.csv"))}
    assert {path.name.partition(".")[0] for path in (ROOT / "results/tables").iterdir()} == known
    assert COMMITTED


def test_diagnostics_are_promoted_and_shown(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records.write(row(), run / "record.json")
    note = {"method": "draft", "sparsity": 0.5, "prompt": "a", "seed": 3, "mean": {"error": 0.25, "mass": 0.75}}
    (run / "diagnostics.json").write_text(json.dumps(note | {"cell_id": "c"}))
    (tmp_path / "resumed").mkdir()
    shutil.copy(run / "diagnostics.json", tmp_path / "resumed")
    source = promote([run, tmp_path / "resumed"], "some", tmp_path / "in", allow_dirty=True)
    assert len(json.loads(source.with_suffix(".diagnostics.json").read_text())) == 1
    config = tables._configured([])
    text = tables.page(source, records.read_all([source]), config).markdown()
    assert text.startswith(markdown([row()], "some"))
    assert text.endswith("| 0.5 | draft | 0.250 | 0.750 |\n") and "a (seed 3)" in text


def test_oracle_recalls_the_most():
    """By construction: at equal counts nothing can recall more than the blocks with the most mass."""
    for path in (ROOT / "results/records").glob("*.diagnostics.json"):
        notes = json.loads(path.read_text())
        for level in {note["sparsity"] for note in notes if note["method"] == "oracle"}:
            masses = {note["method"]: note["mean"]["mass"] for note in notes if note["sparsity"] == level}
            assert max(masses, key=masses.get) == "oracle" and masses["draft"] > masses["random"]


FIRST = {"draft": 30.0, "random": 20.0, "sta": 25.0}
AGAIN = {"draft": 28.0, "random": 19.0, "sta": 29.0}


def trained(means, weights="a", levels=(0.75,), **values):
    found = [row("dense", 0.0, psnr=100.0, seed=seed, weights_hash=weights * 64, **values) for seed in (0, 1)]
    for level in levels:
        for method, psnr in means.items():
            cells = {"weights_hash": weights * 64, "lpips": 1 / psnr, "ssim": 0.5, **values}
            found += [row(method, level, seed=seed, psnr=psnr, **cells) for seed in (0, 1)]
    return found


def ranked(first, again):
    return rank_tables.ranks(first, again, "some", RULE)


def test_a_rank_that_changes_is_marked():
    text = ranked(trained(FIRST), trained(AGAIN, "b")).markdown()
    assert line(text, "| 0.75 | draft")[2:4] == ["30.00 / 28.00", "1 -> 2 *"]
    assert line(text, "| 0.75 | sta")[3] == "2 -> 1 *" and line(text, "| 0.75 | random")[3] == "3"
    assert line(text, "| 0.75 | draft")[7] == "1 -> 2 *"  # of LPIPS, where less is better
    assert "marked *: 4 of 9" in text and "dense |" not in text and "weights `bbbbbbbbbbbb`" in text


def test_each_sparsity_has_ranks_of_its_own_and_what_one_file_lacks_is_in_none():
    first = trained(FIRST | {"oracle": 40.0}, levels=(0.5, 0.9))
    text = ranked(first, [*trained(AGAIN, "b", (0.9,)), *trained(FIRST, "b", (0.5,))]).markdown()
    assert line(text, "| 0.5 | draft")[3] == "1" and line(text, "| 0.9 | draft")[3] == "1 -> 2 *"
    assert "oracle" not in text


def test_means_are_over_the_clips_that_both_have():
    first = [*trained(FIRST), row("draft", seed=9, psnr=1000.0), row("sta", seed=9, status="failed: x")]
    again = [*trained(AGAIN, "b"), row("sta", seed=9, psnr=1000.0, weights_hash="b" * 64)]
    text = ranked(first, again).markdown()
    assert line(text, "| 0.75 | draft")[2] == "30.00 / 28.00" and line(text, "| 0.75 | sta")[2] == "25.00 / 29.00"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "H200"}, "some: ranks are compared at one device, not at 'H100' and 'H200'"),
        ({"grid": [16, 32, 48]}, "some: ranks are compared at one grid"),
        ({"weights_hash": "a" * 64}, "some: ranks are compared between two weights, and both have aaaa"),
    ],
)
def test_what_must_be_the_same_is(change, message):
    with pytest.raises(ValueError, match=message):
        ranked(trained(FIRST), [one | change for one in trained(AGAIN, "b")])
    ranked(trained(FIRST), [one | {"commit": "d" * 40} for one in trained(AGAIN, "b")])


def test_the_page_has_ranks_once_the_second_file_is_there(tmp_path):
    keys = [f"records={tmp_path / 'in'}", f"out={tmp_path / 'out'}", *NOWHERE]
    for name, found in (("some", trained(FIRST)), ("other", trained(AGAIN, "b"))):
        for number, one in enumerate(found):
            records.write(one, tmp_path / name / f"record_{number}.json")
        promote([tmp_path / name], name, tmp_path / "in", allow_dirty=True)
        assert tables.main([*keys, "+again.some=other"]) == 0
        text = (tmp_path / "out" / "some.md").read_text()
        assert ("## Ranks on the model trained again" in text) == (name == "other")
    assert "Ranks" not in (tmp_path / "out" / "other.md").read_text()
    assert (tmp_path / "out" / "some.ranks.csv").is_file()
