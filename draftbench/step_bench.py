"""bench=step: one denoising step of a whole model at full size with random weights, for latency; see bench.py.

A step is one forward, or one for each branch of guidance that the model runs by itself, and the scheduler's own step.
Contestants run one after the other in one process on one model, dense ones first; each row divides by the dense kernel
of the lowest median so far of the same compile mode. A sparse step is an active one: no step is dense in these runs,
but the first layers may be. Before its timings a contestant runs a step of the network with few of its blocks, which
compiles and loads what a step needs, for a whole one may take half a minute. A row of a whole generation is composed of
the steps that were measured, or measured itself if generation=true; 30% of its steps are dense, as in DraftAttention's
code.

The network is made on the device in its own dtype, so its making costs no more than drawing the numbers.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

from draftbench.kernels import dense as dense_kernel
from draftbench.kernels import resolve, run

from . import hints, parts, profiled, records, schema
from .attention import DenseParts, Meter, Method, Plan, Request, Session
from .cases import threads
from .contest import Contest, first_line, runnable
from .help import CONFIGS, options
from .knob import Calibrated
from .latency import Timer, Timing, quantiles
from .layout import Layout
from .methods.dense import Dense
from .models.hook import Hook, shadowed, transformers
from .peers import Absent
from .step_tables import lacks, line, page

__all__ = ["ROWS", "Bench", "lacks", "listing", "page", "plan"]

ROWS = "step.jsonl"
DENSE_STEPS = 0.3  # of a generation
TINY = (  # for the tests
    "model.frames=9", "model.height=96", "model.width=160", "model.steps=10", "model.text_tokens=5",
    "model.dtype=float32",
    "model.geometry={region: [4, 4], tile: [2, 2, 4], block: 8}",
    "++model.architecture={num_layers: 2, num_single_layers: 3, num_attention_heads: 2, attention_head_dim: 16, "
    "num_refiner_layers: 1, text_embed_dim: 16, pooled_projection_dim: 8, rope_axes_dim: [4, 6, 6]}",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model by the overrides of its config; DraftAttention's sparsities and .9, its dense layers; a CPU's threads."""

    overrides: tuple[str, ...]
    sparsities: tuple[float, ...]
    layers: int
    device: str = "cuda"
    threads: int | None = None

    def config(self, *more: str) -> DictConfig:
        """The config of a job with this model."""
        with initialize_config_module(CONFIGS, version_base="1.3"):
            return compose("config", [*self.overrides, "model.weights=random", f"device={self.device}", *more])


HUNYUAN = Case(("model=hunyuan_video",), (0.6, 0.8, 0.9), 2)
WAN = Case(("model=wan21_14b",), (0.55, 0.75, 0.9), 1)
CASES = {
    "hunyuan_768p": HUNYUAN,
    "hunyuan_512p": replace(HUNYUAN, overrides=(*HUNYUAN.overrides, "model.height=512", "model.width=768")),
    "wan14b_768p": WAN,
    "wan14b_480p": replace(WAN, overrides=(*WAN.overrides, "model.height=480", "model.width=832")),  # ragged
    "tiny": Case((*HUNYUAN.overrides, *TINY), (0.5,), 1, "cpu", 1),
}


@dataclass(frozen=True)
class Contestant:
    """A dense kernel (its name), "stock", or a method with its sparsity and the number of dense layers."""

    name: str
    method: Method | None = None
    layers: int = 0

    @property
    def dense(self) -> bool:
        """Whether it is one that others divide by."""
        return self.name in dense_kernel.KERNELS


Jobs = list[tuple[str, list[Contestant]]]


