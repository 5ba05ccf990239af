"""Reference frames on disk, by the hash of everything that shapes them; lossless, one file a clip.

`python -m draftbench.cache` tells what is there and `clear` deletes it: the frames, and with --cells the index of
finished cells, which then run again. Records and videos of runs are elsewhere and stay.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from .records import replacing

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX, LOCK = ".safetensors", ".lock"


class FrameCache:
    """A folder of clips; any number of processes may read and write it at once.

    limit_gb: 10^9 bytes; when a clip is put, those that were not used for longest are deleted until the rest fits.
    """

    def __init__(self, folder: Path | str, limit_gb: float = float("inf")):
        self.folder, self.limit = Path(folder).expanduser(), limit_gb * 1e9

    def get(self, key: str) -> Tensor | None:
        """The frames put under `key`, uint8 [T, 3, h, w] on the CPU, or None; a damaged file is told and deleted."""
        import safetensors

        from .metrics import check_frames

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                frames, wanted = file.get_tensor("frames").clone(), (file.metadata() or {}).get("sha256")
            check_frames(frames, frames)
            if wanted != digest(frames):
                raise ValueError("its checksum does not match")
        except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
            warnings.warn(f"cached frames {path} are damaged ({error}); they will be made again", stacklevel=2)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return frames

    def put(self, key: str, frames: Tensor) -> None:
        """Keep `frames`, uint8 [T, 3, h, w], under `key`; raises OSError naming the file if it cannot be written."""
        import safetensors.torch

        from .metrics import check_frames

        check_frames(frames, frames)
        frames = frames.cpu().contiguous()
        data = safetensors.torch.save({"frames": frames}, {"sha256": digest(frames)})
        with replacing(self._path(key)) as temporary:
            temporary.write_bytes(data)
        self._shrink(self._path(key))

    @contextmanager
    def making(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold the clips of these keys: another process waits here for as long as this one makes them.

        A process that is killed lets go. Where the folder cannot hold locks, that is told and nobody waits.
        """
        from filelock import FileLock

        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for key in sorted(set(keys)):  # everyone in one order, so that no two wait for one another
                    stack.enter_context(FileLock(self._path(key).with_suffix(LOCK)))
            except (OSError, NotImplementedError) as error:
                warnings.warn(f"{self.folder} cannot be locked ({error}); clips may be made twice", stacklevel=3)
            yield

    def clips(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of each clip, the longest unused first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may delete it now
                status = path.stat()
                found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda clip: (clip[2], clip[0]))

    def _shrink(self, newest: Path) -> None:
        clips = self.clips()
        total = sum(size for _, size, _ in clips)
        for path, size, _ in clips:
            if total <= self.limit:
                break
            if path != newest:
                with suppress(OSError):
                    path.unlink()
                total -= size

    def _path(self, key: str) -> Path:
        if not key.isalnum():
            raise ValueError(f"a cache key must be letters and digits, got {key!r}")
        return self.folder / f"{key}{SUFFIX}"


def digest(frames: Tensor) -> str:
    """SHA-256 of the values of frames on the CPU."""
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Tell or clear; returns the exit code, 1 if something could not be deleted, 2 for what is no cache."""
    from omegaconf import OmegaConf

    config = OmegaConf.create((files("draftbench.conf") / "config.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser("python -m draftbench.cache", description="Reference frames of earlier runs.")
    parser.add_argument("command", nargs="?", choices=["show", "clear"], default="show")
    parser.add_argument("--cache", type=Path, default=Path(config.cache), help=f"the folder ({config.cache})")
    parser.add_argument("--cells", action="store_true", help="clear the index of finished cells too: all run again")
    options = parser.parse_args(argv)
    folder = options.cache.expanduser()
    if folder.exists() and not folder.is_dir():
        print(f"draftbench: --cache must be a folder, got {folder}", file=sys.stderr)
        return 2
    frames = FrameCache(folder / "frames")
    cells = list((folder / "cells").glob("*.json"))
    clips = frames.clips()
    gone = [path for path, _, _ in clips] + (cells if options.cells else [])
    if options.command == "clear":
        for path in [*gone, *frames.folder.glob(f"*{LOCK}"), *folder.glob("*/.*.tmp")]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                print(f"draftbench: {path} cannot be deleted: {error.strerror}", file=sys.stderr)
                return 1
    said = "deleted" if options.command == "clear" else "there are"
    size = sum(size for _, size, _ in clips) / 1e9
    kept = "" if options.cells and options.command == "clear" else f"; {len(cells)} finished cells are known"
    also = f" and {len(cells)} finished cells" if options.cells and options.command == "clear" else ""
    print(f"{folder}: {said} {len(clips)} reference clips, {size:.2f} GB{also}{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
