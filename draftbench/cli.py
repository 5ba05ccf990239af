"""The command line: Hydra's, with `+group=x` allowed, every job of a sweep judged first, and errors of a line or two.

A job that fails leaves its traceback in its folder (`error.txt`) and does not end the others of a sweep. Exit codes:
0; 1 if a job or a cell failed; 2 if nothing was run; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from . import records, schema
from .help import CONFIGS, defaults, page
from .queued import patient

ERROR = "error.txt"  # in a job's folder: the traceback of its failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to stderr, with a traceback only for debug=true."""
    argv = normalise(list(sys.argv[1:] if argv is None else argv), groups())
    try:
        return _main(argv)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        _say(message(error, argv))
        if _debug(argv):
            traceback.print_exception(error)
        return 2


def normalise(argv: list[str], groups: list[str]) -> list[str]:
    """Rewrite `+group=x` to `group=x`, for both spellings to work; `+group.key=v` and `+group={...}` stay as they are.

    Hydra refuses the plus for a group that is in the defaults list already. `hydra/launcher=x` becomes `launcher=x`
    where there is a config of ours, which chooses Hydra's and sets its keys.
    """
    pattern = re.compile(rf"\+({'|'.join(map(re.escape, groups))})=(?!\s*\{{)")
    if "launcher" in groups:
        ours = {file.name.removesuffix(".yaml") for file in (files(CONFIGS) / "launcher").iterdir()}
        argv = [re.sub(rf"^\+?hydra/launcher=({'|'.join(ours)})$", r"launcher=\1", argument) for argument in argv]
    return [pattern.sub(r"\1=", argument, count=1) if pattern.match(argument) else argument for argument in argv]


def groups(name: str = "config") -> list[str]:
    """The groups in the defaults list of a config in conf/."""
    return list(defaults((files(CONFIGS) / f"{name}.yaml").read_text(encoding="utf-8")))


