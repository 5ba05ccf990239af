"""Tables from committed records: `python -m draftbench.tables` rewrites results/tables from results/records.

For each file of records a Markdown page, and a CSV and a LaTeX file of each of its tables; a short form of it between
the README's markers `<!-- table NAME -->` and `<!-- end -->`; a page for each paper of results/quoted; pictures of the
benchmarks, and of quality over time, in results/figures, which hold the digest of their records and of what draws them.
Files there that no record makes are named and never deleted. `paper=NAME` prints one paper's page and writes nothing.
Keys: conf/tables.yaml. Exit codes: 0; 1 if `--check` finds something out of date or made from no record, or a record is
damaged, which no table has then; 2 if nothing was done.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from . import (
    attention_tables,
    cli,
    contrasts,
    estimate_tables,
    frontier,
    hints,
    method_tables,
    paper_tables,
    rank_tables,
    records,
    schema,
    step_tables,
    tabular,
)  # fmt: skip
from .help import CONFIGS, options
from .tabular import Page

Rows = list[dict[str, Any]]
Picture = tuple[str, Callable[[Path, str], None]]  # its digest, and what draws it to a path with that digest in it
# By the kind of records: those of benches.
DRAWN: dict[str, Any] = {"attention": attention_tables, "methods": estimate_tables, "step": step_tables}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to stderr in a line or two."""
    argv = ["check=true" if a == "--check" else a for a in (sys.argv[1:] if argv is None else argv)]
    argv = cli.normalise(argv, ["paper"])
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys and their defaults:\n\n{OmegaConf.to_yaml(_configured([]))}".strip())
        return 0
    try:
        config = _configured(argv)
        if "paper" in config:
            name = next(a.partition("=")[2] for a in argv if a.startswith("paper="))
            damaged: list[str] = []
            print(_paper(name, config, _read(config.records, damaged)).markdown())
            return _tell(damaged)
        return _all(config)
    except Exception as error:
        print(f"draftbench: {cli.message(error, argv, 'tables')}", file=sys.stderr)
        return 2


def _configured(argv: Sequence[str]) -> DictConfig:
    """The config; ValueError or Hydra's errors for what is not allowed."""
    if flags := [argument for argument in argv if argument.startswith("-")]:
        raise ValueError(f"there is no option {flags[0]}: keys are written key=value (see --help)")
    with initialize_config_module(CONFIGS, version_base="1.3"):
        config = compose("tables", list(argv))
    schema.check_tables(config)
    return config


def _all(config: DictConfig) -> int:
    """Write whatever differs, or with check only tell it; 1 if that found anything."""
    sources = sorted(Path(config.records).glob("*.jsonl"))
    if not sources:
        raise ValueError(f"records must be a folder with .jsonl files, got {config.records}")
    damaged: list[str] = []
    rows = {source: found for source in sources if (found := _read(source, damaged))}
    for source in sorted(set(sources) - set(rows)):
        print(f"draftbench: {source} holds no records that a table could take", file=sys.stderr)
    everything = [row for group in rows.values() for row in group]
    known = sorted({*options("method"), *(row["method"] for row in everything if row.get("method"))})
    for name in config.contrasts.against:
        if name not in known:
            raise hints.wrong("contrasts.against", f"a list of {', '.join(known)}", name)
    by_name = {source.stem: group for source, group in rows.items()}
    again = {name: by_name[other] for name, other in config.again.items() if other in by_name}
    pages = [page(source, group, config, again.get(source.stem, [])) for source, group in rows.items()]
    pages += [_paper(path.stem, config, everything) for path in sorted(Path(config.quoted).glob("*.csv"))]
    out = Path(config.out)
    files = {out / name: text for made in pages for name, text in made.files().items()}
    if len({made.name for made in pages}) < len(pages):
        raise ValueError("two pages have one name: rename a file of records or of quoted numbers")
    if (readme_path := Path(config.readme)).is_file():
        try:
            text = readme_path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"readme={readme_path} cannot be read: {error}") from error
        files[readme_path] = readme(text, {name: short(group) for name, group in by_name.items()})
    pictures = _pictures(config, {source.stem: source for source in rows}, by_name)
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    stale += [path for path, (digest, _) in pictures.items() if tabular.drawn_from(path) != digest]
    for path in stale:
        if config.check:
            print(f"{path} is out of date; run `make tables`", file=sys.stderr)
            continue
        with records.replacing(path) as temporary:
            if path in files:
                temporary.write_text(files[path])
            else:
                digest, draw = pictures[path]
                draw(temporary, digest)
        print(path)
    kinds = [(out, kind) for kind in ("md", "csv", "tex")] + [(Path(config.figures), "png")]
    left = sorted({path for folder, kind in kinds for path in folder.glob(f"*.{kind}")} - {*files, *pictures})
    for path in left if not damaged else []:  # what cannot be read may have made it
        print(f"{path} is made from none of the records in {config.records}; delete it", file=sys.stderr)
    return max(_tell(damaged), int(bool(config.check and (stale or left))))


