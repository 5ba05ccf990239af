"""HunyuanVideo 1.5 (Tencent, 2025, arXiv 2511.18870) through diffusers' HunyuanVideo15Pipeline; see pipeline.py.

The joint attention of every block goes to the session; the attention of the text refiner is no self-attention of the
video and stays as it is. The transformer puts a prompt's real tokens first (the words that stand in quotation marks,
then the whole text); the rest of its nearly two thousand places is padding, masked by the pipeline and cropped here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hook import Hook, Processor, in_patches, project
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "HunyuanVideo15AttnProcessor2_0"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = project(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = project(encoder_hidden_states, attn.heads, added, (attn.norm_added_q, attn.norm_added_k))
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))  # type: ignore[arg-type,assignment]
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True))
        out, rest = self.attend_joint(q, k, v, encoder_hidden_states.shape[1])
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(rest)


class HunyuanVideo15Hook(Hook):
    """Where HunyuanVideo 1.5 keeps things."""

    pipeline = "HunyuanVideo15Pipeline"
    transformer = "HunyuanVideo15Transformer3DModel"
    processor = _Processor
    attention = "attn"

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`."""
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return in_patches(inputs["hidden_states"].shape[2:], patch)

    @staticmethod
    def text_lengths(inputs: dict[str, Any]) -> Tensor:
        """See `Hook.text_lengths`; the image's places are real unless all of it is zero, as without an image."""
        masks = (inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"])
        image = inputs["image_embeds"]
        lengths: Tensor = sum(mask.bool().sum(1) for mask in masks) + image.any() * image.shape[1]
        return lengths


@dataclass(kw_only=True)
class HunyuanVideo15(Pipeline):
    """See `Pipeline`. shift: of the noise schedule; guidance: classifier-free against the empty prompt, 1 is off."""

    shift: float

    hook = HunyuanVideo15Hook
    places = 1000
    ratios = (4, 16)

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"model.shift must be above 0, got {self.shift}")
        super().__post_init__()

    def patch(self, transformer: dict[str, Any]) -> tuple[int, int, int]:
        """See `Pipeline.patch`."""
        size = transformer.get("patch_size", 1)
        return transformer.get("patch_size_t", 1), size, size

    def schedule(self, pipe: Any) -> None:
        """See `Pipeline.schedule`; this pipeline's guidance is a component of it."""
        pipe.scheduler.set_shift(self.shift)
        pipe.guider = pipe.guider.new(guidance_scale=self.guidance)
        if pipe.vae is not None:
            pipe.vae.enable_slicing()  # its attention's mask fits no batch of several

    def guided(self) -> dict[str, Any]:
        """See `Pipeline.guided`."""
        return {}

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()

    def random_parts(self) -> dict[str, Any]:
        """See `Pipeline.random_parts`."""
        from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance

        with torch.device("meta"):  # the pipeline reads its config, and `random_pipe` drops it
            vae = AutoencoderKLHunyuanVideo15()
        return super().random_parts() | {"vae": vae, "guider": ClassifierFreeGuidance()}

    def random_pipe(self) -> Any:
        """See `Pipeline.random_pipe`."""
        pipe = super().random_pipe()
        pipe.vae = None
        return pipe

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`; no words in quotation marks."""
        text: dict[str, Any] = {}
        for seed, side in enumerate(("", "negative_")):
            text[f"{side}prompt_embeds"] = self.random(clips, self.places, config.text_embed_dim, seed=seed)
            text[f"{side}prompt_embeds_mask"] = self.real(clips)
            text[f"{side}prompt_embeds_2"] = self.random(clips, 256, config.text_embed_2_dim, seed=seed)
            text[f"{side}prompt_embeds_mask_2"] = torch.zeros(clips, 256, dtype=torch.int64, device=self.device)
        return text
