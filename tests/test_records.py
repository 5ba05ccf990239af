"""Records are whole or absent, whoever writes them and whatever fails."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from draftbench import promote, records, tables


def record(**values):
    known = {
        "model": "pocket", "method": "draft", "sparsity": 0.9, "prompt": "turn left", "seed": 0,
        "weights_hash": "b" * 64, "grid": [4, 8, 8], "device": "CPU", "versions": {"torch": "2.13"},
    }  # fmt: skip
    return records.new(**known | {"cell_id": "c0", "status": "ok", "commit": "a" * 40, "dirty": False} | values)


def test_new_fills_every_field_with_null_or_what_json_holds():
    made = records.new(model="pocket", grid=(4, 8, 8), latency={"p50": 1.5})
    assert list(made)[: len(records.FIELDS)] == list(records.FIELDS)
    assert (
        made["schema_version"] == records.SCHEMA_VERSION == 4
        and made["kind"] == "cell"
        and made["timestamp"].endswith("+00:00")
    )
    assert made["psnr_db"] is None and made["grid"] == [4, 8, 8] and made["latency"] == {"p50": 1.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"psnr": 1.0}, r"unknown record fields \['psnr'\]"),
        ({"psnr_db": float("nan")}, "record field psnr_db must be valid JSON, got nan"),
        ({"latency": {"p50": [float("inf")]}}, "record field latency"),
        ({"model": object()}, "record field model"),
        ({"status": "bad"}, "'ok' or 'failed: <reason>'"),
    ],
)
def test_new_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        records.new(**values)


def test_cell_id_depends_on_everything_but_the_order():
    one = records.cell_id({"a": 1, "b": {"x": (1, 2), "y": None}})
    assert one == records.cell_id({"b": {"y": None, "x": [1, 2]}, "a": 1})
    assert one != records.cell_id({"a": 1, "b": {"x": [2, 1], "y": None}})
    assert len(one) == 16 and int(one, 16) >= 0
    with pytest.raises(ValueError):
        records.cell_id({"a": float("nan")})


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "folder" / "record.json"
    records.write(record(psnr_db=30.5, prompt="naïve"), path)
    assert records.read(path) == records.read_all([path])[0] == records.read_all([tmp_path, path])[0]
    assert records.read(path)["psnr_db"] == 30.5 and records.read(path)["prompt"] == "naïve"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def fail(code):
    def raising(*_, **__):
        raise OSError(code, os.strerror(code))

    return raising


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", [(os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "mkdir")])
def test_a_failed_write_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch, where, code):
    path = tmp_path / "record.json"
    records.write(record(seed=1), path)
    monkeypatch.setattr(*where, fail(code))
    with pytest.raises(OSError, match=f"cannot write {path}: {os.strerror(code)}") as caught:
        records.write(record(seed=2), path)
    assert caught.value.errno == code and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert records.read(path)["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_record_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        records.write({"psnr_db": float("nan")}, tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        records.write(record(), tmp_path / "file" / "record.json")


WRITER = """
import sys
from draftbench import records
assert "torch" not in sys.modules
index = records.Index(sys.argv[1] + "/cells")
for i in range(300):
    row = records.new(cell_id="c0", status="ok", seed=int(sys.argv[2]), prompt="x" * 20000)
    records.write(row, sys.argv[1] + "/record.json")
    index.add(row, sys.argv[1] + "/record.json")
