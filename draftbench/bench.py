"""`python -m draftbench.bench bench=NAME`: benchmarks on shapes, the command line that they share.

bench=attention (attention_bench.py) times one attention call, bench=step (step_bench.py) a denoising step of a whole
model, bench=methods (method_bench.py) what each method's estimate costs. Rows are appended to the run's folder as they
come. Exit codes: 0; 1 if a row or the run failed, no contestant can run here or a row lacks what it is compared with; 2
if nothing was run; 130 if interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from . import attention_bench, cli, method_bench, records, schema, step_bench
from .cases import SHAPES
from .contest import away
from .environment import alone, drop_working_folder, resolve_device
from .help import CONFIGS

# Each has ROWS, the file of its rows; plan(config), what is to be run, or a ValueError; Bench(config, path) with `rows`
# and `run(plan)`; lacks(row), what a row that has a time lacks, or None; page(rows, name), its tables; and listing(),
# lines for --help.
BENCHES: dict[str, Any] = {"attention": attention_bench, "step": step_bench, "methods": method_bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to stderr in a line or two."""
    argv = cli.normalise(list(sys.argv[1:] if argv is None else argv), ["bench"])
    if {"-h", "--help"} & set(argv):
        print(page())
        return 0
    try:
        config, name, folder = configure(argv)
        kind = BENCHES[name]
        jobs = kind.plan(config.bench)
        claim(folder, kind.ROWS)
        bench = kind.Bench(config.bench, folder / kind.ROWS)
    except Exception as error:
        _say(cli.message(error, argv, "bench"))
        return 2
    for key, known in (("models", step_bench.CASES), ("shapes", SHAPES)):
        if "all" in config.bench.get(key, ()) and (rest := away(known)):
            _say(f"bench.{key}=all leaves out {', '.join(rest)}: torch sees no CUDA GPU")
    code = 0
    try:
        with alone(resolve_device("auto")):
            bench.run(jobs)
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except Exception as error:
        (folder / cli.ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        _say(f"{cli.message(error)}\nThe traceback is in {folder / cli.ERROR}")
        code = 1
    if bench.rows:
        text = kind.page(bench.rows, folder.name).markdown()
        with records.replacing(folder / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"\n{text}\nRows and table: {folder}")
    failed = [row for row in bench.rows if row["status"].startswith("failed")]
    if failed:
        _say(f"{len(failed)} of {len(bench.rows)} rows failed")
    if bench.rows and not code and all(row["status"].startswith("absent") for row in bench.rows):
        reasons = [
            f"{row.get('contestant') or row['method']}: {row['status'].removeprefix('absent: ')}" for row in bench.rows
        ]
        _say(f"no contestant can run here: {'; '.join(dict.fromkeys(reasons))}")
        code = 1
    lacking = [row for row in bench.rows if row["status"] == "ok" and kind.lacks(row)]
    if lacking:
        _say(f"{len(lacking)} of {len(bench.rows)} rows lack their dense time or their parts")
    return code or int(bool(failed or lacking))


def configure(overrides: list[str]) -> tuple[DictConfig, str, Path]:
    """The checked config, the benchmark's name and the run's folder; ValueError or Hydra's errors for what is not
    allowed."""
    if flags := [argument for argument in overrides if argument.startswith("-")]:
        raise ValueError(f"there is no option {flags[0]} (see --help)")
    with initialize_config_module(CONFIGS, version_base="1.3"):
        config = compose("bench", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        folder, name = Path(config.hydra.run.dir), str(config.hydra.runtime.choices.bench)
    schema.check_bench(config, name)
    return config, name, folder


def claim(folder: Path, rows: str) -> None:
    """Make the run's folder and its empty file of rows; OSError if it cannot be written or has rows of another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / rows).touch(exist_ok=False)
    except FileExistsError as error:
        raise OSError(f"hydra.run.dir must be a folder without rows of another run, got {folder}") from error
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"hydra.run.dir must be a folder that can be written, got {folder}: {reason}") from error


def page() -> str:
    """The page of --help, from the configs' own comments."""
    lines = [
        "Usage: python -m draftbench.bench [bench=attention | bench=step | bench=methods] [bench.key=value] ...",
        "  python -m draftbench.bench bench=attention 'bench.shapes=[hunyuan_768p]' 'bench.sparsities=[0.5,0.9]'",
        "  python -m draftbench.bench bench=step 'bench.methods=[fa4,draft]' bench.compile=true",
    ]
    for name, bench in BENCHES.items():
        text = (files(CONFIGS) / "bench" / f"{name}.yaml").read_text(encoding="utf-8")
        about, _, keys = text.partition("\n")
        lines += ["", f"bench={name}: {about.lstrip('# ')}", *(f"  {line}" for line in keys.splitlines())]
        lines += ["", *bench.listing()]
    lines += [
        "",
        "Rows go to a folder under outputs/ (hydra.run.dir) as they come, and a table at the end.",
        "`python -m draftbench.promote FOLDER --name NAME` keeps them; `make tables` makes table and picture.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"draftbench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    drop_working_folder()
    sys.exit(main())
