"""Checkpoints in diffusers' folder format: found here and whole, or refused with the command to fetch them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")  # of a tokenizer: one of these


def find(path: str | None, hub_id: str, revision: str, pipeline: str) -> Path:
    """The folder of a whole checkpoint on this machine; nothing is ever downloaded.

    path: the folder; None looks for `hub_id` at `revision` in the Hugging Face cache. pipeline: the class that it must
    hold. Raises FileNotFoundError with the command that fetches it, ValueError if it is another pipeline's.
    """
    fetch = f"fetch it with: hf download {hub_id} --revision {revision}" + (f" --local-dir {path}" if path else "")
    fetch += " (gated models: accept the terms on the model's page, then hf auth login)"
    if path is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            absent = f"{hub_id} at model.revision={revision} is not in the Hugging Face cache"
            raise FileNotFoundError(f"model.path=null and {absent}; {fetch}") from None
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"model.path={path} is not a folder; {fetch}")
    named = f"model.path={path}" if path else f"model.path=null ({folder})"
    if problem := _json_problem(folder, "model_index.json"):
        raise FileNotFoundError(f"{named} {problem}; {fetch}")
    index = read(folder, "model_index.json")
    if index.get("_class_name") != pipeline:
        raise ValueError(f"{named} must hold a {pipeline}, got {index.get('_class_name')}; {fetch}")
    if problem := _problem(folder, index):
        raise FileNotFoundError(f"{named} {problem}; {fetch}")
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint."""
    config: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return config


def scheduler(folder: Path) -> Any:
    """The checkpoint's scheduler."""
    import diffusers

    kind = read(folder, "model_index.json")["scheduler"][1]
    return getattr(diffusers, kind).from_pretrained(folder / "scheduler", local_files_only=True)


def sha256(folder: Path, pattern: str) -> str:
    """SHA-256 over the names and bytes of the files that match, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob(pattern)):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _problem(folder: Path, index: dict[str, Any]) -> str | None:
    """The first thing that keeps a checkpoint from being whole."""
    for file in sorted(folder.rglob("*.incomplete")):  # of a download into this folder
        return f"has an unfinished download, {file.relative_to(folder)}"
    for part, value in index.items():
        if not (isinstance(value, list) and value[0]):  # a setting, or a component that this checkpoint does without
            continue
        kind = part.split("_")[0]
        config = {"scheduler": "scheduler_config", "tokenizer": "tokenizer_config", "guider": "guider_config"}.get(kind)
        name = f"{part}/{config or 'config'}.json"
        files = (str(file.relative_to(folder)) for file in sorted((folder / part).glob("*.json")))
        problems = (_json_problem(folder, file) for file in dict.fromkeys((name, *files)))
        if problem := next(filter(None, problems), None):
            return problem
        has_words = kind == "tokenizer" and value[1] != "ByT5Tokenizer"  # whose vocabulary is the bytes
        if has_words and not any(file for pattern in VOCABULARIES for file in (folder / part).glob(pattern)):
            return f"lacks a vocabulary, one of {', '.join(f'{part}/{pattern}' for pattern in VOCABULARIES)}"
        if config is None and (problem := _weights_problem(folder / part)):
            return problem
    return None


def _json_problem(folder: Path, name: str) -> str | None:
    """What keeps a JSON file of the checkpoint from being read."""
    if not (folder / name).is_file():
        return f"lacks {name}"
    try:
        read(folder, name)
    except ValueError:  # of JSON, or of Unicode
        return f"has {name}, which is cut short"
    return None


def _weights_problem(folder: Path) -> str | None:
    """The same of one component's weights: shards that are not there, files that end too early."""
    indices, files = list(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    shards = {shard for index in indices for shard in json.loads(index.read_text())["weight_map"].values()}
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            return f"lacks {folder.name}/{shard}"
    if not files:
        return f"lacks {folder.name}/*.safetensors"
    if not indices and any(re.search(r"-\d+-of-\d+\.safetensors$", file.name) for file in files):
        return f"lacks {folder.name}/*.safetensors.index.json"
    for file in files:
        if not _whole(file):
            return f"has {folder.name}/{file.name}, which is cut short"
    return None


def _whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        if not 0 < header <= size - 8:
            return False
        try:
            tensors = json.loads(stream.read(header))
        except ValueError:
            return False
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    return 8 + header + max(ends, default=0) == size
