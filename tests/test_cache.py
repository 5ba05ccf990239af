"""Cached frames come back bit for bit or not at all."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from draftbench import cache as cache_module
from draftbench.cache import FrameCache

KEY = "0123abcd"


@pytest.fixture
def cache(tmp_path):
    return FrameCache(tmp_path / "frames")


def clip():
    return torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)


def test_frames_come_back(cache):
    assert cache.get(KEY) is None
    for frames in (clip(), clip().transpose(2, 3)):
        cache.put(KEY, frames)
        assert torch.equal(cache.get(KEY), frames)
    assert [p.name for p in cache.folder.iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "short", "bit", "other", "pickle"])
def test_a_damaged_file_is_told_deleted_and_missed(cache, damage):
    cache.put(KEY, clip())
    path = cache.folder / f"{KEY}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-100] ^= 1
    path.write_bytes(
        {"empty": b"", "short": data[:-7], "other": b"not safetensors", "pickle": b"\x80\x04."}.get(damage, data)
    )
    with pytest.warns(UserWarning, match="are damaged .*; they will be made again"):
        assert cache.get(KEY) is None
    assert not path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEY) is None


def test_frames_stay_valid_when_their_file_is_replaced(cache):
    first = clip()
    cache.put(KEY, first)
    got = cache.get(KEY)
    cache.put(KEY, clip())
    (cache.folder / f"{KEY}.safetensors").write_bytes(b"")
    assert torch.equal(got, first)


def test_bad_frames_and_keys_are_refused(cache):
    with pytest.raises(TypeError, match="must be uint8"):
        cache.put(KEY, clip().float())
    with pytest.raises(ValueError, match=r"must be \[T, 3, h, w\]"):
        cache.put(KEY, clip()[0])
    with pytest.raises(ValueError, match="letters and digits"):
        cache.get("../x")


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file"):
        FrameCache(tmp_path / "file").put(KEY, clip())
    assert FrameCache(tmp_path / "file").get(KEY) is None


def test_beyond_its_limit_the_longest_unused_go_and_never_the_newest(tmp_path):
    FrameCache(tmp_path / "one").put("a", clip())
    ((_, size, _),) = FrameCache(tmp_path / "one").clips()
    cache = FrameCache(tmp_path, limit_gb=3.5 * size / 1e9)
    for i, key in enumerate("abc"):
        cache.put(key, clip())
        os.utime(tmp_path / f"{key}.safetensors", (i, i))
    assert cache.get("a") is not None  # used now
    cache.put("d", clip())
    assert {path.stem for path, _, _ in cache.clips()} == {"a", "c", "d"}
    small = FrameCache(tmp_path, limit_gb=1e-9)
    small.put("e", clip())
    assert [path.stem for path, _, _ in cache.clips()] == ["e"] and small.get("e") is not None


MAKER = """
import sys, time, torch
from draftbench.cache import FrameCache
cache = FrameCache(sys.argv[1])
print("up", flush=True)
sys.stdin.readline()
with cache.making(sys.argv[2:]):
    for key in sys.argv[2:]:
        if cache.get(key) is None:
            print("making", flush=True)
            time.sleep(1 if key != "slow" else 100)
            cache.put(key, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
"""


def makers(folder, *orders):
    """Processes that have imported everything and start together."""
    command = [sys.executable, "-P", "-c", MAKER, str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = [subprocess.Popen([*command, *order], **pipes) for order in orders]
    for process in started:
        assert process.stdout.readline() == "up\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return started


def test_a_clip_that_three_processes_want_is_made_once(tmp_path):
    """In different orders, so that they would wait for one another for ever if they locked as they were told."""
    started = makers(tmp_path, ["a", "b"], ["b", "a"], ["b"])
    told = [process.communicate(timeout=60)[0] for process in started]
    assert sum(text.count("making") for text in told) == 2
    assert {path.stem for path, _, _ in FrameCache(tmp_path).clips()} == {"a", "b"}


def test_a_process_that_is_killed_lets_go(tmp_path):
    (first,) = makers(tmp_path, ["slow"])
    assert first.stdout.readline() == "making\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    start = time.monotonic()
    with FrameCache(tmp_path).making(["slow"]):
        assert time.monotonic() - start < 5


def test_where_nothing_can_be_locked_that_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be locked"), FrameCache(tmp_path / "file").making(["a"]):
        pass


def test_the_command_tells_and_clears(tmp_path, capsys):
    cache = FrameCache(tmp_path / "frames")
    cache.put(KEY, clip())
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "c.json").write_text("{}")
    with cache.making([KEY]):
        pass
    arguments = ["--cache", str(tmp_path)]
    assert cache_module.main(arguments) == 0 and cache.get(KEY) is not None
    assert "there are 1 reference clips, 0.00 GB; 1 finished cells are known" in capsys.readouterr().out
    assert cache_module.main(["clear", *arguments]) == 0
    assert [path.name for path in tmp_path.rglob("*.*")] == ["c.json"]
    assert cache_module.main(["clear", "--cells", *arguments]) == 0
    assert "deleted 0 reference clips, 0.00 GB and 1 finished cells" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.*"))


def test_the_command_refuses_what_is_no_cache(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cache_module.main(["clear", "--cache", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"draftbench: --cache must be a folder, got {tmp_path / 'file'}\n"
