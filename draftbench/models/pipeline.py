"""Models through diffusers' pipelines (0.42.1): what their adapters have in common. Nothing is ever downloaded here.

Deviations from the pipelines as they come: each clip's noise has its own CPU generator, whatever its batch; text
padding that a pipeline masks is cropped before attention, which keeps the call on the fast kernels (rows of padding
come out as zero and only padding reads them).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import Request, Session
from ..environment import resolve_device
from . import checkpoint
from .hook import Hook, transformers

OFFLOADS = ("none", "model", "sequential")


@dataclass(kw_only=True)
class Pipeline:
    """See `draftbench.models.Model`. Making one reads configs only; weights are loaded at the first clip.

    path: the checkpoint's folder; None looks for `hub_id` at `revision` in the Hugging Face cache. weights: None for
    the checkpoint's, or "random" for the true architecture with random weights and random text of `text_tokens` real
    tokens, for latency only: no checkpoint is read and nothing is decoded. frames, height and width are in pixels.
    guidance: the scale that the pipeline takes. dtype: of the transformer, bfloat16, float16 or float32. compile: the
    transformer's blocks, each as one graph with its attention as one operator. offload: none, model or sequential, to
    the CPU as diffusers does it. vae_tiling: decode in tiles. architecture: the transformer's sizes where they are not
    diffusers' defaults, read for random weights alone. Raises ValueError for a value that is wrong, FileNotFoundError
    for a checkpoint that is missing or not whole, ImportError without diffusers.
    """

    name: str
    hub_id: str
    revision: str
    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    dtype: str
    fps: int
    path: str | None = None
    weights: str | None = None
    text_tokens: int = 64
    device: Any = "auto"
    compile: bool = False
    offload: str = "none"
    vae_tiling: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)

    hook: ClassVar[type[Hook]]
    places: ClassVar[int]  # for the tokens of a text, padding included
    random_vae_kind: ClassVar[str | None] = None  # diffusers' class, where its default sizes are the checkpoints'
    rest: ClassVar[dict[str, str]] = {}  # dtypes of other components where they are not the transformer's
    ratios: ClassVar[tuple[int, int]] = (4, 8)  # frames and pixels in one of the latent's, where no config says
    multiple: ClassVar[int] = 16  # of pixels that the pipeline asks for

    def __post_init__(self) -> None:
        for key in ("frames", "height", "width", "steps", "fps", "text_tokens"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{key} must be a positive integer, got {value!r}")
        if self.text_tokens > self.places:
            raise ValueError(f"model.text_tokens must be at most {self.places}, got {self.text_tokens}")
        if not self.guidance >= 0:
            raise ValueError(f"model.guidance must be at least 0, got {self.guidance}")
        _one_of("dtype", self.dtype, ("bfloat16", "float16", "float32"))
        _one_of("offload", self.offload, OFFLOADS)
        _one_of("weights", self.weights, (None, "random"))
        if not importlib.util.find_spec("diffusers"):
            raise ImportError(f"model={self.name} needs diffusers: pip install 'draftbench[diffusers]'")
        self.device = resolve_device(str(self.device))
        if self.offload != "none" and self.device.type == "cpu":
            raise ValueError(f"model.offload={self.offload} needs a GPU to run on, got device=cpu")
        if self.offload == "sequential" and self.compile:
            raise ValueError("model.offload=sequential moves weights within blocks, so it needs model.compile=false")
        if self.offload != "none" and self.weights == "random":
            raise ValueError(f"model.offload={self.offload} has nothing to move with model.weights=random")
        if self.weights is None:
            self.folder = checkpoint.find(self.path, self.hub_id, self.revision, self.hook.pipeline)
        self.grid = self.token_grid()

    # What a family may say of itself.

    def vae_ratios(self, vae: dict[str, Any]) -> tuple[int, int]:
        """Frames and pixels in one of the latent's, by the VAE's config."""
        return (
            vae.get("temporal_compression_ratio", self.ratios[0]),
            vae.get("spatial_compression_ratio", self.ratios[1]),
        )

    def patch(self, transformer: dict[str, Any]) -> tuple[int, int, int]:
        """Sizes (t, h, w) of a patch of the latent, by the transformer's config."""
        size = transformer.get("patch_size", 2)
        return transformer.get("patch_size_t") or 1, size, size

    @property
    def layers(self) -> int:
        """See `draftbench.models.Model`."""
        count: int = self.sizes["num_layers"]
        return count

    @property
    def heads(self) -> int:
        """See `draftbench.models.Model`."""
        count: int = self.sizes["num_attention_heads"]
        return count

    @property
    def switches(self) -> tuple[int, ...]:
        """See `draftbench.models.Model`; read off configs alone."""
        return ()

    def schedule(self, pipe: Any) -> None:
        """Set the pipeline's scheduler, and what else is no argument of its call."""

    def scheduler(self) -> Any:
        """A scheduler as the checkpoints have it, for random weights."""
        raise NotImplementedError

    def guided(self) -> dict[str, Any]:
        """The arguments of a call that ask for guidance."""
        return {"guidance_scale": self.guidance}

    def random_text(self, clips: int, config: Any) -> dict[str, Any]:
        """Prompt embeddings as the pipeline's call takes them, random, of `text_tokens` real tokens."""
        raise NotImplementedError

    # What they share.

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The transformer's config: the checkpoint's, or that of random weights, over diffusers' defaults."""
        import diffusers

        kind = getattr(diffusers, self.hook.transformer)
        given = self.architecture if self.weights else checkpoint.read(self.folder, "transformer/config.json")
        return {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()} | given

    @cached_property
    def pipe(self) -> Any:
        """The diffusers pipeline, loaded or made at first use."""
        pipe = self.random_pipe() if self.weights == "random" else self.loaded_pipe()
        self.schedule(pipe)
        pipe.set_progress_bar_config(disable=True)
        if self.compile:
            self.compile_blocks(pipe)
        return pipe

    def loaded_pipe(self) -> Any:
        """The checkpoint's pipeline, on its device."""
        import diffusers

        kinds = {"transformer": self.dtype, "transformer_2": self.dtype, "default": self.dtype} | self.rest_dtypes
        dtypes = {part: getattr(torch, kind) for part, kind in kinds.items()}
        pipe = getattr(diffusers, self.hook.pipeline).from_pretrained(self.folder, dtype=dtypes, local_files_only=True)
        if self.vae_tiling:
            pipe.vae.enable_tiling()
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            pipe.to(self.device)
        return pipe

    def random_pipe(self) -> Any:
        """The pipeline with random transformers on the device and nothing else but a scheduler."""
        import diffusers

        kind = getattr(diffusers, self.hook.pipeline)
        parts = dict.fromkeys(
            name for name, p in inspect.signature(kind.__init__).parameters.items() if p.default is p.empty
        )
        parts.pop("self")
        return kind(**parts | {"scheduler": self.scheduler()} | self.random_parts())

    def check_memory(self) -> None:
        """See `Model.check_memory`: of random parameters, which a CPU would take to the last byte before it fails."""
        if self.weights is None or self.device.type != "cpu":
            return
        import psutil

        bare = copy.copy(self)
        bare.device = torch.device("meta")
        networks = [part for name, part in bare.random_parts().items() if name in ("transformer", "transformer_2")]
        needed = sum(weight.nbytes for network in networks for weight in network.parameters())
        if needed > (free := psutil.virtual_memory().available):
            raise ValueError(
                f"model={self.name} model.weights=random does not fit device=cpu: its parameters are "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"
            )

    def random_parts(self) -> dict[str, Any]:
        """The random components, and settings of the pipeline that its checkpoint would bring."""
        return {"transformer": self.random_transformer(0)}

    def random_transformer(self, seed: int) -> Any:
        """A transformer of the configured architecture, made on the device; diffusers' float32 modules stay so."""
        import diffusers

        kind = getattr(diffusers, self.hook.transformer)
        network = self._random_network(functools.partial(kind, **self.architecture), self.dtype, seed)
        exact = set(kind._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if exact & set(name.split(".")):
                parameter.data = parameter.data.float()
        return network

    def random_vae(self) -> Any:
        """A VAE of diffusers' default sizes, which are those of the checkpoints of `random_vae_kind`."""
        import diffusers

        if self.random_vae_kind is None:
            raise ValueError(f"model={self.name} has no VAE of random weights")
        dtype = self.rest_dtypes.get("vae", self.rest_dtypes.get("default", self.dtype))
        network = self._random_network(getattr(diffusers, self.random_vae_kind), dtype, 0)
        if self.vae_tiling:
            network.enable_tiling()
        return network

    def random_encoders(self) -> list[tuple[Callable[[], Any], int]]:
        """What makes each text encoder of the checkpoint's sizes, and the tokens that it reads for a prompt."""
        raise ValueError(f"model={self.name} has no text encoders of random weights")

    @property
    def prompts(self) -> int:
        """How many a clip has: with classifier-free guidance a negative one too."""
        return 1 + (self.guidance > 1)

    def random_encoding(self) -> Callable[[], None]:
        """What encodes a prompt (and its negative one) of random tokens by text encoders of random weights."""
        dtype = self.rest_dtypes.get("default", self.dtype)
        encoders = [(self._random_network(make, dtype, 0), length) for make, length in self.random_encoders()]

        def encode() -> None:
            for network, length in encoders * self.prompts:
                ids = torch.arange(3, 3 + length, device=self.device)[None]
                network(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)

        return encode

    def _random_network(self, make: Callable[[], Any], dtype: str, seed: int) -> Any:
        """A network whose parameters are drawn on the device in their own dtype."""
        before, cards = torch.get_default_dtype(), [self.device] if self.device.type == "cuda" else []
        try:
            torch.set_default_dtype(getattr(torch, dtype))
            with torch.random.fork_rng(cards), torch.device(self.device):
                torch.manual_seed(seed)
                return make().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def compile_blocks(self, pipe: Any, backend: str = "inductor") -> None:
        """Compile each block of the transformers, once for texts of any length."""
        for transformer in transformers(pipe):
            for block in self.hook.blocks(transformer):
                block.compile(backend=backend, fullgraph=True, dynamic=False)

    @property
    def rest_dtypes(self) -> dict[str, str]:
        """The dtypes of components that do not have the transformer's."""
        return self.rest if self.dtype != "float32" else {}

    @property
    def no_quality(self) -> str | None:
        """Why clips of this model cannot be judged, or None if they can."""
        return "model.weights=random: for latency only" if self.weights == "random" else None

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names and bytes of the checkpoint's safetensors files, or of a random network's sizes."""
        if self.weights == "random":
            sizes = json.dumps({"random": self.hook.transformer, "architecture": self.architecture}, sort_keys=True)
            return hashlib.sha256(sizes.encode()).hexdigest()
        return checkpoint.sha256(self.folder, "*.safetensors")

    def settings(self) -> dict[str, Any]:
        """See `Model.settings`; `configs` is a hash of the checkpoint's JSON files (scheduler, tokenizers, sizes)."""
        drop = {"name", "path", "hub_id", "revision", "steps", "fps", "device", "architecture"}
        if self.weights is None:
            drop |= {"weights", "text_tokens"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in drop}
        configs = None if self.weights else self._configs_hash
        versions = {"diffusers": importlib.metadata.version("diffusers"), "configs": configs}
        return values | {"rest_dtypes": self.rest_dtypes} | versions

    @cached_property
    def _configs_hash(self) -> str:
        return checkpoint.sha256(self.folder, "*.json")

    def token_grid(self) -> tuple[int, int, int]:
        """The token grid (T, H, W) of a clip, by the VAE's and the patches' sizes in the checkpoint's configs."""
        vae, transformer = {}, self.architecture
        if self.weights is None:
            vae, transformer = (checkpoint.read(self.folder, f"{part}/config.json") for part in ("vae", "transformer"))
        period, stride = self.vae_ratios(vae)
        t, h, w = self.patch(transformer)
        latents = (self.frames - 1) // period + 1
        if (self.frames - 1) % period:
            raise ValueError(f"model.frames must be a multiple of {period} and one more, got {self.frames}")
        for key, edge in (("height", h), ("width", w)):
            multiple = math.lcm(stride * edge, self.multiple)
            if getattr(self, key) % multiple:
                raise ValueError(f"model.{key} must be a multiple of {multiple}, got {getattr(self, key)}")
        return -(-latents // t), self.height // (stride * h), self.width // (stride * w)

    def check(self, prompts: list[str]) -> None:
        """See `Model.check`: any text but an empty one."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompts must not be empty, got {prompt!r}")

    def generate(self, request: Request, session: Session, last_step: int | None = None) -> Tensor:
        """See `Model.generate`; stopped early, or with random weights, clips are not decoded and have no frames."""
        whole = self.weights is None and (last_step or request.steps) >= request.steps
        with self.patched(session, request.seeds, last_step):
            video = self.pipe(**self.arguments(request), output_type="pt" if whole else "latent").frames
        if not whole:
            return torch.empty(len(request.prompts), 0, 3, self.height, self.width, dtype=torch.uint8)
        return (video.float() * 255).round().to(torch.uint8).cpu()

    def arguments(self, request: Request) -> dict[str, Any]:
        """What the pipeline is called with; each clip's noise comes from its own seed, whatever its batch."""
        clips = len(request.prompts)
        if self.weights == "random":
            text = self.random_text(clips, self.pipe.transformer.config)
        else:
            text = {"prompt": list(request.prompts), "negative_prompt": [""] * clips}
        return {
            **text,
            **self.guided(),
            "num_frames": self.frames,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": request.steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        }

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Standard normal numbers in the transformer's dtype on the device, the same at every call."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=getattr(torch, self.dtype))

    def real(self, clips: int) -> Tensor:
        """A mask [clips, places] of `text_tokens` real tokens, int64."""
        return (torch.arange(self.places, device=self.device) < self.text_tokens).long().expand(clips, -1)

    def masked_text(self, clips: int, width: int) -> dict[str, Any]:
        """Random embeddings and masks of both branches, by the names that most pipelines have for them."""
        text: dict[str, Any] = {}
        for seed, side in enumerate(("", "negative_")):
            text[f"{side}prompt_embeds"] = self.random(clips, self.places, width, seed=seed)
            text[f"{side}prompt_attention_mask"] = self.real(clips).bool()
        return text

    def patched(
        self, session: Session, seeds: tuple[int, ...], last_step: int | None = None
    ) -> AbstractContextManager[None]:
        """Inside, this pipeline's self-attention goes to `session`; afterwards it is as it was."""
        return self.hook(self.pipe, session, seeds, last_step).patched()


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        names = ["null" if name is None else str(name) for name in allowed]
        raise ValueError(f"model.{key} must be {', '.join(names[:-1])} or {names[-1]}, got {value!r}")
