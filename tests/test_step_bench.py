"""The step benchmark on a CPU: a tiny model end to end, compiled and not, what fails, and its table and picture."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from draftbench.kernels import fa4
from draftbench.methods.svg import SVG
from torch._dynamo.utils import counters

from draftbench import bench, records, step_bench, step_tables, tables
from draftbench.latency import Timing
from draftbench.models.pipeline import Pipeline
from draftbench.promote import promote
from draftbench.step_bench import CASES, DENSE_STEPS

TINY = ["bench=step", "bench.models=tiny", "bench.repeats=2"]
STEPS = 10


def tiny_vae(model):
    from diffusers import AutoencoderKLHunyuanVideo

    assert model.pipe.vae is None  # a step, and its peak of memory, has none
    sizes = dict(latent_channels=16, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    return AutoencoderKLHunyuanVideo(**sizes).eval()


def failing(self, q, k, v, call):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TiB")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of everything, whose blocks are compiled by a backend that counts, and whose svg fails."""
    folder, graphs, usual = tmp_path_factory.mktemp("step") / "run", [], Pipeline.compile_blocks

    def compile_blocks(self, pipe):
        usual(self, pipe, lambda graph, inputs: graphs.append(graph) or graph.forward)

    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "compile_blocks", compile_blocks)
        patch.setattr(Pipeline, "random_vae", tiny_vae)
        patch.setattr(Pipeline, "random_encoding", lambda model: lambda: None)
        patch.setattr(SVG, "plan", failing)
        patch.setattr(torch._dynamo, "reset", lambda: None)  # for the counters
        methods = "bench.methods=[sdpa,fa4,stock,svg,draft]"
        code = bench.main(
            [*TINY, methods, "bench.generation=true", "bench.text_encoders=true", "bench.profile=true",
             f"hydra.run.dir={folder}"]
        )  # fmt: skip
    found = dict(code=code, folder=folder, graphs=graphs, counters={name: dict(n) for name, n in counters.items()})
    torch._dynamo.reset()
    return found | {"rows": records.read_all([folder])}


@pytest.fixture
def rows(run):
    return run["rows"]


def one(rows, contestant, compiled=False, layers=0, what="step"):
    key = dict(contestant=contestant, compiled=compiled, dense_layers=layers, what=what)
    (row,) = (row for row in rows if all(row[name] == value for name, value in key.items()))
    return row


def test_a_run_has_every_row_and_fails_for_the_failed(run, rows):
    assert run["code"] == 1
    steps = [row for row in rows if row["what"] == "step"]
    assert len(steps) == 2 * (3 + 2 * 2) and len({row["cell_id"] for row in rows}) == len(rows)
    for compiled in (False, True):
        for layers in (0, 1):
            row = one(rows, "svg", compiled, layers)
            assert (
                row["status"] == "failed: OutOfMemoryError: CUDA out of memory." and row["ms"] is row["speedup"] is None
            )
        assert one(rows, "fa4", compiled)["status"] == f"absent: {fa4.unavailable(torch.device('cpu'))}"
    for row in steps:
        if row["status"] == "ok":
            assert row["forwards"] == 1 and row["ms"]["n"] == len(row["times_ms"]) == 2 and row["warm_up_s"] > 0
            dense = one(rows, "sdpa", row["compiled"])
            assert row["dense"] == {"contestant": "sdpa", "ms": dense["ms"]["p50"]}
            assert row["speedup"] == pytest.approx(dense["ms"]["p50"] / row["ms"]["p50"])
    text = (run["folder"] / "table.md").read_text()
    assert "- svg: failed: OutOfMemoryError: CUDA out of memory. (0.5, not compiled; " in text
    assert "- fa4: absent: it needs a CUDA device" in text


