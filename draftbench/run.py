"""One job, a model under a method at a sparsity, top to bottom: time, generate, measure, record, show.

Dense and method clips of the same prompt, seed and noise are paired; the dense frames are cached, a timing never is.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from . import attention, heatmaps, kernels, layout, media, metrics, records, schema, summary
from .attention import DenseParts, Method, Request, Session, Watch
from .cache import FrameCache, digest
from .diagnostics import Probe, Spot
from .environment import alone, describe
from .folder import Folder, keep
from .kernels import dense as dense_kernel
from .knob import Knobbed
from .latency import Timer, Timing, in_turn
from .methods.dense import Dense
from .methods.draft import Draft
from .metrics.lpips import lpips
from .metrics.psnr import psnr_db
from .metrics.ssim import ssim
from .models import hook
from .parts import collect
from .tracking import Tracker


def job(config: DictConfig, folder: Path, group: str | None = None) -> list[dict[str, Any]]:
    """Run every prompt and seed of a config that schema.check has passed; all that is made goes into `folder`.

    Returns the records. A batch that fails becomes records with its reason; what was finished before stays. Raises
    ValueError, FileNotFoundError, RuntimeError or OSError for what is wrong before the work starts, or if records can't
    be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = Job(config, folder)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    with Tracker(
        config.tracking.mode, config.tracking.project, folder, group or folder.name,
        f"{work.model.name} {work.name} {config.sparsity:g}", plain,
    ) as tracker:  # fmt: skip
        with alone(work.model.device):
            rows = work.run()
        tracker.log_rows(rows)
        videos, pictures = ({path.stem: path for path in sorted(folder.glob(kind))} for kind in ("*.mp4", "*.png"))
        tracker.log_files(videos if config.videos else {}, pictures)
    print(summary.table(rows if work.name == "dense" or not work.baseline else [work.baseline, *rows]))
    print(f"records, videos and pictures: {folder}")
    return rows


# Out of memory, a plan that the executor refuses, weights that cannot be read; anything else is a bug and ends the job.
EXPECTED = (RuntimeError, ValueError, OSError, MemoryError)
UNFINISHED = "failed: it was killed, or is still running"
Cell: TypeAlias = tuple[str, int]  # prompt and seed


@dataclass
class Clip:
    """A generated clip, uint8 [T, 3, h, w], and the pairs that were counted while it was made."""

    frames: Tensor
    sparsity: float
    density: float
    fallback_rows: int


