"""Train pocket from nothing: `python -m draftbench.models.pocket.train out=FOLDER`.

Processes render clips (clips.py) while the GPU trains on what is there, small grids first, the large one last.
Muon for the blocks' matrices, AdamW for the rest, an exponential moving average of the weights is what ships.
At the end the judge is fitted on real clips and both scored on held-out ones; card.json holds all of it.
The seed fixes the initialisation, the renderers and the noise; how many clips are rendered by a given step depends on
the machine, so two runs agree in distribution and not bit by bit.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

from .clips import clips
from .judge import fit, score
from .model import PocketConfig, PocketDiT
from .prompts import LENGTH, MOTIONS, SCENES, sentence, tokens
from .sampler import initial_noise, sample

FRAMES, HEIGHT, WIDTH = 16, 128, 192
# Share of the time, token grid, clips a step, mean of the logit-normal noise level (higher for larger frames).
PHASES = ((0.22, (8, 16, 24), 96, 0.5), (0.45, (16, 16, 24), 48, 0.6), (1.0, (16, 32, 48), 12, 1.2))
# Token grids and sampler shifts that the finished model is checked at.
CHECKS = {"small": ((8, 16, 24), 2.0), "middle": ((16, 16, 24), 2.0), "large": ((16, 32, 48), 3.0)}
REHEARSE = 6  # in the last phase every sixth step goes back to a small grid


@dataclass
class Settings:
    """The command's options, given as key=value."""

    out: str = "outputs/pocket_training"
    minutes: float = 15.0
    seed: int = 0
    workers: int = 14
    clips: int = 20000  # kept on the GPU, the oldest replaced
    held_out: int = 100  # clips a scene
    judge_steps: int = 1500
    check_seeds: int = 100
    device: str = "cuda"
    width: int = 384
    depth: int = 6


def _render(
    worker: int, seed: int, scenes: list[int], limit: int, video: Tensor, labels: Tensor, count: Tensor
) -> None:
    """Fill this worker's slots of a shared ring; `limit` clips a scene, or endlessly if 0."""
    torch.set_num_threads(1)
    slots = len(video) // len(count)
    frames, _, height, width = video.shape[1:]
    while True:
        for scene in scenes:
            source = clips(scene, seed + 1000 * worker + scene, frames, height, width)
            for made, (clip, motion) in enumerate(source, 1):
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

    def __init__(self, settings: Settings):
        context, n, per = mp.get_context("spawn"), settings.workers, 64
        self.ring = torch.zeros(n * per, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8).share_memory_()
        self.ring_labels = torch.zeros(n * per, 2, dtype=torch.long).share_memory_()
        self.count = torch.zeros(n, dtype=torch.long).share_memory_()
        self.taken = torch.zeros(n, dtype=torch.long)
        held = settings.held_out * len(SCENES)
        self.held = torch.zeros(held, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8).share_memory_()
        self.held_labels = torch.zeros(held, 2, dtype=torch.long).share_memory_()
        self.held_count = torch.zeros(1, dtype=torch.long).share_memory_()
        jobs: list[tuple[Any, ...]] = [
            (i, 10_000_000 + settings.seed, [i % len(SCENES)], 0, self.ring, self.ring_labels, self.count)
            for i in range(n)
        ]
        everything = list(range(len(SCENES)))
        jobs.append((0, 99_000_000, everything, settings.held_out, self.held, self.held_labels, self.held_count))
        self.processes = [context.Process(target=_render, args=job, daemon=True) for job in jobs]
        for process in self.processes:
            process.start()
        self.video = torch.zeros(settings.clips, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=settings.device)
        self.labels = torch.zeros(settings.clips, 2, dtype=torch.long, device=settings.device)
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
        video = self.video[rows, : grid[0]].float() / 127.5 - 1
        shrink = HEIGHT // (4 * grid[1])
        if shrink > 1:
            video = torch.nn.functional.avg_pool2d(video.flatten(0, 1), shrink).unflatten(0, video.shape[:2])
        return video, self.labels[rows]

    def stop(self) -> None:
        """End the rendering processes."""
        for process in self.processes:
            process.terminate()


def _captions(device: str) -> Tensor:
    """Token ids [2 orders, MOTIONS + 1, SCENES + 1, LENGTH]; the last index of each leaves that half out."""
    table = torch.zeros(2, len(MOTIONS) + 1, len(SCENES) + 1, LENGTH, dtype=torch.long)
    for order in range(2):
        for m in range(len(MOTIONS) + 1):
            for s in range(len(SCENES) + 1):
                text = sentence(m if m < len(MOTIONS) else None, s if s < len(SCENES) else None, bool(order))
                if text:
                    table[order, m, s] = torch.tensor(tokens(text))
    return table.to(device)


def _optimisers(model: PocketDiT) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "table" not in name]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(model: PocketDiT, weights: dict[str, Tensor], path: Path) -> None:
    """Write float16 weights with the network's shape in the file's metadata."""
    tensors = {name: value.to(torch.float16).contiguous().cpu() for name, value in weights.items()}
    save_file(tensors, path, metadata=model.config.as_strings())