def _read(path: Path | str, damaged: list[str]) -> Rows:
    """Every cell of a file or folder once; what no table could take is told in `damaged`."""
    return records.distinct(records.read_all([path], damaged, whole=True))


def _pictures(config: DictConfig, sources: dict[str, Path], rows: dict[str, Rows]) -> dict[Path, Picture]:
    """The pictures of the benches' records and, if both of its files are there, of quality over time."""
    folder, rule = Path(config.figures), _rule(config)
    found: dict[Path, Picture] = {}
    for name, group in rows.items():
        if bench := DRAWN.get(_kind(group)):
            found[folder / f"{name}.png"] = _digest(bench, sources[name]), partial(bench.figure, group)
    names = str(config.frontier.quality), str(config.frontier.time)
    if set(names) <= set(rows) and (made := frontier.drawing(rows[names[0]], rows[names[1]], names, rule)):
        digest = _digest(frontier, *(sources[name] for name in names), settings=repr((rule, made)))
        found[folder / f"{names[0]}_frontier.png"] = digest, partial(frontier.figure, made)
    return found


def _rule(config: DictConfig) -> contrasts.Contrasts:
    return contrasts.Contrasts(**OmegaConf.to_container(config.contrasts))  # type: ignore[arg-type]


def _tell(damaged: list[str]) -> int:
    """Name the rows that no table has; 1 if there are any."""
    for line in damaged:
        print(f"draftbench: left out: {line}", file=sys.stderr)
    return int(bool(damaged))


def check(rows: Rows, source: str) -> None:
    """Raise ValueError, as `page` does, for records of one file that may not share a page, or that no page can take."""
    for row in rows:
        try:
            records.check_whole(row)
        except ValueError as error:
            raise ValueError(f"{source}: the record of cell {row.get('cell_id')}: {error}") from error
    if bench := DRAWN.get(_kind(rows)):
        bench.page(rows, source)
    else:
        method_tables.check_page(rows, source)  # its page draws bootstraps


def page(source: Path, rows: Rows, config: DictConfig, again: Sequence[dict[str, Any]] = ()) -> Page:
    """The page of a file of records, with the diagnostics beside it and the ranks in the file `again`, if any."""
    if bench := DRAWN.get(_kind(rows)):
        made: Page = bench.page(rows, source.stem)
        return made
    notes = source.with_suffix(".diagnostics.json")
    found = _notes(notes) if notes.is_file() else []
    rule = _rule(config)
    made = method_tables.page(rows, source.stem, rule, found)
    return replace(made, parts=[*made.parts, rank_tables.ranks(rows, again, source.stem, rule)]) if again else made


def _notes(path: Path) -> list[dict[str, Any]]:
    """The diagnostics of a file; ValueError naming it for one that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(found, list) and all(isinstance(note, dict) and "cell_id" in note for note in found)):
            raise ValueError("it is no list of diagnostics")
    except ValueError as error:
        raise ValueError(f"{path} holds no diagnostics: {error}") from error
    return found


def short(rows: Rows) -> str:
    """The table of a file of records for the README."""
    text: str = DRAWN.get(_kind(rows), method_tables).short(rows).grid()
    return text


def readme(text: str, tables: dict[str, str]) -> str:
    """`text` with what stands between each pair of markers replaced: by nothing, and that is told, without records."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in tables:
            print(f"README: there are no records for the table {match[1]!r} yet; it is left empty", file=sys.stderr)
        table = tables.get(match[1], "")
        return "\n".join([f"<!-- table {match[1]} -->", *([table] if table else []), "<!-- end -->"])

    for part in re.split(r"^(?=<!-- table )", text, flags=re.MULTILINE)[1:]:
        if "<!-- end -->" not in part:
            raise ValueError(f"{part.splitlines()[0]!r} in the README lacks its <!-- end -->")
    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def _paper(name: str, config: DictConfig, rows: Rows) -> Page:
    """The page of one paper, configured by conf/paper/NAME.yaml, its numbers in NAME.csv."""
    with initialize_config_module(CONFIGS, version_base="1.3"):
        plain = OmegaConf.to_container(compose("tables", [f"paper={name}"]).paper)
    paper = paper_tables.Paper(**plain)  # type: ignore[arg-type]
    return paper_tables.page(name, paper, paper_tables.read(Path(config.quoted) / f"{name}.csv"), rows)


def _digest(draws: ModuleType, *sources: Path, settings: str = "") -> str:
    """Of a picture's records, the settings of what it shows, and the two modules that draw: its own and `tabular`."""
    digest = hashlib.sha256(settings.encode())
    for path in (*sources, *(Path(str(module.__file__)) for module in (draws, tabular))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _kind(rows: Rows) -> str:
    return str(rows[0].get("kind"))


if __name__ == "__main__":
    sys.exit(main())
