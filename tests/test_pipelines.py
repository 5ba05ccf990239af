"""The adapters of diffusers' pipelines, on tiny random checkpoints written to disk and loaded as real ones would be."""

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from draftbench.kernels import dense, run
from draftbench.methods.dense import Dense
from draftbench.methods.re_ttention import ReTtention
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import draftbench
from draftbench import records, schema
from draftbench.attention import DenseParts, Method, Request, Session, Watch
from draftbench.knob import Calibrated, Knobbed, Losses

CONF = Path(__file__).parent.parent / "conf"
METHODS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "method").glob("*.yaml"))}
METHODS.pop("fewer_steps")  # takes another method, and is dense itself
KNOBS = {"region": (2, 4), "tile": (2, 2, 4), "cube": (2, 2, 4), "block": 8, "first": 8}
STEPS = 3
WORDS = ["a", "cat", "runs", "wet", "dog", "over", "the", "hill"]
SHORT, LONGER = "a cat", "a wet dog runs over the hill"
FULL = " ".join(WORDS * 40)  # cut at the pipelines' 256 tokens or fewer, so no padding is left
PATTERN = "hf download some/model --revision main"
TINY = {"num_attention_heads": 2, "num_layers": 2}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def tokenizer(words, end=True, template=None):
    """Whole words; with an end mark as T5 has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    made.chat_template = template
    return made


def t5(width=16):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def euler(**settings):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def hunyuan_video():
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    split = pre_tokenizers.Whitespace().pre_tokenize_str(DEFAULT_PROMPT_TEMPLATE["template"])
    words = {word for word, _ in split} | set(WORDS)
    sizes = dict(num_attention_heads=2, intermediate_size=32, vocab_size=len(words) + 3, pad_token_id=0)
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=3, **sizes)),
        tokenizer=tokenizer(words, end=False),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, attention_head_dim=16, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), **TINY,
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=euler(),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=1, eos_token_id=2, **sizes)),
        tokenizer_2=tokenizer(words, end=False),
    )  # fmt: skip


def hunyuan_video_15():
    from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance, HunyuanVideo15Pipeline
    from diffusers import HunyuanVideo15Transformer3DModel as Transformer
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    text = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, vocab_size=16)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                intermediate_size=16, rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2, **text
            )
        ),
        # 108 tokens of the template are cut off again
        tokenizer=tokenizer(WORDS, end=False, template="{{ 'a ' * 108 + messages[1]['content'] + ' hill' }}"),
        transformer=Transformer(
            in_channels=9, out_channels=4, attention_head_dim=16, num_refiner_layers=1, text_embed_dim=16,
            text_embed_2_dim=16, image_embed_dim=8, rope_axes_dim=(4, 6, 6), task_type="t2v", **TINY,
        ),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1),
        scheduler=euler(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(WORDS),
        guider=ClassifierFreeGuidance(),
    )  # fmt: skip


def wan(second=False):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = dict(in_channels=16, out_channels=16, attention_head_dim=12, text_dim=16, freq_dim=8, ffn_dim=16, **TINY)
    text = UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=tokenizer(WORDS),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel(**sizes),
        transformer_2=WanTransformer3DModel(**sizes) if second else None,
        boundary_ratio=0.875 if second else None,
    )  # fmt: skip


def cogvideox(**sizes):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from diffusers import CogVideoXTransformer3DModel as Transformer

    return CogVideoXPipeline(
        tokenizer=tokenizer(WORDS),
        text_encoder=t5(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        ),
        transformer=Transformer(
            attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
            sample_width=28, sample_height=6, **TINY, **sizes,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True
        ),
    )  # fmt: skip


def cogvideox_15():
    return cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)


def mochi():
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    return MochiPipeline(
        scheduler=euler(invert_sigmas=True),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(WORDS),
        transformer=MochiTransformer3DModel(
            attention_head_dim=16, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8, **TINY
        ),
    )


def ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    return LTXPipeline(
        scheduler=euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(WORDS),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, attention_head_dim=12, cross_attention_dim=24, caption_channels=16, **TINY
        ),
    )  # fmt: skip


@dataclass
class Family:
    """A tiny pipeline, its config where it is not the model's own, and what its attention must be told.

    text: tokens of SHORT and LONGER that attend; branches: of a guided step, in turn; same: dense is bit for bit that
    of diffusers (HunyuanVideo 1.5 there masks its padding, CogVideoX has its text first, so sums run in another order);
    prompts: that leave no padding.
    """

    make: object
    grid: tuple
    text: tuple = (0, 0)
    branches: tuple = ("cond", "uncond")
    same: bool = True
    prompts: tuple = (SHORT, LONGER)
    changes: dict = field(default_factory=dict)
    layers: int = 2
    networks: int = 1


BATCHED = ("both_reversed",)
FAMILIES = {
    "hunyuan_video": Family(
        hunyuan_video, (5, 3, 7), (9, 14), prompts=(FULL, FULL), layers=4,
        changes={"true_cfg": 3.0},
    ),
    "hunyuan_video_15": Family(hunyuan_video_15, (5, 3, 7), (3, 8), same=False),
    "wan21_1_3b": Family(wan, (5, 3, 7)),
    "wan22_a14b": Family(lambda: wan(second=True), (5, 3, 7), networks=2),
    "cogvideox_2b": Family(cogvideox, (5, 3, 7), (226, 226), BATCHED, same=False),
    "cogvideox_15": Family(cogvideox_15, (3, 3, 7), (226, 226), BATCHED, same=False),
    "mochi": Family(mochi, (3, 3, 7), (3, 8), BATCHED, changes={"frames": 13}),
    "ltx": Family(ltx, (3, 3, 7), (0, 0), BATCHED, changes={"height": 96, "width": 224}),
}  # fmt: skip
SIZE = {"frames": 17, "height": 48, "width": 112, "steps": STEPS, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saves a family's checkpoint at first use."""
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            pipe = FAMILIES[name].make()
            with torch.no_grad():
                for part in ("transformer", "transformer_2"):
                    for weight in getattr(getattr(pipe, part, None), "parameters", list)():
                        if not weight.abs().sum():  # Mochi's positions, and norms that start at zero
                            weight.normal_(std=0.1)
            pipe.save_pretrained(root / name)
        return root / name

    return folder


