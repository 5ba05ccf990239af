"""One table in three forms: read back, dashes for what is missing, LaTeX that LaTeX can read."""

import csv
import io
import re

import pytest
from PIL import Image, PngImagePlugin

from draftbench.tabular import Page, Table, canvas, drawn_from, save

ROWS = [
    {"method": "a_b & 50%", "ms": {"p50": 1.23456789, "n": 3}, "sd": 0.5, "grid": [1, 2]},
    {"method": "c", "ms": {"p50": 1234567.0, "n": None}, "sd": None, "grid": None},
]
COLUMNS = {
    "": "{method}", "ms": ("{ms[p50]:.2f} +- {sd:.1f}", "{ms[p50]:.2f}"), "sd": "{sd:.3f}",
    "n": lambda row: str(row["ms"]["n"]),
}  # fmt: skip
TABLE = Table("times", COLUMNS, ROWS, "Times", "In ms,\nmedian.")


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        "## Times", "", "In ms,", "median.", "", "| | ms | sd | n |", "|---|---|---|---|",
        "| a_b & 50% | 1.23 +- 0.5 | 0.500 | 3 |", "| c | 1234567.00 | - | None |",
    ]  # fmt: skip


def test_csv_has_the_numbers_and_not_their_text():
    first, second = csv.DictReader(io.StringIO(TABLE.csv()))
    assert first == {"method": "a_b & 50%", "ms.p50": "1.23457", "ms.n": "3", "sd": "0.5", "grid": "[1, 2]"}
    assert second == {"method": "c", "ms.p50": "1.23457e+06", "ms.n": "", "sd": "", "grid": ""}


def test_latex_has_as_many_columns_as_each_line_has_cells_and_nothing_unescaped():
    text = TABLE.latex("some_page")
    (sides,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0].replace(r"\midrule", "")
    lines = [line for line in body.splitlines() if line]
    assert sides == "lrrr" and all(len(re.split(r"(?<!\\)&", line)) == 4 and line.endswith(r"\\") for line in lines)
    assert (
        r"a\_b \& 50\% & 1.23 +- 0.5" in text
        and r"\caption[{some\_page: Times}]{some\_page: Times. In ms, median.}" in text
    )
    for kind in ("table", "tabular"):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") == 1


def test_a_latex_caption_holds_the_pages_prose_without_marks():
    note = "**No evidence** about `x` at 50%, see [its page](a_b.md)."
    page = Page("some", "Some", ["Of 3 runs.", "On a GPU.", Table("t", {"a": "{a}"}, [{"a": 1}], "T", note), "More."])
    expected = r"\caption[{some: T}]{some: T. Of 3 runs. On a GPU. No evidence about x at 50\%, see its page.}"
    assert expected in page.files()["some.t.tex"]


def test_a_page_has_a_file_for_each_form_of_each_table_and_is_the_same_again():
    page = Page("some", "Some", ["Text.", TABLE])
    assert list(page.files()) == ["some.md", "some.times.csv", "some.times.tex"]
    assert page.files()["some.md"] == f"# Some\n\nText.\n\n{TABLE.markdown()}\n" and page.files() == page.files()
    with pytest.raises(ValueError, match="two tables have one name"):
        Page("some", "Some", [TABLE, TABLE]).files()


def test_a_table_without_rows():
    assert Table("none", {"a": "{a}"}, []).grid() == "| a |\n|---|"
    assert r"\begin{tabular}{l}" in Table("none", {"a": "{a}"}, []).latex("x")


def test_a_cell_stays_a_cell_whatever_it_says():
    grid = Table("t", {"a": "{a}", "b": "{b}"}, [{"a": "x | y\nz", "b": 1}]).grid()
    assert grid.splitlines()[-1] == r"| x \| y z | 1 |"


def test_a_picture_that_another_took_the_place_of_is_found(tmp_path):
    figure = canvas(1, 1)
    save(figure, tmp_path / "a.png", "abc")
    assert drawn_from(tmp_path / "a.png") == "abc" and drawn_from(tmp_path / "none.png") is None
    with Image.open(tmp_path / "a.png") as image:
        about = PngImagePlugin.PngInfo()
        for name, text in image.info.items():
            about.add_text(name, str(text))
        Image.new(image.mode, image.size, "red").save(tmp_path / "a.png", pnginfo=about)
    assert drawn_from(tmp_path / "a.png") is None
    save(figure, tmp_path / "a.png", "abc")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data.replace(b"IDAT", b"\0\0\0\0"))
    assert drawn_from(tmp_path / "a.png") is None
