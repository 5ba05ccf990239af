"""Train pocket from nothing: `python -m draftbench.models.pocket.train out=FOLDER`.

Processes render clips (clips.py) while the GPUs train on what is there, small grids first, the large one last.
Muon for the blocks' matrices, AdamW for the rest, an exponential moving average of the weights is what ships.
The schedule counts steps, so the seed fixes initialisation, renderers, noise and rates; which clips are rendered by a
given step depends on the machine, so two runs agree in distribution and not bit by bit. A run that was stopped goes on
from its last saved state. `python -m draftbench.models.pocket.check` then scores what was trained.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

from ...environment import alone, commit
from .clips import HEIGHT, WIDTH, clips
from .model import PocketConfig, PocketDiT
from .prompts import LENGTH, MOTIONS, SCENES, sentence, tokens

FRAMES = 16


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: steps, token grid, clips a step (over all GPUs), mean of the logit-normal noise level.

    Larger frames need more noise to hide as much. In the last phase every `REHEARSE`-th step is one of an earlier
    phase's grids, so that those are not forgotten.
    """

    steps: int
    grid: tuple[int, int, int]
    clips: int
    noise: float


PHASES = (
    Phase(1500, (8, 8, 12), 192, 0.2),
    Phase(1500, (8, 16, 24), 64, 0.5),
    Phase(800, (16, 16, 24), 32, 0.6),
    Phase(900, (16, 32, 48), 8, 1.2),
)
REHEARSE = 6


@dataclass
class Settings:
    """The command's options, given as key=value."""

    out: str = "outputs/pocket_training"
    seed: int = 0
    gpus: int = 1
    workers: int = 14  # rendering processes a GPU
    clips: int = 20000  # kept on each GPU, the oldest replaced
    stop: int = 0  # pause after this step, to go on later; 0 trains to the end


def render(worker: int, seed: int, scenes: list[int], limit: int, video: Tensor, labels: Tensor, count: Tensor) -> None:
    """Fill this worker's slots of a shared ring; `limit` clips a scene, or endlessly if 0."""
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())  # ViZDoom writes where it runs, and fails where two of its processes start at once
    slots = len(video) // len(count)
    while True:
        for scene in scenes:
            for made, (clip, motion) in enumerate(clips(scene, seed + 1000 * worker + scene, FRAMES), 1):
                slot = worker * slots + int(count[worker]) % slots
                video[slot] = torch.from_numpy(clip)
                labels[slot] = torch.tensor([motion, scene])
                count[worker] += 1
                if made == limit:
                    break
        if limit:
            return


