"""Mochi 1 (Genmo, 2024, github.com/genmoai/mochi) through diffusers' MochiPipeline; see pipeline.py.

The joint attention of every block goes to the session; both guidance branches are one batch. The pipeline's noise
schedule is fixed, and its timesteps count up; the session is told of them counting down, as elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hook import Hook, Processor, in_patches, project
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "MochiAttnProcessor2_0"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = project(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = project(encoder_hidden_states, attn.heads, added, (attn.norm_added_q, attn.norm_added_k))
        q, k = (rotated(x, image_rotary_emb) for x in (q, k))
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True))
        out, rest = self.attend_joint(q, k, v, encoder_hidden_states.shape[1])
        out = attn.to_out[1](attn.to_out[0](out))
        return out, attn.to_add_out(rest) if hasattr(attn, "to_add_out") else rest  # the last block drops its text


def rotated(x: Tensor, rotary: Any) -> Tensor:
    """Rotary embedding of [B, S, H, D], pairs side by side; rotary: cosines and sines [S, H, D / 2], learned a head."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return torch.stack([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], -1).flatten(-2)


class MochiHook(Hook):
    """Where Mochi keeps things."""

    pipeline = "MochiPipeline"
    transformer = "MochiTransformer3DModel"
    processor = _Processor

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`."""
        return in_patches(inputs["hidden_states"].shape[2:], (1, config.patch_size, config.patch_size))

    @staticmethod
    def text_lengths(inputs: dict[str, Any]) -> Tensor:
        """See `Hook.text_lengths`."""
        lengths: Tensor = inputs["encoder_attention_mask"].sum(1, dtype=torch.int64)
        return lengths


@dataclass(kw_only=True)
class Mochi(Pipeline):
    """See `Pipeline`. guidance: classifier-free, 1 is off."""

    hook = MochiHook
    places = 256
    ratios = (6, 8)

    def vae_ratios(self, vae: dict[str, Any]) -> tuple[int, int]:
        """See `Pipeline.vae_ratios`; the pipeline reads no config for them."""
        return self.ratios

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(invert_sigmas=True)

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`."""
        return self.masked_text(clips, config.text_embed_dim)
