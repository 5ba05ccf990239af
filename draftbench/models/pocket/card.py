"""Write pocket's model card, loss curve and contact sheet: `python -m draftbench.models.pocket.card out=FOLDER`.

Reads card.json and samples.safetensors, which train and check left in FOLDER; nothing in the card is typed by hand.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .prompts import MOTIONS, SCENES, sentence
from .train import parse

HERE = Path(__file__).parent


@dataclass
class Settings:
    """The command's options, given as key=value."""

    out: str = "outputs/pocket_training"


def loss_curve(curve: list[list[Any]], path: Path) -> None:
    """Draw the training loss over steps, one colour a grid."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for grid in dict.fromkeys(tuple(row[1]) for row in curve):
        rows = [row for row in curve if tuple(row[1]) == grid]
        axes.plot([row[0] for row in rows], [row[2] for row in rows], label="x".join(map(str, grid)))
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(title="token grid", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def text(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    checks = card["checks"]
    digest = hashlib.sha256((HERE / "weights" / "pocket.safetensors").read_bytes()).hexdigest()
    rows = []
    for name, score in checks.items():
        if isinstance(score, dict):
            for what in ("motion", "scene", "sharpness"):
                made, real = score["generated"][what], score["real"][what]
                setting = f"{name}, {score['steps']} steps, guidance {score['guidance']}"
                rows.append(f"| {setting} | {what} | {made:.4g} | {real:.4g} | {made / real:.2f} |")
    seen = ", ".join(f"{count:,} at {grid}" for grid, count in card["clips_trained"].items())
    return f"""# Pocket

A text-to-video diffusion transformer of {card["parameters"] / 1e6:.1f} million parameters (float16, safetensors),
trained by this project so that the benchmark has a real model that needs no download. It paints Freedoom rooms while
the player keeps to one steady motion. It knows {len(MOTIONS)} motions ({", ".join(MOTIONS)})
and {len(SCENES)} scenes ({", ".join(SCENES)}), and nothing else;
its numbers are no evidence about larger models.

- Weights: `weights/pocket.safetensors`, SHA-256 `{digest}`; every record carries this hash.
- Data: rendered while it trained by ViZDoom 1.3.2 (MIT) with Freedoom's maps and textures (BSD-3-Clause), `clips.py`;
  {card["clips_rendered"]:,} clips rendered, clips used (token grid): {seen}.
- Training: `python -m draftbench.models.pocket.train`, {card["steps"]} steps, seed {card["settings"]["seed"]}, on
  {card["gpu"]}, torch {card["torch"]}, commit `{card.get("commit", "unknown")}`; `check` and `card` came after it.
- Licence of the weights: Apache-2.0, as the code.

![Loss](loss.png)

## Checks
Motion and scene: the share of clips in which a classifier, fitted on {checks["fitted_on"]} real clips, sees what the
prompt asked for; on {checks["held_out"]} held-out real clips beside it. Generated: seeds 0 to
{card["check_seeds"] - 1}, unselected. Sharpness: mean gradient energy, pixels in [0, 1].

| grid | check | generated | real | ratio |
|---|---|---|---|---|
{chr(10).join(rows)}

![Generated clips above real ones](contact_sheet.jpg)

Each pair of rows: generated above, a real clip of the same motion and scene below; unselected, of the large grid.
"""


def main(settings: Settings) -> None:
    """Write MODEL_CARD.md, loss.png and contact_sheet.png beside this file."""
    from PIL import Image

    from ...media import contact_sheet

    out = Path(settings.out)
    card = json.loads((out / "card.json").read_text())
    loss_curve(card["loss_curve"], HERE / "loss.png")
    samples = load_file(out / "samples.safetensors")
    rows = []
    for i, seed in enumerate(range(0, 36, 5)):
        prompt = sentence(seed % len(MOTIONS), seed // len(MOTIONS) % len(SCENES))
        rows += [(prompt, samples["large.generated"][i]), ("real", samples["large.real"][i])]
    contact_sheet(rows, out / "contact_sheet.png")
    Image.open(out / "contact_sheet.png").convert("RGB").save(HERE / "contact_sheet.jpg", quality=88)
    (HERE / "MODEL_CARD.md").write_text(text(card))


if __name__ == "__main__":
    main(parse(Settings, sys.argv[1:]))
