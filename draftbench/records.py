"""One record a cell: a JSON object written by rename; reading those of any version; the index of finished cells."""

from __future__ import annotations

import hashlib
import json
import os
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
KINDS = {
    "attention": (*ATTENTION, *ATTENTION_LATER),
    "step": STEP,
    "methods": METHODS,
}  # others are of FIELDS and LATER
# What a table cannot do without, of any row, and of one whose status is ok.
NEEDED = {
    "cell": ("model", "weights_hash", "method", "prompt", "seed", "sparsity", "grid"),
    "attention": ("shape", "shape_settings", "mask", "sparsity", "contestant", "contestant_kind", "source", "budget_s"),
    "step": ("what", "case", "contestant", "model", "model_settings", "grid", "compiled", "dense_layers", "requested"),
    "methods": ("shape", "method", "sparsity", "source", "budget_s"),
}
MEASURED = {
    "attention": ("ms", "kept_pairs", "sparsity_achieved"),
    "methods": ("ms", "plan_ms", "kernel_ms", "dense", "executors_run", "share", "speedup", "sparsity_achieved"),
}


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
    reasons = ("failed: ", "absent: ") if values["kind"] in KINDS else ("failed: ",)
    if status not in (None, "ok") and not str(status).startswith(reasons):
        allowed = " or ".join(f"'{name}<reason>'" for name in reasons)
        raise ValueError(f"record field status must be 'ok' or {allowed}, got {status!r}")
    return record


def _fields(record: Mapping[str, Any]) -> tuple[str, ...]:
    return KINDS.get(str(record.get("kind")), (*FIELDS, *LATER))


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
    found = {**lacking, **record, "schema_version": SCHEMA_VERSION}
    if isinstance(settings := record.get("method_settings"), Mapping):
        found["method_settings"] = placeless(settings)
    return found


def placeless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings, and those of a method it holds, without where a calibration lies: a path of one machine."""
    held = {name: placeless(value) for name, value in settings.items() if isinstance(value, Mapping)}
    return {**settings, **held, **({"calibration": None} if "calibration" in settings else {})}


def _check_types(record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming it, for a value of a cell that no table could take."""
    for (kinds, what), names in TYPES.items():
        for name in names:
            value = record.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {what} or null, got {value!r}")


def check_whole(record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming it, for what a table needs and a record lacks."""
    kind = record.get("kind")
    if kind not in NEEDED:
        raise ValueError(f"kind must be one of {', '.join(NEEDED)}, got {kind!r}")
    measured = MEASURED.get(str(kind), ()) if record.get("status") == "ok" else ()
    for name in (*NEEDED[kind], *measured, "device", "versions", "commit", "status"):
        if record.get(name) is None:
            raise ValueError(f"it has no {name}")


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


def read_all(
    paths: Iterable[Path | str], damaged: list[str] | None = None, whole: bool = False
) -> list[dict[str, Any]]:
    """The records of `files(paths)`, of this version.

    Raises FileNotFoundError for a path that does not exist, ValueError naming the file for what is no record, or lacks
    what a table needs if they are to be `whole`; given `damaged`, the message goes there and the good ones come back.
    """
    return [record for path in files(paths) for record in parse(path, damaged, whole)]


def files(paths: Iterable[Path | str]) -> list[Path]:
    """Files as they are, and every record*.json and *.jsonl under folders (W&B's own files left out), each once.

    Raises FileNotFoundError for a path that does not exist.
    """
    found: dict[Path, None] = {}
    for path in (Path(p) for p in paths):
        if not path.exists():
            raise FileNotFoundError(f"no such run folder or record: {path}")
        inside = sorted({*path.rglob("record*.json"), *path.rglob("*.jsonl")}) if path.is_dir() else [path]
        inside = [f for f in inside if not f.is_dir()]
        found |= {f.resolve(): None for f in inside if path == f or "wandb" not in f.relative_to(path).parts}
    return list(found)


def parse(path: Path, damaged: list[str] | None = None, whole: bool = False) -> list[dict[str, Any]]:
    """The records of one file, in a .jsonl one a line; errors as `read_all`, which name the line too."""
    found = []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"cannot read {path}: {error.strerror or error}") from error
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_number, object_pairs_hook=_sorted)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            record = upgrade(record)
            if whole:
                check_whole(record)
            found.append(record)
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
