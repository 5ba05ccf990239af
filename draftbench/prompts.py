"""What prompts are if they are one text: a suite of draftbench/suites, a CSV file's column, or that text itself."""

from __future__ import annotations

import csv
from pathlib import Path

SUITES = Path(__file__).parent / "suites"


def expand(text: str) -> list[str]:
    """The prompts that `text` stands for.

    The name of a suite gives its lines; "FILE.csv:COLUMN" that column, empty cells left out; any other text is one
    prompt. Raises ValueError, naming the file and its columns, for a CSV file that cannot be read or lacks the column,
    or any text in it; and for a text that is a file's name without a column.
    """
    suite = SUITES / f"{text}.txt"
    if text in suites():
        lines = suite.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]
    name, colon, column = text.rpartition(":")
    if text.lower().endswith((".csv", ".txt")):
        raise ValueError(f"prompts must be {', '.join(suites())}, FILE.csv:COLUMN or [TEXT, ...], got {text!r}")
    if not (colon and name.lower().endswith(".csv")):
        return [text]
    try:
        with Path(name).expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"prompts: {name} has no column {column!r}; it has {', '.join(rows.fieldnames or ())}")
            if not (found := [row[column].strip() for row in rows if (row[column] or "").strip()]):
                raise ValueError(f"prompts: {name} has no text in its column {column!r}")
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"prompts: cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def suites() -> list[str]:
    """The names of the suites."""
    return sorted(path.stem for path in SUITES.glob("*.txt"))
