"""Pocket: a text-to-video diffusion transformer small enough to ship, with the anatomy of the large ones.

Pixel space, 4x4 patches, joint attention over [video | text], 3D RoPE on video tokens, QK-norm, adaLN, SwiGLU;
rectified flow with x-prediction. Any grid: coordinates are scaled so that every clip is `SPAN` units long and every
frame `BREADTH` units wide, so a finer grid samples the same clip more finely, and the scale itself is an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .prompts import LENGTH, WORDS

SPAN, BREADTH = 16, 24  # units of a clip's length and of a frame's width; tokens have unit steps at 16x16x24

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class PocketConfig:
    """Shape of the network; saved in the metadata of the weights file."""

    width: int = 384
    depth: int = 6
    heads: int = 6
    hidden: int = 896
    patch: int = 4
    margin: int = 2  # pixels that a patch's input reaches beyond it on each side

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    def as_strings(self) -> dict[str, str]:
        """The fields as strings, the only kind safetensors metadata holds."""
        return {key: str(value) for key, value in asdict(self).items()}


def dense(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Plain dense attention on [B, S, H, D]; the default of an unpatched model."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def coordinates(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """(t, y, x) of each token of a (T, H, W) grid in units, [S, 3]: t from 0, y and x from the frame's centre."""
    frames, height, width = grid
    unit = BREADTH / width
    t = torch.arange(frames, device=device, dtype=torch.float32) * (SPAN / frames)
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5 - height / 2) * unit
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5 - width / 2) * unit
    return torch.stack(torch.meshgrid(t, y, x, indexing="ij"), -1).view(-1, 3)


