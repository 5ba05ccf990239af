"""The adapter of pocket, the embedded model: any grid, both guidance branches in one batch."""

from __future__ import annotations

import functools
import hashlib
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...attention import Request, Session
from ...compiled import handles
from ...environment import memory, resolve_device
from ...layout import Layout
from . import judge as judging
from .model import PocketDiT, check_weights, load
from .prompts import LENGTH, MOTIONS, SCENES, labels, tokens
from .sampler import initial_noise, sample

WEIGHTS = Path(__file__).parent / "weights"


@dataclass
class Pocket:
    """See conf/model/pocket.yaml for the knobs; raises ValueError or FileNotFoundError naming the one that is wrong."""

    name: str = "pocket"
    weights: str | None = None
    frames: int = 8
    height: int = 64
    width: int = 96
    steps: int = 8
    shift: float = 1.0
    guidance: float = 3.0
    dtype: str = "auto"
    compile: bool = False
    fps: int = 4
    device: Any = "auto"

    switches: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        for key in ("frames", "steps", "fps"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("height", "width"):
            if getattr(self, key) < 32 or getattr(self, key) % 4:
                raise ValueError(f"model.{key} must be a multiple of 4, at least 32, got {getattr(self, key)}")
        if self.shift <= 0:
            raise ValueError(f"model.shift must be positive, got {self.shift}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"model.dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        self.device = resolve_device(str(self.device))
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.path = Path(self.weights).expanduser() if self.weights else WEIGHTS / "pocket.safetensors"
        self.sizes = check_weights(self.path)

    @property
    def layers(self) -> int:
        """See `Model.layers`."""
        return self.sizes.depth

    @property
    def heads(self) -> int:
        """See `Model.heads`."""
        return self.sizes.heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """The token grid (T, H, W)."""
        return self.frames, self.height // 4, self.width // 4

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @functools.cached_property
    def network(self) -> PocketDiT:
        """The denoiser, loaded at first use."""
        network = load(self.path).to(self.device)
        if self.compile:
            network.compile_blocks()
        return network

    @functools.cached_property
    def judge(self) -> judging.Judge:
        """The classifier of motion and scene, loaded at first use."""
        return judging.load(WEIGHTS / "judge.safetensors").to(self.device)

    def check(self, prompts: list[str]) -> None:
        """Raise ValueError for a prompt with an unknown word, and list the vocabulary."""
        for prompt in prompts:
            try:
                tokens(prompt)
            except ValueError as error:
                raise ValueError(f"prompts: {prompt!r}: {error}") from error

    def check_memory(self) -> None:
        """See `Model.check_memory`: of what one clip's feed-forward holds, where it is not compiled.

        Where memory is short a CPU's process is killed without a word; a GPU's says so.
        """
        if self.device.type != "cpu" or self.compile:
            return
        # Of a token: x, its sum with attention, that normed; q, k; q, k, v in one; attention; gate, up, their products.
        values = 9 * self.sizes.width + 4 * self.sizes.hidden
        needed = 2 * math.prod(self.grid) * values * getattr(torch, self.dtype).itemsize  # 2 branches of guidance
        if needed > (there := memory()):
            grid = "x".join(map(str, self.grid))
            raise ValueError(
                f"model={self.name} does not fit device=cpu: a clip of {grid} tokens takes at least "
                f"{needed / 2**30:.1f} GiB, and the machine has {there / 2**30:.1f} GiB of memory"
            )

    def settings(self) -> dict[str, Any]:
        """Everything but weights, prompts, seeds and steps that shapes the frames."""
        names = ("frames", "height", "width", "shift", "guidance", "dtype", "compile")
        return {key: getattr(self, key) for key in names}

    def generate(self, request: Request, session: Session, last_step: int | None = None) -> Tensor:
        """See `Model.generate`."""
        clips, network = len(request.seeds), self.network
        layout = Layout(self.grid, LENGTH)
        lengths = torch.full((2 * clips,), LENGTH, device=self.device)
        text = torch.tensor([tokens(prompt) for prompt in request.prompts], device=self.device)
        noise = initial_noise(list(request.seeds), (self.frames, 3, self.height, self.width)).to(self.device)

        half = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            with half():  # a compiled graph has its casts inside and runs without autocast
                return session(
                    q, k, v, layout=layout, text_lengths=lengths, layer=layer, branch="both", seeds=request.seeds * 2
                )

        before, network.attend = network.attend, attend
        session.start(clips)
        try:
            with half(), ExitStack() as stack:
                if self.compile:
                    network.handles = stack.enter_context(handles(attend, len(network.blocks)))
                video = sample(
                    network, noise, text, request.steps, self.shift, self.guidance,
                    lambda step, level: session.at_step(step, request.steps, 1000 * level), last_step,
                )  # fmt: skip
            session.finish()
        finally:
            network.attend, network.handles = before, []
        return video.cpu()

    def quality(self, frames: Tensor, prompt: str) -> dict[str, Any]:
        """What is seen in a clip uint8 [T, 3, h, w] beside what `prompt` asks for: motion, scene, mean gradient energy.

        A share asked for nothing gives None as its verdict; fewer than five frames are too few for the judge.
        """
        result: dict[str, Any] = {"sharpness": judging.sharpness(frames[None]).item()}
        if len(frames) >= 5:
            asked = labels(prompt)
            seen = [int(x) for x in judging.verdicts(self.judge, frames[None].to(self.device))]
            for name, names, want, got in zip(("motion", "scene"), (MOTIONS, SCENES), asked, seen, strict=True):
                result[name], result[f"{name}_right"] = names[got], None if want is None else want == got
        return result
