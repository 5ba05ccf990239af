"""HunyuanVideo (Kong et al., 2024, arXiv 2412.03603) through diffusers' HunyuanVideoPipeline; see pipeline.py.

The joint attention of the double-stream, then the single-stream blocks goes to the session; the attention of the text
refiner is no self-attention of the video and stays as it is. Beside a bfloat16 transformer the VAE and the text
encoders run in float16, as in diffusers' documentation, but on a CPU, which is slow at it, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .hook import Hook, Processor, in_patches, project
from .pipeline import Pipeline


class _Processor(Processor):
    replaces = "HunyuanVideoAttnProcessor2_0"

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        video, padded = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:  # a single-stream block: video and text share their projections
            both = torch.cat([hidden_states, encoder_hidden_states], 1)
            q, k, v = project(both, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            (q, text_q), (k, text_k) = (x.split((video, padded), 1) for x in (q, k))
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
            q, k, v = project(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            text_q, text_k, text_v = project(encoder_hidden_states, attn.heads, added, norms)
            v = torch.cat([v, text_v], 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))  # type: ignore[arg-type,assignment]
        out, text = self.attend_joint(torch.cat([q, text_q], 1), torch.cat([k, text_k], 1), v, padded)
        if attn.to_out is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return out, text


class HunyuanVideoHook(Hook):
    """Where HunyuanVideo keeps things."""

    pipeline = "HunyuanVideoPipeline"
    transformer = "HunyuanVideoTransformer3DModel"
    processor = _Processor
    attention = "attn"

    @staticmethod
    def blocks(transformer: Any) -> tuple[Any, ...]:
        """See `Hook.blocks`."""
        return *transformer.transformer_blocks, *transformer.single_transformer_blocks

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See `Hook.grid`."""
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return in_patches(inputs["hidden_states"].shape[2:], patch)

    @staticmethod
    def text_lengths(inputs: dict[str, Any]) -> Tensor:
        """See `Hook.text_lengths`."""
        lengths: Tensor = inputs["encoder_attention_mask"].sum(1, dtype=torch.int64)
        return lengths


@dataclass(kw_only=True)
class HunyuanVideo(Pipeline):
    """See `Pipeline`. shift: of the noise schedule; guidance: embedded; true_cfg: classifier-free guidance against the
    empty prompt, 1 for none."""

    shift: float
    true_cfg: float

    hook = HunyuanVideoHook
    places = 256
    random_vae_kind = "AutoencoderKLHunyuanVideo"

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"model.shift must be above 0, got {self.shift}")
        if not self.true_cfg >= 1:
            raise ValueError(f"model.true_cfg must be at least 1 (1 is off), got {self.true_cfg}")
        super().__post_init__()

    @property
    def layers(self) -> int:
        """See `Pipeline.layers`: double-stream, then single-stream."""
        return super().layers + int(self.sizes["num_single_layers"])

    @property
    def rest_dtypes(self) -> dict[str, str]:
        """See `Pipeline.rest_dtypes`."""
        if self.dtype == "float32":
            return {}
        return {"default": "float32" if self.device.type == "cpu" else "float16"}

    def schedule(self, pipe: Any) -> None:
        """See `Pipeline.schedule`."""
        pipe.scheduler.set_shift(self.shift)

    def scheduler(self) -> Any:
        """See `Pipeline.scheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()

    def guided(self) -> dict[str, Any]:
        """See `Pipeline.guided`."""
        return {"guidance_scale": self.guidance, "true_cfg_scale": self.true_cfg}

    @property
    def prompts(self) -> int:
        """See `Pipeline.prompts`."""
        return 1 + (self.true_cfg > 1)

    def random_encoders(self) -> list[tuple[Callable[[], Any], int]]:
        """See `Pipeline.random_encoders`: Llama 3 8B, which reads 95 tokens of a template too, and CLIP L/14."""
        from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

        llama = LlamaConfig(
            vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8,
        )  # fmt: skip
        clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        return [(partial(LlamaModel, llama), self.places + 95), (partial(CLIPTextModel, clip), 77)]

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """See `Pipeline.random_text`."""
        sides = ("", "negative_") if self.true_cfg > 1 else ("",)
        text: dict[str, Any] = {}
        for seed, side in enumerate(sides):
            text[f"{side}prompt_embeds"] = self.random(clips, self.places, config.text_embed_dim, seed=seed)
            text[f"{side}pooled_prompt_embeds"] = self.random(clips, config.pooled_projection_dim, seed=seed)
            text[f"{side}prompt_attention_mask"] = self.real(clips)
        return text
