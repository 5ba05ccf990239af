"""One record a cell: a JSON object written by rename; the index of finished cells; promotion to results/records.

`python -m draftbench.records promote RUN_FOLDER... --name NAME` gathers run folders into results/records/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# 1 had no null for the fields of LATER and ATTENTION_LATER, 2 no reference_sha256, 3 no lpips_net; `parse` reads all.
SCHEMA_VERSION = 4

# Every record has these and those of LATER; what was not measured is null.
FIELDS = (
    *("schema_version", "kind", "cell_id", "model", "weights_hash", "method", "method_settings", "executor"),
    *("prompt", "seed", "steps", "grid", "sparsity", "sparsity_achieved", "density_effective", "fallback_rows"),
    *("psnr_db", "ssim", "lpips", "generate_s", "step_ms", "attention_ms", "speedup_generate", "speedup_attention"),
    *("baseline_id", "peak_memory_gib", "device", "versions", "commit", "dirty", "status", "timestamp"),
)
LATER = (
    "latency", "parts_ms", "quality", "frames_sha256", "dense", "labels", "batch", "model_settings", "executors_run",
    "dense_kernel",
    "reference_sha256",  # of the dense frames that this clip was measured against
    "knob",  # the original's own and its value, where that is given in place of a sparsity
    "lpips_net",  # "alex" or "vgg"
    "no_quality",  # why psnr_db, ssim, lpips and quality are absent
)  # fmt: skip
# What a cell's fields hold, if not null.
TYPES: dict[tuple[Any, str], tuple[str, ...]] = {
    (str, "a text"): (
        *("cell_id", "model", "weights_hash", "method", "executor", "prompt", "device", "commit", "status"),
        *("timestamp", "frames_sha256", "reference_sha256", "dense_kernel", "lpips_net"),
    ),
    (int | float, "a number"): (
        *("seed", "steps", "sparsity", "sparsity_achieved", "density_effective", "fallback_rows", "psnr_db", "ssim"),
        *("lpips", "generate_s", "step_ms", "attention_ms", "speedup_generate", "speedup_attention"),
        *("peak_memory_gib", "batch"),
    ),
    (Mapping, "an object"): (
        *("method_settings", "versions", "dense", "knob", "model_settings", "quality", "parts_ms", "latency"),
    ),
    (list, "a list"): ("grid", "executors_run"),
}
# Records of kind "attention" (draftbench.bench) have these instead: one contestant on one shape, mask and sparsity.
ATTENTION = (
    *("schema_version", "kind", "cell_id", "run", "shape", "shape_settings", "source", "mask", "sparsity"),
    *("sparsity_achieved", "density", "kept_pairs", "all_pairs", "contestant", "contestant_kind", "ms", "budget_s"),
    *("tflops", "dense", "speedup", "ideal_share", "parts_ms", "error", "tolerance", "peak_memory_gib"),
    *("device", "versions", "commit", "dirty", "status", "timestamp"),
)
# plan_ms: of the selection alone; parts_failed: why parts_ms is null; requested: what the run was asked for.
ATTENTION_LATER = ("plan_ms", "parts_failed", "requested")
# Those of kind "step" (draftbench.bench, bench=step): a step of a whole model, or a generation made of steps.
STEP = (
    *("schema_version", "kind", "cell_id", "run", "what", "case", "model", "model_settings", "grid", "forwards"),
    *("contestant", "method_settings", "executors_run", "sparsity", "sparsity_achieved", "density_effective"),
    *("dense_layers", "compiled", "ms", "times_ms", "attention_ms", "parts_ms", "parts_failed", "warm_up_s"),
    "profile",
    *("composed", "steps", "dense_steps", "generate_s", "text_s", "denoise_s", "decode_s", "not_timed"),
    *("peak_memory_gib", "memory_over_dense_gib", "dense", "speedup", "requested"),
    *("device", "versions", "commit", "dirty", "status", "timestamp"),
)
# Those of kind "methods" (draftbench.bench, bench=methods): a method's estimate at one attention call.
METHODS = (
    *("schema_version", "kind", "cell_id", "run", "shape", "shape_settings", "source", "method", "method_settings"),
    *("sparsity", "sparsity_achieved", "density", "kept_pairs", "all_pairs", "executors_run", "first_plan_ms"),
    *("plan_ms", "kernel_ms", "ms", "dense", "share", "speedup", "error", "tolerance", "peak_memory_gib", "budget_s"),
    *("requested", "device", "versions", "commit", "dirty", "status", "timestamp"),
)
_KINDS = {
    "attention": (*ATTENTION, *ATTENTION_LATER),
    "step": STEP,
    "methods": METHODS,
}  # others are of FIELDS and LATER


def new(**values: Any) -> dict[str, Any]:
    """A record of `values`, as JSON will hold it (tuples become lists); absent fields are None.

    Raises ValueError for an unknown field, a NaN or infinity, what JSON cannot hold, or a status that is neither "ok"
    nor "failed: <reason>" (nor "absent: <reason>" of a contestant that cannot run).
    """
    if unknown := sorted(set(values) - set(fields := _fields(values))):
        raise ValueError(f"unknown record fields {unknown}; known: {', '.join(fields)}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    values = {"schema_version": SCHEMA_VERSION, "kind": "cell", "timestamp": now} | values
    record = dict.fromkeys(fields) | values
    for name, value in record.items():
        try:
            record[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"record field {name} must be valid JSON, got {value!r}: {error}") from error
    status = record["status"]
    reasons = ("failed: ", "absent: ") if values["kind"] in _KINDS else ("failed: ",)
    if status not in (None, "ok") and not str(status).startswith(reasons):
        allowed = " or ".join(f"'{name}<reason>'" for name in reasons)
        raise ValueError(f"record field status must be 'ok' or {allowed}, got {status!r}")
    return record


def _fields(record: Mapping[str, Any]) -> tuple[str, ...]:
    return _KINDS.get(str(record.get("kind")), (*FIELDS, *LATER))


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any version as one of this version; ValueError for one of a newer draftbench, or of none."""
    version = record.get("schema_version")
    if isinstance(version, bool) or version not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(f"schema_version must be 1 to {SCHEMA_VERSION}, got {version!r}")
    if record.get("kind") == "cell":
        _check_types(record)
    lacking: dict[str, Any] = {name: None for name in _fields(record) if name not in record}
    if "lpips_net" in lacking:
        lacking["lpips_net"] = "alex"  # whose weights came along, and the setting unless asked otherwise
    return {**lacking, **record, "schema_version": SCHEMA_VERSION}