def test_density_counts_dense_layers_and_text(rows):
    layers, video, text = 5, 3 * 6 * 10, 5
    for layers_dense in (0, 1):
        row = one(rows, "draft", layers=layers_dense)
        kept = (video + text) ** 2 - row["sparsity_achieved"] * video**2
        sparse = kept / (video + text) ** 2
        expected = (layers_dense + (layers - layers_dense) * sparse) / layers
        assert row["density_effective"] == pytest.approx(expected)
        assert row["sparsity_achieved"] == pytest.approx(0.5, abs=0.05)
    assert one(rows, "sdpa")["density_effective"] == one(rows, "stock")["density_effective"] == 1


def test_a_draft_row_says_which_regions_ran(rows):
    stacked = [row["method_settings"]["stacked"] for row in rows if row["contestant"] == "draft"]
    assert stacked and all(stacked)  # 4x4 on 3 frames of 6x10: 5 x 3 regions from frame to frame, 3 x 2 x 3 apart


def test_parts(rows):
    for compiled in (False, True):
        row = one(rows, "draft", compiled)
        assert row["parts_ms"]["kernel"] > 0 and row["parts_ms"]["select"] > 0 and row["parts_ms"]["rest"] > 0
        assert set(step_tables.grouped(row)) == set(step_tables.COLOURS)
        assert sum(step_tables.grouped(row).values()) == pytest.approx(sum(row["parts_ms"].values()))
        dense = one(rows, "sdpa", compiled)
        assert sum(dense["parts_ms"].values()) == pytest.approx(dense["ms"]["p50"], abs=1e-3)
    assert one(rows, "stock")["parts_ms"] is None


def test_the_profile_tells_products_from_attention(rows):
    for compiled in (False, True):
        dense, sparse, stock = (one(rows, name, compiled)["profile"] for name in ("sdpa", "draft", "stock"))
        assert dense["matmul_tflop"] == sparse["matmul_tflop"] > 0  # attention's own are not among them
        assert dense["attention_ms"] > 0 and sparse["attention_ms"] > 0 and stock["attention_ms"] is None
        for found in (dense, sparse, stock):
            told = found["matmul_ms"] + found["fused_ms"] + found["other_ms"] + (found["attention_ms"] or 0)
            assert told == pytest.approx(found["step_ms"]) and found["matmul_ms"] > 0
            times = [ms for *_, ms in found["kernels"]]
            assert times == sorted(times, reverse=True) and len(times) == 24
    assert "matrix products, s" in step_tables.page(rows, "tiny").markdown()


def test_generations_are_composed_or_measured(rows):
    for compiled in (False, True):
        dense, sparse = one(rows, "sdpa", compiled), one(rows, "draft", compiled, 1)
        composed = one(rows, "draft", compiled, 1, "composed")
        first = 3
        seconds = (first * dense["ms"]["p50"] + (STEPS - first) * sparse["ms"]["p50"]) / 1000
        assert composed["generate_s"] == pytest.approx(seconds) and composed["composed"] is True
        assert composed["speedup"] == pytest.approx(STEPS * dense["ms"]["p50"] / 1000 / seconds)
        assert composed["dense_steps"] == first == DENSE_STEPS * STEPS
        share = (first + (STEPS - first) * sparse["density_effective"]) / STEPS
        assert composed["density_effective"] == pytest.approx(share)
        assert one(rows, "sdpa", compiled, 0, "composed")["speedup"] == 1
        for name, layers in (("sdpa", 0), ("draft", 1)):
            measured = one(rows, name, compiled, layers, "generation")
            assert measured["status"] == "ok" and measured["composed"] is False
            assert measured["generate_s"] > measured["denoise_s"] + measured["decode_s"] > measured["decode_s"] > 0
            whole = one(rows, "sdpa", compiled, what="generation")["generate_s"]
            assert measured["speedup"] == pytest.approx(whole / measured["generate_s"])
            assert measured["not_timed"] is None and measured["text_s"] >= 0