class Clips:
    """Clips rendered by other processes, copied to the training device as they arrive."""

    def __init__(self, settings: Settings, rank: int, device: torch.device):
        context, n, per = mp.get_context("spawn"), settings.workers, 64
        self.ring = torch.zeros(n * per, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8).share_memory_()
        self.ring_labels = torch.zeros(n * per, 2, dtype=torch.long).share_memory_()
        self.count = torch.zeros(n, dtype=torch.long).share_memory_()
        self.taken = torch.zeros(n, dtype=torch.long)
        first = 10_000_000 * (1 + rank) + settings.seed
        self.processes = [
            context.Process(
                target=render,
                args=(i, first, [i % len(SCENES)], 0, self.ring, self.ring_labels, self.count),
                daemon=True,
            )
            for i in range(n)
        ]
        for process in self.processes:
            process.start()
        self.video = torch.zeros(settings.clips, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(settings.clips, 2, dtype=torch.long, device=device)
        self.seen = 0

    def take(self) -> None:
        """Copy what has been rendered since the last call, at most a slice of the ring."""
        if any(process.exitcode not in (None, 0) for process in self.processes):
            raise RuntimeError("a rendering process died; is vizdoom installed?")
        per = len(self.ring) // len(self.count)
        rows = []
        for worker, (made, taken) in enumerate(zip(self.count.tolist(), self.taken.tolist(), strict=True)):
            first = max(taken, made - per + 4)  # slots about to be overwritten are skipped
            rows += [worker * per + i % per for i in range(first, made)]
            self.taken[worker] = made
        if rows:
            where = (torch.arange(self.seen, self.seen + len(rows)) % len(self.video)).to(self.video.device)
            self.video[where] = self.ring[rows].to(self.video.device)
            self.labels[where] = self.ring_labels[rows].to(self.video.device)
            self.seen += len(rows)

    def batch(self, size: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """`size` random clips as floats in [-1, 1] at a token grid's pixels, and their labels [size, 2]."""
        rows = torch.randint(0, min(self.seen, len(self.video)), (size,), device=self.video.device)
        return resize(self.video[rows, :: FRAMES // grid[0]].float(), grid) / 127.5 - 1, self.labels[rows]

    def stop(self) -> None:
        """End the rendering processes."""
        for process in self.processes:
            process.terminate()


def resize(video: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Average float pixels [B, T, 3, HEIGHT, WIDTH] down to 4 a token side of `grid`."""
    shrink = HEIGHT // (4 * grid[1])
    if shrink == 1:
        return video
    return torch.nn.functional.avg_pool2d(video.flatten(0, 1), shrink).unflatten(0, video.shape[:2])


def captions(device: torch.device) -> Tensor:
    """Token ids [2 orders, MOTIONS + 1, SCENES + 1, LENGTH]; the last index of each leaves that half out."""
    table = torch.zeros(2, len(MOTIONS) + 1, len(SCENES) + 1, LENGTH, dtype=torch.long)
    for order in range(2):
        for m in range(len(MOTIONS) + 1):
            for s in range(len(SCENES) + 1):
                text = sentence(m if m < len(MOTIONS) else None, s if s < len(SCENES) else None, bool(order))
                if text:
                    table[order, m, s] = torch.tensor(tokens(text))
    return table.to(device)


def optimisers(model: PocketDiT) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "table" not in name]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(weights: dict[str, Tensor], config: PocketConfig, path: Path) -> None:
    """Write float16 weights with the network's shape in the file's metadata."""
    tensors = {name: value.to(torch.float16).contiguous().cpu() for name, value in weights.items()}
    save_file(tensors, path, metadata=config.as_strings())


def schedule(step: int) -> tuple[Phase, float]:
    """The phase of a step and the share of the training that is done."""
    ends = list(itertools.accumulate(p.steps for p in PHASES))
    index = next(i for i, end in enumerate(ends) if step < end)
    if index == len(PHASES) - 1 and step % REHEARSE == 0:
        index = 1 + step // REHEARSE % (index - 1)
    return PHASES[index], step / ends[-1]


def draw(source: Clips, phase: Phase, size: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Clean, noisy clips, noise levels [size], prompt ids) of a step; captions lose a half or all now and then."""
    clean, labels = source.batch(size, phase.grid)
    drop = torch.rand(size, device=clean.device)
    motion = torch.where(drop < 0.15, len(MOTIONS), labels[:, 0])
    scene = torch.where((drop < 0.1) | (drop > 0.95), len(SCENES), labels[:, 1])
    text = table[torch.randint(0, 2, (size,), device=clean.device), motion, scene]
    t = torch.sigmoid(torch.randn(size, device=clean.device) + phase.noise)
    level = t.view(-1, 1, 1, 1, 1)
    return clean, (1 - level) * clean + level * torch.randn_like(clean), t, text


def loss_of(model: PocketDiT, clean: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Mean squared error of the velocity that the predicted clip implies, per clip [B]."""
    with torch.autocast(clean.device.type, torch.bfloat16):
        guess = model(noisy, t, text)
    return ((guess.float() - clean) / t.clamp(min=0.05).view(-1, 1, 1, 1, 1)).square().flatten(1).mean(1)


def worker(rank: int, settings: Settings) -> None:
    """Train on one GPU of `settings.gpus`; rank 0 keeps the average and writes the files."""
    out, device = Path(settings.out), torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's attention is the faster one on Hopper
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    if settings.gpus > 1:
        dist.init_process_group("nccl", f"file://{out.resolve()}/.rendezvous", rank=rank, world_size=settings.gpus)
    source = Clips(settings, rank, device)
    torch.manual_seed(settings.seed)
    model = PocketDiT().to(device)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optims, step, curve, trained = optimisers(model), 0, [], {}
    rates = [optim.param_groups[0]["lr"] for optim in optims]
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average, step, curve, trained = state["average"], state["step"], state["curve"], state["trained"]
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
    torch.manual_seed(settings.seed + 1000 * rank + step + 1)
    model.compile()
    table, recent, started = captions(device), [], time.time()
    total = settings.stop or sum(p.steps for p in PHASES)

    def keep() -> None:
        card = {
            "settings": vars(settings), "steps": step, "clips_rendered": source.seen * settings.gpus,
            "clips_trained": trained, "parameters": sum(p.numel() for p in model.parameters()),
            "torch": torch.__version__, "gpu": f"{settings.gpus} x {torch.cuda.get_device_name()}",
            "loss_curve": curve, **commit(),
        }  # fmt: skip
        save(average, model.config, out / "pocket.safetensors")
        (out / "card.json").write_text(json.dumps(card, indent=1))
        state = {"model": model.state_dict(), "average": average, "step": step, "curve": curve, "trained": trained}
        torch.save(state | {"optims": [optim.state_dict() for optim in optims]}, out / "state.tmp")
        os.replace(out / "state.tmp", out / "state.pt")

    try:
        while source.seen < 400:
            time.sleep(0.2)
            source.take()
        while step < total:
            phase, done = schedule(step)
            size = phase.clips // settings.gpus
            trained[str(phase.grid)] = trained.get(str(phase.grid), 0) + phase.clips
            if step % 10 == 0:
                source.take()
            rate = min(1.0, (step + 1) / 100) * (1 if done < 0.6 else max(0.02, (1 - done) / 0.4))
            for optim, base in zip(optims, rates, strict=True):
                optim.param_groups[0]["lr"] = base * rate
            loss = loss_of(model, *draw(source, phase, size, table)).mean()
            loss.backward()
            if settings.gpus > 1:
                for p in model.parameters():
                    dist.all_reduce(p.grad, dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=False)
            step += 1
            share = min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                now = model.state_dict()
                torch._foreach_lerp_([average[n] for n in average], [now[n] for n in average], 1 - share)
            recent.append(loss.detach())
            if rank == 0 and step % 100 == 0:
                mean, grid = round(torch.stack(recent).mean().item(), 5), list(phase.grid)
                curve.append([step, grid, mean])
                recent.clear()
                print(f"step {step} {time.time() - started:.0f} s {grid} loss {mean} clips {source.seen}", flush=True)
            if rank == 0 and (step % 500 == 0 or step == total):
                keep()
    finally:
        source.stop()
    if settings.gpus > 1:
        dist.destroy_process_group()


def parse(kind: type, arguments: list[str]) -> Any:
    """A dataclass of options from key=value arguments; SystemExit names an unknown or malformed one, and after --help
    the options are printed."""
    if {"-h", "--help"} & set(arguments):
        options = inspect.getsource(kind).partition('"""\n\n')[2]  # with their comments
        options = re.sub(r'(?m)^ *(\w+): \w+ = "?([^"\n]*)"?', r"  \1=\2", options)
        print(f"{sys.modules[kind.__module__].__doc__}\nOptions and their defaults:\n{options}", end="")
        raise SystemExit(0)
    kinds = {field.name: field.type for field in fields(kind)}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in kinds:
            raise SystemExit(f"unknown option {argument!r}; options: {', '.join(kinds)}")
        try:
            values[key] = {"int": int, "float": float, "str": str}[str(kinds[key])](value)
        except ValueError:
            raise SystemExit(f"{key} must be of type {kinds[key]}, got {value!r}") from None
    return kind(**values)


def main(arguments: list[str]) -> None:
    """Parse key=value options and train."""
    settings = parse(Settings, arguments)
    if not 1 <= settings.gpus <= torch.cuda.device_count():
        raise SystemExit(f"gpus must be from 1 to the {torch.cuda.device_count()} that torch sees, got {settings.gpus}")
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    ranks = sorted(range(settings.gpus), key=lambda rank: str(torch.cuda.get_device_properties(rank).uuid))
    with ExitStack() as held:  # in an order of the GPUs' own, so that no two wait for one another
        for rank in ranks:
            held.enter_context(alone(torch.device("cuda", rank)))
        (Path(settings.out) / ".rendezvous").unlink(missing_ok=True)
        if settings.gpus == 1:
            worker(0, settings)
        else:
            mp.spawn(worker, (settings,), settings.gpus)


if __name__ == "__main__":
    main(sys.argv[1:])
