"""Real command lines, end to end in processes of their own: a sweep killed and resumed, bad input, a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from draftbench import records, run


def command(tmp_path, tiny, *arguments):
    small = [
        f"model.weights={tiny()}", "model.frames=5", "model.height=32", "model.width=48", "model.steps=2",
        "model.geometry.region=[4,4]", "device=cpu", "tracking=disabled", "videos=false", "metrics=[psnr_db]",
    ]  # fmt: skip
    return [sys.executable, "-P", "-m", "draftbench", *small, f"cache={tmp_path}/cache", *arguments]


def settings():
    return {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny network only waits for its threads


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path, tiny):
    first, second = tmp_path / "first", tmp_path / "second"
    sweep = ["-m", "+method=dense,draft", "sparsity=0.5,0.9", "seeds=[0,1,2]", "batch=1", "model.frames=24"]
    argv = command(tmp_path, tiny, *sweep)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*argv, f"hydra.sweep.dir={first}"], cwd=tmp_path, env=settings(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 100
            while not list(tmp_path.glob("cache/cells/*.json")):
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    before = records.read_all([first])  # raises for a half-written one
    finished = {json.loads(path.read_text())["record"] for path in tmp_path.glob("cache/cells/[!.]*.json")}
    assert 1 <= len(finished) <= len(before) < 12

    done = subprocess.run([*argv, f"hydra.sweep.dir={second}"], cwd=tmp_path, env=settings(), capture_output=True)
    output, error = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in error, error
    assert "of 3 cells were finished before, see" in error
    rows = records.read_all([second])
    assert len(rows) == 12 and {row["status"] for row in rows} == {"ok"}
    again = {row["cell_id"]: row for row in rows}
    assert all(again[row["cell_id"]] == row for row in map(records.read, finished))
    table = (second / "table.txt").read_text()
    assert table in output
    assert [line.split()[1:4] for line in table.splitlines()[2:]] == [
        ["dense", "0", "3"], ["draft", "0.5", "3"], ["draft", "0.9", "3"],
    ]  # fmt: skip
    left = [path for folder in (second, tmp_path / "cache") for path in folder.rglob("*.tmp")]
    assert not [path for path in left if path.is_relative_to(second)]
    assert len(left) <= 1  # what the killed one was writing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsity=1.2"], "sparsity must be a number in [0, 1), got 1.2"),
        (["-m", "sparsity=0.5,abc"], "sparsity"),
        (["method=nope"], "method must be one of dense, draft,"),
        (["prompts=['']"], "prompts must be a non-empty list of distinct, non-empty texts, got ''"),
        (["model.frames=0"], "model.frames must be an integer of at least 1, got 0"),
        (["model.weights=pickled.safetensors"], "model.weights: pickled.safetensors is no whole safetensors file"),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_a_line_or_two(arguments, message, tmp_path, tiny):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled.safetensors")
    argv = command(tmp_path, tiny, *arguments)
    done = subprocess.run(argv, cwd=tmp_path, env=settings(), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"draftbench: {message}") and done.stderr.count("\n") <= 2
    assert "Traceback" not in done.stderr and not (tmp_path / "outputs").exists()


def test_a_full_disk_names_the_path_and_keeps_what_was_written(configured, tmp_path, monkeypatch):
    def replace(source, target, original=os.replace):
        if str(target).endswith("record_001.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "out" / "record_001.json"
    with pytest.raises(OSError, match="No space left on device") as error:
        run.job(configured("seeds=[0,1,2]", "batch=1"), tmp_path / "out")
    assert error.value.strerror == f"cannot write {path}: No space left on device"
    assert [row["seed"] for row in records.read_all([tmp_path / "out"])] == [0]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["record_000.json"]
    monkeypatch.undo()
    assert [row["seed"] for row in run.job(configured("seeds=[0,1,2]"), tmp_path / "out")] == [0, 1, 2]
