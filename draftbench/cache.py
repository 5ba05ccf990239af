"""Reference frames on disk, by the hash of everything that shapes them; lossless, one file a clip."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from .metrics import check_frames
from .records import replacing


class FrameCache:
    """A folder of clips; any number of processes may read and write it at once."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser()

    def get(self, key: str) -> Tensor | None:
        """The frames put under `key`, uint8 [T, 3, h, w] on the CPU, or None; a damaged file is told and deleted."""
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
        return frames

    def put(self, key: str, frames: Tensor) -> None:
        """Keep `frames`, uint8 [T, 3, h, w], under `key`; raises OSError naming the file if it cannot be written."""
        check_frames(frames, frames)
        frames = frames.cpu().contiguous()
        data = safetensors.torch.save({"frames": frames}, {"sha256": digest(frames)})
        with replacing(self._path(key)) as temporary:
            temporary.write_bytes(data)

    def _path(self, key: str) -> Path:
        if not key.isalnum():
            raise ValueError(f"a cache key must be letters and digits, got {key!r}")
        return self.folder / f"{key}.safetensors"


def digest(frames: Tensor) -> str:
    """SHA-256 of the values of frames on the CPU."""
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()