def plan(config: DictConfig) -> Jobs:
    """Each model asked for and its contestants, the dense ones first.

    ValueError for an unknown one, a model that this machine cannot run, methods without a dense kernel to compare with,
    or one whose work depends on the data, which is random here.
    """
    jobs = []
    for name in runnable("bench.models", config.models, CASES):
        case = CASES[name]
        sparsities = case.sparsities if config.sparsities is None else config.sparsities
        layers = (0, case.layers) if config.layers is None else config.layers
        dense = [Contestant(one) for one in dense_kernel.KERNELS if one in config.methods]
        rest, model = [], schema.model(case.config())
        if (most := max(layers)) >= model.layers:
            raise hints.wrong("bench.layers", f"integers below {model.layers}, the layers of {name}", most)
        for method in config.methods:
            if method == "stock":
                rest.append(Contestant(method))
            elif method not in dense_kernel.KERNELS:
                made = [_method(case, method, float(sparsity)) for sparsity in sparsities]
                for one in made:
                    one.meet(model, DenseParts(DENSE_STEPS, layers=case.layers))
                rest += [Contestant(method, one, int(count)) for one in made for count in layers]
        if not dense:
            raise ValueError(f"bench.methods must have a dense one to compare with ({', '.join(dense_kernel.KERNELS)})")
        jobs.append((name, [*dense, *rest]))
    return jobs


def _method(case: Case, name: str, sparsity: float) -> Method:
    """A method at a sparsity, with the settings of its config and the model's geometry."""
    known = options("method")
    if name not in known:
        raise ValueError(f"bench.methods must be of stock, {', '.join([*dense_kernel.KERNELS, *known])}, got {name!r}")
    made = schema.method(case.config(f"method={name}", f"sparsity={sparsity}"))
    if isinstance(made, Calibrated):
        raise ValueError(f"bench.methods: what {name} keeps depends on the data, which random weights do not have")
    if not made.steady:
        raise ValueError(f"bench.methods: steps of {name} differ, and one of them stands for none of the others")
    if not made.sparse or made.changes_request:
        raise ValueError(f"bench.methods: {name} is a control of the dense run, whose step is as long as a dense one")
    return made


def listing() -> list[str]:
    """Lines for --help: the models."""
    return [
        "Models",
        *(f"  {name:<18}{' '.join(case.overrides[:3])}" for name, case in CASES.items() if name != "tiny"),
    ]