def rope_waves(heads: int, pairs: int) -> Tensor:
    """Wave vectors (t, y, x) of the rotated pairs in radians a unit, [heads, pairs, 3], fixed once and for all.

    A quarter turns with time alone. The others are plane waves over the frame, of any direction, that travel by -1 to
    1 unit a unit of time: a head that weighs those which travel as the picture does looks along its motion, which
    rotations by one axis each (the usual 3D RoPE) cannot express.
    """
    draw = torch.Generator().manual_seed(0)
    n_t = pairs // 4
    n_s = pairs - n_t
    waves = torch.zeros(heads, pairs, 3)
    waves[:, :n_t, 0] = 2.0 * 100.0 ** (-torch.arange(n_t) / n_t)
    angle = torch.rand(heads, n_s, generator=draw) * 2 * math.pi
    travel = torch.rand(heads, n_s, generator=draw) * 2 - 1
    length = 2.0 * 50.0 ** (-torch.arange(n_s) / n_s)
    waves[:, n_t:] = torch.stack([-travel, angle.sin(), angle.cos()], -1) * length[:, None]
    return waves


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, S, H, D] by half-split pairs; cos and sin are [S, H, D / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    """One transformer block: modulated attention and SwiGLU, each with a gated residual."""

    def __init__(self, config: PocketConfig):
        super().__init__()
        d, self.heads = config.width, config.heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, d, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.table = nn.Parameter(torch.randn(6, d) * 0.02)

    def project(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, S, width] to q, k, v [B, S, heads, head_dim], normalised and rotated."""
        m = self._modulate(x, modulation)
        y = F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + m[:, 1]) + m[:, 0]
        q, k, v = self.qkv(y).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        q, k = (
            rotate(F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), eps=1e-6), cos, sin).to(v.dtype)
            for x, norm in ((q, self.q_norm), (k, self.k_norm))  # autocast norms in float32 on a GPU
        )
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """The attention's residual, then the feed-forward's. x [B, S, width], attended [B, S, heads, head_dim]."""
        m = self._modulate(x, modulation)
        x = x + m[:, 2] * self.out(attended.reshape(x.shape))
        y = F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + m[:, 4]) + m[:, 3]
        gate, up = self.up(y).chunk(2, -1)
        return x + m[:, 5] * self.down(F.silu(gate) * up)

    def whole(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, handle: Tensor) -> Tensor:
        """The block with its attention as one operator; handle: see `draftbench.compiled`."""
        q, k, v = self.project(x, modulation, cos, sin)
        return self.finish(x, torch.ops.draftbench.attend(q, k, v, handle), modulation)

    def _modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        return (modulation.view(len(x), 6, -1) + self.table).to(x.dtype).unsqueeze(2)


class PocketDiT(nn.Module):
    """The denoiser: noisy pixels, noise level and prompt tokens to clean pixels.

    `attend(q, k, v, layer)` on [B, S, H, D] is an attribute, so a hook replaces and restores it.
    """

    def __init__(self, config: PocketConfig | None = None):
        super().__init__()
        self.config = config = config or PocketConfig()
        d, pixels = config.width, 3 * config.patch**2
        self.attend: Attend = dense
        self.project, self.finish = Block.project, Block.finish
        self.whole = Block.whole  # in place of the three above while there are handles
        self.handles: list[Tensor] = []
        self.inp = nn.Linear(3 * (config.patch + 2 * config.margin) ** 2, d)
        self.words = nn.Embedding(len(WORDS), d)
        self.order = nn.Parameter(torch.randn(LENGTH, d) * 0.02)
        self.place = nn.Linear(3 * 2 * 4, d)
        self.register_buffer("waves", rope_waves(config.heads, config.head_dim // 2), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.scale = nn.Linear(1, d)
        self.modulation = nn.Linear(d, 6 * d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.last = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, pixels)
        for layer in (self.out, self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile(self) -> None:
        """Compile what lies between attentions; the two graphs are shared by all blocks, attention stays outside."""
        self.project = torch.compile(Block.project, dynamic=False)
        self.finish = torch.compile(Block.finish, dynamic=False)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block as one graph, attention inside as an operator; it takes effect while `handles` are set."""
        self.whole = torch.compile(Block.whole, dynamic=False, fullgraph=True, backend=backend)

    def grid(self, video: Tensor) -> tuple[int, int, int]:
        """The token grid (T, H, W) of pixels [B, T, 3, h, w]."""
        p = self.config.patch
        return video.shape[1], video.shape[3] // p, video.shape[4] // p

    def patches(self, video: Tensor) -> Tensor:
        """What each token sees of pixels [B, T, 3, h, w]: its patch, with a margin, [B, T * H * W, pixels]."""
        margin, p = self.config.margin, self.config.patch
        x = F.pad(video, (margin, margin, margin, margin))
        x = x.unfold(3, p + 2 * margin, p).unfold(4, p + 2 * margin, p).permute(0, 1, 3, 4, 2, 5, 6)
        return x.flatten(4).flatten(1, 3)

    def forward(self, video: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Clean-video prediction.

        video: noisy pixels [B, T, 3, h, w], about [-1, 1] plus noise; t: noise level [B] in [0, 1]; tokens: prompt
        ids [B, LENGTH]. Returns pixels of the same shape as video.
        """
        frames, height, width = self.grid(video)
        batch, p = video.shape[0], self.config.patch
        patches = self.patches(video)
        waves = torch.exp(-math.log(1e4) * torch.arange(128, device=video.device) / 128)
        phase = t[:, None] * 1000 * waves
        text = self.words(tokens) + self.order
        zoom = torch.full((batch, 1), math.log2(width / BREADTH), device=video.device)
        c = self.time(torch.cat([phase.cos(), phase.sin()], -1).to(self.inp.weight.dtype))
        c = F.silu(c + self.scale(zoom.to(self.inp.weight.dtype)) + text.mean(1))
        where = coordinates((frames, height, width), video.device)
        angles = F.pad(torch.einsum("sc,hpc->shp", where, self.waves), (0, 0, 0, 0, 0, LENGTH))
        cos, sin = angles.cos(), angles.sin()
        phases = (where[:, :, None] * (2 * math.pi / BREADTH) * 2.0 ** torch.arange(4, device=video.device)).flatten(1)
        place = self.place(torch.cat([phases.sin(), phases.cos()], -1).to(self.inp.weight.dtype))
        x = torch.cat([self.inp(patches.to(self.inp.weight.dtype)) + place, text.to(self.inp.weight.dtype)], 1)
        modulation = self.modulation(c)
        for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
            if self.handles:
                x = self.whole(block, x, modulation, cos, sin, self.handles[layer])
                continue
            q, k, v = self.project(block, x, modulation, cos, sin)
            x = self.finish(block, x, self.attend(q, k, v, layer), modulation)
        shift, scale = self.last(c)[:, None].chunk(2, -1)
        x = x[:, :-LENGTH]
        y = self.out((F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift).to(self.out.weight.dtype))
        y = y.view(batch, frames, height, width, 3, p, p).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(video.shape)


def check_weights(path: Path) -> PocketConfig:
    """The network's shape in a weights file, whose header alone is read.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, a pickle, cut short or another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model.weights: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            config = PocketConfig(**{key: int(value) for key, value in (file.metadata() or {}).items()})
            given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.weights: {path} is no whole safetensors file of pocket's ({reason})") from None
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in PocketDiT(config).state_dict().items()}
    if given != wanted:
        odd = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        raise ValueError(f"model.weights: {path} holds another network, see {', '.join(odd[:3])}")
    return config


def load(path: Path) -> PocketDiT:
    """The network in a weights file, float32, on the CPU, in evaluation mode; errors as `check_weights`."""
    model = PocketDiT(check_weights(path))
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