def configured(name, *overrides, **changes):
    """A model's config as the command line gives it, with changes."""
    with initialize_config_module("draftbench.conf", version_base="1.3"):
        config = compose("config", [f"model={name}", "device=cpu", *overrides])
    OmegaConf.set_struct(config, False)
    config.model.update(changes)
    return config


def made(name, folder, **changes):
    size = SIZE | FAMILIES[name].changes | {"path": folder and str(folder), "hub_id": "some/model"}
    return schema.model(configured(name, **size | changes))


@pytest.fixture(scope="module")
def models(folders):
    """A family's model, loaded once; changes make another."""
    kept = {}

    def model(name, **changes):
        key = name, repr(changes)
        if key not in kept:
            kept[key] = made(name, folders(name), **changes)
        return kept[key]

    return model


def make(folder, **changes):
    return made("hunyuan_video", folder, **{"true_cfg": 1.0, "revision": "main"} | changes)


@pytest.fixture(scope="module")
def checkpoint(folders):
    return folders("hunyuan_video")


@pytest.fixture(scope="module")
def model(models):
    return models("hunyuan_video", true_cfg=1.0)


@pytest.fixture(scope="module")
def guided(models):
    return models("hunyuan_video")


class Spy(Session):
    """Notes what the adapter tells and asks."""

    def __init__(self, method=None, watch=None):
        super().__init__(method or Dense(0.0), run("cpu"), dense.run, DenseParts(), watch)
        self.begun, self.asked = [], []

    def at_step(self, step, steps, timestep):
        self.begun.append((step, steps, timestep))
        super().at_step(step, steps, timestep)

    def __call__(self, q, k, v, **where):
        self.asked.append({"step": self.step, "shape": tuple(q.shape), **where})
        return super().__call__(q, k, v, **where)


def batch(*prompts, steps=STEPS):
    return Request(prompts, tuple(range(5, 5 + len(prompts))), steps)


def stock(model, wanted):
    """Latents of the unpatched pipeline."""
    return model.pipe(**model.arguments(wanted), output_type="latent").frames


def hooked(model, wanted, session):
    """Latents of the patched pipeline."""
    session.start(len(wanted.prompts))
    with model.patched(session, wanted.seeds):
        return stock(model, wanted)


def picked(method, grid, sparsity, heads=8):
    """What a search would find if no mask lost more than another."""
    losses = {option: torch.zeros(1, 1, heads, dtype=torch.float64) for option in method.options(grid, sparsity)}
    return method.pick(Losses([0], [0], losses), grid, sparsity)[0]


def build(name, sparsity, grid=(2, 4, 4)):
    config = METHODS[name]
    module, _, kind = config["_target_"].rpartition(".")
    knobs = {key: KNOBS[key] for key in config if key in KNOBS}
    method = getattr(importlib.import_module(module), kind)(sparsity=sparsity, **knobs)
    # Not calibrated here: a knob stands where it keeps the least, and no mask loses more than another.
    if isinstance(method, Calibrated) and sparsity:
        return method.at(method.ends[0] if isinstance(method, Knobbed) else picked(method, grid, sparsity))
    return method


def networks(model):
    return [model.pipe.components[part] for part in ("transformer", "transformer_2") if model.pipe.components.get(part)]


def state(model):
    """All that the hook changes."""
    processors = [(name, id(m.processor)) for network in networks(model) for name, m in network.named_modules()
                  if hasattr(m, "processor")]  # fmt: skip
    hooks = [(len(network._forward_pre_hooks), vars(network).get("cache_context")) for network in networks(model)]
    return processors, hooks, vars(model.pipe.scheduler).get("step")


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_clips_from_disk(family, models):
    model = models(family)
    clips = model.generate(batch(SHORT, LONGER), Spy())
    assert clips.shape == (2, model.frames, 3, model.height, model.width)
    assert clips.dtype == torch.uint8 and clips.device.type == "cpu"
    assert not torch.equal(clips[0], clips[1])
    expected = model.pipe(**model.arguments(batch(SHORT, LONGER)), output_type="np").frames
    difference = clips.float() - torch.from_numpy(expected * 255).round().permute(0, 1, 4, 2, 3)
    assert difference.abs().max() <= 1
    assert (model.grid, model.layers, model.heads) == (FAMILIES[family].grid, FAMILIES[family].layers, 2)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.same])
