"""Gather the records of run folders into results/records, a file for a page of draftbench.tables.

`python -m draftbench.promote RUN_FOLDER... --name NAME` writes results/records/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import tables
from .records import KINDS, distinct, read_all, replacing


def promote(
    paths: Iterable[Path | str], name: str, out: Path | str = "results/records", allow_dirty: bool = False,
    force: bool = False, damaged: list[str] | None = None,
) -> Path:  # fmt: skip
    """Gather the records of run folders into out/NAME.jsonl, sorted; a cell run again keeps its last ok record.

    Failed cells stay as rows that say so; diagnostics go into out/NAME.diagnostics.json. What is damaged is left out if
    a list is given for its names. Raises ValueError for no records, a damaged one, mixed kinds, records that may not
    share a page of draftbench.tables, which makes one a file, uncommitted code (unless allow_dirty) or a bad name, and
    FileExistsError for a file that exists (unless force).
    """
    if not name.removesuffix(".jsonl") or Path(name).name != name:
        raise ValueError(f"name must be a plain file name, got {name!r}")
    target = Path(out) / f"{name.removesuffix('.jsonl')}.jsonl"
    folders = [Path(path) for path in paths]
    records = read_all(folders, damaged)
    if not records:
        raise ValueError("; ".join(["no records under the given folders", *(damaged or [])]))
    if (kinds := {str(record.get("kind")) for record in records}) & set(KINDS) and len(kinds) > 1:
        raise ValueError(f"records of kinds {sorted(kinds)} do not mix")
    dirty = [record for record in records if record.get("dirty") is not False]
    if dirty and not allow_dirty:
        raise ValueError(f"{len(dirty)} of {len(records)} records come from uncommitted code; allow with --allow-dirty")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; replace it with --force")
    records = sorted(distinct(records), key=_order)
    tables.check(records, target.stem)
    read = {}
    for path in [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("diagnostics.json"))]:
        try:
            read[path] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            if damaged is None:
                raise ValueError(f"{path} is not JSON: {error}") from error
            damaged.append(f"{path} is not JSON: {error}")
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
    if read:
        found = list({note.get("cell_id") or path: note for path, note in read.items()}.values())  # a resumed run's too
        found.sort(key=lambda row: (row["sparsity"], row["method"]))
        with replacing(target.with_suffix(".diagnostics.json")) as temporary:
            rows = ",\n".join(json.dumps(row, sort_keys=True) for row in found)
            temporary.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    return target


_ORDERS: dict[str, tuple[str, ...]] = {  # of a file's records, by their kind
    "attention": ("shape", "sparsity", "mask", "contestant"),
    "methods": ("shape", "sparsity", "method"),
    "step": ("case", "what", "compiled", "sparsity", "contestant", "dense_layers"),
}


def _order(record: Mapping[str, Any]) -> list[Any]:
    names = _ORDERS.get(str(record.get("kind")), ("model", "method", "sparsity", "prompt", "seed"))
    values = [record.get(name) for name in (*names, "cell_id")]
    return [(value is not None, 0 if value is None else value) for value in values]


def main(arguments: list[str]) -> int:
    """The command line; 1 if something damaged was left out, 2, and a line on stderr, if nothing was promoted."""
    parser = argparse.ArgumentParser(prog="python -m draftbench.promote", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="RUN_FOLDER", help="or a file of records")
    parser.add_argument("--name", required=True, help="writes OUT/NAME.jsonl")
    parser.add_argument("--out", default="results/records")
    parser.add_argument("--allow-dirty", action="store_true", help="take records of uncommitted code too")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = vars(parser.parse_args(arguments))
    damaged: list[str] = []
    try:
        target = promote(**options, damaged=damaged)
        records = read_all([target])
    except (OSError, ValueError) as error:
        print(f"draftbench: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    failed, absent = (sum(str(record["status"]).startswith(why) for record in records) for why in ("failed", "absent"))
    print(f"{target}: {len(records)} records, {failed} failed" + (f", {absent} absent" if absent else ""))
    for line in damaged:
        print(f"draftbench: left out: {line}", file=sys.stderr)
    return int(bool(damaged))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
