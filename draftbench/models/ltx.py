"""LTX-Video (HaCohen et al., 2024, arXiv 2501.00103) through diffusers' LTXPipeline; see pipeline.py.

The self-attention of every block goes to the session, without text, which LTX reads by cross-attention. Both guidance
branches are one batch. The pipeline shifts its noise schedule by the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .hook import Hook, Processor, in_patches
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "LTXVideoAttnProcessor"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))  # both across heads
        q, k = (apply_rotary_emb(x, image_rotary_emb) for x in (q, k))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        out: Tensor = attn.to_out[1](attn.to_out[0](self.attend(q, k, v)))
        return out


class LTXHook(Hook):
    """Where LTX-Video keeps things."""

    pipeline = "LTXPipeline"
    transformer = "LTXVideoTransformer3DModel"
    processor = _Processor

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`; the tokens come packed, and their latent's size beside them."""
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return in_patches((inputs["num_frames"], inputs["height"], inputs["width"]), patch)


@dataclass(kw_only=True)
class LTX(Pipeline):
    """See `Pipeline`. guidance: classifier-free, 1 is off."""

    hook = LTXHook
    places = 128
    ratios = (8, 32)
    multiple = 32

    def vae_ratios(self, vae: dict[str, Any]) -> tuple[int, int]:
        """See `Pipeline.vae_ratios`."""
        halvings = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        period = vae.get("temporal_compression_ratio") or halvings * vae.get("patch_size_t", 1)
        return period, vae.get("spatial_compression_ratio") or halvings * vae.get("patch_size", 4)

    def patch(self, transformer: dict[str, Any]) -> tuple[int, int, int]:
        """See `Pipeline.patch`."""
        size = transformer.get("patch_size", 1)
        return transformer.get("patch_size_t", 1), size, size

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        )

    def settings(self) -> dict[str, Any]:
        """See `Pipeline.settings`; the frames depend on the frame rate here, by the positions in time."""
        return super().settings() | {"frame_rate": self.fps}

    def guided(self) -> dict[str, Any]:
        """See `Pipeline.guided`; the frame rate shapes the position embedding."""
        return {"guidance_scale": self.guidance, "frame_rate": self.fps}

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`."""
        return self.masked_text(clips, config.caption_channels)
