"""A paper's numbers as they are quoted, ours beside them, and nothing of one where only the other belongs."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from draftbench import paper_tables, records, tables

ROOT = Path(__file__).parent.parent
QUOTED = paper_tables.read(ROOT / "results/quoted/draft_attention.csv")


@pytest.fixture(scope="module")
def paper():
    with initialize_config_module("draftbench.conf", version_base="1.3"):
        return paper_tables.Paper(**OmegaConf.to_container(compose("tables", ["paper=draft_attention"]).paper))


def row(model="hunyuan_video", grid=(33, 48, 80), layers=2, steps=50, sparsity=0.9, psnr=30.0, **values):
    known = {
        "model": model, "grid": grid, "steps": steps, "sparsity": sparsity, "psnr_db": psnr, "ssim": 0.9321,
        "lpips": 0.05, "dense": {"steps": 0.3, "timestep": None, "layers": layers}, "method": "draft", "seed": 42,
        "prompt": "a cat", "weights_hash": "a" * 64, "device": "H200", "versions": {"torch": "2.13"}, "status": "ok",
        "commit": "c" * 40, "speedup_generate": 1.625, "generate_s": 900.0, "density_effective": 0.4,
    }  # fmt: skip
    return records.new(**known | values)


def lines(page, heading):
    """The cells of a table's lines, by their first cells (model, method, sparsity)."""
    section = page.markdown().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    body = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    return {tuple(cells[:3]): cells[3:] for cells in body}


def test_the_quoted_numbers_are_all_there_and_each_says_where_from():
    assert len(QUOTED) == 5 * 6 + 14 * 9 + 5
    assert {line["source"] for line in QUOTED} == {"Table 1", "Figure 4"}
    assert len({(line["model"], line["method"], line["sparsity"], line["quantity"]) for line in QUOTED}) == len(QUOTED)


def test_quoted_numbers_stand_as_the_paper_prints_them_and_dashes_beside_them(paper):
    page = paper_tables.page("draft_attention", paper, QUOTED, [])
    found = lines(page, "Quoted, and ours beside it")
    assert len(found) == 1 + 19
    assert found["HunyuanVideo 768p", "Draft", "90%"] == [
        *("24.22", "79.90", "18.12", "65.9", "95.7", "96.9", "36.6", "57.8", "283.20"), *"------"
    ]  # fmt: skip
    assert found["Wan2.1 512p", "SVG", "0%"][:4] == ["-", "-", "-", "65.1"]
    assert lines(page, "End-to-end speed-up, Figure 4")["Wan2.1 768p", "75%", "1.42x"] == ["-", "-", "-"]
    assert "There are no records of these models yet." in page.markdown()


def test_ours_stand_beside_the_same_model_and_setting_with_both_scales_of_ssim(paper):
    rows = [row(), row(seed=43, psnr=32.0), row(sparsity=0.8, status="failed: out of memory", psnr_db=None)]
    page = paper_tables.page("draft_attention", paper, QUOTED, rows)
    found = lines(page, "Quoted, and ours beside it")
    assert found["HunyuanVideo 768p", "Draft", "90%"][-6:] == ["2", "31.00", "93.21 (0.9321)", "5.00", "0.400", "1.62x"]
    assert found["HunyuanVideo 768p", "Draft", "80%"][-6:] == ["failed: out of memory", *"-----"]
    assert found["HunyuanVideo 768p", "SVG", "90%"][-6:] == found["Wan2.1 768p", "Draft", "75%"][-6:] == [*"------"]
    assert lines(page, "End-to-end speed-up, Figure 4")["HunyuanVideo 768p", "90%", "1.75x"] == [
        "1.62x",
        "900.0",
        "H200",
    ]
    assert "Ours, HunyuanVideo 768p: hunyuan_video, token grid 33x48x80" in page.markdown()


@pytest.mark.parametrize(
    "other",
    [{"layers": 0}, {"steps": 20}, {"dense": {"steps": 0.25, "layers": 2}}, {"sparsity": 0.55}, {"sparsity": 0.5}],
)
def test_records_of_other_settings_are_not_beside_quoted_ones(paper, other):
    page = paper_tables.page("draft_attention", paper, QUOTED, [row(**other)])
    assert all(cells[-6:] == [*"------"] for cells in list(lines(page, "Quoted, and ours beside it").values())[1:])
    assert "Left out, made at other settings: hunyuan_video 33x48x80." in page.markdown()


