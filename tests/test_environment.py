"""The commit by git, by a stamp and by neither; the device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from draftbench import environment

IDENTITY = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]


@pytest.fixture
def tree(tmp_path):
    """A small copy of the project, without git."""
    root = tmp_path / "copy"
    for name in ("draftbench", "methods"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    shutil.copy(environment.__file__, root / "draftbench")
    (root / "pyproject.toml").write_text('[project]\nname = "draftbench"\n')
    return root


def git(root, *arguments):
    done = subprocess.run(["git", *IDENTITY, "-C", root, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_repository(root):
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "x")
    return git(root, "rev-parse", "HEAD")


def commit(root, **variables):
    """What the copy in `root` says of itself, by its own interpreter, from another folder."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from draftbench import environment as e; "
        "assert e.__file__.startswith(sys.argv[1]); assert 'torch' not in sys.modules; print(json.dumps(e.commit()))"
    )
    command = [sys.executable, "-P", "-S", "-c", code, str(root)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=variables, cwd="/").stdout)


def write_stamp(root):
    subprocess.run(
        [sys.executable, "-m", "draftbench.environment", "stamp"], check=True, capture_output=True, cwd=root,
    )  # fmt: skip


PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def test_git_tells_the_commit_and_tracked_changes(tree):
    head = make_repository(tree)
    assert commit(tree, **PATH) == {"commit": head, "dirty": False}
    (tree / "new.txt").touch()
    assert not commit(tree, **PATH)["dirty"]
    assert commit(tree, GIT_DIR="/nowhere", GIT_INDEX_FILE="/nowhere", **PATH)["commit"] == head
    (tree / "methods" / "new.py").touch()  # a method that the commit does not have
    assert commit(tree, **PATH) == {"commit": head, "dirty": True}
    (tree / "methods" / "new.py").unlink()
    (tree / "methods" / "__init__.py").write_text("x = 1\n")
    assert commit(tree, **PATH) == {"commit": head, "dirty": True}


def test_a_stamp_where_there_is_no_git(tree, tmp_path):
    head = make_repository(tree)
    write_stamp(tree)
    away = tmp_path / "away"
    shutil.copytree(tree, away, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    assert commit(away, **PATH) == {"commit": head, "dirty": False}
    write_stamp(away)
    assert commit(away, **PATH) == {"commit": head, "dirty": False}
    (away / "methods" / "__init__.py").write_text("x = 1\n")
    assert commit(away, **PATH) == {"commit": head, "dirty": True}
    write_stamp(away)  # stamping again does not launder the edit
    assert commit(away, **PATH) == {"commit": head, "dirty": True}


def test_a_config_edited_after_the_stamp_counts(tree, tmp_path):
    (tree / "conf" / "calibration").mkdir(parents=True)
    (tree / "conf" / "calibration" / "some.yaml").write_text("- 1\n")
    head = make_repository(tree)
    write_stamp(tree)
    installed = tmp_path / "site"
    shutil.copytree(tree / "draftbench", installed / "draftbench")
    for name in ("methods", "conf"):
        shutil.copytree(tree / name, installed / "draftbench" / name)
    assert commit(installed, **PATH) == {"commit": head, "dirty": False}
    (installed / "draftbench" / "conf" / "calibration" / "some.yaml").write_text("- 2\n")
    assert commit(installed, **PATH) == {"commit": head, "dirty": True}


def test_installed_sources_have_the_digest_of_the_checkout(tree, tmp_path):
    head = make_repository(tree)
    write_stamp(tree)
    installed = tmp_path / "site"
    shutil.copytree(tree / "draftbench", installed / "draftbench")
    shutil.copytree(tree / "methods", installed / "draftbench" / "methods")
    (installed / "kernels").mkdir()
    (installed / "kernels" / "other.py").write_text("# another package of this name\n")
    (installed / "draftbench" / "kernels").mkdir()
    assert commit(installed, **PATH) == {"commit": head, "dirty": False}


def test_git_of_another_project_is_not_ours(tree, tmp_path):
    (tree / "pyproject.toml").write_text('[project]\nname = "other"\n')
    make_repository(tree)
    assert commit(tree, **PATH) == {"commit": "unknown", "dirty": True}
    (tree / "pyproject.toml").write_text('[project]\nname = "draftbench"\n')
    shutil.rmtree(tree / ".git")
    make_repository(tmp_path)  # the copy lies inside someone else's repository
    assert commit(tree, **PATH) == {"commit": "unknown", "dirty": True}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"commit": "a"}', "\x00"])
def test_no_git_and_a_bad_stamp_is_unknown(tree, text):
    (tree / "draftbench" / "_stamp.json").write_text(text)
    assert commit(tree, PATH="/nowhere") == {"commit": "unknown", "dirty": True}


def test_describe():
    found = environment.describe(torch.device("cpu"))
    assert found["device"]
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "triton", "cuda", "draftbench"} <= set(found["versions"])
    assert isinstance(found["commit"], str) and isinstance(found["dirty"], bool)
    json.dumps(found, allow_nan=False)


def test_cpu_name_without_proc(monkeypatch):
    def missing(self, *_, **__):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert environment._cpu_name()


def test_resolve_device(monkeypatch):
    assert environment.resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda needs a CUDA GPU, and torch sees none"):
        environment.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.resolve_device("auto") == environment.resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        environment.resolve_device("tpu")


HOLDER = """
import sys, types, torch
from draftbench.environment import alone
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(uuid="GPU-of-a-test")
with alone(torch.device(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.readline()
"""


def holder(tmp_path, device):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-P", "-c", HOLDER, device]
    return subprocess.Popen(command, env=environment, text=True, **pipes)


@pytest.mark.parametrize("end", ["done", "killed"])
def test_one_run_at_a_time_has_the_gpu(tmp_path, end):
    first = holder(tmp_path, "cuda")
    assert first.stdout.readline() == "has it\n"
    second = holder(tmp_path, "cuda")
    assert second.stderr.readline() == "draftbench: waiting for the GPU, which another run holds\n"
    assert holder(tmp_path, "cpu").communicate("\n", timeout=60)[0] == "has it\n"
    assert second.poll() is None
    if end == "killed":
        first.kill()
    else:
        first.communicate("\n", timeout=60)
    assert second.communicate("\n", timeout=60)[0] == "has it\n" and second.returncode == 0


def test_an_unknown_commit_is_told_before_the_work(monkeypatch, recwarn):
    monkeypatch.setattr(environment, "commit", lambda: {"commit": "a" * 40, "dirty": True})
    environment.describe(torch.device("cpu"))
    assert not recwarn
    monkeypatch.setattr(environment, "commit", lambda: environment.UNKNOWN)
    with pytest.warns(UserWarning, match="neither git nor a stamp tells the commit of this code"):
        assert environment.describe(torch.device("cpu"))["dirty"]
