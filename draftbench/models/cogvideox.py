"""CogVideoX and 1.5 (Yang et al., 2024, arXiv 2408.06072) through diffusers' CogVideoXPipeline; see pipeline.py.

The joint attention of every block goes to the session. The model has its text first, and all of its places take part,
padding too; here the text comes behind the video, which attention cannot tell. Both guidance branches are one batch.
CogVideoX 1.5 takes two frames of the latent to a token and pads their number at the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hook import Hook, Processor, project
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "CogVideoXAttnProcessor2_0"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        video = hidden_states.shape[1]
        both = torch.cat([hidden_states, encoder_hidden_states], 1)
        q, k, v = project(both, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:
            for x in (q, k):
                x[:, :video] = apply_rotary_emb(x[:, :video], image_rotary_emb, sequence_dim=1)  # type: ignore[arg-type,assignment]
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v)))
        return out[:, :video], out[:, video:]


class CogVideoXHook(Hook):
    """Where CogVideoX keeps things."""

    pipeline = "CogVideoXPipeline"
    transformer = "CogVideoXTransformer3DModel"
    processor = _Processor

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`."""
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size

    @staticmethod
    def text_lengths(inputs: dict[str, Any]) -> Tensor:
        """See `Hook.text_lengths`."""
        text = inputs["encoder_hidden_states"]
        return torch.full((text.shape[0],), text.shape[1], dtype=torch.int64, device=text.device)


@dataclass(kw_only=True)
class CogVideoX(Pipeline):
    """See `Pipeline`. guidance: classifier-free, 1 is off. The noise schedule is the checkpoint's own; snr_shift, which
    is part of it, is read for random weights alone."""

    snr_shift: float
    text_tokens: int = 226

    hook = CogVideoXHook
    places = 226
    multiple = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_tokens != self.places:  # padding counts too
            raise ValueError(f"model.text_tokens must be {self.places}, all of them real, got {self.text_tokens}")

    def vae_ratios(self, vae: dict[str, Any]) -> tuple[int, int]:
        """See `Pipeline.vae_ratios`."""
        return vae.get("temporal_compression_ratio", 4), 2 ** (len(vae.get("block_out_channels", range(4))) - 1)

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
            snr_shift_scale=self.snr_shift, timestep_spacing="trailing",
        )  # fmt: skip

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`; the model takes all its places for text as real."""
        shape = (clips, self.places, config.text_embed_dim)
        return {"prompt_embeds": self.random(*shape), "negative_prompt_embeds": self.random(*shape, seed=1)}
