"""Tables from records: intervals, paired contrasts, what may not be mixed, and the committed ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from draftbench import records, tables

ROOT = Path(__file__).parent.parent
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


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_an_interval_of_constants_has_no_width():
    assert tables.interval({"a": [2.5, 2.5], "b": [2.5]}) == (2.5, 2.5, 2.5)


def test_an_interval_is_about_the_mean_of_all_clips():
    mean, low, high = tables.interval({"a": [1.0, 2.0, 3.0], "b": [10.0]})
    assert mean == 4 and low < mean < high


def test_an_interval_of_two_clips_reaches_both():
    assert tables.interval({"a": [0.0, 1.0]}) == (0.5, 0, 1)  # means 0, .5, 1 with chances 1/4, 1/2, 1/4
    assert tables.interval({"a": [0.0], "b": [1.0]}) == (0.5, 0, 1)


def test_an_interval_of_many_clips_is_the_textbooks():
    values = np.random.default_rng(3).normal(5, 2, 100)
    mean, low, high = tables.interval({str(i): [x] for i, x in enumerate(values)})
    half = 1.96 * values.std() / 10
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_seeds_of_one_prompt_are_no_new_evidence_about_prompts():
    few = tables.interval({str(i): [float(i)] for i in range(4)})
    many = tables.interval({str(i): [float(i)] * 25 for i in range(4)})
    assert few == pytest.approx(many)
    assert tables.interval({"a": [1.0, 2.0]}, seed=1) == tables.interval({"a": [1.0, 2.0]}, seed=1)


def test_the_table_has_means_over_clips():
    rows = [row(seed=0, psnr=30.0), row(seed=1, psnr=34.0), row("dense", 0.0, psnr=100.0)]
    text = tables.markdown(rows, "some")
    assert line(text, "| 0.75 | draft | 2") == [
        *("0.75", "draft", "2", "0.750", "0.400", "32.00 +- 2.83", "0.640", "0.320", "0.00", "1.00", "2.00"),
        *("1.50", "2.50"),
    ]
    assert text.index("| dense |") < text.index("| draft |")
    assert "The dense clips: motion 1.00, scene 1.00." in text
    assert "pocket, token grid 8x16x24, weights `aaaaaaaaaaaa`, on one H100, torch 2.13, commit `cccccccccccc`" in text


def test_contrasts_are_paired_by_prompt_and_seed():
    rows = [row("random", prompt=p, seed=s, psnr=20.0 + 3 * s) for p in ("a", "b") for s in (0, 1)]
    rows += [row("draft", prompt=p, seed=s, psnr=25.0 + 3 * s) for p in ("b", "a") for s in (1, 0)]
    rows += [row("draft", prompt="a", seed=9, psnr=1000.0), row("random", prompt="c", psnr=-1000.0)]  # without a twin
    rows += [row("draft", 0.9, prompt="a", psnr=77.0)]  # another sparsity
    rows += [failed("draft", prompt="b", seed=7), row("random", prompt="b", seed=7, psnr=0.0)]
    text = tables.markdown(rows, "some")
    minus_random, minus_draft = text.split("## Minus ")[1:]
    found = line(minus_random, "| 0.75 | draft")
    assert found[2:] == ["+5.000 [+5.000, +5.000]", "+0.100 [+0.100, +0.100]", "+0.050 [+0.050, +0.050]"]
    assert line(minus_draft, "| 0.75 | random")[2] == "-5.000 [-5.000, -5.000]"
    assert "| 0.9 |" not in minus_random and "| random" not in minus_random


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("device", "H200"), ("versions", {"torch": "2.11"}), ("weights_hash", "b" * 64), ("grid", [16, 32, 48]),
        ("model", "hunyuan_video"), ("commit", "d" * 40),
    ],
)  # fmt: skip
def test_a_table_never_mixes(name, other):
    with pytest.raises(ValueError, match=f"^some: rows with different {name} share no table: ") as error:
        tables.markdown([row(), row(seed=1, **{name: other})], "some")
    assert repr(other) in str(error.value)


def test_a_method_that_failed_is_shown_with_its_reason():
    text = tables.markdown([row(), failed("oracle"), row("sta", seed=1), failed("sta")], "some")
    assert line(text, "| 0.75 | oracle")[2] == "failed: out of memory"
    assert line(text, "| 0.75 | sta")[2:4] == ["1 of 2; failed: out of memory", "0.750"]


def test_what_was_not_measured_is_a_dash():
    pairs = [row(method, seed=seed, psnr=20.0) for method in ("random", "draft") for seed in (0, 1)]
    text = tables.markdown([r | {"psnr_db": None, "lpips": None} for r in pairs], "some")
    assert line(text, "| 0.75 | draft | 2")[5:8] == ["- +- -", "0.400", "-"]
    minus_random = text.split("## Minus ")[1]
    assert line(minus_random, "| 0.75 | draft")[2:] == ["-", "+0.000 [+0.000, +0.000]", "-"]


def test_the_readme_is_filled_between_its_markers():
    text = "before\n<!-- table a -->\nold\n<!-- end -->\nafter\n"
    rows = [row(psnr=30.0), row(seed=1, psnr=32.0), row("dense", 0.0, psnr=100.0), row("sta", 0.9, psnr=20.0)]
    filled = tables.readme(text, {"a": tables.short(rows)})
    assert filled.startswith("before\n<!-- table a -->\n| PSNR dB / LPIPS (clips) | 75% | 90% |\n")
    assert line(filled, "| `draft`") == ["`draft`", "31.0 / 0.310 (2)", "-"] and "`dense`" not in filled
    assert filled.endswith("\n<!-- end -->\nafter\n") and tables.readme(filled, {"a": tables.short(rows)}) == filled
    with pytest.raises(ValueError, match="no records for the table 'a'"):
        tables.readme(text, {})


def test_the_command_writes_checks_and_says_what_is_stale(tmp_path, capsys):
    folders = ["--records", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--readme", str(tmp_path / "R.md")]
    assert tables.main(folders) == 2 and "there are no .jsonl files" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    records.write(row(), tmp_path / "record.json")
    records.promote([tmp_path / "record.json"], "some", tmp_path / "in", allow_dirty=True)
    (tmp_path / "R.md").write_text("<!-- table some -->\n<!-- end -->\n")
    page = tmp_path / "out" / "some.md"
    assert tables.main([*folders, "--check"]) == 1 and not page.exists()
    assert f"{page} is out of date; run `make tables`" in capsys.readouterr().err
    assert tables.main(folders) == 0 and page.read_text() == tables.markdown([row()], "some")
    assert tables.main([*folders, "--check"]) == 0
    (tmp_path / "R.md").write_text("<!-- table some -->\nother\n<!-- end -->\n")
    assert tables.main([*folders, "--check"]) == 1 and "R.md is out of date" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_committed_records(path):
    rows = records.read_all([path])
    assert (ROOT / "results/tables" / f"{path.stem}.md").read_text() == tables.page(path, rows)
    text = (ROOT / "README.md").read_text()
    if f"<!-- table {path.stem} -->" in text:
        assert f"<!-- table {path.stem} -->\n{tables.short(rows)}\n<!-- end -->" in text


def test_every_committed_table_has_records():
    assert {path.stem for path in (ROOT / "results/tables").glob("*.md")} == {path.stem for path in COMMITTED}
    assert COMMITTED


def test_diagnostics_are_promoted_and_shown(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records.write(row(), run / "record.json")
    note = {"method": "draft", "sparsity": 0.5, "prompt": "a", "seed": 3, "mean": {"error": 0.25, "mass": 0.75}}
    (run / "diagnostics.json").write_text(json.dumps(note))
    source = records.promote([run], "some", tmp_path / "in", allow_dirty=True)
    text = tables.page(source, records.read_all([source]))
    assert text.startswith(tables.markdown([row()], "some"))
    assert text.endswith("| 0.5 | draft | 0.250 | 0.750 |\n") and "a (seed 3)" in text


def test_oracle_recalls_the_most():
    """By construction: at equal counts nothing can recall more than the blocks with the most mass."""
    for path in (ROOT / "results/records").glob("*.diagnostics.json"):
        notes = json.loads(path.read_text())
        for level in {note["sparsity"] for note in notes if note["method"] == "oracle"}:
            masses = {note["method"]: note["mean"]["mass"] for note in notes if note["sparsity"] == level}
            assert max(masses, key=masses.get) == "oracle" and masses["draft"] > masses["random"]
