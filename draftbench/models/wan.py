"""Wan 2.1 and 2.2 (Wan Team, 2025, arXiv 2503.20314) through diffusers' WanPipeline; see pipeline.py.

The self-attention of every block goes to the session, without text, which Wan reads by cross-attention. Wan 2.2 A14B
has two transformers, one for the noisy steps and one for the rest; their layers count alike, and a method forgets what
it kept when they change. As in diffusers' documentation the VAE stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import checkpoint
from .hook import Hook, Processor, in_patches
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "WanAttnProcessor"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))  # across heads
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        q, k = (rotated(x, rotary_emb) for x in (q, k))
        out: Tensor = attn.to_out[1](attn.to_out[0](self.attend(q, k, v)))
        return out


def rotated(x: Tensor, rotary: Any) -> Tensor:
    """Rotary embedding of [B, S, H, D], pairs side by side; rotary: cosines and sines [1, S, 1, D], each twice."""
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([(a * cos - b * sin).type_as(x), (a * sin + b * cos).type_as(x)], -1).flatten(-2)


class WanHook(Hook):
    """Where Wan keeps things."""

    pipeline = "WanPipeline"
    transformer = "WanTransformer3DModel"
    processor = _Processor

    @staticmethod
    def blocks(transformer: Any) -> tuple[Any, ...]:
        """See `Hook.blocks`."""
        return tuple(transformer.blocks)

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`."""
        return in_patches(inputs["hidden_states"].shape[2:], config.patch_size)

    @staticmethod
    def switches(pipe: Any) -> tuple[int, ...]:
        """See `Hook.switches`."""
        return switch(pipe.scheduler, pipe.config.boundary_ratio)


def switch(scheduler: Any, boundary: float | None) -> tuple[int, ...]:
    """The first of a scheduler's timesteps below a share of the noise, as WanPipeline takes its second transformer."""
    if boundary is None:
        return ()
    early = int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())
    return (early,) if 0 < early < len(scheduler.timesteps) else ()


@dataclass(kw_only=True)
class Wan(Pipeline):
    """See `Pipeline`. shift: of the noise schedule; guidance: classifier-free, 1 is off; guidance_2 and boundary are
    Wan 2.2's: the second transformer's guidance, and the share of the noise below which it runs (for random weights;
    a checkpoint has its own)."""

    shift: float
    guidance_2: float | None = None
    boundary: float | None = None

    hook = WanHook
    places = 512
    random_vae_kind = "AutoencoderKLWan"
    rest: ClassVar[dict[str, str]] = {"vae": "float32"}

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"model.shift must be above 0, got {self.shift}")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ValueError(f"model.boundary must be null or between 0 and 1, got {self.boundary}")
        super().__post_init__()
        if self.guidance_2 is None:
            return
        if self.share is None:
            raise ValueError(f"model.guidance_2 must be null without a second transformer, got {self.guidance_2}")
        if not self.guidance_2 >= 0:
            raise ValueError(f"model.guidance_2 must be at least 0, got {self.guidance_2}")

    def vae_ratios(self, vae: dict[str, Any]) -> tuple[int, int]:
        """See `Pipeline.vae_ratios`."""
        return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)

    def patch(self, transformer: dict[str, Any]) -> tuple[int, int, int]:
        """See `Pipeline.patch`."""
        t, h, w = transformer.get("patch_size", (1, 2, 2))
        return t, h, w

    @property
    def share(self) -> float | None:
        """The share of the noise below which a second transformer runs; None without one."""
        if self.weights:
            return self.boundary
        found: float | None = checkpoint.read(self.folder, "model_index.json").get("boundary_ratio")
        return found

    @property
    def switches(self) -> tuple[int, ...]:
        """See `Pipeline.switches`."""
        if self.share is None:
            return ()
        scheduler = self.scheduler() if self.weights else checkpoint.scheduler(self.folder)
        scheduler = self.shifted(scheduler)
        scheduler.set_timesteps(self.steps)
        return switch(scheduler, self.share)

    def schedule(self, pipe: Any) -> None:
        """See `Pipeline.schedule`."""
        pipe.scheduler = self.shifted(pipe.scheduler)

    def shifted(self, scheduler: Any) -> Any:
        """A scheduler like this one at the model's shift."""
        return type(scheduler).from_config(scheduler.config, flow_shift=self.shift)

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)

    def guided(self) -> dict[str, Any]:
        """See `Pipeline.guided`."""
        second = {} if self.guidance_2 is None else {"guidance_scale_2": self.guidance_2}
        return {"guidance_scale": self.guidance} | second

    def random_parts(self) -> dict[str, Any]:
        """See `Pipeline.random_parts`."""
        if self.boundary is None:
            return super().random_parts()
        return super().random_parts() | {"transformer_2": self.random_transformer(1), "boundary_ratio": self.boundary}

    def random_encoders(self) -> list[tuple[Callable[[], Any], int]]:
        """See `Pipeline.random_encoders`: the encoder of UMT5-XXL."""
        from transformers import UMT5Config, UMT5EncoderModel

        sizes = UMT5Config(
            vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return [(partial(UMT5EncoderModel, sizes), self.places)]

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`; behind the real tokens Wan reads zeros."""
        text: dict[str, Any] = {}
        for seed, side in enumerate(("", "negative_")):
            embeds = self.random(clips, self.places, config.text_dim, seed=seed)
            text[f"{side}prompt_embeds"] = embeds * self.real(clips)[..., None].to(embeds.dtype)
        return text