def test_dense_is_bit_identical_where_the_same_kernel_runs(family, models):
    wanted, session = batch(*FAMILIES[family].prompts), Spy()
    assert torch.equal(hooked(models(family), wanted, session), stock(models(family), wanted))
    assert len(session.asked) == STEPS * FAMILIES[family].layers * len(FAMILIES[family].branches)


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15", "cogvideox_2b", "cogvideox_15"])
@pytest.mark.parametrize("prompts", [(SHORT,), (FULL, SHORT)], ids=["one", "far"])
def test_dense_is_close_elsewhere(family, prompts, models):
    # a mask and a crop run different kernels, or the same one in other tiles
    model, wanted = models(family), batch(*prompts)
    torch.testing.assert_close(hooked(model, wanted, Spy()), stock(model, wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.pairs(family=[*FAMILIES], name=[*METHODS])
def test_methods_at_sparsity_zero_are_dense_and_else_sparse(family, name, models):
    model, wanted, session = models(family), batch(SHORT, LONGER), Spy(build(name, 0.0))
    expected = hooked(model, wanted, Spy())
    torch.testing.assert_close(hooked(model, wanted, session), expected, atol=1e-4, rtol=1e-4)
    assert session.meter.density() == [1, 1]
    asked = 0.3 if name == "re_ttention" else 0.5  # one of its two steps is full
    if not build(name, asked).sparsity:
        return
    session = Spy(build(name, asked, FAMILIES[family].grid))
    if name == "re_ttention" and family == "wan22_a14b":  # each of its transformers has one step, which is full
        for refused in (lambda: session.method.meet(model, DenseParts()), lambda: hooked(model, wanted, session)):
            with pytest.raises(ValueError, match="in 2 active steps, 2 of which are full"):
                refused()
        return
    latents = hooked(model, wanted, session)
    assert latents.isfinite().all() and not torch.equal(latents, expected)
    # one of the three steps is in the dense share of a quarter
    calls = FAMILIES[family].layers * len(FAMILIES[family].branches)
    assert session.meter.calls == STEPS * calls and session.meter.sparse_calls == (STEPS - 1) * calls
    if not isinstance(session.method, Calibrated):
        assert all(abs(achieved - asked) < 0.1 for achieved in session.meter.sparsity())


def test_a_second_transformer_is_told_before_it_runs(models):
    """Wan 2.2's: from the configs alone, at each generation, and to a method that must begin anew with it."""
    model, session, ran = models("wan22_a14b", steps=12), Spy(ReTtention(0.5, period=3, block=8)), {}
    with ExitStack() as stack:
        for network in networks(model):
            hook = network.register_forward_hook(lambda module, *_: ran.update({session.step: module}))
            stack.callback(hook.remove)
        hooked(model, batch(SHORT, steps=12), session)
    (switch,) = [step for step in range(1, 12) if ran[step] is not ran[step - 1]]
    assert 4 < switch < 11 and model.switches == session.switches == (switch,) and session.first == 3
    assert abs(session.meter.sparsity()[0] - 0.5) < 0.02
    session.method.meet(model, DenseParts())
    assert models("ltx").switches == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_carry_layout_lengths_layers_branches_and_seeds(family, models):
    facts, session = FAMILIES[family], Spy()
    hooked(models(family), batch(SHORT, LONGER), session)
    assert [(call["step"], call["branch"], call["layer"]) for call in session.asked] == [
        (step, branch, layer) for step in range(STEPS) for branch in facts.branches for layer in range(facts.layers)
    ]
    both = facts.branches == BATCHED
    for call in session.asked:
        lengths, longest = call["text_lengths"], call["layout"].text
        assert lengths.dtype == torch.int64 and longest == lengths.max()
        if call["branch"] != "uncond":
            assert tuple(lengths[-2:].tolist()) == facts.text  # conditional items are the last ones
        assert len(lengths) == len(call["seeds"]) == (4 if both else 2) and call["seeds"][:2] == (5, 6)
        assert call["layout"].grid == facts.grid and call["head_offset"] == 0
        assert call["shape"][:3] == (len(lengths), facts.grid[0] * facts.grid[1] * facts.grid[2] + longest, 2)
    assert [step for step, _, _ in session.begun] == [*range(STEPS)]


def test_a_batch_of_both_branches_draws_as_each_alone():
    from draftbench.attention import Call, Meter
    from draftbench.layout import Layout

    def draw(branch, item, seeds):
        lengths = torch.zeros(len(seeds))
        call = Call(Layout((1, 1, 1)), 1, 3, 0, branch, lengths, seeds, 0, {}, run("cpu"), Meter(), (0, 3))
        return call.generator(item, torch.device("cpu")).initial_seed()

    seeds = (7, 7)
    assert draw("both_reversed", 0, seeds) == draw("uncond", 0, (7,)) == draw("both", 1, seeds)
    assert draw("both_reversed", 1, seeds) == draw("cond", 0, (7,)) == draw("both", 0, seeds)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_steps_are_counted_where_a_scheduler_repeats_timesteps(scheduler, models, monkeypatch):
    import diffusers

    model, session = models("cogvideox_2b"), Spy(build("draft", 0.5))
    monkeypatch.setattr(model.pipe, "scheduler", getattr(diffusers, scheduler)())
    assert hooked(model, batch(SHORT, steps=5), session).isfinite().all()
    timesteps = model.pipe.scheduler.timesteps.tolist()
    assert len(set(timesteps)) < len(timesteps)
    assert [begun[:2] for begun in session.begun] == [(step, len(timesteps)) for step in range(len(timesteps))]
    assert session.meter.calls == len(timesteps) * FAMILIES["cogvideox_2b"].layers


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_fall_as_the_scheduler_says(family, models):
    model, session = models(family), Spy()
    model.generate(batch(SHORT), session)
    levels = [timestep for _, _, timestep in session.begun]
    assert [begun[:2] for begun in session.begun] == [(step, STEPS) for step in range(STEPS)]
    assert levels == sorted(levels, reverse=True) and 900 < levels[0] <= 1000
    given = model.pipe.scheduler.timesteps.tolist()
    assert levels == pytest.approx([1000 - t for t in given] if family == "mochi" else given)


def test_both_transformers_of_wan22_run_and_count_their_layers_alike(models):
    model, session, seen = models("wan22_a14b"), Spy(build("draft", 0.5)), []
    watches = [
        network.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
        for number, network in enumerate(networks(model))
    ]
    hooked(model, batch(SHORT), session)
    for watch in watches:
        watch.remove()
    assert seen == [0, 0, 0, 0, 1, 1]  # at shift 12 the last of three steps is below 0.875 of the noise
    assert [call["layer"] for call in session.asked] == [0, 1] * 2 * STEPS


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_stay_as_they_are_over_steps_layers_and_methods(family, models, folders):
    from torch._dynamo.utils import counters

    model, graphs = models(family), []
    compiled = made(family, folders(family))
    compiled.compile_blocks(compiled.pipe, lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    counters.clear()
    hooked(compiled, batch(LONGER, steps=2), Spy())
    made_first = len(graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for method in (Dense(), build("draft", 0.5), build("svg", 0.5)):
            # what torch.compile joins may round otherwise
            difference = hooked(compiled, batch(LONGER), Spy(method)) - hooked(model, batch(LONGER), Spy(method))
            assert difference.abs().max() < 1e-5
    assert len(graphs) == made_first == counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert made_first <= 6
    for graph in graphs:
        operators = (torch.ops.draftbench.attend, torch.ops.draftbench.attend_joint)
        assert sum(node.target in operators for node in graph.graph.nodes) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15", "mochi"])
def test_compiled_blocks_take_texts_of_any_length(family, models, folders):
    model, graphs = models(family), []
    compiled = made(family, folders(family))
    torch._dynamo.reset()
    compiled.compile_blocks(compiled.pipe, lambda graph, inputs: graphs.append(graph) or graph.forward)
    hooked(compiled, batch(SHORT, steps=2), Spy())
    made_first, lengths = len(graphs), set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for words in range(1, 11):
            wanted, session = batch(" ".join(WORDS[:2] * words), steps=2), Spy()
            difference = hooked(compiled, wanted, session) - hooked(model, wanted, Spy())
            assert difference.abs().max() < 1e-5
            lengths.add(session.asked[0]["layout"].text)
    assert len(lengths) == 10 and len(graphs) == made_first
    torch._dynamo.reset()


class Broken(Method):
    """Fails at its first sparse call."""

    def plan(self, q, k, v, call):
        raise ArithmeticError("broken")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_is_restored(family, models):
    model = models(family)
    before, expected = state(model), stock(model, batch(SHORT))
    with model.patched(Spy(), (0,)):
        inside = state(model)
    changed = [name for (name, old), (_, new) in zip(before[0], inside[0], strict=True) if old != new]
    assert len(changed) == FAMILIES[family].layers * FAMILIES[family].networks  # so no cross-attention, no refiner
    assert not any("attn2" in name or "embedder" in name for name in changed)
    assert state(model) == before
    model.generate(batch(SHORT), Spy(build("draft", 0.5)), last_step=2)
    assert state(model) == before
    with pytest.raises(ArithmeticError, match="broken"):
        model.generate(batch(SHORT), Spy(Broken(0.5)))
    assert state(model) == before
    assert torch.equal(stock(model, batch(SHORT)), expected)


def test_what_a_user_set_on_an_instance_stays(models, monkeypatch):
    model = models("wan21_1_3b")
    for owner, name in ((model.pipe.scheduler, "step"), (model.pipe.transformer, "cache_context")):
        monkeypatch.setitem(vars(owner), name, getattr(owner, name))
    before = state(model)
    assert before[1][0][1] and before[2]
    for _ in range(2):
        with draftbench.accelerate(model.pipe, "draft", 0.5) as session:
            assert state(model) != before
            stock(model, batch(SHORT))
        assert state(model) == before and session.meter.sparse_calls


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_need_no_checkpoint_and_make_no_frames(family, tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts, size = FAMILIES[family], SIZE | FAMILIES[family].changes
    text = facts.text[0] if family.startswith("cogvideox") else 4  # all of its places are real
    model = schema.model(configured(family, **size | {"weights": "random", "dtype": "bfloat16", "text_tokens": text}))
    network = getattr(diffusers, model.hook.transformer)
    assert set(model.architecture) <= set(inspect.signature(network.__init__).parameters)
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    small["cross_attention_dim"] = 2 * model.architecture["attention_head_dim"]
    model.architecture |= {name: value for name, value in small.items() if name in model.architecture}
    session = Spy(build("draft", 0.5))
    clips = model.generate(batch(SHORT, LONGER), session)
    assert clips.shape == (2, 0, 3, model.height, model.width) and model.grid == facts.grid
    assert all(abs(achieved - 0.5) < 0.1 for achieved in session.meter.sparsity())
    assert not [part for part in ("vae", "text_encoder", "text_encoder_2") if model.pipe.components.get(part)]
    assert session.asked[0]["layout"].text in (0, 4, 226) and model.no_quality and len(model.weights_hash) == 64
    assert {weight.dtype for weight in networks(model)[0].parameters()} <= {torch.bfloat16, torch.float32}


SIZES = {  # billions of parameters, as their authors have them, and the token grid at the config's size
    "hunyuan_video": (12.8, (33, 48, 80)), "hunyuan_video_15": (8.3, (31, 45, 80)), "wan21_1_3b": (1.42, (21, 30, 52)),
    "wan21_14b": (14.3, (21, 48, 80)), "wan22_a14b": (14.3, (21, 45, 80)), "cogvideox_2b": (1.69, (13, 30, 45)),
    "cogvideox_5b": (5.57, (13, 30, 45)), "cogvideox_15": (5.57, (11, 48, 85)), "mochi": (10.0, (28, 30, 53)),
    "ltx": (1.92, (21, 15, 22)),
}  # fmt: skip


def test_every_config_has_a_size():
    assert set(SIZES) == {path.stem for path in (CONF / "model").glob("*.yaml")} - {"pocket", "pocket_large"}


@pytest.mark.parametrize("name", SIZES)
def test_random_weights_have_the_true_size(name):
    import diffusers

    model = schema.model(configured(name, weights="random"))
    with torch.device("meta"):
        network = getattr(diffusers, model.hook.transformer)(**model.architecture)
    count = sum(weight.numel() for weight in network.parameters())
    assert count / 1e9 == pytest.approx(SIZES[name][0], rel=0.01) and model.grid == SIZES[name][1]
    blocks = model.hook.blocks(network)
    assert (model.layers, model.heads) == (len(blocks), getattr(blocks[0], model.hook.attention).heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_have_the_constructors_keys(family):
    config = OmegaConf.to_container(configured(family).model, resolve=True)
    module, _, kind = config.pop("_target_").rpartition(".")
    assert set(config.pop("geometry")) == {"region", "tile", "block"}
    assert set(config) == set(inspect.signature(getattr(importlib.import_module(module), kind)).parameters)


def test_padding_reaches_no_video_token(model):
    wanted = batch(SHORT, LONGER)
    expected, expected_stock = hooked(model, wanted, Spy()), stock(model, wanted)

    def scribble(module, args, inputs):
        real = inputs["encoder_attention_mask"].bool()[..., None]
        text = torch.where(real, inputs["encoder_hidden_states"], torch.tensor(7.0))
        return args, inputs | {"encoder_hidden_states": text}

    handle = model.pipe.transformer.register_forward_pre_hook(scribble, with_kwargs=True)
    try:
        assert torch.equal(hooked(model, wanted, Spy()), expected)
        assert torch.equal(stock(model, wanted), expected_stock)
    finally:
        handle.remove()


def test_a_clip_is_the_same_in_any_batch(model):
    both = hooked(model, Request((SHORT, LONGER), (1, 2), STEPS), Spy())
    for item, (prompt, seed) in enumerate([(SHORT, 1), (LONGER, 2)]):
        alone = hooked(model, Request((prompt,), (seed,), STEPS), Spy())
        torch.testing.assert_close(both[item : item + 1], alone, atol=1e-5, rtol=1e-5)


def test_steps_survive_bfloat16(checkpoint):
    model, session, seen = make(checkpoint, dtype="bfloat16"), Spy(), []
    transformer = model.pipe.transformer
    assert transformer.dtype == torch.bfloat16 and model.pipe.vae.dtype == torch.float32
    note = lambda module, args, inputs: seen.append(float(inputs["timestep"][0]))  # noqa: E731
    transformer.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(batch(SHORT, steps=50), session, last_step=8)
    assert len(set(seen)) < 8  # rounded: what the transformer gets cannot tell one step from the next
    assert [begun[:2] for begun in session.begun] == [(step, 50) for step in range(8)]


class Log(Watch):
    """Notes steps and the end."""

    def __init__(self):
        self.events = []

    def step(self, index):
        self.events.append(index)

    def finish(self):
        self.events.append("finish")


def test_finish_comes_once_and_before_decoding(model, monkeypatch):
    watch, decode = Log(), model.pipe.vae.decode
    monkeypatch.setattr(model.pipe.vae, "decode", lambda *a, **k: (watch.events.append("decode"), decode(*a, **k))[1])
    model.generate(batch(SHORT), Spy(watch=watch))
    assert watch.events == [*range(STEPS), "finish", "decode"]


@pytest.mark.parametrize("last_step", [1, 2])
def test_last_step_stops_early(model, last_step):
    watch = Log()
    session = Spy(watch=watch)
    clips = model.generate(batch(SHORT, LONGER), session, last_step=last_step)
    assert watch.events == [*range(last_step), "finish"] and len(session.asked) == last_step * 4
    assert clips.shape == (2, 0, 3, 48, 112) and clips.dtype == torch.uint8
    assert len(model.generate(batch(SHORT), Spy())[0]) == 17  # the next run is a whole one


def test_another_instance_is_not_touched(model, guided):
    before = state(guided)
    with model.patched(Spy(), (0,)):
        assert state(guided) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_is_the_same_hook_at_any_size(family, models):
    model = models(family)
    before, wanted = state(model), batch(SHORT, LONGER)
    expected, plain = hooked(model, wanted, Spy(build("svg", 0.5))), stock(model, wanted)
    parts = {"method": build("svg", 0.5), "dense": DenseParts(0.25)}
    with draftbench.accelerate(model.pipe, **parts) as session:
        assert state(model) != before
        first = stock(model, wanted)
        again = stock(model, wanted)  # one more call: the meter counts anew
    assert first.shape == expected.shape and torch.equal(first, again) and not torch.equal(first, plain)
    calls = FAMILIES[family].layers * len(FAMILIES[family].branches)
    assert session.meter.calls == STEPS * calls and abs(session.meter.sparsity()[0] - 0.5) < 0.1
    larger = model.arguments(wanted) | {"width": 2 * model.width}
    with draftbench.accelerate(model.pipe, "draft", 0.5) as session:
        model.pipe(**larger, output_type="latent")
        assert session.meter.sparse_calls == (STEPS - 1) * calls
    assert state(model) == before


def test_accelerate_in_the_repo_root_whose_folders_shadow_packages(folders):
    code = (
        "import sys, draftbench, torch\n"
        "from diffusers import WanPipeline\n"
        "pipe = WanPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)\n"
        "method = draftbench.accelerate(pipe, method='sta', sparsity=0.5)\n"
        "with method as session:\n"
        f"    pipe('{SHORT}', num_frames=17, height=48, width=112, num_inference_steps=2, output_type='latent')\n"
        "print(sys.path[0], session.meter.sparse_calls)"
    )
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    given = dict(cwd=CONF.parent, env=variables, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code, folders("wan21_1_3b")], **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == " 4\n"  # the working folder is on the path; two layers, two branches, one step


def test_accelerate_names_what_it_cannot_take(model, monkeypatch):
    with pytest.raises(ValueError, match=r"pipe must be one of CogVideoXPipeline, .*, WanPipeline, got Dense"):
        draftbench.accelerate(Dense()).__enter__()
    with pytest.raises(ValueError, match=r"method must be one of dense, draft, .*, got 'darft'"):
        draftbench.accelerate(model.pipe, "darft").__enter__()
    for name, kind in {"other_seed": "OtherSeed", "fewer_steps": "FewerSteps"}.items():
        with pytest.raises(ValueError, match=f"{kind} changes seeds or steps"):
            draftbench.accelerate(model.pipe, name).__enter__()
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1.5"):
        draftbench.accelerate(model.pipe, "draft", 1.5).__enter__()
    for wrong, message in [
        ({"method": Dense}, r"method must be the name of one, or one made as .*, got <class '.*Dense'>"),
        ({"sparsity": "0.5"}, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        ({"dense": 0.25}, r"dense must be a draftbench.attention.DenseParts or None, got 0.25"),
        ({"dense": DenseParts(1)}, r"dense.steps must be below 1, to leave the method a step, got 1"),
        (
            {"dense": DenseParts(layers=4)},
            r"dense.layers must be an integer from 0 to 3, below the model's layers, got 4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            draftbench.accelerate(model.pipe, **wrong).__enter__()
    with pytest.raises(
        ValueError, match=r"method='svg2' at sparsity=0.9 needs a cal.*; give .*svg2.SVG2\(top_p=...\)$"
    ):
        draftbench.accelerate(model.pipe, "svg2").__enter__()
    with pytest.raises(
        ValueError, match=r"'sta_searched' at sparsity=0.5 needs a calibration, which one's own pipeline has not$"
    ):
        draftbench.accelerate(model.pipe, "sta_searched", 0.5).__enter__()


def test_what_would_run_dense_or_wrong_is_refused_by_name(models, monkeypatch):
    model = models("wan21_1_3b")
    network, before = model.pipe.transformer, state(model)
    for value, message in [
        ({"transformer": 0, "vae": 1}, "WanPipeline is spread over devices 0, 1"),
        ({"transformer": 0, "vae": "cpu"}, None),
    ]:
        monkeypatch.setattr(model.pipe, "hf_device_map", value)
        if message:
            with pytest.raises(ValueError, match=message):
                model.patched(Spy(), (0,))
        else:
            model.patched(Spy(), (0,))
    monkeypatch.undo()
    monkeypatch.setattr(network, "_parallel_config", object())
    with pytest.raises(ValueError, match="WanTransformer3DModel has context or tensor parallelism enabled"):
        model.patched(Spy(), (0,))
    monkeypatch.undo()
    monkeypatch.setattr(network, "_compiled_call_impl", len)
    with pytest.raises(ValueError, match=r"is compiled in place, .* compile it by compile_repeated_blocks\(\) or"):
        model.patched(Spy(), (0,))
    monkeypatch.undo()
    registry = SimpleNamespace(hooks={"faster_cache_denoiser": None})
    monkeypatch.setattr(network, "_diffusers_hook", registry, raising=False)
    with pytest.raises(ValueError, match="WanTransformer3DModel has FasterCache enabled"):
        model.patched(Spy(), (0,))
    monkeypatch.undo()
    with (
        model.patched(Spy(), (0,)),
        pytest.raises(ValueError, match="must have its WanAttnProcessor in every block, got _Processor"),
    ):
        model.patched(Spy(), (0,))  # within itself
    assert state(model) == before


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_method_kept_goes_with_the_last_step(models, broken):
    """It is gone when the latents are decoded, and where a generation is broken off."""
    model, session, seen = models("ltx"), Spy(build("re_ttention", 0.3)), []
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if broken:
            patch.setattr(session, "finish", lambda: seen.append(len(session.states)) or 1 / 0)
            stack.enter_context(pytest.raises(ZeroDivisionError))
        else:
            patch.setattr(session.watch, "finish", lambda: seen.append(len(session.states)))
        hooked(model, batch(SHORT), session)
    assert seen == ([FAMILIES["ltx"].layers * len(FAMILIES["ltx"].branches)] if broken else [0])
    assert not session.states


def test_the_frame_rate_is_a_setting_where_it_shapes_the_frames(models):
    assert [models("ltx", fps=fps).settings()["frame_rate"] for fps in (8, 25)] == [8, 25]
    assert models("mochi", fps=8).settings() == models("mochi", fps=25).settings()


def test_another_guidance_is_refused_by_name(models):
    model = models("hunyuan_video_15")
    before = state(model)
    with (
        model.patched(Spy(), (0,)),
        pytest.raises(ValueError, match="runs a guidance branch 'pred_cond_skip'; known: cond, "),
        model.pipe.transformer.cache_context("pred_cond_skip"),
    ):
        pass
    assert state(model) == before


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model.path=.*nowhere is not a folder; .*{PATTERN} --local-dir"):
        make(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"]
)
def test_incomplete_folder(copy, name):
    (copy / name).unlink()
    lacks = name.replace("diffusion_pytorch_model", r"\*")
    with pytest.raises(FileNotFoundError, match=rf"model.path=.* lacks {lacks}; fetch it with: {PATTERN}"):
        make(copy)


def test_missing_shard(copy):
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "second.safetensors"}}
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks transformer/second\.safetensors"):
        make(copy)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((WEIGHTS, damage) for damage in ("last byte", "half", "empty", "pointer", "zero header")),
        ("transformer/config.json", "half"), ("vae/config.json", "zeros"), ("vae/config.json", "half character"),
        ("text_encoder/config.json", "half"), ("scheduler/scheduler_config.json", "half"),
        ("tokenizer/tokenizer.json", "half"), ("model_index.json", "half"), ("model_index.json", "empty"),
    ],
)  # fmt: skip
def test_unfinished_downloads(copy, name, damage):
    file = copy / name
    whole = file.read_bytes()
    bad = {
        "last byte": whole[:-1], "half": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole)),
        "pointer": b"version https://git-lfs.github.com/spec/v1", "zero header": whole[:8] + bytes(len(whole) - 8),
        "half character": b'{"a": "\xc3',
    }  # fmt: skip
    file.write_bytes(bad[damage])
    with pytest.raises(FileNotFoundError, match=rf"has {name}, which is cut short; .*{PATTERN}"):
        make(copy)


def test_a_tokenizer_needs_its_vocabulary(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    lacks = r"lacks a vocabulary, one of tokenizer/tokenizer.json, tokenizer/\*.model, tokenizer/vocab.\*; "
    with pytest.raises(FileNotFoundError, match=rf"{lacks}.*{PATTERN}"):
        make(copy)
    index = json.loads((copy / "model_index.json").read_text())
    bytewise = {"tokenizer": ["transformers", "ByT5Tokenizer"]}  # as HunyuanVideo 1.5 has one: no file of words
    (copy / "model_index.json").write_text(json.dumps(index | bytewise))
    make(copy)


def test_unfinished_shards_and_folders(copy):
    folder = copy / ".cache" / "huggingface"
    first = copy / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (copy / WEIGHTS).rename(first)
    with pytest.raises(FileNotFoundError, match=r"lacks transformer/\*.safetensors.index.json"):
        make(copy)
    index = first.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text('{"weight_map": {')
    with pytest.raises(FileNotFoundError, match=f"has transformer/{index.name}, which is cut short"):
        make(copy)
    folder.mkdir(parents=True)
    (folder / "abc.incomplete").touch()
    with pytest.raises(FileNotFoundError, match=r"an unfinished download, \.cache/huggingface/abc\.incomplete; "):
        make(copy)


def test_another_pipelines_folder(copy):
    (copy / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="must hold a HunyuanVideoPipeline, got WanPipeline"):
        make(copy)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_is_one_commit_of_its_repository(name):
    config = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    assert len(config["revision"]) == 40 and int(config["revision"], 16)


def test_hugging_face_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"model.path=null and some/model .* not in .* cache; .*{PATTERN}"):
        make(None)
    repository, commit = tmp_path / "models--some--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    for revision in ("main", commit):
        assert make(None, revision=revision).weights_hash == make(checkpoint).weights_hash
    (repository / "snapshots" / commit / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.path=null \(.*\) lacks vae/\*.safetensors"):
        make(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 18}, "model.frames must be a multiple of 4 and one more, got 18"),
        ({"frames": 0}, "model.frames must be a positive integer, got 0"),
        ({"height": 40}, "model.height must be a multiple of 16, got 40"),
        ({"width": 100}, "model.width must be a multiple of 16, got 100"),
        ({"steps": 2.5}, "model.steps must be a positive integer, got 2.5"),
        ({"shift": 0.0}, "model.shift must be above 0, got 0.0"),
        ({"guidance": -1.0}, "model.guidance must be at least 0, got -1.0"),
        ({"true_cfg": 0.5}, r"model.true_cfg must be at least 1 \(1 is off\), got 0.5"),
        ({"offload": "model"}, "model.offload=model needs a GPU to run on, got device=cpu"),
        ({"offload": "disk"}, "model.offload must be none, model or sequential, got 'disk'"),
        ({"compile": True, "offload": "model"}, "model.offload=model needs a GPU to run on, got device=cpu"),
        ({"weights": "ones"}, "model.weights must be null or random, got 'ones'"),
        ({"weights": "random", "text_tokens": 0}, "model.text_tokens must be a positive integer, got 0"),
        ({"dtype": "int8"}, "model.dtype must be bfloat16, float16 or float32, got 'int8'"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_bad_values(checkpoint, change, message):
    with pytest.raises(ValueError, match=message):
        make(checkpoint, **change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hunyuan_video", {"text_tokens": 300}, "model.text_tokens must be at most 256, got 300"),
        ("hunyuan_video_15", {"text_tokens": 1001}, "model.text_tokens must be at most 1000, got 1001"),
        ("wan21_1_3b", {"text_tokens": 600}, "model.text_tokens must be at most 512, got 600"),
        ("mochi", {"text_tokens": 300}, "model.text_tokens must be at most 256, got 300"),
        ("ltx", {"text_tokens": 129}, "model.text_tokens must be at most 128, got 129"),
        ("cogvideox_2b", {"text_tokens": 64}, "model.text_tokens must be 226, all of them real, got 64"),
        ("wan21_1_3b", {"guidance_2": 3.0}, "model.guidance_2 must be null without a second transformer, got 3.0"),
        ("wan22_a14b", {"guidance_2": -1.0}, "model.guidance_2 must be at least 0, got -1.0"),
        ("wan22_a14b", {"boundary": 5}, "model.boundary must be null or between 0 and 1, got 5"),
    ],
)
def test_bad_values_of_random_weights(name, change, message):
    with pytest.raises(ValueError, match=message):
        schema.model(configured(name, weights="random", **change))


def test_a_second_guidance_needs_a_checkpoint_of_two_transformers(folders):
    with pytest.raises(ValueError, match=r"model.guidance_2 must be null without a second transformer, got 3.0"):
        made("wan21_1_3b", folders("wan21_1_3b"), guidance_2=3.0)
    assert made("wan22_a14b", folders("wan22_a14b"), guidance_2=3.0, boundary=None).guidance_2 == 3.0


def test_random_weights_larger_than_memory_are_refused_before_work_and_told_once(monkeypatch, tmp_path, capsys):
    """On the machine that is to run them: under Slurm that is another one."""
    import psutil

    from draftbench.cli import main

    model = schema.model(configured("wan21_1_3b", weights="random"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    with pytest.raises(ValueError, match=r"device=cpu: its parameters are 2\.6 GiB, and 2\.0 GiB of memory are free"):
        model.check_memory()
    given = ["model=wan21_1_3b", "model.weights=random", "device=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(given) == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.count("does not fit device=cpu") == 1
    schema.check_job(configured("wan21_1_3b", weights="random"), here=False)


def test_prompts_must_not_be_empty(model):
    model.check([SHORT, FULL])
    with pytest.raises(ValueError, match="prompts must not be empty, got ' '"):
        model.check([SHORT, " "])


def test_without_diffusers(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'draftbench\[diffusers\]'"):
        make(checkpoint)


def test_imports_lazily():
    code = "import sys, draftbench.models.hunyuan_video; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_weights_hash_and_settings(checkpoint, copy):
    first, second = make(checkpoint), make(copy, guidance=1.0)
    assert first.weights_hash == second.weights_hash and len(first.weights_hash) == 64
    assert "pipe" not in vars(first)  # neither needs the weights loaded
    differ = {key for key, value in first.settings().items() if second.settings()[key] != value}
    assert differ == {"guidance"} and json.loads(json.dumps(first.settings())) == first.settings()
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert make(copy).weights_hash != first.weights_hash


def test_a_whole_job_runs_from_the_command_line(checkpoint, tmp_path, capsys):
    from draftbench.cli import main

    size = ["model.frames=9", "model.height=48", "model.width=64", "model.steps=3", "model.dtype=float32"]
    blocks = ["model.geometry.region=[2,2]", "model.geometry.tile=[1,2,2]", "model.geometry.block=4"]
    rest = [
        f"prompts=[{SHORT}]",
        "tracking=disabled",
        f"cache={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    given = ["model=hunyuan_video", f"model.path={checkpoint}", "+method=draft", "sparsity=0.5", "diagnostics=true"]
    assert main([*given, *size, *blocks, *rest]) == 0
    record = records.read(tmp_path / "run" / "record.json")
    assert record["status"] == "ok"
    assert record["quality"] is None  # pocket alone has checks of its own
    assert abs(record["sparsity_achieved"] - 0.5) < 0.1
    assert record["speedup_attention"] > 0
    assert (tmp_path / "run" / "000_side_by_side.png").exists()
    assert (tmp_path / "run" / "diagnostics.json").exists()


def test_a_job_with_random_weights_writes_latencies_and_says_why_no_quality(tmp_path, capsys):
    from draftbench.cli import main

    sizes = "{num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 32, text_dim: 16}"
    given = ["model=wan21_1_3b", "model.weights=random", f"++model.architecture={sizes}", "method=draft"]
    size = ["model.frames=9", "model.height=48", "model.width=64", "model.steps=3", "model.dtype=float32"]
    rest = ["sparsity=0.5", "model.geometry.region=[2,2]", "device=cpu", "diagnostics=true", "tracking=disabled"]
    assert main([*given, *size, *rest, f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    record = records.read(tmp_path / "run" / "record.json")
    assert record["status"] == "ok" and record["no_quality"] == "model.weights=random: for latency only"
    assert all(record[name] is None for name in ("psnr_db", "ssim", "lpips")) and record["frames_sha256"] is None
    assert record["speedup_attention"] > 0 and abs(record["sparsity_achieved"] - 0.5) < 0.1
    assert {path.suffix for path in (tmp_path / "run").glob("0*")} == set()
    assert "no quality, videos or diagnostics: model.weights=random" in capsys.readouterr().err
    assert record["labels"] is None
    own = [one for one in given if one != "method=draft"] + ["method=xattention", "method.block=8"]
    folders = [f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'own'}"]
    assert main([*own, *size, "sparsity=0", "method.tau=0.5", "device=cpu", "tracking=disabled", *folders]) == 0
    record = records.read(tmp_path / "own" / "record.json")  # a knob of its own keeps what the data say
    assert record["status"] == "ok" and record["labels"] == {"density": "of random weights"}