def _check_types(record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming it, for a value of a cell that no table could take."""
    for (kinds, what), names in TYPES.items():
        for name in names:
            value = record.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {what} or null, got {value!r}")


def missed(sparsity: float, achieved: float) -> str | None:
    """What labels a row whose sparsity was missed by 2 points, 1 beyond 90%: "achieved 0.933 of 0.9"; None if met."""
    off = abs(achieved - sparsity) > (0.01 if sparsity > 0.9 else 0.02) + 1e-9
    return f"achieved {achieved:.3f} of {sparsity:g}" if off else None


def missed_by(record: Mapping[str, Any], achieved: float | None) -> str | None:
    """`missed` of cells like this record with their mean; None of an own knob, at which no sparsity was asked for."""
    asked = {**record, **(record["method_settings"] or {})}["sparsity"]  # 0 for controls of dense
    return None if asked is None or achieved is None or record.get("knob") else missed(asked, achieved)


def cell_id(identity: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of everything that shapes the cell; 1 is not 1.0."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots; lists as JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value) if isinstance(value, list | tuple) else value
    return found


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, deleted when it does not.

    Raises OSError, one line that names `path`, for a folder that cannot be written or a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:  # it may be a link to what cannot be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def probe(folder: Path, size: int = 1) -> None:
    """Write `size` bytes to a folder and delete them; OSError if it cannot be."""
    path = folder / f".draftbench-{os.getpid()}"
    try:
        path.write_bytes(bytes(size))
    finally:
        path.unlink(missing_ok=True)


def write(record: Mapping[str, Any], path: Path | str) -> None:
    """Write one record by rename; OSError naming the path, ValueError for NaN, and then no file is left."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(record: Mapping[str, Any], path: Path | str) -> None:
    """Add one record as a line, on disk when this returns; OSError naming the path, ValueError for NaN.

    What a full disk took of a line is taken back, so that a later one does not run on from it.
    """
    line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
    try:
        with Path(path).open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path | str) -> dict[str, Any]:
    """One record; ValueError naming the file if it is not one."""
    (record,) = parse(Path(path))
    return record