def test_another_model_has_a_table_of_its_own(paper):
    pocket = {"model": "pocket", "grid": (8, 16, 24)}
    rows = [row(**pocket, sparsity=level) for level in (0.55, 0.9)] + [row(**pocket, sparsity=0.9, method="svg"), row()]
    rows += [row(**pocket, sparsity=0.5), row(**pocket, sparsity=0.9, steps=8)]  # of no row of the paper
    page = paper_tables.page("draft_attention", paper, QUOTED, rows)
    quoted, own = page.markdown().split("## pocket 8x16x24")
    assert "pocket" not in quoted and "no evidence about larger models" in own
    assert list(lines(page, "pocket 8x16x24")) == [
        ("model", "method", "sparsity"), ("pocket", "SVG", "90%"),
        ("pocket", "Draft", "55%"), ("pocket", "Draft", "90%"),
    ]  # fmt: skip
    numbers = {line["value"] for line in QUOTED if line["quantity"] == "psnr_db"}
    assert not numbers & set(re.findall(r"\d+\.\d+", own))


def test_what_differs_shares_no_table(paper):
    with pytest.raises(ValueError, match="draft_attention, HunyuanVideo 768p: rows with different weights_hash"):
        paper_tables.page("draft_attention", paper, QUOTED, [row(), row(seed=1, weights_hash="b" * 64)])
    rows = [row(), row(seed=1, device="H100", psnr=20.0)]
    rows += [one | {"model": "pocket", "grid": [16, 32, 48]} for one in rows]
    page = paper_tables.page("draft_attention", paper, QUOTED, rows)
    names = [table.name for table in page.parts]
    assert names == ["table1", "figure4", "table1_2", "figure4_2", "pocket_16x32x48", "pocket_16x32x48_2"]
    found = [line["ours_psnr_db"] for table in page.parts for line in table.rows if line.get("ours_psnr_db")]
    assert found == [20.0, 20.0, 30.0, 30.0, 20.0, 30.0] and len(page.files()) == 13


def test_dense_of_ours_stands_at_zero_whatever_the_paper_calls_it(paper):
    wan = row("wan21_14b", (21, 48, 80), 1, sparsity=0.0, method="dense", psnr=100.0)
    found = lines(paper_tables.page("draft_attention", paper, QUOTED, [wan]), "Quoted, and ours beside it")
    assert {name: cells[-5] for name, cells in found.items() if cells[-6] == "1"} == {
        ("Wan2.1 768p", "SVG", "0%"): "100.00", ("Wan2.1 768p", "Draft", "0%"): "100.00"
    }  # fmt: skip


def test_the_command_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records.write(row(), tmp_path / "run" / "record.json")
    assert tables.main(["paper=draft_attention", "records=run", f"quoted={ROOT / 'results/quoted'}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# DraftAttention (Shen et al., 2025, arXiv 2505.14708v1), Table 1\n") and "93.21 (" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert tables.main(["paper=draft_attention", "records=run"]) == 2
    assert "draft_attention.csv" in capsys.readouterr().err


HEAD = "model,method,sparsity,quantity,value,source\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "must have the columns model, method, sparsity, quantity, value, source; it lacks model, method,"),
        (HEAD, "has no line of numbers"),
        (HEAD + "m,Draft,0.9,psnr_db,abc,Table 1\n", "line 2: value must be a number, got 'abc'"),
        (HEAD + "\nm,Draft,0.9,psnr_db,nan,Table 1\n", "line 3: value must be a number, got 'nan'"),
        (HEAD + "m,Draft\n", "line 2: it has no sparsity, quantity, value, source"),
    ],
    ids=["columns", "empty", "number", "finite", "cut"],
)
def test_a_file_of_quoted_numbers_that_holds_none_is_named(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.csv.* {message}"):
        paper_tables.read(tmp_path / "x.csv")
