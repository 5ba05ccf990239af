"""HunyuanVideo (Kong et al., 2024, arXiv 2412.03603) through diffusers' HunyuanVideoPipeline, as of diffusers 0.42.1.

The joint attention of the double-stream, then the single-stream blocks goes to the session; the attention of the text
refiner is no self-attention of the video and stays as it is. Nothing is ever downloaded here.

Deviations from the pipeline as it comes: text padding is cropped before attention instead of masked, which keeps the
call on the fast kernels (rows of padding come out as zero and only padding reads them); each clip's noise has its own
CPU generator; the VAE decodes in tiles. Beside a bfloat16 transformer the VAE and the text encoders run in float16, as
in diffusers' documentation, but on a CPU, which is slow at it, in float32.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import Request, Session
from ..compiled import handles
from ..layout import Layout

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
CONFIGS = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer_config.json", *(f"{part}/config.json" for part in WEIGHTS),
)  # fmt: skip


class HunyuanVideo:
    """See `draftbench.models.Model`. The constructor reads configs only; weights are loaded at the first clip.

    path: the checkpoint's folder; None looks for `hub_id` at `revision` in the Hugging Face cache. frames, height and
    width are in pixels. shift: of the noise schedule; guidance: embedded; true_cfg: classifier-free guidance against
    the empty prompt, 1 for none. dtype: of the transformer, bfloat16 or float32. device may be "auto". compile: the
    transformer's blocks, each as one graph with its attention as one operator.
    """

    def __init__(
        self, *, name: str, path: str | None, hub_id: str, revision: str, frames: int, height: int, width: int,
        steps: int, shift: float, guidance: float, true_cfg: float, dtype: str, fps: int, device: str | torch.device,
        compile: bool = False,
    ) -> None:  # fmt: skip
        counts = {"frames": frames, "height": height, "width": width, "steps": steps, "fps": fps}
        for key, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{key} must be a positive integer, got {value!r}")
        if not shift > 0:
            raise ValueError(f"model.shift must be above 0, got {shift}")
        if not guidance >= 0:
            raise ValueError(f"model.guidance must be at least 0, got {guidance}")
        if not true_cfg >= 1:
            raise ValueError(f"model.true_cfg must be at least 1 (1 is off), got {true_cfg}")
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"model.dtype must be bfloat16 or float32, got {dtype!r}")
        if not importlib.util.find_spec("diffusers"):
            raise ImportError("model=hunyuan_video needs diffusers: pip install 'draftbench[diffusers]'")
        self.folder = find_checkpoint(path, hub_id, revision)
        self.grid = token_grid(self.folder, frames, height, width)
        self.name, self.frames, self.height, self.width, self.steps, self.fps = name, frames, height, width, steps, fps
        self.shift, self.guidance, self.true_cfg, self.dtype, self.compile = shift, guidance, true_cfg, dtype, compile
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        half = dtype == "bfloat16" and self.device.type != "cpu"
        self.rest_dtype = "float16" if half else "float32"  # of the VAE and the text encoders

    @cached_property
    def pipe(self) -> Any:
        """The diffusers pipeline, loaded at first use."""
        from diffusers import HunyuanVideoPipeline

        dtypes = {"transformer": getattr(torch, self.dtype), "default": getattr(torch, self.rest_dtype)}
        pipe = HunyuanVideoPipeline.from_pretrained(self.folder, dtype=dtypes, local_files_only=True)
        pipe.scheduler.set_shift(self.shift)
        pipe.vae.enable_tiling()
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self.device)
        if self.compile:
            self.compile_blocks(pipe)
        return pipe

    @staticmethod
    def compile_blocks(pipe: Any, backend: str = "inductor") -> None:
        """Compile each block of the transformer; a text of another length is another graph."""
        for block in _blocks(pipe):
            block.compile(backend=backend, fullgraph=True, dynamic=False)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names and bytes of the checkpoint's safetensors files."""
        return _sha256(self.folder, "*.safetensors")

    def settings(self) -> dict[str, Any]:
        """See `Model.settings`; `configs` is a hash of the checkpoint's JSON files (scheduler, tokenizers, sizes)."""
        keys = ("frames", "height", "width", "shift", "guidance", "true_cfg", "dtype", "rest_dtype", "compile")
        versions = {"diffusers": importlib.metadata.version("diffusers"), "configs": self._configs_hash}
        return {key: getattr(self, key) for key in keys} | versions

    @cached_property
    def _configs_hash(self) -> str:
        return _sha256(self.folder, "*.json")

    def check(self, prompts: list[str]) -> None:
        """See `Model.check`: any text but an empty one."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompts must not be empty, got {prompt!r}")

    def generate(self, request: Request, session: Session, last_step: int | None = None) -> Tensor:
        """See `Model.generate`; when `last_step` stops early, nothing is decoded and the clips have no frames."""
        last = min(last_step or request.steps, request.steps)

        def on_step_end(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            if index + 1 == last:
                session.finish()
                pipe._interrupt = True  # the pipeline's own switch: it skips the steps that are left
            return {}

        session.start(len(request.prompts))
        whole = last == request.steps
        with self.patched(session, request.seeds):
            video = self.pipe(
                **self.arguments(request), output_type="pt" if whole else "latent", callback_on_step_end=on_step_end
            ).frames
        if not whole:
            return torch.empty(len(request.prompts), 0, 3, self.height, self.width, dtype=torch.uint8)
        return (video.float() * 255).round().to(torch.uint8).cpu()

    def arguments(self, request: Request) -> dict[str, Any]:
        """What the pipeline is called with; each clip's noise comes from its own seed, whatever its batch."""
        clips = len(request.prompts)
        return {
            "prompt": list(request.prompts),
            "negative_prompt": [""] * clips if self.true_cfg > 1 else None,
            "num_frames": self.frames,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": request.steps,
            "guidance_scale": self.guidance,
            "true_cfg_scale": self.true_cfg,
            "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        }

    @contextmanager
    def patched(self, session: Session, seeds: tuple[int, ...]) -> Iterator[None]:
        """Inside, this pipeline's self-attention goes to `session`; afterwards it is as it was."""
        transformer = self.pipe.transformer
        hook = _Hook(session, self.pipe, self.grid, seeds)
        blocks = _blocks(self.pipe)
        originals = [block.attn.processor for block in blocks]
        handle = transformer.register_forward_pre_hook(hook.before_forward, with_kwargs=True)
        transformer.cache_context = hook.cache_context  # shadows the class's method on this instance only
        try:
            with handles(hook.attend, len(blocks)) as found:
                for layer, block in enumerate(blocks):
                    block.attn.set_processor(_Processor(found[layer], hook))
                yield
        finally:
            for block, original in zip(blocks, originals, strict=True):
                block.attn.set_processor(original)
            del transformer.cache_context
            handle.remove()


def _blocks(pipe: Any) -> tuple[Any, ...]:
    """The transformer's blocks, a layer each, in the order they run."""
    return *pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks


class _Hook:
    """Follows the pipeline: which step and branch run now, and how long the text is."""

    def __init__(self, session: Session, pipe: Any, grid: tuple[int, int, int], seeds: tuple[int, ...]):
        self.session, self.scheduler, self.grid, self.seeds = session, pipe.scheduler, grid, seeds
        self.name_branch = pipe.transformer.cache_context
        self.step, self.branch = -1, "cond"

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """The pipeline names the branch of each forward by entering this context, as "cond" or "uncond"."""
        self.branch = name
        with self.name_branch(name, **where):
            yield

    def before_forward(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Tell the session of a new step, and note the batch's real text."""
        # The scheduler's own index, None before its first step. The timestep that the transformer gets does not tell:
        # from the second step on diffusers rounds it to bfloat16, which makes neighbours equal.
        step = self.scheduler.step_index or 0
        if step != self.step:
            self.step = step
            self.session.at_step(step, len(self.scheduler.timesteps), float(self.scheduler.timesteps[step]))
        self.text_lengths = inputs["encoder_attention_mask"].sum(1, dtype=torch.int64)
        self.layout = Layout(self.grid, int(self.text_lengths.max()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """The session's attention over [video | text] q, k, v [B, S, H, D] of one layer."""
        return self.session(
            q, k, v, layout=self.layout, text_lengths=self.text_lengths, layer=layer, branch=self.branch,
            seeds=self.seeds, head_offset=0,
        )  # fmt: skip


class _Processor:
    """A block's attention: the arithmetic of diffusers' HunyuanVideoAttnProcessor2_0 around the session's attention."""

    def __init__(self, handle: Tensor, hook: _Hook):
        self.handle, self.hook = handle, hook

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        video, padded, real = hidden_states.shape[1], encoder_hidden_states.shape[1], self.hook.layout.text
        if attn.add_q_proj is None:  # a single-stream block: video and text share their projections
            both = torch.cat([hidden_states, encoder_hidden_states], 1)
            q, k, v = _project(both, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            text_q, text_k = q[:, video : video + real], k[:, video : video + real]
            q, k, v = q[:, :video], k[:, :video], v[:, : video + real]
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
            q, k, v = _project(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            text_q, text_k, text_v = (x[:, :real] for x in _project(encoder_hidden_states, attn.heads, added, norms))
            v = torch.cat([v, text_v], 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))  # type: ignore[arg-type,assignment]
        q, k = torch.cat([q, text_q], 1), torch.cat([k, text_k], 1)

        out = torch.ops.draftbench.attend(q, k, v, self.handle).flatten(2, 3)
        out, text = out[:, :video], torch.nn.functional.pad(out[:, video:], (0, 0, 0, padded - real))
        if attn.to_out is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return out, text


def _project(x: Tensor, heads: int, linears: tuple[Any, ...], norms: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, S, C] to q, k, v [B, S, heads, D], q and k normalised."""
    q, k, v = (linear(x).unflatten(2, (heads, -1)) for linear in linears)
    q, k = (y if norm is None else norm(y) for y, norm in zip((q, k), norms, strict=True))
    return q, k, v


def find_checkpoint(path: str | None, hub_id: str, revision: str) -> Path:
    """The folder of a whole checkpoint on this machine.

    Raises FileNotFoundError with the command that fetches it, ValueError if it is another pipeline's.
    """
    fetch = f"fetch it with: hf download {hub_id} --revision {revision}" + (f" --local-dir {path}" if path else "")
    if path is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            absent = f"{hub_id} at {revision} is not in the Hugging Face cache"
            raise FileNotFoundError(f"model.path=null and {absent}; {fetch}") from None
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"model.path={path} is not a folder; {fetch}")
    named = f"model.path={path}" if path else f"model.path=null ({folder})"
    lacking = _lacking(folder)
    if lacking:
        raise FileNotFoundError(f"{named} lacks {lacking}; {fetch}")
    kind = _read(folder, "model_index.json").get("_class_name")
    if kind != "HunyuanVideoPipeline":
        raise ValueError(f"{named} must hold a HunyuanVideoPipeline, got {kind}; {fetch}")
    return folder


def _lacking(folder: Path) -> str | None:
    """The first file that a checkpoint lacks, shards of its weights included."""
    for name in CONFIGS:
        if not (folder / name).is_file():
            return name
    for part in WEIGHTS:
        indices = (folder / part).glob("*.safetensors.index.json")
        shards = {shard for index in indices for shard in json.loads(index.read_text())["weight_map"].values()}
        for shard in sorted(shards):
            if not (folder / part / shard).is_file():
                return f"{part}/{shard}"
        if not any(file.is_file() for file in (folder / part).glob("*.safetensors")):
            return f"{part}/*.safetensors"
    return None


def token_grid(folder: Path, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The token grid (T, H, W) of a clip, by the VAE's and the patches' sizes in the checkpoint's configs."""
    vae, transformer = _read(folder, "vae/config.json"), _read(folder, "transformer/config.json")
    period, stride = vae.get("temporal_compression_ratio", 4), vae.get("spatial_compression_ratio", 8)
    patch, patch_t = transformer.get("patch_size", 2), transformer.get("patch_size_t", 1)
    latents = (frames - 1) // period + 1
    if (frames - 1) % period or latents % patch_t:
        raise ValueError(f"model.frames must be a multiple of {period} and one more, got {frames}")
    multiple = math.lcm(stride * patch, 16)  # the pipeline itself asks for 16
    for key, value in (("height", height), ("width", width)):
        if value % multiple:
            raise ValueError(f"model.{key} must be a multiple of {multiple}, got {value}")
    return latents // patch_t, height // (stride * patch), width // (stride * patch)


def _read(folder: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def _sha256(folder: Path, pattern: str) -> str:
    """SHA-256 over the names and bytes of the files that match, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob(pattern)):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