def task(config: DictConfig) -> None:
    """What Hydra runs for each job, perhaps in another process; a failure is told and noted, and not raised."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        schema.check(config)
        from . import run

        run.job(config, folder, group=Path(hydra_config.sweep.dir).name if sweep else None)
    except Exception as error:
        job = f"job {hydra_config.job.num} ({' '.join(hydra_config.overrides.task)}) failed: " if sweep else ""
        _say(f"{job}{message(error)}\nThe traceback is in {folder / ERROR}")
        if config.get("debug") is True:
            traceback.print_exception(error)
        trace = "".join(traceback.format_exception(error))
        (folder / ERROR).write_text(trace, encoding="utf-8")


_hydra_main = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="config")(task)


@dataclass
class Jobs:
    """The composed and checked jobs of a command line, and where they write."""

    configs: list[DictConfig]
    root: Path
    key: str  # of root: hydra.run.dir or hydra.sweep.dir
    fresh: bool  # root is named by the time, so one that exists is another run's
    places: list[str]  # of the jobs, under root

    @property
    def folders(self) -> list[Path]:
        """One a job."""
        return [self.root / place for place in self.places]


def _main(argv: list[str]) -> int:
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    if "--version" in argv:
        print(f"draftbench {version('draftbench')}")
        return 0
    arguments = parser.parse_intermixed_args(argv)
    if arguments.help:
        print(page())
        return 0
    overrides = list(arguments.overrides)
    flags = _without(argv, overrides)
    asks = arguments.cfg, arguments.info, arguments.hydra_help, arguments.shell_completion, arguments.experimental_rerun
    if any(asks):
        _run_hydra([*flags, *overrides])
        return 0
    if arguments.config_path:
        raise ValueError("--config-path is not supported; --config-dir=FOLDER adds a folder of your own configs")
    jobs = plan(arguments, overrides)
    place = f"{jobs.key}={QuotedString(str(jobs.root), Quote.single).with_quotes()}"
    code = 0
    try:
        with patient() as lost:
            _run_hydra([*flags, *overrides, place])
        for line in lost:
            _say(line)
        code = int(bool(lost))
    except KeyboardInterrupt:
        _say(f"interrupted; what is finished is in {jobs.root}")
        return 130
    except Exception as error:
        _say(message(error, overrides))
        if _debug(argv):
            traceback.print_exception(error)
        code = 1
    return gather(jobs) or code


def plan(arguments: argparse.Namespace, overrides: list[str]) -> Jobs:
    """Compose every job and check it, its model and its output folder; raises what is wrong before any work is done."""
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise ValueError(f"--config-dir must be a folder, got {arguments.config_dir}")
    own = [f"hydra.searchpath=[file://{Path(arguments.config_dir).absolute()}]"] if arguments.config_dir else []
    with _configs() as loader:
        parsed = OverridesParser.create(loader).parse_overrides(overrides)
        for override in parsed:
            _check_option(override, loader, own)

        def compose(chosen: list[str]) -> DictConfig:
            name = arguments.config_name or "config"
            return hydra.compose(name, [*own, *chosen], return_hydra_config=True)

        first = compose(BasicSweeper.split_arguments(parsed, None)[0][0])
        mode = RunMode.MULTIRUN if arguments.multirun else first.hydra.mode
        if mode == RunMode.MULTIRUN:
            if not str(first.hydra.sweeper._target_).endswith(".BasicSweeper"):
                raise ValueError("hydra/sweeper must be basic, so that every job can be checked before the first runs")
            swept = [f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()]
            parsed = OverridesParser.create(loader).parse_overrides([*swept, *overrides])
            configs = [compose(chosen) for chosen in BasicSweeper.split_arguments(parsed, None)[0]]
        else:
            for override in parsed:
                _check_single(override)
            configs = [compose(overrides)]
        slurm = mode == RunMode.MULTIRUN and str(first.hydra.launcher._target_).endswith(".SlurmLauncher")
        if slurm and not shutil.which("sbatch"):
            others = "launcher=submitit_local and launcher=joblib work without it"
            raise ValueError(f"launcher=submitit_slurm needs Slurm, whose sbatch is not on PATH here; {others}")
        jobs = _place(configs, mode == RunMode.MULTIRUN)
        for config in jobs.configs:
            schema.check(config)
    _check_models(jobs.configs, here=not slurm)
    _claim(jobs)
    return jobs


def _check_option(override: Override, loader: ConfigLoader, own: list[str]) -> None:
    """Raise ValueError for an option that its group does not have, with the options, or what cannot be swept."""
    key = override.key_or_group
    if not key:
        raise ValueError(f"{override.input_line!r} must have the form key=value")
    if override.is_sweep_override() and (override.is_hydra_override() or not override.is_discrete_sweep()):
        raise ValueError(f"{override.input_line} cannot be swept; a sweep is over values of our own keys: key=a,b,c")
    options = loader.get_group_options(key, config_name="config", overrides=own)
    if not options or override.is_delete() or override.package or isinstance(override.value(), dict):
        return
    swept = override.is_sweep_override()
    for value in override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]:
        if value not in options:
            raise ValueError(f"{key} must be one of {', '.join(options)}, got {value!r}")


def _check_single(override: Override) -> None:
    """Raise ValueError for several values where there is one job."""
    if override.is_sweep_override():
        key = override.key_or_group
        alike = f"; {key}=[...] is one job with a list of them" if key in ("prompts", "seeds", "metrics") else ""
        raise ValueError(f"{override.input_line} has several values: add -m to run a sweep{alike}")


def _place(configs: list[DictConfig], sweep: bool) -> Jobs:
    """Work out the output folders as Hydra will, and take Hydra's own part out of the configs."""
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    raw = OmegaConf.to_yaml(configs[0].hydra.sweep if sweep else configs[0].hydra.run)
    roots, places, jobs = [], [], []
    for number, config in enumerate(configs):
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        HydraConfig.instance().set_config(config)  # for interpolations of the form ${hydra:...}
        roots.append(str(OmegaConf.select(config, key)))
        places.append(str(config.hydra.sweep.subdir) if sweep else "")
        jobs.append(OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"]))
    if not roots[0].strip():
        raise ValueError(f"{key} must be a folder, got {roots[0]!r}")
    if len(set(places)) < len(places):
        raise ValueError(f"hydra.sweep.subdir must differ from job to job, got {places[0]!r} for more than one")
    return Jobs(jobs, Path(roots[0]), key, bool(re.search(r"^dir:.*\$\{now:", raw, re.MULTILINE)), places)


def _check_models(configs: list[DictConfig], here: bool) -> None:
    """`schema.check_job` once for each set of what it looks at; then each job's method meets its model.

    Raises an ExceptionGroup of ValueErrors for all methods that cannot, with all their sparsities.
    """
    from .knob import Uncalibrated  # imports torch

    keys = ["model", "prompts", "device", "executor", "metrics", "lpips_net", "diagnostics", "maps", "tracking"]
    distinct = {OmegaConf.to_yaml(OmegaConf.masked_copy(config, keys), resolve=True): config for config in configs}
    models = {key: schema.check_job(config, here) for key, config in distinct.items()}
    lacking: dict[str, ValueError] = {}
    for config in configs:
        key = OmegaConf.to_yaml(OmegaConf.masked_copy(config, keys), resolve=True)
        try:
            method, parts, model = schema.method(config), schema.parts(config), models[key]
            if method.sparse:
                parts.check(model.layers, model.steps)
            method.meet(model, parts)
        except Uncalibrated as error:
            first = lacking.setdefault(error.reason, error)
            if isinstance(first, Uncalibrated):
                first.sparsities |= error.sparsities
        except ValueError as error:
            lacking.setdefault(str(error), error)
    if lacking:
        raise ExceptionGroup("methods that cannot run", list(lacking.values()))


def _claim(jobs: Jobs) -> None:
    """Make the output folder and the cache, try to write there, forget the failures of an earlier run of these jobs."""
    given = jobs.root
    for cache in sorted({str(config.cache) for config in jobs.configs}):
        folder = Path(cache).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            records.probe(folder)
        except OSError as error:
            raise OSError(f"cache must be a folder that can be written, got {cache}: {error.strerror}") from error
    try:
        for number in itertools.count(2):
            try:
                jobs.root.mkdir(parents=True, exist_ok=not jobs.fresh)
                break
            except FileExistsError:
                if not jobs.fresh:
                    raise
                jobs.root = given.with_name(f"{given.name}_{number}")
        records.probe(jobs.root, 2**20)
        for folder in jobs.folders:
            (folder / ERROR).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{jobs.key} must be a folder that can be written, got {jobs.root}: {reason}") from error


def gather(jobs: Jobs) -> int:
    """Tell what failed, and for a sweep print, write and log the table of all its records; 1 if anything failed.

    A failed record that is left from an earlier run of a folder, of a clip that is not asked for now, does not count.
    """
    failures = [folder for folder in jobs.folders if (folder / ERROR).exists()]
    missing = [folder for folder in jobs.folders if not any(folder.glob("record*.json")) and folder not in failures]
    damaged: list[str] = []
    rows, bad, asked = [], [], 0
    for folder, config in zip(jobs.folders, jobs.configs, strict=True):
        found = records.read_all([folder], damaged) if folder.exists() else []
        wanted = {(str(prompt), int(seed)) for prompt in config.prompts for seed in config.seeds}
        mine = [row for row in found if (row.get("prompt"), row.get("seed")) in wanted]
        bad += [row for row in mine if row["status"] != "ok"]
        asked += len(mine)
        rows += found
    if jobs.key == "hydra.sweep.dir":
        _show_sweep(jobs, rows)
        if failures:
            _say(f"{len(failures)} of {len(jobs.folders)} jobs failed, see {jobs.root}/*/{ERROR}")
        if missing:
            _say(f"{len(missing)} of {len(jobs.folders)} jobs left no record")
    for line in damaged:
        _say(f"left out: {line}")
    for (method, sparsity, status), count in Counter(map(_what, bad)).items():
        _say(f"{method} sparsity={sparsity:g}: {status} (cells: {count})")
    if bad:
        _say(f"{len(bad)} of {asked} cells failed; the same command runs those and what is missing")
    return int(bool(failures or missing or bad or damaged))


def _what(row: dict[str, Any]) -> tuple[str, float, str]:
    return str(row["method"]), float(row["sparsity"] or 0), str(row["status"])


def _baselines(jobs: Jobs) -> list[dict[str, Any]]:
    """The first dense timing of each model and grid, for a sweep that has no dense job."""
    paths = [path for folder in jobs.folders if (path := folder / "baseline.json").exists()]
    found = records.read_all(paths, damaged=[])
    first = {(row["model"], tuple(row["grid"])): row for row in reversed(found)}
    return list(first.values())


def _show_sweep(jobs: Jobs, rows: list[dict[str, Any]]) -> None:
    from . import summary, tracking

    rows = records.distinct(rows)  # dense cells come back at every sparsity
    if all(row["method"] != "dense" for row in rows):
        rows = [*_baselines(jobs), *rows]
    table = summary.table(rows)
    print(f"\n{table}\n\nTable, records and videos: {jobs.root}")
    try:
        with records.replacing(jobs.root / "table.txt") as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        _say(message(error))
    settings = jobs.configs[0].tracking
    if rows:
        tracking.log_sweep(rows, settings.project, jobs.root, jobs.root.name, settings.mode)


def message(error: BaseException, overrides: Sequence[str] = (), name: str = "config") -> str:
    """An error in a line or two that name the key, the value and what is allowed, without Hydra's advice for coders.

    name: the config in draftbench.conf that the overrides are of. Of a group of errors, a line each.
    """
    if isinstance(error, ExceptionGroup):
        return "\n".join(message(one) for one in error.exceptions)
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        line = error.override
        if not re.match(r"[^=]+=", line):
            return f"{line!r} must have the form key=value"
        return f"cannot read {line!r}: quote a value with special characters, as in prompts='[\"turn left, slowly\"]'"
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or "")
        given = next((o for o in overrides if _key(o) and f"{key}.".startswith(f"{_key(o)}.")), key)
        if "Could not override" in str(error):
            given = given if _key(given) == key else key
            return str(_unknown(given, overrides, name))
        return f"{given} does not fit: {str(cause).splitlines()[0]}"
    text = " ".join(str(error).split())
    if isinstance(error, ConfigCompositionException) and "Could not append" in text:
        key = text.partition("already at '")[2].partition("'")[0]
        return f"{key} is in the config already: write {key}=VALUE without the +"
    if launcher := re.search(r"Could not find 'hydra/launcher/((\w+?)(_\w+)?)'", text):
        return f"launcher={launcher[1]} needs its plugin: pip install 'draftbench[{launcher[2]}]'"
    if absent := re.search(
        r"Could not find '(\w+)/([^']*)' Available options in '[^']*': (.*?)( Config search|$)", text
    ):
        return f"{absent[1]} must be one of {', '.join(absent[3].split())}, got {absent[2]!r}"
    if isinstance(error, HydraException):
        return text.partition(" Config search path:")[0]
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected = isinstance(error, ValueError | OSError | RuntimeError | ImportError)
    return text if expected and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _unknown(given: str, overrides: Sequence[str], name: str) -> ValueError:
    """The error for an unknown key: the nearest keys of the chosen groups, and those beside it."""
    chosen = [o for o in overrides if _key(o) in groups(name) and not re.search(r"[,{]", o) and o[0] not in "+~"]
    try:
        with _configs():
            config = hydra.compose(name, chosen, return_hydra_config=given.startswith("hydra."))
    except (HydraException, ValueError):
        return ValueError(f"unknown key {given}")
    parent = _key(given).rpartition(".")[0]
    beside = OmegaConf.select(config, parent) if parent else config
    if isinstance(beside, DictConfig):
        shown = [f"{parent}.{name!s}".lstrip(".") for name in beside]
    else:
        shown = list(map(str, config))
    return schema.unknown(given, _dotted(config), shown)