def test_blocks_compile_once_for_all_contestants(run):
    # Double-stream blocks, the first single-stream one and the others, with the hook's processor and diffusers' own.
    assert len(run["graphs"]) == run["counters"]["stats"]["unique_graphs"] == 6
    assert not run["counters"].get("graph_break")
    joint = torch.ops.draftbench.attend_joint
    attends = [sum(node.target is joint for node in graph.graph.nodes) for graph in run["graphs"]]
    assert sorted(attends) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("name", "billions"), [("hunyuan_768p", [7.50, 0.123]), ("wan14b_768p", [5.68])])
def test_text_encoders_have_the_checkpoints_sizes(name, billions, monkeypatch):
    model = step_bench.schema.model(replace(CASES[name], device="cpu").config())
    monkeypatch.setattr(model, "device", torch.device("meta"))
    made, usual = [], model._random_network
    monkeypatch.setattr(model, "_random_network", lambda *args: made.append(usual(*args)) or made[-1])
    model.random_encoding()
    assert [sum(p.numel() for p in one.parameters()) / 1e9 for one in made] == pytest.approx(billions, rel=0.02)
    assert {str(p.dtype) for one in made for p in one.parameters()} <= {"torch.bfloat16", "torch.float16"}


def test_random_text_encoders_read_tokens(monkeypatch, one_thread):
    model = step_bench.schema.model(CASES["tiny"].config())
    small = {name: 16 for name in ("hidden_size", "intermediate_size", "d_model", "d_ff", "d_kv")}
    small |= dict(num_hidden_layers=1, num_layers=1, num_heads=2, num_attention_heads=2, num_key_value_heads=2)
    wan = step_bench.schema.model(replace(CASES["wan14b_768p"], device="cpu").config())
    seen = []
    for one in (model, wan):
        makers = []
        for make, length in one.random_encoders():
            (config,) = make.args
            kept = {name: value for name, value in small.items() if name in config.to_dict()}
            makers.append((functools.partial(make.func, type(config)(**config.to_dict() | kept)), length))
        monkeypatch.setattr(one, "random_encoders", lambda makers=makers: makers)
        network = one._random_network
        monkeypatch.setattr(one, "_random_network", lambda *args, network=network: spied(network(*args), seen))
        with torch.no_grad():
            one.random_encoding()()
    assert seen == [351, 77, 512, 512]  # Wan's guidance reads a negative prompt, too


def spied(network, seen):
    network.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    return network


def test_steps_in_which_a_block_was_compiled_are_timed_again(monkeypatch):
    step, calls = step_bench.Step(step_bench.schema.model(CASES["tiny"].config()), step_bench.Contestant("sdpa")), []

    def once(session):
        calls.append(0)
        counters["stats"]["unique_graphs"] += len(calls) == 2
        return Timing([1.0], [float(len(calls))], [0.5])

    monkeypatch.setattr(step, "once", once)
    assert step.timed(2)["times_ms"] == [3.0, 4.0] and len(calls) == 4


def test_the_model_is_as_it_was_after_warm_up_and_stock(one_thread):
    model = step_bench.schema.model(CASES["tiny"].config())
    before = model.pipe.transformer.state_dict().keys()
    step = step_bench.Step(model, step_bench.Contestant("stock"))
    with step_bench.shortened(model.hook, model.pipe, 2):
        assert len(model.hook.blocks(model.pipe.transformer)) == 4
    assert step.warm_up()["forwards"] == 1 and len(model.hook.blocks(model.pipe.transformer)) == 5
    assert model.pipe.transformer.state_dict().keys() == before
    assert "step" not in vars(model.pipe.scheduler) and not model.pipe.transformer._forward_pre_hooks
    with pytest.raises(RuntimeError), step_bench.shortened(model.hook, model.pipe, 1):
        raise RuntimeError
    assert len(model.hook.blocks(model.pipe.transformer)) == 5