class Job:
    """The state of one job: what was built, what was timed, what was made."""

    def __init__(self, config: DictConfig, folder: Path):
        self.config, self.folder = config, folder
        self.model, self.parts = schema.check_job(config), schema.parts(config)
        self.method = schema.method(config)
        self.method.meet(self.model, self.parts)
        self.cuda = self.model.device.type == "cuda"
        self.name, self.settings = _file(type(self.method)).stem, _plain(self.method)  # before it measures any
        self.executor_name = kernels.resolve(config.executor, self.model.device)
        self.executor = kernels.run(self.executor_name)
        self.dense_kernel = dense_kernel.name(self.model.device, getattr(torch, self.model.dtype))
        self.environment = describe(self.model.device)
        self.source = _source(*_classes(self.method), kernels, metrics)
        self.model_source = _source(type(self.model), attention, layout, dense_kernel, hook)
        cache = Path(config.cache).expanduser()
        self.frames = FrameCache(cache / "frames", config.cache_gb)
        self.memo: dict[tuple[str, Request], list[Clip]] = {}
        self.warm: set[type] = set()
        self.sparse_steps: set[int] = set()  # of a whole generation under the method
        self.timed: dict[str, Any] = {}
        self.told = False  # that the method never ran
        self.baseline: dict[str, Any] | None = None  # the dense timing of this process, or one that was brought
        self.request = Request((config.prompts[0],), (int(config.seeds[0]),), self.model.steps)
        # Of random weights there are latencies and densities, and no frames to compare.
        self.no_quality: str | None = getattr(self.model, "no_quality", None)
        videos = config.videos and not self.no_quality
        shown = ("dense.mp4", f"{self.name}.mp4", "side_by_side.png") if videos else ()
        self.index = records.Index(cache / "cells")
        self.place = Folder(folder, len(config.prompts) * len(config.seeds), shown, self.index)

    def run(self) -> list[dict[str, Any]]:
        """Skip what is finished, time the first clip, then generate and measure batch by batch."""
        cells = [(prompt, int(seed)) for prompt in self.config.prompts for seed in self.config.seeds]
        places = dict(zip(self.place.numbers(cells), cells, strict=True))
        known = {} if self.config.force else {n: self.index.find(self.cell_id(*cell)) for n, cell in places.items()}
        # Committed code runs again what uncommitted code made, which could not be promoted.
        dirty = self.environment["dirty"]
        found = self.place.bring({n: done for n, done in known.items() if done and (dirty or not done[0]["dirty"])})
        self.baseline = self.place.baseline
        rows = [(number, row) for number, (row, _) in found.items()]
        waiting = [(number, cell) for number, cell in places.items() if number not in found]
        if rows:
            where = ", ".join(sorted({str(made.parent) for _, made in found.values()}))
            print(f"{len(rows)} of {len(cells)} cells were finished before, see {where}", file=sys.stderr)
            print("force=true runs them again", file=sys.stderr)
        failure = None
        if waiting:
            self.claim(waiting)
            failure = self.prepared()
        with tqdm(total=len(cells), initial=len(rows), desc="cells", disable=len(cells) == 1) as bar:
            for start in range(0, len(waiting), self.config.batch):
                batch = waiting[start : start + self.config.batch]
                made, clips = (self.failed(batch, failure), []) if failure else self.batch(batch)
                for (number, _), row in zip(batch, made, strict=True):
                    self.place.write(row, number)
                    rows.append((number, row))
                    bar.update()
                for i, ((number, cell), row) in enumerate(zip(batch, made, strict=True)):
                    if row["status"] != "ok":
                        continue
                    if self.place.shown:  # after the records, so that a full disk loses none
                        self.show(number, cell, *clips[i])
                    self.place.finished(row, number)
        if self.config.diagnostics and self.method.sparse and not failure and not self.no_quality:
            region = self.config.model.geometry.region
            regions = Draft(region=region and tuple(region), stacked=False)
            spot = Spot(**self.config.maps, box=regions.box(self.model.grid))
            first = next(iter(places))
            wanted = {"cell_id": self.cell_id(*places[first]), "spot": asdict(spot)}
            if first not in found or not self.place.bring_diagnostics(found[first][1].parent, wanted):
                self.diagnose(spot)
        if self.no_quality:
            print(f"draftbench: no quality, videos or diagnostics: {self.no_quality}", file=sys.stderr)
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def claim(self, waiting: Sequence[tuple[int, Cell]]) -> None:
        """Leave a record that says so for every cell that is to come, for the case that the job is killed."""
        for number, cell in waiting:
            if not self.place.record(number).exists():  # it may be a finished one, with force=true
                steps = self.method.request(self.request).steps
                self.place.write(self.record(cell, status=UNFINISHED, steps=steps), number)

    def prepared(self) -> Exception | None:
        """`prepare`, and what went wrong with it, if that is no bug of ours."""
        try:
            self.prepare()
        except EXPECTED as error:
            if self.config.debug:
                raise
            return error
        return None

    def prepare(self) -> None:
        """Time the first clip; controls that need a timing of their own take it here."""
        self.method.prepare(lambda method: self.time(method, self.request).median("generate_s"))
        if not self.config.latency.enabled:
            return
        runs: dict[str, Callable[[], Timing]] = {"dense": lambda: self.time(Dense(), self.request)}
        if self.name != "dense":
            runs[self.name] = lambda: self.time(self.method, self.method.request(self.request))
        timings = in_turn(runs, self.config.latency.repeats)
        # A step is one in which the method was active, for dense too; whole generations hold every step.
        dense, mine = timings["dense"].only(self.sparse_steps), timings[self.name].only(self.sparse_steps)
        self.timed = {
            "generate_s": mine.median("generate_s"), "step_ms": mine.median("step_ms"),
            "attention_ms": mine.median("attention_ms"),
            "speedup_generate": dense.median("generate_s") / mine.median("generate_s"),
            "speedup_attention": dense.median("attention_ms") / mine.median("attention_ms"),
            "baseline_id": records.cell_id({"at": time.time_ns(), "dense": dense.summary()}),
            "latency": {"dense": dense.summary(), "method": mine.summary()},
        }  # fmt: skip
        if self.method.sparse:
            self.timed["parts_ms"] = self.parts_ms()
        self.baseline = records.new(
            kind="baseline", cell_id=self.timed["baseline_id"], baseline_id=self.timed["baseline_id"],
            model=self.model.name, weights_hash=self.model.weights_hash, method="dense", sparsity=0.0,
            sparsity_achieved=0.0, density_effective=1.0, grid=list(self.model.grid), steps=self.model.steps,
            speedup_generate=1.0, speedup_attention=1.0, latency={"dense": dense.summary()}, status="ok",
            **{name: dense.median(name) for name in vars(dense)}, **self.environment,
        )  # fmt: skip
        records.write(self.baseline, self.folder / "baseline.json")

    def time(self, method: Method, request: Request) -> Timing:
        """One whole generation, timed, after a warm-up the first time: load, compile and pick kernels off the clock.

        On a GPU nothing is counted meanwhile; on a CPU the clips are kept for the batch that asks for the same, since
        making them again would cost more than counting does.
        """
        if type(method) not in self.warm:
            self.warm.add(type(method))
            self.sparse_step(method, Watch())
        timer = Timer(self.model.device)
        clips = self.generate(method, request, timer, counting=not self.cuda)
        if not self.cuda:
            self.memo[repr(method), request] = clips
        return timer.timing()

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of one sparse step's attention by part, in a pass of its own; "rest" is what no part covers."""
        with collect(self.model.device) as parts:
            timer = Timer(self.model.device)
            self.sparse_step(self.method, timer)
        total = timer.timing().attention_ms[0]
        return {**parts, "rest": total - sum(parts.values())}

    def generate(self, method: Method, request: Request, watch: Watch, counting: bool = True) -> list[Clip]:
        """Generate `request` under a method and count its pairs."""
        with tqdm(total=request.steps, desc=type(method).__name__.lower(), leave=False) as bar:
            watch = Progress(watch, bar)
            session = Session(method, self.executor, dense_kernel.run, self.parts, watch, counting)
            video = self.model.generate(request, session)
        if method is self.method:
            if method.sparse and not session.sparse_steps and not self.told:
                kept = ", ".join(f"dense.{name}={value}" for name, value in asdict(self.parts).items())
                print(f"draftbench: {kept} keep every call dense, so {self.name} never ran", file=sys.stderr)
                self.told = True
            self.sparse_steps = session.sparse_steps
        meter = session.meter
        counts = (meter.sparsity(), meter.density(), meter.fallback_rows())
        return [Clip(*clip) for clip in zip(video, *counts, strict=True)]

    def sparse_step(self, method: Method, watch: Watch) -> None:
        """The first step of the first clip, with no call kept dense."""
        session = Session(method, self.executor, dense_kernel.run, DenseParts(0), watch)
        self.model.generate(self.request, session, last_step=1)

    def clips(self, method: Method, request: Request) -> list[Clip]:
        """As `generate`, unless the timing pass has just made the same."""
        found = self.memo.get((repr(method), request))
        return found or self.generate(method, request, Watch())

    def reference(self, request: Request) -> list[Tensor]:
        """The dense frames, from the cache if every clip of the batch is there."""
        keys = [self.reference_key(request, i) for i in range(len(request.seeds))]
        with self.frames.making(keys):  # another process that wants the same waits, and then finds it
            cached = [self.frames.get(key) for key in keys]
            if (repr(Dense()), request) not in self.memo and all(clip is not None for clip in cached):
                return [clip for clip in cached if clip is not None]
            made = [clip.frames for clip in self.clips(Dense(), request)]
            for key, frames in zip(keys, made, strict=True):
                keep("the reference was not cached", partial(self.frames.put, key, frames))
        return made

    def batch(self, batch: Sequence[tuple[int, Cell]]) -> tuple[list[dict[str, Any]], list[tuple[Clip, Tensor]]]:
        """Generate and compare one batch: its cells' records and, unless it failed, (clip, dense frames) of each."""
        prompts, seeds = zip(*(cell for _, cell in batch), strict=True)
        request = Request(prompts, seeds, self.model.steps)
        changed = self.method.request(request)
        try:
            reference = [] if self.no_quality else self.reference(request)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            made = self.clips(self.method, changed)
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
            rows = []
            for i, ((_, cell), clip) in enumerate(zip(batch, made, strict=True)):
                values = self.counted(clip) if self.no_quality else self.measured(clip, reference[i], cell[0])
                rows.append(self.record(cell, steps=changed.steps, peak_memory_gib=peak, **values))
            return rows, list(zip(made, reference, strict=False))
        except EXPECTED as error:
            if self.config.debug:
                raise
            return self.failed(batch, error), []

    def failed(self, batch: Sequence[tuple[int, Cell]], error: Exception) -> list[dict[str, Any]]:
        """The records of a batch that an error ended; tells it."""
        reason = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        print(f"draftbench: {self.name} sparsity={self.config.sparsity}: {reason}", file=sys.stderr)
        steps = self.method.request(self.request).steps
        return [self.record(cell, status=reason, steps=steps) for _, cell in batch]

    def measured(self, clip: Clip, dense: Tensor, prompt: str) -> dict[str, Any]:
        """Fidelity to the dense frames, quality by the model's own checks, and the counted densities."""
        a, b = clip.frames.to(self.model.device), dense.to(self.model.device)
        functions = {"psnr_db": psnr_db, "ssim": ssim, "lpips": lambda x, y: lpips(x, y, self.config.lpips_net)}
        values: dict[str, Any] = {name: functions[name](a, b) for name in self.config.metrics}
        quality = getattr(self.model, "quality", None)
        if quality is not None:
            values["quality"] = {"method": quality(a, prompt), "dense": quality(b, prompt)}
        digests = {"frames_sha256": digest(clip.frames), "reference_sha256": digest(dense)}
        return values | self.counted(clip) | digests

    def counted(self, clip: Clip) -> dict[str, Any]:
        """The counted densities of a clip, labelled where they are not what was asked for; why nothing else is known of
        it, where that is so."""
        values = {"sparsity_achieved": clip.sparsity, "density_effective": clip.density}
        labels: dict[str, str] = {}
        if self.no_quality and isinstance(self.method, Knobbed):  # what it keeps depends on the data, no video's
            labels["density"] = "of random weights"
        if not self.method.given and (missed := records.missed(self.method.sparsity, clip.sparsity)):
            labels["sparsity"] = missed
        return values | {"fallback_rows": clip.fallback_rows, "no_quality": self.no_quality, "labels": labels or None}

    def record(self, cell: Cell, status: str = "ok", **values: Any) -> dict[str, Any]:
        """A record of this job's cell."""
        return records.new(
            cell_id=self.cell_id(*cell), model=self.model.name, weights_hash=self.model.weights_hash, method=self.name,
            method_settings=_plain(self.method), knob=self.method.given,
            executor=self.executor_name, executors_run=sorted(self.executor.ran),
            dense_kernel=self.dense_kernel,
            prompt=cell[0], seed=cell[1],
            grid=list(self.model.grid), sparsity=float(self.method.target), status=status,
            model_settings=self.model.settings(), dense=asdict(self.parts),
            batch=self.config.batch, lpips_net=self.config.lpips_net, **self.environment, **self.timed, **values,
        )  # fmt: skip

    def show(self, number: int, cell: Cell, clip: Clip, dense: Tensor) -> None:
        """Write both videos and the side-by-side picture of a clip."""
        first, second, picture = (self.folder / f"{number:03}_{name}" for name in self.place.shown)
        media.write_video(dense, first, self.model.fps)
        media.write_video(clip.frames, second, self.model.fps)
        title = {"method": self.name, "sparsity": self.config.sparsity, "prompt": cell[0], "seed": cell[1]}
        media.side_by_side(dense, clip.frames, picture, title)

    def diagnose(self, spot: Spot) -> None:
        """Write output error and recalled mass by step and layer of the first clip, after pictures of them."""
        path = self.folder / "diagnostics.json"
        path.unlink(missing_ok=True)  # it says that all of it is there
        probe = Probe(self.method, self.executor, dense_kernel.run, self.parts, spot=spot)
        (frames,) = self.model.generate(self.request, probe)
        if not probe.rows:
            print("diagnostics: every call was dense, so there is nothing to tell", file=sys.stderr)
            return
        means = {name: sum(row[name] for row in probe.rows) / len(probe.rows) for name in ("error", "mass")}
        (prompt,), (seed,) = self.request.prompts, self.request.seeds
        title = f"{self.model.name}, {self.name} at {self.method.sparsity:g}, {prompt!r}, seed {seed}"
        pictures = ["recall.png"]
        heatmaps.draw_recall(probe.rows, title, self.folder / "recall.png")
        if probe.maps:
            pictures += ["maps.png", "kept_over_frames.png"]
            heatmaps.draw_maps(probe.maps, title, self.folder / "maps.png")
            heatmaps.draw_frames(probe.maps, frames, title, self.folder / "kept_over_frames.png")
        else:
            print(
                f"draftbench: no maps: maps.step={spot.step} maps.layer={spot.layer} is no active call", file=sys.stderr
            )
        note = {
            "kind": "diagnostics", "cell_id": self.cell_id(prompt, seed), "method": self.name,
            "sparsity": self.method.sparsity, "prompt": prompt, "seed": seed, "mean": means, "calls": probe.rows,
            "spot": asdict(spot), "pictures": pictures,
        }  # fmt: skip
        records.write(note, path)
        print(f"diagnostics: mean output error {means['error']:.4f}, recalled attention mass {means['mass']:.4f}")

    def cell_id(self, prompt: str, seed: int) -> str:
        """The hash of everything that shapes a cell: settings, weights, GPU, versions and the method's source."""
        config = self.config
        return records.cell_id(
            {
                "reference": self._reference_identity(), "prompt": prompt, "seed": seed, "method": self.name,
                "settings": self.settings, "sparsity": float(self.method.target), "dense": asdict(self.parts),
                "executor": self.executor_name, "source": self.source,
                "metrics": [*config.metrics, config.lpips_net], "latency": OmegaConf.to_container(config.latency),
                "videos": bool(config.videos), "diagnostics": bool(config.diagnostics), "batch": int(config.batch),
            }
        )  # fmt: skip

    def reference_key(self, request: Request, item: int) -> str:
        """The hash of everything that shapes a reference clip; rounding may differ with the batch, so its size too."""
        cell = {"prompt": request.prompts[item], "seed": request.seeds[item], "batch": len(request.seeds)}
        return records.cell_id(self._reference_identity() | cell)

    def _reference_identity(self) -> dict[str, Any]:
        return {
            "model": self.model.name, "weights": self.model.weights_hash, "settings": self.model.settings(),
            "steps": self.model.steps, "device": self.environment["device"], "versions": self.environment["versions"],
            "source": self.model_source, "dense_kernel": self.dense_kernel,
        }  # fmt: skip


