"""Check a trained pocket: `python -m draftbench.models.pocket.check out=FOLDER`, after train, in the same folder.

Fits the judge on freshly rendered clips, scores held-out real clips and generated ones (seeds 0 to 99, unselected),
adds the scores to card.json and writes judge.safetensors and samples.safetensors for the contact sheet.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import judge as judging
from .clips import HEIGHT, WIDTH
from .judge import fit, sharpness, verdicts
from .model import load
from .prompts import MOTIONS, SCENES, sentence, tokens
from .sampler import initial_noise, sample
from .train import FRAMES, parse, render, resize

# Token grid, sampler steps, shift and guidance that the model is checked at: those of conf/model.
GRIDS = {"small": ((8, 16, 24), 8, 1.0, 3.0), "large": ((16, 32, 48), 20, 3.0, 4.5)}


@dataclass
class Settings:
    """The command's options, given as key=value."""

    out: str = "outputs/pocket_training"
    workers: int = 16
    real: int = 1000  # clips a scene to fit the judge on
    held_out: int = 100  # clips a scene to score
    judge_steps: int = 2500
    seeds: int = 100
    grids: str = "small,large"


def rendered(seed: int, each: int, workers: int) -> tuple[Tensor, Tensor]:
    """At least `each` clips of every scene, uint8 [N, FRAMES, 3, HEIGHT, WIDTH], and labels (motion, scene) [N, 2]."""
    context, teams = mp.get_context("spawn"), max(1, workers // len(SCENES))
    count = torch.zeros(teams * len(SCENES), dtype=torch.long).share_memory_()
    share = -(-each // teams)
    video = torch.zeros(len(count) * share, FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8).share_memory_()
    labels = torch.zeros(len(video), 2, dtype=torch.long).share_memory_()
    jobs = [
        context.Process(target=render, args=(i, seed, [i % len(SCENES)], share, video, labels, count))
        for i in range(len(count))
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise RuntimeError("a rendering process died; is vizdoom installed?")
    return video, labels


def check(settings: Settings) -> dict[str, object]:
    """Scores by grid: {"real": ..., "generated": ...} shares of motions and scenes seen as asked, and sharpness."""
    out, device = Path(settings.out), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    fresh = not (out / "judge.safetensors").exists()
    held, truth = (x.to(device) for x in rendered(99_000_000, settings.held_out, settings.workers))
    if fresh:
        video, labels = (x.to(device) for x in rendered(50_000_000, settings.real, settings.workers))
        fitted = fit(
            resize(video.float(), (FRAMES, 16, 24)).round().byte(), labels[:, 0], labels[:, 1], settings.judge_steps, 0
        )
        half = {name: value.half().contiguous().cpu() for name, value in fitted.state_dict().items()}
        save_file(half, out / "judge.safetensors", metadata={"fitted_on": str(len(video))})
    judge = judging.load(out / "judge.safetensors").to(device)
    with safe_open(out / "judge.safetensors", "pt") as file:
        fitted_on = int(file.metadata()["fitted_on"])
    model = load(out / "pocket.safetensors").to(device)
    seeds = list(range(settings.seeds))
    asked = torch.tensor([[s % len(MOTIONS), s // len(MOTIONS) % len(SCENES)] for s in seeds], device=device)
    scores: dict[str, object] = {"fitted_on": fitted_on, "held_out": len(held)}
    samples = {}

    def score(clips: Tensor, wanted: Tensor) -> dict[str, float]:
        motion, scene = verdicts(judge, clips)
        return {
            "motion": (motion == wanted[:, 0]).float().mean().item(),
            "scene": (scene == wanted[:, 1]).float().mean().item(),
            "sharpness": sharpness(clips).mean().item(),
        }

    for name in settings.grids.split(","):
        grid, steps, shift, guidance = GRIDS[name]
        real = torch.cat([resize(x[:, :: FRAMES // grid[0]].float(), grid).round().byte() for x in held.split(50)])
        made = []
        for start in range(0, len(seeds), 10):
            some = seeds[start : start + 10]
            noise = initial_noise(some, (grid[0], 3, 4 * grid[1], 4 * grid[2])).to(device)
            prompts = [sentence(*asked[s].tolist()) for s in some]
            text = torch.tensor([tokens(prompt) for prompt in prompts], device=device)
            with torch.autocast(device.type, torch.bfloat16):
                made.append(sample(model, noise, text, steps=steps, shift=shift, guidance=guidance))
        clips = torch.cat(made)
        scores[name] = {
            "steps": steps,
            "guidance": guidance,
            "real": score(real, truth),
            "generated": score(clips, asked),
        }
        print(name, json.dumps(scores[name]), flush=True)
        first = [int((truth == asked[s]).all(1).nonzero()[0]) for s in range(0, 36, 5)]
        samples[f"{name}.generated"], samples[f"{name}.real"] = clips[:36:5].cpu(), real[first].cpu()
    save_file(samples, out / "samples.safetensors")
    card = json.loads((out / "card.json").read_text())
    (out / "card.json").write_text(json.dumps(card | {"checks": scores, "check_seeds": settings.seeds}, indent=1))
    return scores


if __name__ == "__main__":
    check(parse(Settings, sys.argv[1:]))