def test_stock_and_dense_compute_the_same(one_thread, monkeypatch):
    model = step_bench.schema.model(CASES["tiny"].config())
    scheduler, found = type(model.pipe.scheduler), []
    usual = scheduler.step

    @functools.wraps(usual)
    def spy(self, noise, *args, **kwargs):
        found.append(noise)
        return usual(self, noise, *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", spy)
    for name in ("stock", "sdpa"):
        step_bench.Step(model, step_bench.Contestant(name)).timed(1)
    assert len(found) == 2 and found[0].abs().max() > 0.01
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("bench.models=hunyuan_768p", "bench.models: hunyuan_768p needs a CUDA GPU, and torch sees none"),
        (
            "bench.models=[all]",
            "bench.models: hunyuan_768p, hunyuan_512p, wan14b_768p, wan14b_480p need a CUDA GPU, and torch sees none",
        ),
        ("bench.models=[x]", "bench.models must be one of all, hunyuan_768p, "),
        ("bench.methods=[draft]", "bench.methods must have a dense one to compare with (gluon, fa4, cudnn, sdpa)"),
        ("bench.methods=[sdpa,nope]", "bench.methods must be of stock, gluon, fa4, cudnn, sdpa, dense, draft, "),
        (
            "bench.methods=[sdpa,svg2]",
            "bench.methods: what svg2 keeps depends on the data, which random weights do not",
        ),
        ("bench.methods=[sdpa,other_seed]", "bench.methods: other_seed is a control of the dense run"),
        ("bench.methods=[sdpa,re_ttention]", "bench.methods: steps of re_ttention differ"),
        ("bench.sparsities=[1.0]", "bench.sparsities must be null or distinct numbers in [0, 1), got 1.0"),
        ("bench.sparsities=[]", "bench.sparsities must be null or distinct numbers in [0, 1), got []"),
        ("bench.layers=[-1]", "bench.layers must be null or distinct integers of at least 0, got -1"),
        ("bench.layers=[0,5]", "bench.layers must be integers below 5, the layers of tiny, got 5"),
        ("bench.compile=[1]", "bench.compile must be a list of true or false, each once, got 1"),
        ("bench.methods=[foo]", "bench.methods must be of stock, "),
        ("bench.repeats=0", "bench.repeats must be an integer of at least 1, got 0"),
        ("bench.shapes=[tiny]", "unknown key bench.shapes (keys: bench.models, "),
    ],
)
def test_bad_input_is_refused_in_a_line(argument, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([*TINY, argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("draftbench: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_promote_tables_and_picture(run, rows, tmp_path, capsys):
    source = promote([run["folder"]], "steps", tmp_path / "in", allow_dirty=True)
    promoted = records.read_all([source])
    assert sorted(row["cell_id"] for row in promoted) == sorted(row["cell_id"] for row in rows)
    folders = [f"{name}={tmp_path / name}" for name in ("out", "figures")]
    folders += [f"records={tmp_path / 'in'}", f"readme={tmp_path / 'R.md'}", f"quoted={tmp_path}"]
    (tmp_path / "R.md").write_text("<!-- table steps -->\n<!-- end -->\n")
    assert tables.main(folders) == 0 and tables.main([*folders, "--check"]) == 0
    assert "| tiny, draft 50% (1 dense layer) | " in (tmp_path / "R.md").read_text()
    assert (tmp_path / "figures" / "steps.png").is_file()
    page = (tmp_path / "out" / "steps.md").read_text()
    assert "| sdpa | 0 | 0 | 10 of 10 | 1.000 | compiled | its steps |" in page and "| a run |" in page
    other = json.loads(source.read_text().splitlines()[0]) | {"device": "another"}
    with pytest.raises(ValueError, match="some: rows with different device share no table"):
        step_tables.page([*promoted, other], "some")
    with pytest.raises(ValueError, match="some: tiny compiled: rows with different commit share no table"):
        step_tables.page([*promoted, next(row for row in promoted if row["compiled"]) | {"commit": "f" * 40}], "some")
    later = [row | {"commit": "f" * 40} if row["compiled"] else row for row in promoted]
    assert "`ffffffffffff`" in step_tables.page(later, "some").markdown().splitlines()[2]


def test_help_names_models_and_keys(capsys):
    assert bench.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(text in page for text in ("bench=step", "wan14b_480p", "dense_repeats: 2"))
