"""What a config may hold: `check` judges it without loading weights, `check_job` with the model at hand.

The dataclasses below are the schema. Every problem is a ValueError of a line that names the key, what is allowed and
what was given, so that all jobs of a sweep are judged before the first one runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import hints, tracking
from .hints import Count, Region, Switch, Text, Tile
from .prompts import expand
from .tracking import Mode

if TYPE_CHECKING:
    from .attention import DenseParts, Method
    from .models import Model


@dataclasses.dataclass
class Latency:
    """How latency is timed."""

    enabled: Switch
    repeats: Count


@dataclasses.dataclass
class Maps:
    """The call of which diagnostics draws maps."""

    step: Annotated[int | None, "null or an integer of at least 0", lambda x: x is None or x >= 0]
    layer: Annotated[int | None, "null or an integer of at least 0", lambda x: x is None or x >= 0]
    head: Annotated[int, "an integer of at least 0", lambda x: x >= 0]


@dataclasses.dataclass
class Tracking:
    """W&B."""

    mode: Mode
    project: Text


@dataclasses.dataclass
class Geometry:
    """Sizes in tokens that the methods read, each where it is present."""

    region: Region
    tile: Tile
    block: Count


@dataclasses.dataclass
class Shape:
    """What models have in common, each where it is present; their other keys are theirs to check."""

    name: Text
    frames: Count
    height: Count
    width: Count
    steps: Count
    shift: Annotated[float, "a number above 0", lambda x: x > 0]
    guidance: Annotated[float, "a number of at least 0", lambda x: x >= 0]
    fps: Count
    compile: Switch
    device: Literal["auto", "cpu", "cuda"]
    geometry: Geometry


@dataclasses.dataclass
class Config:
    """The root of a job's config; dense, model and method hold the arguments of their own classes."""

    sparsity: Annotated[float, "a number in [0, 1)", lambda x: 0 <= x < 1]
    prompts: Annotated[list[str], "a non-empty list of distinct, non-empty texts", str.strip]
    seeds: Annotated[list[int], "a non-empty list of distinct integers from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31]
    batch: Count
    device: Literal["auto", "cpu", "cuda"]
    executor: Text
    dense: Mapping[str, Any]
    metrics: list[Literal["psnr_db", "ssim", "lpips"]]
    lpips_net: Literal["alex", "vgg"]
    latency: Latency
    diagnostics: Switch
    maps: Maps
    videos: Switch
    cache: Text
    cache_gb: Annotated[float, "a number above 0", lambda x: x > 0]
    force: Switch
    debug: Switch
    tracking: Tracking
    model: Mapping[str, Any]
    method: Mapping[str, Any]


@dataclasses.dataclass
class OnShapes:
    """What the benchmarks of one attention call (draftbench.bench) share; they know the names of shapes."""

    shapes: Annotated[list[str], "a non-empty list of distinct shapes", str.strip]
    budget_s: Annotated[float, "a number above 0", lambda x: x > 0]
    prompt: Text
    seed: Annotated[int, "an integer from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31]


@dataclasses.dataclass
class Bench(OnShapes):
    """The attention benchmark, which knows the names of contestants."""

    sparsities: Annotated[list[float], "a non-empty list of distinct numbers in [0, 1)", lambda x: 0 <= x < 1]
    masks: list[Literal["captured", "balanced", "trimmed"]]
    contestants: Annotated[list[str], "a non-empty list of distinct contestants", str.strip]


@dataclasses.dataclass
class Estimates(OnShapes):
    """The benchmark of methods' estimates, which knows the names of methods."""

    methods: Annotated[list[str], "a non-empty list of distinct methods", str.strip]
    sparsities: Annotated[list[float], "a non-empty list of distinct numbers in (0, 1)", lambda x: 0 < x < 1]
    executor: Text


@dataclasses.dataclass
class Step:
    """The step benchmark, which knows the names of models and methods."""

    models: Annotated[list[str], "a non-empty list of distinct models", str.strip]
    methods: Annotated[list[str], "a non-empty list of distinct methods", str.strip]
    sparsities: Annotated[list[float] | None, "null or distinct numbers in [0, 1)", lambda x: 0 <= x < 1]
    layers: Annotated[list[int] | None, "null or distinct integers of at least 0", lambda x: x >= 0]
    compile: list[bool]
    repeats: Count
    dense_repeats: Count
    profile: Switch
    generation: Switch
    text_encoders: Switch


@dataclasses.dataclass
class Contrasts:
    """What draftbench.tables compares, and how its bootstrap draws."""

    against: Annotated[list[str], "a list of distinct methods", str.strip]
    metrics: list[Literal["psnr_db", "ssim", "lpips"]]
    draws: Annotated[int, "an integer of at least 1000", lambda x: x >= 1000]
    seed: Annotated[int, "an integer from 0 to 2^31 - 1", lambda x: 0 <= x < 2**31]


@dataclasses.dataclass
class Frontier:
    """The two files of records that the picture of quality over time joins."""

    quality: Text
    time: Text


@dataclasses.dataclass
class Tables:
    """The keys of draftbench.tables; conf/paper says what `paper` holds."""

    records: Text
    quoted: Text
    out: Text
    figures: Text
    readme: Text
    check: Switch
    again: Mapping[str, Any]
    frontier: Frontier
    contrasts: Contrasts


_LISTS = ("prompts", "seeds", "metrics")  # one item may stand for the list
_EMPTY = ("metrics",)  # may be empty


def check(config: DictConfig) -> None:
    """Raise ValueError for the first thing in a job's config that is not allowed.

    In `config` itself, a prompt, seed or metric where a list is asked for becomes a list of one (a suite's name or a
    CSV column its prompts), and an integer where a number is asked for a float, so that one setting is always written
    in one way.
    """
    for name in _LISTS:
        if name in config and not isinstance(item := _value(config, name), list | None):
            config[name] = expand(item) if name == "prompts" and isinstance(item, str) else [item]
    _fields(config, Config, "")
    from .attention import DenseParts  # imports torch

    _fields(config.dense, DenseParts, "dense.")
    if config.executor != "auto":
        from .kernels import NAMES  # imports torch

        if config.executor not in NAMES:
            raise hints.wrong("executor", hints.one_of(("auto", *NAMES)), config.executor)
    _fields(config.model, Shape, "model.", partial=True)
    _fields(config.method, Geometry, "method.", partial=True)
    method(config)


def check_bench(config: DictConfig, kind: str) -> None:
    """As `check`, for the keys under `bench` of the benchmark of that name; one item may stand for a list."""
    known = {"attention": Bench, "step": Step, "methods": Estimates}[kind]
    for name in ("shapes", "sparsities", "masks", "contestants", "models", "methods", "layers", "compile"):
        if name in config.bench and not isinstance(item := _value(config.bench, name, "bench."), list | None):
            config.bench[name] = [item]
    for name in map(str, config):
        if name not in ("bench", "hydra"):
            raise unknown(f"{name}={config[name]}", ["bench"])
    _fields(config.bench, known, "bench.")


def check_tables(config: DictConfig) -> None:
    """As `check`, for the config of draftbench.tables."""
    _fields(OmegaConf.masked_copy(config, [str(name) for name in config if name != "paper"]), Tables, "")


def check_job(config: DictConfig, here: bool = True) -> Model:
    """The model of a checked config, its weights not loaded; raises what it says of itself and of the prompts.

    Also checks the device, the executor on it, that LPIPS has its weights, diagnostics matplotlib and tracking=online
    its login; here: whether this machine is to run it, so that its memory counts. ValueError, RuntimeError, ImportError
    or FileNotFoundError, a line or two.
    """
    from .environment import resolve_device
    from .kernels import resolve

    resolve_device(config.device)
    if "lpips" in config.metrics:
        from .metrics.lpips import weights_path

        weights_path(config.lpips_net)
    if config.diagnostics and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("diagnostics=true draws with matplotlib: pip install 'draftbench[figures]'")
    made = model(config)
    made.check(list(config.prompts))
    if config.diagnostics:
        for name, count in (("step", made.steps), ("layer", made.layers), ("head", made.heads)):
            if (value := config.maps[name]) is not None and value >= count:
                or_null = "null or " if name != "head" else ""
                allowed = f"{or_null}an integer from 0 to {count - 1}, of the model's {count} {name}s"
                raise hints.wrong(f"maps.{name}", allowed, value)
    resolve(config.executor, made.device)
    if here:
        made.check_memory()
    tracking.check(config.tracking.mode)  # last, as it may ask a server
    return made


def model(config: DictConfig) -> Model:
    """The model of a config; its geometry is for the methods, and not an argument of it."""
    arguments = {str(name): value for name, value in config.model.items() if name != "geometry"}
    result: Model = _instantiate(arguments, "model")
    return result


def method(config: DictConfig) -> Method:
    """The method of a config; it checks its own settings, by the hints of its dataclass."""
    from .attention import Method

    kind = _target(config.method, "method", Method)
    known = hints.of(kind)
    for name in map(str, config.method):
        if name.startswith("_") and name.endswith("_"):  # Hydra's own
            continue
        if name not in known:
            raise unknown(f"method.{name}={config.method[name]}", [f"method.{n}" for n in known])
        _value(config.method, name, "method.")  # or an error that names what cannot be resolved
    result: Method = _instantiate(config.method, "method")
    return result


def parts(config: DictConfig) -> DenseParts:
    """What stays dense under a config."""
    from .attention import DenseParts

    return DenseParts(config.dense.steps, config.dense.timestep, config.dense.layers)


def unknown(given: str, known: Iterable[str], shown: Iterable[str] | None = None) -> ValueError:
    """The error for a key that does not exist: the nearest of the known ones, then the list of `shown` (or known).

    given: key=value; keys may be dotted, and then the nearest is sought by their last part.
    """
    parent, _, last = given.partition("=")[0].rpartition(".")
    names = [name.rpartition(".") for name in dict.fromkeys(known)]
    near = difflib.get_close_matches(last, {name for _, _, name in names}, 1)
    nearest = sorted((up != parent, "".join((up, dot, name))) for up, dot, name in names if name in near)
    hints = [name for elsewhere, name in nearest if elsewhere == nearest[0][0]][:3]
    hint = f"; did you mean {' or '.join(hints)}?" if hints else ""
    return ValueError(f"unknown key {given}{hint} (keys: {', '.join(map(''.join, names) if shown is None else shown)})")


def _fields(node: DictConfig, kind: type, prefix: str, partial: bool = False) -> None:
    """Check a node against a dataclass; partial: only the keys it has, and others are allowed."""
    known = hints.of(kind)
    for name in map(str, node):
        if name not in known and not partial:
            raise unknown(f"{prefix}{name}={node[name]}", [prefix + other for other in known])
    for name, hint in known.items():
        if name not in node:
            if not partial:
                raise ValueError(f"{prefix}{name} is missing")
            continue
        value = _value(node, name, prefix)
        if not (dataclasses.is_dataclass(hint) or get_origin(hint) is Mapping):
            hints.judge(prefix + name, value, hint, empty=prefix + name in _EMPTY)
            if isinstance(value, int) and get_args(hint)[0] is float:
                node[name] = float(value)
        elif not isinstance(value, DictConfig):
            raise hints.wrong(prefix + name, "keys and values", value)
        elif isinstance(hint, type):
            _fields(value, hint, f"{prefix}{name}.", partial)


def _value(node: DictConfig, name: str, prefix: str = "") -> Any:
    """A key's value, resolved; a list is plain, keys and values stay a node."""
    try:
        value = node[name]
        return OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    except OmegaConfBaseException as error:
        raise ValueError(f"{prefix}{name} cannot be resolved: {str(error).splitlines()[0]}") from error


def _target(node: DictConfig, key: str, kind: type) -> type:
    """The subclass of `kind` that a node names."""
    path, why, found = str(node.get("_target_")), "", None
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        why = f" ({error})"
    if not (isinstance(found, type) and issubclass(found, kind)):
        allowed = f"the path of a {kind.__module__}.{kind.__name__}"
        raise ValueError(f"{key}._target_ must be {allowed}, got {hints.short(path)}{why}")
    return found


def _instantiate(node: Mapping[Any, Any], key: str) -> Any:
    """Hydra's instantiate, with the error of the class itself in place of Hydra's wrapping of it."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if "_target_" not in node:
        raise ValueError(f"{key}._target_ is missing; choose one with {key}=NAME")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError) and "argument" in str(cause):
            raise ValueError(f"{key} has a key too many or too few: {cause}") from error
        if isinstance(cause, Exception) and str(error).startswith("Error in call"):
            raise cause from error
        raise ValueError(f"{key} cannot be made: {' '.join(str(error).split())}") from error
