"""Cached frames come back bit for bit or not at all."""

import warnings

import pytest
import torch

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
