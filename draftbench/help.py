"""The page of `draftbench --help`, derived from the files in conf; imports neither torch nor a method."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONFIGS = "draftbench.conf"


def page() -> str:
    """The page of --help; groups, options, knobs and comments come from the files in conf."""
    conf = files(CONFIGS)
    root = (conf / "config.yaml").read_text(encoding="utf-8")
    lines = [
        f"draftbench {version('draftbench')}: what sparse attention costs and gains a video diffusion transformer.",
        "It generates the same clip with dense attention and with a method, and measures fidelity and latency.",
        "",
        "Usage: draftbench [group=option | +group=option] [key=value] ...    (or python -m draftbench ...)",
        "  draftbench method=draft sparsity=0.9",
        "  draftbench model=pocket_large device=cuda 'prompts=[turn left, walk forward]' 'seeds=[0,1]'",
        "  draftbench -m +method=dense,sta,svg,draft sparsity=0.5,0.75,0.9    (-m: a sweep, one job each)",
        "",
        "Groups (* is the default)",
    ]
    for group, default in defaults(root).items():
        for i, option in enumerate(options(group)):
            mark = "*" if option == default else " "
            about = _about((conf / group / f"{option}.yaml").read_text(encoding="utf-8"))
            lines += _columns(f"  {'' if i else group:<11}{mark}{option}", about, 30)
    lines += ["", "Keys and their defaults (draftbench method=svg --cfg job shows every key of a choice)"]
    for key, value, comment in _knobs(root):
        lines += _columns(f"  {key}={value}".removesuffix("="), comment, 40)
    lines += [
        "",
        "Results: a folder for each run under outputs/ (hydra.run.dir, hydra.sweep.dir) with record*.json, videos and",
        "a picture; table.txt for a sweep. `python -m draftbench.promote FOLDER --name NAME` keeps records.",
        "",
        "Flags: -m, --multirun; --cfg job; --config-dir FOLDER (configs of your own); --version; --hydra-help, --info",
    ]
    return "\n".join(lines)


def options(group: str) -> list[str]:
    """What there is to choose from in a group of conf."""
    names = (path.name for path in (files(CONFIGS) / group).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _columns(left: str, right: str, width: int) -> list[str]:
    """Text in a second column, under the first where that is too long for its own."""
    wrapped = textwrap.wrap(right, 112 - width, break_on_hyphens=False) or [""]
    first = [left] if len(left) >= width - 1 and right else [f"{left:<{width}}{wrapped.pop(0)}".rstrip()]
    return first + [" " * width + line for line in wrapped if line]


def _about(text: str) -> str:
    """A config's first comment, its lines until one ends a sentence, or else the first of the docstring of the module
    that it names."""
    found: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or (found and found[-1].endswith(".")):
            break
        if not line.startswith("# @package"):
            found.append(line.lstrip("# "))
    if found:
        return " ".join(found)
    target = re.search(r"^_target_: *(draftbench[\w.]*)\.\w+", text, re.MULTILINE)
    return _first_line(target[1]) if target else ""


def _first_line(module: str) -> str:
    """The first line of a module's docstring, read and not imported (that would import torch)."""
    package, name, *rest = module.split(".")
    with suppress(ImportError, OSError, SyntaxError):
        spec = find_spec(f"{package}.{name}")
        folders = spec.submodule_search_locations if spec else None
        source = Path(folders[0], *rest).with_suffix(".py") if folders else Path(spec.origin or "" if spec else "")
        return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return ""


def _knobs(text: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of each key of config.yaml that is neither a group nor Hydra's."""
    parent = ""
    for line in text.partition("\nhydra:")[0].splitlines():
        found = re.fullmatch(r"( *)(\w+):\s*(.*?)\s*(?:# (.*))?", line)
        if not found or found[2] == "defaults":
            continue
        parent = found[2] if not found[1] else parent
        key = f"{parent}.{found[2]}" if found[1] else parent
        value = re.sub(r"\$\{oc\.env:\w+,\"?(.*?)\"?\}", r"\1", found[3])
        yield key, value, found[4] or ""


def defaults(text: str) -> dict[str, str | None]:
    """Group to option of a config's defaults list, in its order."""
    entries = [entry for entry in OmegaConf.create(text).defaults if isinstance(entry, DictConfig)]
    return {str(key).split()[-1]: option for entry in entries for key, option in entry.items()}