"""


def test_two_processes_write_at_once_and_every_read_is_whole(tmp_path):
    command = [sys.executable, "-P", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(seed)]) for seed in (1, 2)]
    index, seen = records.Index(tmp_path / "cells"), set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "record.json").exists():
            seen.add(records.read(tmp_path / "record.json")["seed"])
        if (tmp_path / "cells" / "c0.json").exists():
            assert index.find("c0") is not None
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen and seen <= {1, 2}
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "cells",
        "cells/c0.json",
        "record.json",
    ]


def test_a_killed_writer_leaves_no_row_that_is_read(tmp_path):
    with pytest.raises(KeyboardInterrupt), records.replacing(tmp_path / "record.json") as temporary:
        temporary.write_text('{"half')
        left = tmp_path / temporary.name.replace(str(os.getpid()), "1")
        left.write_text('{"half')  # as a kill -9 would leave it
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == [left.name]
    assert records.read_all([tmp_path]) == []


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b"[]", b"3", b"{}", b"\xff\xfe"])
def test_a_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'record.json'} is not a draftbench record"):
        records.read_all([tmp_path])


def test_read_all_takes_records_and_tables_but_not_wandb_files(tmp_path):
    for i, name in enumerate(("0/record.json", "1/record_b.json", "wandb/x/records_0.table.json", "0/other.json")):
        records.write(record(seed=i), tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record(seed=i)) for i in (7, 8)) + "\n")
    assert sorted(r["seed"] for r in records.read_all([tmp_path, tmp_path / "0"])) == [0, 1, 7, 8]
    with pytest.raises(FileNotFoundError, match="no such run folder or record"):
        records.read_all([tmp_path / "none"])


def test_index_finds_finished_cells_only(tmp_path, monkeypatch):
    index = records.Index(tmp_path / "cells")
    assert index.find("c0") is None
    monkeypatch.chdir(tmp_path)
    records.write(record(seed=4), "record.json")
    index.add(record(seed=4), "record.json")
    monkeypatch.chdir("/")
    assert index.find("c0")[0]["seed"] == 4
    for other in (record(cell_id="c1"), record(status="failed: no memory")):
        records.write(other, tmp_path / "record.json")
        assert index.find("c0") is None
    (tmp_path / "record.json").write_text("{")
    assert index.find("c0") is None
    (tmp_path / "record.json").unlink()
    assert index.find("c0") is None
    for damaged in ("{", "[]", "{}", '{"record": 3}'):
        (tmp_path / "cells" / "c0.json").write_text(damaged)
        assert index.find("c0") is None


def run_folder(tmp_path, *rows):
    for i, row in enumerate(rows):
        records.write(row, tmp_path / "run" / str(i) / "record.json")
    return tmp_path / "run"


def test_promote_sorts_keeps_failures_and_takes_the_last_run_of_a_cell(tmp_path, capsys):
    folder = run_folder(
        tmp_path,
        record(cell_id="b", sparsity=0.9, status="failed: no memory"),
        record(cell_id="a", sparsity=0.75, psnr_db=1.0, timestamp="2026-01-01T00:00:00+00:00"),
        record(cell_id="a", sparsity=0.75, psnr_db=2.0, timestamp="2026-01-02T00:00:00+00:00"),
        record(cell_id="a", sparsity=0.75, status="failed: killed", timestamp="2026-01-03T00:00:00+00:00"),
        record(cell_id="d", method="dense", sparsity=0.0),
    )
    assert promote.main([str(folder), "--name", "first", "--out", str(tmp_path / "out")]) == 0
    assert "first.jsonl: 3 records, 1 failed" in capsys.readouterr().out
    lines = (tmp_path / "out" / "first.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["cell_id"], row["psnr_db"]) for row in rows] == [("d", None), ("a", 2.0), ("b", None)]
    assert rows[2]["status"] == "failed: no memory"
    assert lines == [json.dumps(row, sort_keys=True) for row in rows]
    again = [str(folder), "--name", "first", "--out", str(tmp_path / "out")]
    assert promote.main(again) == 2
    assert re.match(r"draftbench: \S+first\.jsonl exists; replace it with --force\n$", capsys.readouterr().err)
    assert promote.main([*again, "--force"]) == 0
    assert promote.main([str(tmp_path / "none"), "--name", "x"]) == 2
    assert capsys.readouterr().err == f"draftbench: no such run folder or record: {tmp_path / 'none'}\n"


def test_the_order_of_keys_is_no_difference(tmp_path):
    """Promoted records have them sorted, those of a run not."""
    versions = [{"torch": "2.13", "python": "3.12"}, {"python": "3.12", "torch": "2.13"}]
    folder = run_folder(tmp_path, *(record(cell_id=f"c{i}", seed=i, versions=x) for i, x in enumerate(versions)))
    found = records.read_all([promote.promote([folder], "x", tmp_path / "out")])
    assert [list(row["versions"]) for row in [*found, *records.read_all([folder])]] == [["python", "torch"]] * 4


@pytest.mark.parametrize("dirty", [True, None])
def test_promote_refuses_uncommitted_code(tmp_path, dirty):
    folder = run_folder(tmp_path, record(), record(cell_id="c1", seed=1, dirty=dirty))
    with pytest.raises(ValueError, match="1 of 2 records come from uncommitted code; allow with --allow-dirty"):
        promote.promote([folder], "x", tmp_path / "out")
    assert promote.promote([folder], "x", tmp_path / "out", allow_dirty=True).name == "x.jsonl"


def test_promote_refuses_what_tables_would(tmp_path, capsys):
    """In the same words, before it writes; and a file that was there stays as it was."""
    mixed = record(device="a"), record(cell_id="c1", seed=1, device="b")
    twice = record(), record(cell_id="of a run with videos")
    calibrated = (record(method_settings={"calibrated": {"prompts": ["turn left"], "seeds": [7]}}),)
    out = tmp_path / "out"
    (source := out / "x.jsonl").parent.mkdir()
    for name, rows in {"mixed": mixed, "twice": twice, "calibrated": calibrated}.items():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        nowhere = [f"{key}={tmp_path / 'nowhere'}" for key in ("readme", "quoted", "figures", "out")]
        assert tables.main([f"records={out}", *nowhere]) == 2
        said = capsys.readouterr().err
        source.write_text("before")
        folder = run_folder(tmp_path / name, *rows)
        assert promote.main([str(folder), "--name", "x", "--out", str(out), "--force"]) == 2
        assert capsys.readouterr().err == said and said.startswith("draftbench: x: ")
        assert source.read_text() == "before" and list(out.iterdir()) == [source]


@pytest.mark.parametrize("kind", ["attention", "step", "methods"])
def test_every_committed_row_of_a_bench_is_whole_and_one_that_lacks_anything_needed_is_not(kind):
    paths = (Path(__file__).parent.parent / "results" / "records").glob("*.jsonl")
    rows = [row for row in records.read_all(sorted(paths), whole=True) if row["kind"] == kind]
    done = next(row for row in rows if row["status"] == "ok")
    for name in (*records.NEEDED[kind], *records.MEASURED.get(kind, ())):
        with pytest.raises(ValueError, match=f"it has no {name}$"):
            records.check_whole(done | {name: None})


@pytest.mark.parametrize("name", ["kind", "versions", "sparsity"])
def test_promote_refuses_what_no_table_could_take(tmp_path, name):
    folder = run_folder(tmp_path, record(), record(cell_id="c1") | {name: None})
    with pytest.raises(ValueError, match=f"^x: the record of cell c1: .*{name}"):
        promote.promote([folder], "x", tmp_path / "out")


def test_promote_refuses_newer_schemas_nothing_and_bad_names(tmp_path):
    folder = run_folder(tmp_path, record(), record(cell_id="c1", schema_version=5))
    with pytest.raises(ValueError, match=r"schema_version must be 1 to 4, got 5"):
        promote.promote([folder], "x", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no records"):
        promote.promote([tmp_path / "empty"], "x", tmp_path / "out")
    with pytest.raises(ValueError, match="plain file name"):
        promote.promote([folder], "../x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_damaged_is_left_out_and_told(tmp_path, capsys):
    folder = run_folder(tmp_path, record(), record(cell_id="c1", seed=1))
    (folder / "record_bad.json").write_text('{"schema_version": 4, "psnr_db": NaN}')
    (folder / "diagnostics.json").write_text('{"cut')
    assert promote.main([str(folder), "--name", "x", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert "2 records, 0 failed" in told.out and "record_bad.json is not a draftbench record: it holds NaN" in told.err
    assert "diagnostics.json is not JSON" in told.err and len(records.read_all([tmp_path / "out"])) == 2
    with pytest.raises(ValueError, match="it holds NaN"):
        promote.promote([folder], "y", tmp_path / "out")


ABSENT = {  # what records of an older version do not have
    1: {*records.LATER, *records.ATTENTION_LATER},
    2: {"reference_sha256", "lpips_net"},
    3: {"lpips_net"},
}


def test_where_a_calibration_lay_is_not_read():
    settings = {"top_p": None, "calibration": "/somewhere/svg2.yaml", "calibrated": {"value": 0.5}}
    nowhere = settings | {"calibration": None}
    for made, read in ((settings, nowhere), ({"like": settings}, {"like": nowhere}), ({"block": 128}, {"block": 128})):
        row = records.new(cell_id="c0", status="ok") | {"method_settings": made}
        assert records.upgrade(row)["method_settings"] == read


@pytest.mark.parametrize("version", ABSENT)
@pytest.mark.parametrize("kind", ["cell", "baseline", "attention", "step", "methods"])
def test_a_record_of_an_older_version_is_read_as_one_of_this_version_and_promoted(tmp_path, monkeypatch, version, kind):
    values = {"kind": kind, "cell_id": "c0", "sparsity": 0.9, "commit": "a" * 40, "dirty": False, "status": "ok"}
    now = records.new(**values)
    if "lpips_net" in now:
        now["lpips_net"] = "alex"  # which no older one says
    old = {name: value for name, value in now.items() if name not in ABSENT[version]} | {"schema_version": version}
    records.write(old | {"peak_memory_gib": 1.5, "of_its_time": 3}, tmp_path / "run" / "record.json")
    found = records.read(tmp_path / "run" / "record.json")
    assert found == now | {"peak_memory_gib": 1.5, "of_its_time": 3} and found["schema_version"] == 4
    records.write(records.new(**values | {"cell_id": "c1"}), tmp_path / "run" / "record_new.json")
    monkeypatch.setattr(tables, "check", lambda *_: None)  # these rows are no table's
    source = promote.promote([tmp_path / "run"], "x", tmp_path / "out")
    assert [row["schema_version"] for row in records.read_all([source])] == [4, 4]


@pytest.mark.parametrize("version", [0, 5, "1", None])
def test_a_record_of_no_known_version_is_refused(tmp_path, version):
    records.write(record(schema_version=version), tmp_path / "record.json")
    with pytest.raises(ValueError, match=rf"record.json is not a .*: schema_version must be 1 to 4, got {version!r}"):
        records.read_all([tmp_path])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"psnr_db": "high"}, "psnr_db must be a number or null, got 'high'"),
        ({"seed": True}, "seed must be a number or null, got True"),
        ({"cell_id": ["a"]}, r"cell_id must be a text or null, got \['a'\]"),
        ({"dense": "none"}, "dense must be an object or null, got 'none'"),
        ({"grid": 3}, "grid must be a list or null, got 3"),
        ({"schema_version": True}, "schema_version must be 1 to 4, got True"),
    ],
)
def test_a_value_that_no_table_could_take_is_damage(values, said, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(record() | values))
    with pytest.raises(ValueError, match=f"record.json is not a draftbench record: {said}"):
        records.read(tmp_path / "record.json")


def test_of_a_file_cut_in_the_middle_the_good_rows_are_kept_and_the_bad_one_is_named(tmp_path):
    lines = [json.dumps(record(seed=i, prompt="naïve"), ensure_ascii=False).encode() for i in range(3)]
    path = tmp_path / "rows.jsonl"
    for cut in (1, 100, len(lines[2]) - 1, lines[2].index("ï".encode()) + 1):
        path.write_bytes(b"\n".join([lines[0], b"", lines[1], lines[2][:cut]]))
        damaged = []
        assert [row["seed"] for row in records.read_all([tmp_path], damaged)] == [0, 1]
        assert len(damaged) == 1 and damaged[0].startswith(f"{path}, line 4, is not a draftbench record: ")
        with pytest.raises(ValueError, match="line 4, is not a draftbench record"):
            records.read_all([tmp_path])
    path.write_bytes(b"\n".join([lines[0][:50], lines[1]]))
    damaged = []
    assert [row["seed"] for row in records.read_all([tmp_path], damaged)] == [1] and "line 1" in damaged[0]