def train(settings: Settings) -> dict[str, Any]:
    """Run the whole recipe; writes pocket.safetensors, judge.safetensors, card.json and samples.pt into `out`."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    device = settings.device
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.backends.cuda.enable_flash_sdp(False)  # cuDNN's attention is the faster one on Hopper
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    source = Clips(settings)
    model = PocketDiT(PocketConfig(width=settings.width, depth=settings.depth)).to(device)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimisers = _optimisers(model)
    base_rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    if device == "cuda":
        model.compile()
    captions, curve, total, step, grids_seen = _captions(device), [], torch.zeros((), device=device), 0, {}
    try:
        while source.seen < 40 * settings.workers // 2:
            time.sleep(0.5)
            source.take()
        started, seconds, saved = time.time(), 60 * settings.minutes, time.time()
        while (elapsed := time.time() - started) < seconds:
            done = elapsed / seconds
            phase = next(i for i, p in enumerate(PHASES) if done < p[0])
            if phase == len(PHASES) - 1 and step % REHEARSE == 0:
                phase = step // REHEARSE % 2
            _, grid, size, mean = PHASES[phase]
            grids_seen[str(grid)] = grids_seen.get(str(grid), 0) + size
            source.take()
            rate = min(1.0, (step + 1) / 200) * (1 if done < 0.6 else max(0.02, (1 - done) / 0.4))
            for optimiser, base in zip(optimisers, base_rates, strict=True):
                optimiser.param_groups[0]["lr"] = base * rate
            clean, labels = source.batch(size, grid)
            drop = torch.rand(size, device=device)
            motion = torch.where((drop < 0.1) | ((drop > 0.1) & (drop < 0.15)), len(MOTIONS), labels[:, 0])
            scene = torch.where((drop < 0.1) | (drop > 0.95), len(SCENES), labels[:, 1])
            text = captions[torch.randint(0, 2, (size,), device=device), motion, scene]
            t = torch.sigmoid(torch.randn(size, device=device) + mean)
            level = t.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * clean + level * torch.randn_like(clean)
            with torch.autocast(device, torch.bfloat16):
                guess = model(noisy, t, text)
            loss = ((guess.float() - clean) / level.clamp(min=0.05)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            step += 1
            keep = min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                state = model.state_dict()
                torch._foreach_lerp_([average[n] for n in average], [state[n] for n in average], 1 - keep)
            total += loss.detach()
            if step % 50 == 0:
                curve.append([step, round(elapsed, 1), list(grid), round(total.item() / 50, 5)])
                print(
                    f"step {step} {elapsed:.0f} s grid {grid} loss {total.item() / 50:.4f} clips {source.seen}",
                    flush=True,
                )
                total.zero_()
            if time.time() - saved > 120:
                save(model, average, out / "pocket.safetensors")
                saved = time.time()
    finally:
        source.stop()
    save(model, average, out / "pocket.safetensors")
    card = {
        "settings": vars(settings), "steps": step, "clips_rendered": source.seen, "clips_trained": grids_seen,
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "loss_curve": curve,
    }  # fmt: skip
    model.load_state_dict({name: value.half().float() for name, value in average.items()})
    card["checks"] = check(model.eval(), source, settings, out)
    (out / "card.json").write_text(json.dumps(card, indent=1))
    return card


def check(model: PocketDiT, source: Clips, settings: Settings, out: Path) -> dict[str, Any]:
    """Fit the judge, score held-out real clips and generated ones (seeds 0 to check_seeds - 1, unselected)."""
    device = settings.device
    real = min(source.seen, len(source.video), 12000)
    judge = fit(source.video[:real], source.labels[:real, 0], source.labels[:real, 1], settings.judge_steps, 0)
    half = {name: value.half().contiguous().cpu() for name, value in judge.state_dict().items()}
    save_file(half, out / "judge.safetensors")
    judge.load_state_dict({name: value.float() for name, value in half.items()})
    held = int(source.held_count)
    held_video, held_labels = source.held[:held].to(device), source.held_labels[:held].to(device)
    results: dict[str, Any] = {"held_out_clips": held}
    samples = {}
    seeds = list(range(settings.check_seeds))
    motions = torch.tensor([seed % len(MOTIONS) for seed in seeds], device=device)
    scenes = torch.tensor([seed // len(MOTIONS) % len(SCENES) for seed in seeds], device=device)
    for name, (grid, shift) in CHECKS.items():
        shrink = HEIGHT // (4 * grid[1])
        truth = held_video[:, : grid[0]]
        if shrink > 1:
            flat = torch.nn.functional.avg_pool2d(truth.flatten(0, 1).float(), shrink).round().byte()
            truth = flat.unflatten(0, truth.shape[:2])
        made = []
        for start in range(0, len(seeds), 10):
            some = seeds[start : start + 10]
            noise = initial_noise(some, (grid[0], 3, 4 * grid[1], 4 * grid[2])).to(device)
            prompts = [sentence(int(motions[s]), int(scenes[s])) for s in some]
            text = torch.tensor([tokens(prompt) for prompt in prompts], device=device)
            with torch.autocast(device, torch.bfloat16):
                made.append(sample(model, noise, text, steps=20, shift=shift, guidance=2.0))
        video = torch.cat(made)
        results[name] = {
            "real": score(judge, truth, held_labels[:, 0], held_labels[:, 1]),
            "generated": score(judge, video, motions, scenes),
        }
        samples[name] = {"generated": video[:36:4].cpu(), "real": truth[:: max(1, len(truth) // 6)][:6].cpu()}
        print(name, json.dumps(results[name]), flush=True)
    torch.save(samples, out / "samples.pt")
    return results


def main(arguments: list[str]) -> None:
    """Parse key=value options and train."""
    kinds = {field.name: field.type for field in fields(Settings)}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in kinds:
            raise SystemExit(f"unknown option {argument!r}; options: {', '.join(kinds)}")
        values[key] = {"int": int, "float": float, "str": str}[str(kinds[key])](value)
    settings = Settings(**values)
    if settings.minutes <= 0 or not math.isfinite(settings.minutes):
        raise SystemExit(f"minutes must be positive, got {settings.minutes}")
    train(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