def _dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key, dotted."""
    for name in map(str, node):
        yield f"{prefix}{name}"
        if not (OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name)):
            yield from _dotted(node[name], f"{prefix}{name}.") if isinstance(node[name], DictConfig) else ()


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _debug(argv: Sequence[str]) -> bool:
    return any(re.fullmatch(r"\+{0,2}debug=true", argument, re.IGNORECASE) for argument in argv)


def _say(text: str) -> None:
    """A message on stderr, after what was printed so far."""
    with suppress(OSError):
        sys.stdout.flush()
    print(f"draftbench: {text}", file=sys.stderr, flush=True)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message} (see --help)")


def _without(argv: list[str], overrides: list[str]) -> list[str]:
    """What is left of argv, in order."""
    left, flags = list(overrides), []
    for argument in argv:
        if left and argument == left[0]:
            del left[0]
        else:
            flags.append(argument)
    return flags


@contextmanager
def _configs() -> Iterator[ConfigLoader]:
    """Hydra's compose API over our configs."""
    with hydra.initialize_config_module(CONFIGS, version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _run_hydra(argv: list[str]) -> None:
    """Hydra's own main over argv; its errors are raised instead of printed."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [before[0], *argv], "1"
    try:
        _hydra_main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"Hydra ended with exit code {end.code}") from end
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
