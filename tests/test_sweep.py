"""Real command lines, end to end in processes of their own: a sweep killed and resumed, bad input, a full disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from draftbench import records, run


@pytest.fixture
def command(small):
    """The command line of a tiny job or sweep."""
    return lambda *arguments: [sys.executable, "-P", "-m", "draftbench", *small, *arguments]


def settings():
    return {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny network only waits for its threads


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path, command):
    first, second = tmp_path / "first", tmp_path / "second"
    sweep = ["-m", "+method=dense,draft", "sparsity=0.5,0.9", "seeds=[0,1,2]", "batch=1", "model.frames=24"]
    argv = command(*sweep)
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
    done = [row for row in before if row["status"] == "ok"]
    assert 1 <= len(finished) <= len(done) < 12 and len(before) < 12
    assert {row["status"] for row in before} == {"ok", run.UNFINISHED}

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
def test_bad_input_is_refused_in_a_line_or_two(arguments, message, tmp_path, command):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled.safetensors")
    argv = command(*arguments)
    done = subprocess.run(argv, cwd=tmp_path, env=settings(), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"draftbench: {message}") and done.stderr.count("\n") <= 2
    assert "Traceback" not in done.stderr and not (tmp_path / "outputs").exists()


def test_every_test_in_the_list_of_faults_is_there():
    tests = Path(__file__).parent
    lines = (tests.parent / "results" / "logs" / "faults.md").read_text().splitlines()
    faults = [line for line in lines if line.startswith("| ")][1:]
    assert len(faults) > 10
    for line in faults:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line.split(" | ")[1])
        assert named, line
        for file, name in named:
            assert f"\ndef {name}(" in (tests / file).read_text(), name


def test_a_full_disk_names_the_path_and_keeps_what_was_written(configured, tmp_path, monkeypatch):
    def replace(source, target, original=os.replace):
        if str(target).endswith("record_001.json") and json.loads(source.read_text())["status"] == "ok":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "out" / "record_001.json"
    with pytest.raises(OSError, match="No space left on device") as error:
        run.job(configured("seeds=[0,1,2]", "batch=1"), tmp_path / "out")
    assert error.value.strerror == f"cannot write {path}: No space left on device"
    rows = records.read_all([tmp_path / "out"])
    assert [(row["seed"], row["status"]) for row in rows] == [(0, "ok"), (1, run.UNFINISHED), (2, run.UNFINISHED)]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"record_00{i}.json" for i in range(3)]
    monkeypatch.undo()
    assert [row["seed"] for row in run.job(configured("seeds=[0,1,2]"), tmp_path / "out")] == [0, 1, 2]


KILLED = """
import os, signal, sys
from draftbench import cli, records
where, argv, original = sys.argv[1], sys.argv[2:], os.replace
def replace(source, target):
    if str(target).endswith(where) and b"still running" not in open(source, "rb").read():
        open(source, "r+b").truncate(100)  # as if half of it had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)