def read_all(paths: Iterable[Path | str], damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The records of `files(paths)`, of this version.

    Raises FileNotFoundError for a path that does not exist, ValueError naming the file for what is no record; given
    `damaged`, the message goes there and the good records come back.
    """
    return [record for path in files(paths) for record in parse(path, damaged)]


def files(paths: Iterable[Path | str]) -> list[Path]:
    """Files as they are, and every record*.json and *.jsonl under folders (W&B's own files left out), each once.

    Raises FileNotFoundError for a path that does not exist.
    """
    found: dict[Path, None] = {}
    for path in (Path(p) for p in paths):
        if not path.exists():
            raise FileNotFoundError(f"no such run folder or record: {path}")
        inside = sorted({*path.rglob("record*.json"), *path.rglob("*.jsonl")}) if path.is_dir() else [path]
        found |= {f.resolve(): None for f in inside if path == f or "wandb" not in f.relative_to(path).parts}
    return list(found)


def parse(path: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The records of one file, in a .jsonl one a line; errors as `read_all`, which name the line too."""
    found = []
    data = path.read_bytes()
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_number, object_pairs_hook=_sorted)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            found.append(upgrade(record))
        except ValueError as error:  # of UTF-8, JSON or the version
            where = f"{path}, line {number}," if path.suffix == ".jsonl" else str(path)
            message = f"{where} is not a draftbench record: {error}"
            if damaged is None:
                raise ValueError(message) from error
            damaged.append(message)
    return found


def _sorted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with its keys in order, as files of promoted records have them: equal ones look alike then."""
    return dict(sorted(pairs))


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}")


def distinct(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every cell once, in the order given: its last ok record, or else its last; one without a cell_id stays."""
    last: dict[Any, dict[str, Any]] = {}
    found = list(records)
    for record in sorted(found, key=lambda r: (r.get("status") == "ok", str(r.get("timestamp")))):
        last[record.get("cell_id") or id(record)] = record
    kept = {id(record) for record in last.values()}
    return [record for record in found if id(record) in kept]


def number(path: Path) -> str:
    """What the videos and the picture beside a record begin with, from the record's path."""
    return path.stem.partition("_")[2] or "000"


class Index:
    """Finished cells of all runs: a folder with one small file a cell, so that any number of processes may add."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser()

    def find(self, cell_id: str) -> tuple[dict[str, Any], Path] | None:
        """The record of this cell and its file, if that is still there, is of this cell and has status ok."""
        try:
            path = Path(json.loads((self.folder / f"{cell_id}.json").read_text(encoding="utf-8"))["record"])
            record = read(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (record, path) if record.get("cell_id") == cell_id and record.get("status") == "ok" else None

    def add(self, record: Mapping[str, Any], path: Path | str) -> None:
        """Remember that `path` holds the finished `record`; raises OSError as `replacing`."""
        with replacing(self.folder / f"{record['cell_id']}.json") as temporary:
            temporary.write_text(json.dumps({"record": str(Path(path).resolve())}) + "\n", encoding="utf-8")


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
    from . import tables  # imports this module

    if not name.removesuffix(".jsonl") or Path(name).name != name:
        raise ValueError(f"name must be a plain file name, got {name!r}")
    target = Path(out) / f"{name.removesuffix('.jsonl')}.jsonl"
    folders = [Path(path) for path in paths]
    records = read_all(folders, damaged)
    if not records:
        raise ValueError("; ".join(["no records under the given folders", *(damaged or [])]))
    if (kinds := {str(record.get("kind")) for record in records}) & set(_KINDS) and len(kinds) > 1:
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
    parser = argparse.ArgumentParser(prog="python -m draftbench.records", description="Work with records.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "promote", help="gather run folders into results/records"
    )
    command.add_argument("paths", nargs="+", metavar="RUN_FOLDER")
    command.add_argument("--name", required=True, help="writes OUT/NAME.jsonl")
    command.add_argument("--out", default="results/records")
    command.add_argument("--allow-dirty", action="store_true", help="take records of uncommitted code too")
    command.add_argument("--force", action="store_true", help="replace an existing file")
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
