"""HunyuanVideo's adapter, on a tiny random checkpoint that is written to disk and loaded as a real one would be."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from draftbench.kernels import dense, run
from draftbench.methods.dense import Dense

from draftbench import records
from draftbench.attention import DenseParts, Method, Request, Session, Watch
from draftbench.models.hunyuan_video import HunyuanVideo

CONF = Path(__file__).parent.parent / "conf"
METHODS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "method").glob("*.yaml"))}
METHODS.pop("fewer_steps")  # takes another method, and is dense itself
KNOBS = {"region": (2, 4), "tile": (2, 2, 4), "block": 16}
LAYERS, STEPS = 4, 3
GRID = (5, 3, 7)  # ragged for every knob
WORDS = ["a", "cat", "runs", "wet", "dog", "over", "the", "hill"]
SHORT, LONGER = "a cat", "a wet dog runs over the hill"
FULL = " ".join(WORDS * 40)  # cut at the pipeline's 256 tokens, so no padding is left
PATTERN = "hf download some/model --revision main"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny HunyuanVideoPipeline on disk; its tokenizers know the words of the prompt template and a few more."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
    from diffusers import HunyuanVideoTransformer3DModel as Transformer
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    known = {word for word, _ in split.pre_tokenize_str(DEFAULT_PROMPT_TEMPLATE["template"])} | set(WORDS)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(known)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = split
    llama, clip = (PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>") for _ in range(2))
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, intermediate_size=32, vocab_size=len(vocabulary), pad_token_id=0)
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=3, **sizes)),
        tokenizer=llama,
        transformer=Transformer(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=1, eos_token_id=2, **sizes)),
        tokenizer_2=clip,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hunyuan") / "checkpoint"
    pipe.save_pretrained(folder)
    return folder


def make(folder, **changes):
    config = dict(
        name="hunyuan_video", path=folder and str(folder), hub_id="some/model", revision="main", frames=17, height=48,
        width=112, steps=STEPS, shift=7.0, guidance=6.0, true_cfg=1.0, dtype="float32", fps=24, device="cpu",
    )  # fmt: skip
    return HunyuanVideo(**config | changes)


@pytest.fixture(scope="module")
def model(checkpoint):
    return make(checkpoint)


@pytest.fixture(scope="module")
def guided(checkpoint):
    return make(checkpoint, true_cfg=3.0)


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


def test_compiled_blocks_stay_as_they_are_over_steps_layers_and_methods(checkpoint, model):
    from torch._dynamo.utils import counters

    compiled = make(checkpoint)
    graphs = []
    compiled.compile_blocks(compiled.pipe, lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    counters.clear()
    hooked(compiled, batch(LONGER, steps=1), Spy())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for method in (Dense(), build("draft", 0.5), build("svg", 0.5)):
            assert torch.equal(hooked(compiled, batch(LONGER), Spy(method)), hooked(model, batch(LONGER), Spy(method)))
    # One of the double blocks; two of the single ones, of which the first gets tensors of other strides.
    assert len(graphs) == counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    for graph in graphs:
        assert sum(node.target is torch.ops.draftbench.attend for node in graph.graph.nodes) == 1
    torch._dynamo.reset()


def build(name, sparsity):
    config = METHODS[name]
    module, _, kind = config["_target_"].rpartition(".")
    knobs = {key: KNOBS[key] for key in config if key in KNOBS}
    return getattr(importlib.import_module(module), kind)(sparsity=sparsity, **knobs)


def state(model):
    """All that the hook changes."""
    transformer = model.pipe.transformer
    processors = [(name, id(processor)) for name, processor in transformer.attn_processors.items()]
    return processors, len(transformer._forward_pre_hooks), "cache_context" in vars(transformer)


def test_generates_clips_from_disk(model):
    clips = model.generate(batch(SHORT, LONGER), Spy())
    assert clips.shape == (2, 17, 3, 48, 112) and clips.dtype == torch.uint8 and clips.device.type == "cpu"
    assert not torch.equal(clips[0], clips[1])
    expected = model.pipe(**model.arguments(batch(SHORT, LONGER)), output_type="np").frames
    difference = clips.float() - torch.from_numpy(expected * 255).round().permute(0, 1, 4, 2, 3)
    assert difference.abs().max() <= 1
    assert model.grid == GRID


@pytest.mark.parametrize("prompts", [(FULL,), (FULL, FULL)], ids=["one", "two"])
def test_dense_is_bit_identical_without_padding(model, prompts):
    session = Spy()
    assert torch.equal(hooked(model, batch(*prompts), session), stock(model, batch(*prompts)))
    assert session.asked[0]["layout"].text == 256


@pytest.mark.parametrize("kind", ["model", "guided"])
@pytest.mark.parametrize("prompts", [(SHORT,), (SHORT, LONGER), (FULL, SHORT)], ids=["one", "two", "far"])
def test_dense_is_close_with_padding(kind, prompts, request):
    # a mask and a crop run different kernels, or the same one in other tiles
    model, wanted = request.getfixturevalue(kind), batch(*prompts)
    torch.testing.assert_close(hooked(model, wanted, Spy()), stock(model, wanted), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("name", METHODS)
def test_methods_at_sparsity_zero_are_dense(name, model):
    wanted = batch(SHORT, LONGER)
    session = Spy(build(name, 0.0))
    expected = hooked(model, wanted, Spy())
    torch.testing.assert_close(hooked(model, wanted, session), expected, atol=1e-4, rtol=1e-4)
    assert session.meter.density() == [1, 1]


@pytest.mark.parametrize("name", [name for name in METHODS if build(name, 0.5).sparsity])
def test_methods_run_sparse(name, model):
    session = Spy(build(name, 0.5))
    latents = hooked(model, batch(SHORT, LONGER), session)
    assert latents.isfinite().all()
    assert not torch.equal(latents, hooked(model, batch(SHORT, LONGER), Spy()))
    # one of the three steps is in the dense share of a quarter
    assert session.meter.calls == STEPS * LAYERS and session.meter.sparse_calls == (STEPS - 1) * LAYERS
    assert all(abs(achieved - 0.5) < 0.1 for achieved in session.meter.sparsity())


def test_calls_carry_layout_lengths_layers_and_seeds(model):
    session = Spy()
    hooked(model, batch(SHORT, LONGER), session)
    assert [(call["step"], call["layer"]) for call in session.asked] == [
        (step, layer) for step in range(STEPS) for layer in range(LAYERS)
    ]
    lengths = [len(prompt.split()) + 7 for prompt in (SHORT, LONGER)]  # 7 tokens of the template stay
    for call in session.asked:
        assert call["text_lengths"].tolist() == lengths and call["text_lengths"].dtype == torch.int64
        assert call["layout"].grid == GRID and call["layout"].text == max(lengths)
        assert call["shape"] == (2, 5 * 3 * 7 + max(lengths), 2, 16)
        assert (call["branch"], call["seeds"], call["head_offset"]) == ("cond", (5, 6), 0)


def test_branches_run_in_turn_at_each_step(guided):
    session = Spy(build("draft", 0.5))
    hooked(guided, batch(SHORT, LONGER), session)
    assert [(call["step"], call["branch"], call["layer"]) for call in session.asked] == [
        (step, branch, layer) for step in range(STEPS) for branch in ("cond", "uncond") for layer in range(LAYERS)
    ]
    assert all(call["text_lengths"].tolist() == [7, 7] for call in session.asked if call["branch"] == "uncond")
    assert [step for step, _, _ in session.begun] == [*range(STEPS)]
    assert session.meter.sparse_calls == 2 * (STEPS - 1) * LAYERS


def test_steps_are_the_schedulers(model):
    session = Spy()
    model.generate(batch(SHORT), session)
    line = [1 - step / STEPS for step in range(STEPS)]
    expected = [(step, STEPS, 1000 * 7 * s / (1 + 6 * s)) for step, s in enumerate(line)]
    assert [begun[:2] for begun in session.begun] == [step[:2] for step in expected]
    assert [begun[2] for begun in session.begun] == pytest.approx([step[2] for step in expected], rel=1e-5)


def test_steps_survive_bfloat16(checkpoint):
    model, session, seen = make(checkpoint, dtype="bfloat16"), Spy(), []
    transformer = model.pipe.transformer
    assert transformer.dtype == torch.bfloat16 and model.pipe.vae.dtype == torch.float32
    note = lambda module, args, inputs: seen.append(float(inputs["timestep"][0]))  # noqa: E731
    transformer.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(batch(SHORT, steps=50), session, last_step=20)
    assert len(set(seen)) < 20  # rounded: what the transformer gets cannot tell one step from the next
    assert [begun[:2] for begun in session.begun] == [(step, 50) for step in range(20)]


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
    assert watch.events == [*range(last_step), "finish"] and len(session.asked) == last_step * LAYERS
    assert clips.shape == (2, 0, 3, 48, 112) and clips.dtype == torch.uint8
    assert len(model.generate(batch(SHORT), Spy())[0]) == 17  # the next run is a whole one


class Broken(Method):
    """Fails at its first sparse call."""

    def plan(self, q, k, v, call):
        raise ArithmeticError("broken")


def test_the_pipeline_is_restored(model):
    before, expected = state(model), stock(model, batch(SHORT))
    hook = model.patched(Spy(), (0,))
    with hook:
        inside = state(model)
    changed = [name for (name, old), (_, new) in zip(before[0], inside[0], strict=True) if old != new]
    assert len(changed) == LAYERS and not any("context_embedder" in name for name in changed)
    assert state(model) == before
    model.generate(batch(SHORT), Spy(build("draft", 0.5)))
    assert state(model) == before
    with pytest.raises(ArithmeticError, match="broken"):
        model.generate(batch(SHORT), Spy(Broken(0.5)))
    assert state(model) == before
    assert torch.equal(stock(model, batch(SHORT)), expected)


def test_another_instance_is_not_touched(model, guided):
    before = state(guided)
    with model.patched(Spy(), (0,)):
        assert state(guided) == before


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


def test_another_pipelines_folder(copy):
    (copy / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="must hold a HunyuanVideoPipeline, got WanPipeline"):
        make(copy)


def test_hugging_face_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"model.path=null and some/model .* not in .* cache; .*{PATTERN}"):
        make(None)
    repository, commit = tmp_path / "models--some--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    assert make(None).weights_hash == make(checkpoint).weights_hash
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
        ({"dtype": "int8"}, "model.dtype must be bfloat16 or float32, got 'int8'"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_bad_values(checkpoint, change, message):
    with pytest.raises(ValueError, match=message):
        make(checkpoint, **change)


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


def test_config_has_the_constructors_keys():
    config = yaml.safe_load((CONF / "model" / "hunyuan_video.yaml").read_text())
    assert config.pop("_target_") == f"{HunyuanVideo.__module__}.{HunyuanVideo.__qualname__}"
    assert set(config.pop("geometry")) == {"region", "tile", "block"}
    assert set(config) == set(inspect.signature(HunyuanVideo).parameters)


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