class Progress(Watch):
    """A progress bar of steps around another watch."""

    def __init__(self, inner: Watch, bar: tqdm):
        self.inner, self.bar = inner, bar

    def step(self, index: int) -> None:
        """See `Watch.step`."""
        self.inner.step(index)
        self.bar.update(index - self.bar.n)

    def finish(self) -> None:
        """See `Watch.finish`."""
        self.inner.finish()

    def attention(self) -> Any:
        """See `Watch.attention`."""
        return self.inner.attention()


def _plain(method: Method) -> dict[str, Any]:
    """The settings of a method; where a calibration lies is none, since `calibrated` holds what was read there."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(method).items()}
    return records.placeless(plain)


def _file(kind: type) -> Path:
    return Path(inspect.getfile(kind))


def _classes(method: Method) -> list[type]:
    """The class of a method and of every method that it holds."""
    held = [value for value in vars(method).values() if isinstance(value, Method)]
    return [type(method), *(kind for inner in held for kind in _classes(inner))]


def _source(*parts: type | ModuleType) -> str:
    """A digest of source files: of a class, its bases and the model package it may lie in; of a module or a package."""
    files: dict[Path, None] = {}
    for part in parts:
        if isinstance(part, ModuleType):
            found = Path(part.__file__ or "")
            files |= dict.fromkeys(sorted(found.parent.glob("*.py")) if found.name == "__init__.py" else [found])
        else:
            for base in (base for base in part.__mro__ if base.__module__ != "builtins"):
                own = base.__module__.count(".") > 2  # a model with a package of its own, as pocket
                files |= dict.fromkeys(sorted(_file(base).parent.glob("*.py")) if own else [_file(base)])
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
