"""Methods for which a sparsity means something that was found beforehand: a value of their own knob, or a choice of
masks that was searched.

`python -m draftbench.calibrate` finds it on prompts and seeds that no table uses and writes it to a file; a run reads
it there, and its record names it and where it comes from. Nothing is adjusted call by call.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from omegaconf import OmegaConf
from torch import Tensor

from .attention import Call, DenseParts, Method, Plan

if TYPE_CHECKING:
    from .models import Model

Self = TypeVar("Self", bound="Calibrated")
Identity = dict[str, Any]
FARTHEST = 0.01  # a calibration that misses its sparsity by more is none


class Uncalibrated(ValueError):
    """Sparsities, a set that may grow, that have no calibration; reason: the whole message, with ??? for them."""

    def __init__(self, reason: str, sparsities: set[float]):
        super().__init__(reason, sparsities)
        self.reason, self.sparsities = reason, sparsities

    def __str__(self) -> str:
        return self.reason.replace("???", ",".join(f"{x:g}" for x in sorted(self.sparsities)))


class OutOfReach(ValueError):
    """No value of the knob, no choice of masks, comes near to the sparsity."""


@dataclass
class Calibrated(Method):
    """A method with a field, named by `knob`, that is null or the original's own knob.

    Null: sparsity asks, and `calibration` (null: the file in conf/calibration) holds what meets it on average. Given:
    it is used as it is, and sparsity must be 0, since none is asked for.
    """

    calibration: str | None = None
    calibrated: dict[str, Any] | None = field(default=None, init=False)  # of the file: value, achieved, prompts, seeds
    knob: ClassVar[str]

    @property
    def asked(self) -> bool:
        """Whether a sparsity asks for a value of the knob; the original's floors hold only where its knob is given."""
        return self.given is None

    @property
    def givable(self) -> bool:
        """Whether its knob can be given at all."""
        return any(f.name == self.knob and f.init for f in dataclasses.fields(self))

    @property
    def found(self) -> Any:
        """What was calibrated; raises ValueError if nothing was read."""
        if self.calibrated is None:
            raise ValueError(f"method.{self.knob} is null and no calibration has been read (Method.meet)")
        return self.calibrated["value"]

    def at(self: Self, value: Any) -> Self:
        """A copy for which a calibration would have found `value`."""
        other = copy.copy(self)
        other.calibrated = {"value": value}
        return other

    @property
    def path(self) -> Path:
        """The file of its calibration."""
        own = Path(str(files("draftbench.conf"))) / "calibration" / f"{name(self)}.yaml"
        return Path(self.calibration).expanduser() if self.calibration else own

    def reach(self, grid: tuple[int, int, int], sparsity: float) -> None:
        """Raise OutOfReach if no calibration can meet the sparsity at this grid, as far as the grid alone tells."""

    def meet(self, model: Model, parts: DenseParts) -> None:
        """See `Method.meet`: read the value for this model, or raise OutOfReach, or Uncalibrated with the command."""
        if not self.asked or self.sparsity == 0:
            return
        self.reach(model.grid, self.sparsity)
        what = identity(model, parts)
        for entry in read(self.path):
            if entry["of"] == what and entry["method"] == settings(self):
                for row in entry["rows"]:
                    if abs(row["sparsity"] - self.sparsity) < 1e-9:
                        source = {key: entry[key] for key in ("prompts", "seeds")}
                        self.calibrated = {key: row[key] for key in ("value", "achieved")} | source
                        return
        grid = "x".join(map(str, what["grid"]))
        given = f"give method.{self.knob} itself with sparsity=0, or " if self.givable else ""
        raise Uncalibrated(
            f"sparsity=??? has no calibrated method.{self.knob} for {model.name} at {grid}, "
            f"{model.steps} steps, with these settings in {self.path}: {given}first run "
            f"python -m draftbench.calibrate method={name(self)} sparsity=??? (and your other overrides)",
            {self.sparsity},
        )


@dataclass
class Knobbed(Calibrated):
    """One whose knob is a number; a sparsity means one global value of it, found by bisection."""

    ends: ClassVar[tuple[float, float]] = (0.0, 1.0)  # the values that keep the least and everything

    def __post_init__(self) -> None:
        super().__post_init__()
        given, (least, everything) = getattr(self, self.knob), self.ends
        if given is not None and not least <= given <= everything:
            raise ValueError(f"method.{self.knob} must be in [{least:g}, {everything:g}], got {given}")

    @property
    def value(self) -> float:
        """The knob's value; raises ValueError if it is neither given nor calibrated."""
        given: float | None = getattr(self, self.knob)
        if given is not None:
            return given
        return self.ends[1] if self.sparsity == 0 else float(self.found)


Option = Any  # a mask's name: a number or a tuple of them


@dataclass
class Searched(Calibrated):
    """One that has a mask for each step, layer and head, or some of these, picked by their loss on dense trajectories.

    A mask's loss is its squared error of the attention output over the squared output, video and text, of each head.
    """

    def options(self, grid: tuple[int, int, int], sparsity: float) -> dict[Option, float]:
        """The masks to try for a sparsity and the share of video pairs that each keeps."""
        raise NotImplementedError

    def option_plan(self, option: Option, q: Tensor, call: Call) -> Plan:
        """The plan in which every head has this mask."""
        raise NotImplementedError

    def reach(self, grid: tuple[int, int, int], sparsity: float) -> None:
        """See `Calibrated.reach`: what no choice of masks can meet, whatever their losses."""
        drops = [1 - density for density in self.options(grid, sparsity).values()]
        if not min(drops) - FARTHEST <= sparsity <= max(drops) + FARTHEST:
            raise OutOfReach(
                f"sparsity={sparsity:g} is out of reach of {name(self)} at {'x'.join(map(str, grid))}, "
                f"where its masks drop {min(drops):.3f} to {max(drops):.3f}"
            )

    def pick(self, losses: Losses, grid: tuple[int, int, int], sparsity: float) -> tuple[Any, float]:
        """(What `found` will hold, the mean density that it keeps) from the losses of all its options."""
        raise NotImplementedError


@dataclass
class Losses:
    """What a search measured: the active steps and layers, and each option's loss, float64 [steps, layers, heads]."""

    steps: list[int]
    layers: list[int]
    of: dict[Option, Tensor]


def name(method: Method) -> str:
    """The name of a method: that of its file."""
    return type(method).__module__.rpartition(".")[2]


def settings(method: Calibrated) -> dict[str, Any]:
    """Its fields but those that a calibration gives or that say where it is."""
    names = [f.name for f in dataclasses.fields(method) if f.init and f.name not in ("sparsity", "calibration")]
    values = {key: getattr(method, key) for key in names if key != method.knob}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def identity(model: Model, parts: DenseParts) -> Identity:
    """What a calibration holds for: the model's weights, grid, steps and settings (but dtype), and what stays dense."""
    shape = {key: value for key, value in model.settings().items() if key not in ("dtype", "compile")}
    return {
        "model": model.name, "weights_hash": model.weights_hash, "grid": list(model.grid), "steps": model.steps,
        "settings": shape, "dense": dataclasses.asdict(parts),
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a calibration file, none if there is no file; ValueError for one that cannot be read."""
    if not path.is_file():
        return []
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise ValueError(f"{path} is not a calibration file: {str(error).splitlines()[0]}") from error
    if not isinstance(found, list) or not all({"of", "method", "rows"} <= set(entry) for entry in found):
        raise ValueError(f"{path} is not a calibration file: it must be a list of entries with of, method and rows")
    return found