class Bench(Contest):
    """See `Contest`."""

    def run(self, jobs: Jobs) -> None:
        """Every model in turn, not compiled and then compiled: a compiled block stays so."""
        for name, chosen in jobs:
            self.requested = {
                "models": [one for one, _ in jobs], "methods": list(self.config.methods),
                "compile": list(self.config.compile), "repeats": int(self.config.repeats),
                "dense_repeats": int(self.config.dense_repeats), "dense_steps": DENSE_STEPS,
            }  # fmt: skip
            with torch.no_grad(), threads(CASES[name].threads):
                self.case(name, CASES[name], chosen)
            torch._dynamo.reset()  # another size is another graph, and their number is limited
            gc.collect()
            torch.cuda.empty_cache()

    def write(self, row: dict[str, Any]) -> None:
        """See `Contest.write`; a row is told too, since minutes may pass before the next."""
        super().write(row)
        tqdm.write(line(row))

    def case(self, name: str, case: Case, chosen: list[Contestant]) -> None:
        """Make the model once and time every contestant on it."""
        model: Any = schema.model(case.config())
        network = model.pipe.transformer  # made before anything is timed
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e9:.2f} billion parameters", flush=True)
        self.text_s: float | None = None
        bar = tqdm(desc=name, total=len(chosen) * len(self.config.compile), unit=" steps")
        for compiled in sorted(self.config.compile):
            if compiled:
                model.compile_blocks(model.pipe)
                model.compile = True
            dense: dict[str, Any] | None = None
            whole: dict[str, Any] | None = None
            for one in (one for one in chosen if one.dense):
                row = self.step(Step(model, one), self.new(name, model, one, "step"), dense)
                bar.update()
                if row["status"] == "ok" and (dense is None or row["ms"]["p50"] < dense["ms"]["p50"]):
                    dense = row
            if dense:
                whole = self.generations(name, Step(model, Contestant(dense["contestant"])), dense, dense)
            for one in (one for one in chosen if not one.dense):
                row = self.step(Step(model, one), self.new(name, model, one, "step"), dense)
                bar.update()
                if dense and one.method and one.layers == case.layers and row["density_effective"]:
                    self.generations(name, Step(model, one), row, dense, whole)
        bar.close()

    def new(self, name: str, model: Any, contestant: Contestant, what: str) -> dict[str, Any]:
        """A row that says what is to be measured."""
        method = contestant.method
        row = records.new(
            kind="step", run=self.run_id, what=what, case=name, model=model.name, model_settings=model.settings(),
            grid=model.grid, steps=model.steps, contestant=contestant.name, dense_layers=contestant.layers,
            method_settings=asdict(method) if method else None, sparsity=method.sparsity if method else 0.0,
            compiled=model.compile, composed=what == "composed", requested=self.requested,
            **self.environment(model.device.type),
        )  # fmt: skip
        identity = (
            *("what", "case", "model", "model_settings", "steps", "contestant", "dense_layers", "method_settings"),
            *("compiled", "device", "versions", "commit"),
        )
        row["cell_id"] = records.cell_id({key: row[key] for key in identity})
        return row

    def step(self, step: Step, row: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
        """Measure a row and write it; what goes wrong is its status."""
        repeats = self.config.repeats if step.contestant.method else self.config.dense_repeats
        try:
            step.check()
            row |= step.warm_up()
            row |= step.timed(int(repeats))
            row["status"] = "ok"
            row |= step.told_apart() if step.contestant.method else {}
            row["profile"] = step.profiled() if self.config.profile else None
        except Absent as reason:
            row["status"] = f"absent: {reason}"
        except Exception as error:  # out of memory, or whatever a package of others raises, is a reason
            what = "parts_failed" if row["status"] == "ok" else "status"
            row[what] = first_line(error) if row["status"] == "ok" else f"failed: {first_line(error)}"
        gc.collect()  # what the traceback held
        if step.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if row["status"] == "ok":
            compare(row, dense or (row if step.contestant.dense else None))
        self.write(row)
        return row

    def generations(
        self, name: str, how: Step, step: dict[str, Any], dense: dict[str, Any], whole: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Rows of a whole generation: composed, and run if that is asked for; the run's.

        step: the row of its step; dense, whole: the rows of the dense step and of the dense run that it is compared
        with, None for itself.
        """
        self.compose(self.new(name, how.model, how.contestant, "composed"), step, dense)
        if not self.config.generation:
            return None
        return self.generate(how, self.new(name, how.model, how.contestant, "generation"), whole)

    def compose(self, row: dict[str, Any], step: dict[str, Any], dense: dict[str, Any]) -> None:
        """Write the row of a whole generation as the sum of its dense steps and those like `step`."""
        steps, ms = row["steps"], dense["ms"]["p50"]
        first = math.ceil(DENSE_STEPS * steps - 1e-9) if row["method_settings"] else steps
        seconds = (first * ms + (steps - first) * step["ms"]["p50"]) / 1000
        row |= {name: step[name] for name in ("sparsity_achieved", "executors_run", "forwards")}
        row |= {
            "dense_steps": first, "generate_s": seconds, "not_timed": "text encoding and decoding", "status": "ok",
            "density_effective": (first + (steps - first) * step["density_effective"]) / steps,
            "dense": {"contestant": dense["contestant"], "ms": ms, "generate_s": steps * ms / 1000},
            "speedup": steps * ms / 1000 / seconds,
        }  # fmt: skip
        self.write(row)

    def generate(self, step: Step, row: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
        """Run a whole generation and write its row; dense: that of the dense kernel, None for its own."""
        share, model = DENSE_STEPS if step.contestant.method else 1.0, step.model
        row["dense_steps"] = math.ceil(share * model.steps - 1e-9)
        try:
            row |= step.generation(share)
            if self.config.text_encoders:
                self.text_s = text_s(model) if self.text_s is None else self.text_s
                row |= {"text_s": self.text_s, "generate_s": row["generate_s"] + self.text_s, "not_timed": None}
            row["status"], against = "ok", dense or row
            if against["generate_s"]:
                row["dense"] = {"contestant": against["contestant"], "ms": None, "generate_s": against["generate_s"]}
                row["speedup"] = against["generate_s"] / row["generate_s"]
        except Exception as error:
            row["status"] = f"failed: {first_line(error)}"
        self.write(row)
        return row


@dataclass
class Step:
    """How one contestant's step is run on a model."""

    model: Any
    contestant: Contestant

    def __post_init__(self) -> None:
        self.request = Request(("random text",), (0,), self.model.steps)
        self.executor = run(resolve("auto", self.model.device))

    def check(self) -> None:
        """Raise Absent if a dense kernel cannot run here."""
        device = self.model.device
        if self.contestant.dense and (reason := dense_kernel.unavailable(self.contestant.name, device)):
            raise Absent(reason)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Sequence[int]) -> Tensor:
        """The dense kernel of a dense contestant, or the fastest for the dense layers of another, as a part."""
        kernel = self.contestant.name if self.contestant.dense else None
        with parts.part("kernel"):
            return dense_kernel.run(q, k, v, layout, text_lengths, kernel)

    def session(self, timer: Timer, steps: float = 0.0, kind: type[Session] = Session) -> Session:
        """One in which the first share of `steps` is dense, and the contestant's layers."""
        method = self.contestant.method or Dense()
        dense = DenseParts(steps, layers=self.contestant.layers)
        return kind(method, self.executor, self.dense, dense, timer, counting=False)

    def once(self, session: Session) -> Timing:
        """The first step of a generation."""
        assert isinstance(session.watch, Timer)
        if self.contestant.name == "stock":
            with followed(self.model.pipe, session.watch):
                self.model.pipe(**self.model.arguments(self.request), output_type="latent")
        else:
            self.model.generate(self.request, session, last_step=1)
        return session.watch.timing()

    def warm_up(self) -> dict[str, Any]:
        """A step of few blocks, the seconds that it took with compiling, and the forwards of a step.

        Two of each kind beyond the dense layers: what the first gets may lie in memory otherwise than what the others
        get, which is another graph.
        """
        start, found = time.perf_counter(), []
        with shortened(self.model.hook, self.model.pipe, self.contestant.layers + 2), ExitStack() as stack:
            for network in transformers(self.model.pipe):
                stack.callback(network.register_forward_pre_hook(lambda *_: found.append(0)).remove)
            self.once(self.session(Timer(self.model.device)))
        return {"warm_up_s": time.perf_counter() - start, "forwards": len(found)}

    def timed(self, repeats: int) -> dict[str, Any]:
        """Times of whole steps and of their attention calls together, and the peak memory of the card in them."""
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        while True:
            graphs, times = counters["stats"]["unique_graphs"], Timing()
            for _ in range(repeats):
                times.add(self.once(self.session(Timer(self.model.device))))
            if graphs == counters["stats"]["unique_graphs"]:  # or a block was compiled meanwhile
                break
        found: dict[str, Any] = {"ms": quantiles(times.step_ms), "times_ms": times.step_ms}
        if self.contestant.name != "stock":
            attention = found["attention_ms"] = quantiles(times.attention_ms)
            if self.contestant.dense:
                rest = found["ms"]["p50"] - attention["p50"]
                found["parts_ms"] = {"kernel": attention["p50"], "rest": rest}
        found["executors_run"] = sorted(self.executor.ran)
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        dense = self.contestant.method is None
        return found | {"sparsity_achieved": 0.0 if dense else None, "density_effective": 1.0 if dense else None}

    def told_apart(self) -> dict[str, Any]:
        """The parts of a sparse step, from a pass that waits around every part, and what was executed in it."""
        session = self.session(Timer(self.model.device), kind=_Counting)
        with parts.collect(self.model.device) as found:
            total = self.once(session).step_ms[0]
        meter = session.meter
        assert isinstance(meter, Apart)
        rest = total - sum(found.values()) - meter.ms
        return {
            "parts_ms": {**found, "rest": rest}, "sparsity_achieved": meter.sparsity()[0],
            "density_effective": meter.density()[0],
        }  # fmt: skip

    def profiled(self) -> dict[str, Any]:
        """What computes a step under the profiler, see `profiled.kernels`: attention_ms of its calls with all that they
        launch, None where nothing tells them from the rest; other_ms, what is left of step_ms."""
        times: list[Timing] = []
        found = profiled.kernels(
            lambda: times.append(self.once(self.session(Timer(self.model.device)))), self.model.device
        )
        (step,), (attention,) = times[0].step_ms, times[0].attention_ms
        other = step - attention - found["matmul_ms"] - found["fused_ms"]
        told = attention if self.contestant.name != "stock" else None
        return {"step_ms": step, "attention_ms": told, "other_ms": other, **found}

    def generation(self, dense_steps: float) -> dict[str, Any]:
        """Seconds of a whole generation: its steps, and the decoding of what they made by a random VAE, the second time
        that it does; the VAE is there for as long only, since no step has it."""
        pipe, timer = self.model.pipe, Timer(self.model.device)
        vae, seconds = self.model.random_vae(), []
        decode = vae.decode

        @functools.wraps(decode)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            for _ in range(2):
                start = parts.now(self.model.device)
                result = decode(*args, **kwargs)
                seconds.append((parts.now(self.model.device) - start) / 1000)
            return result

        vae.decode = clocked
        pipe.register_modules(vae=vae)
        try:
            start = parts.now(self.model.device)
            with self.model.patched(self.session(timer, dense_steps), self.request.seeds):
                pipe(**self.model.arguments(self.request), output_type="pt")
            total = (parts.now(self.model.device) - start) / 1000
        finally:
            pipe.register_modules(vae=None)
        (denoise,) = timer.timing().generate_s
        cold, warm = seconds
        return {
            "generate_s": total - cold, "denoise_s": denoise, "decode_s": warm, "not_timed": "text encoding",
            "executors_run": sorted(self.executor.ran),
        }  # fmt: skip


@dataclass
class Apart(Meter):
    """Counts, and notes the milliseconds that it takes: they are no part of a step."""

    ms: float = 0.0

    def add_plan(self, plan: Plan, layout: Layout, text_lengths: Tensor, heads: int, more: bool = False) -> None:
        """See `Meter.add_plan`."""
        start = parts.now(text_lengths.device)
        super().add_plan(plan, layout, text_lengths, heads, more)
        self.ms += parts.now(text_lengths.device) - start


class _Counting(Session):
    """A session whose meter is `Apart`."""

    def start(self, clips: int, switches: tuple[int, ...] = ()) -> None:
        super().start(clips, switches)
        self.meter = Apart(clips)


def text_s(model: Any) -> float:
    """Seconds of encoding a clip's text by random encoders, warm."""
    encode = model.random_encoding()
    encode()
    start = parts.now(model.device)
    encode()
    return (parts.now(model.device) - start) / 1000


def compare(row: dict[str, Any], dense: dict[str, Any] | None) -> None:
    """Put a step beside the dense one: the speed-up, and the memory beyond it."""
    if not dense:
        return
    row["dense"] = {"contestant": dense["contestant"], "ms": dense["ms"]["p50"]}
    row["speedup"] = row["dense"]["ms"] / row["ms"]["p50"]
    if row["peak_memory_gib"] is not None:
        row["memory_over_dense_gib"] = row["peak_memory_gib"] - dense["peak_memory_gib"]


@contextmanager
def shortened(hook: type[Hook], pipe: Any, each: int) -> Iterator[None]:
    """Inside, the pipeline's transformers have the first `each` blocks of every kind and no others."""
    with ExitStack() as stack:
        for network in transformers(pipe):
            ours = set(hook.blocks(network))
            for name, blocks in list(network.named_children()):
                if isinstance(blocks, torch.nn.ModuleList) and ours & set(blocks):
                    stack.callback(setattr, network, name, blocks)
                    setattr(network, name, blocks[:each])
        yield


@contextmanager
def followed(pipe: Any, timer: Timer) -> Iterator[None]:
    """An unpatched pipeline's first step is timed as a hook would have it, and is its last."""
    step: Callable[..., Any] = pipe.scheduler.step

    def begin(*_: Any) -> None:
        if not timer.steps:
            timer.step(0)

    @functools.wraps(step)
    def end(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        timer.finish()
        pipe._interrupt = True
        return result

    with ExitStack() as stack:
        for network in transformers(pipe):
            stack.callback(network.register_forward_pre_hook(begin).remove)
        stack.enter_context(shadowed(pipe.scheduler, "step", end))
        yield