os.replace = replace
cli.main(argv)
"""


@pytest.mark.parametrize("where", ["record_001.json", "table.txt"])
def test_kill_9_in_a_write_loses_nothing_that_was_finished(where, tmp_path, command):
    sweep = [
        "-m",
        "sparsity=0.5",
        "seeds=[0,1,2]",
        "batch=1",
        "latency.enabled=false",
        f"hydra.sweep.dir={tmp_path}/out",
    ]
    argv = command(*sweep)[4:]
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, where, *argv], env=settings(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = {row["seed"]: row for row in records.read_all([tmp_path / "out"])}
    expected = {"record_001.json": ["ok", run.UNFINISHED, run.UNFINISHED], "table.txt": ["ok"] * 3}[where]
    assert [before[seed]["status"] for seed in range(3)] == expected
    assert not (tmp_path / "out" / "table.txt").exists()

    again = subprocess.run(command(*sweep), env=settings(), capture_output=True, cwd=tmp_path)
    error = again.stderr.decode()
    assert again.returncode == 0 and f"{expected.count('ok')} of 3 cells were finished before" in error, error
    rows = {row["seed"]: row for row in records.read_all([tmp_path / "out"])}
    assert all(rows[seed] == row for seed, row in before.items() if row["status"] == "ok")
    assert {row["status"] for row in rows.values()} == {"ok"} and (tmp_path / "out" / "table.txt").exists()


def test_two_sweeps_on_one_folder_and_a_record_that_was_cut(tmp_path, command):
    sweep = [
        "-m",
        "sparsity=0.5,0.9",
        "seeds=[0,1]",
        "batch=1",
        "latency.enabled=false",
        f"hydra.sweep.dir={tmp_path}/out",
    ]
    argv = command(*sweep)
    both = [subprocess.Popen(argv, env=settings(), cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    rows = records.read_all([tmp_path / "out"])
    assert [(row["sparsity"], row["seed"], row["status"]) for row in rows] == [
        (level, seed, "ok") for level in (0.5, 0.9) for seed in (0, 1)
    ]
    path = tmp_path / "out" / "1" / "record_001.json"
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "out" / "1" / "record_007.json").write_text("{")  # of no cell of this sweep
    again = subprocess.run(argv, env=settings(), capture_output=True, cwd=tmp_path)
    error = again.stderr.decode()
    assert (
        again.returncode == 1 and f"left out: {path.with_name('record_007.json')} is not a draftbench record" in error
    )
    found = records.read_all([tmp_path / "out"], damaged=[])
    assert len(found) == 4 and {row["status"] for row in found} == {"ok"}
    table = (tmp_path / "out" / "table.txt").read_text()
    assert [line.split()[1:4] for line in table.splitlines()[2:]] == [["draft", "0.5", "2"], ["draft", "0.9", "2"]]


MORTAL = """
import os, signal
from draftbench.methods.draft import Draft
def plan(self, *arguments, original=Draft.plan):
    if self.sparsity == 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
Draft.plan = plan
"""


def test_a_job_killed_under_joblib_is_a_record_with_its_reason_and_the_others_go_on(tmp_path, command):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(MORTAL)
    argv = command("-m", "launcher=joblib", "sparsity=0.5,0.75,0.9", "latency.enabled=false", "hydra.sweep.dir=out")
    broken = settings() | {"PYTHONPATH": f"{tmp_path}/faults"}
    first = subprocess.run(argv, env=broken, cwd=tmp_path, capture_output=True, text=True)
    before = {row["sparsity"]: row for row in records.read_all([tmp_path / "out"])}
    statuses = {level: row["status"] for level, row in before.items()}
    assert first.returncode == 1 and statuses == {0.5: run.UNFINISHED, 0.75: "ok", 0.9: "ok"}, first.stderr
    assert "draftbench: job 0 (" in first.stderr and "ended without a result, killed: SIGKILL" in first.stderr
    assert "1 of 3 cells failed; the same command runs those and what is missing\n" in first.stderr

    again = subprocess.run(argv, env=settings(), cwd=tmp_path, capture_output=True, text=True)
    rows = {row["sparsity"]: row for row in records.read_all([tmp_path / "out"])}
    assert again.returncode == 0 and {row["status"] for row in rows.values()} == {"ok"}, again.stderr
    assert all(rows[level] == before[level] for level in (0.75, 0.9))


def test_an_interrupted_sweep_under_joblib_ends_the_jobs_that_run(tmp_path, command):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "sitecustomize.py").write_text(MORTAL.replace("os.kill(os.getpid(), signal.SIGKILL)", "signal.pause()"))
    argv = command("-m", "launcher=joblib", "sparsity=0.5,0.9", "latency.enabled=false", "hydra.sweep.dir=out")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            argv, cwd=tmp_path, env=settings() | {"PYTHONPATH": str(tmp_path)}, stdout=log, stderr=log,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
        )  # fmt: skip
        try:
            end = time.monotonic() + 100
            while not (tmp_path / "out" / "0" / "record.json").exists():  # that of a job that has begun
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)  # to it alone, as by kill, and not to its jobs as from a terminal
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            code = process.poll()
        finally:
            process.kill()
            process.wait()
    log = (tmp_path / "log").read_text()
    assert code == 130 and "interrupted; what is finished is in out" in log, log
