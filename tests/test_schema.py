"""What a config may hold: every config in conf, every key's limits, and the model and method it names."""

import sys
import types
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import ListConfig, OmegaConf

from draftbench import schema
from draftbench.attention import Method

CONF = Path(__file__).parent.parent / "conf"
OTHERS = ("hydra", "bench", "paper", "calibration")  # groups of other commands; what a command wrote
CHOICES = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name not in OTHERS]


def compose(*overrides):
    with hydra.initialize_config_module("draftbench.conf", version_base="1.3"):
        return hydra.compose("config", list(overrides))


@pytest.fixture(scope="module")
def default():
    return compose()


def changed(default, change):
    """The default config with some keys replaced; an added key needs no plus."""
    config = default.copy()
    OmegaConf.set_struct(config, False)
    for key, value in change.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda x: x)
def test_every_config_composes_and_its_method_instantiates(group, option):
    config = compose(f"{group}={option}")
    schema.check(config)
    method = schema.method(config)
    assert isinstance(method, Method)
    assert method.sparsity in (config.sparsity, 0)  # some controls drop nothing
    for name, value in config.model.geometry.items():
        if hasattr(method, name):
            assert getattr(method, name) in (value, tuple(value if isinstance(value, ListConfig) else ()))


def test_every_option_is_seen():
    assert {group for group, _ in CHOICES} >= {"model", "method", "tracking", "experiment"}


BAD = [
    ({"sparsity": 1.2}, "sparsity must be a number in [0, 1), got 1.2"),
    ({"sparsity": "abc"}, "sparsity must be a number in [0, 1), got 'abc'"),
    ({"sparsity": 1}, "sparsity must be a number in [0, 1), got 1"),
    ({"sparsity": -0.1}, "got -0.1"),
    ({"sparsity": float("nan")}, "got nan"),
    ({"sparsity": None}, "got null"),
    ({"sparsity": True}, "got true"),
    ({"sparsity": "${nope}"}, "sparsity cannot be resolved: Interpolation key 'nope' not found"),
    ({"prompts": ""}, "prompts must be a non-empty list of distinct, non-empty texts, got ''"),
    ({"prompts": ["turn left", " "]}, "got ' '"),
    ({"prompts": []}, "got []"),
    ({"prompts": [3]}, "got 3"),
    ({"prompts": None}, "got null"),
    ({"prompts": ["turn left", "turn left"]}, "got 'turn left' twice"),
    ({"seeds": []}, "seeds must be a non-empty list of distinct integers from 0 to 2^31 - 1, got []"),
    ({"seeds": [0, 1, 0]}, "got 0 twice"),
    ({"seeds": [-1]}, "got -1"),
    ({"seeds": [0.5]}, "got 0.5"),
    ({"seeds": [True]}, "got true"),
    ({"seeds": [2**31]}, f"got {2**31}"),
    ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
    ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
    ({"executor": "nope"}, "executor must be one of auto, reference, cpu, triton, gluon, flex, fa4, got 'nope'"),
    ({"dense": 3}, "dense must be keys and values, got 3"),
    ({"dense.steps": 1.5}, "dense.steps must be a number in [0, 1], got 1.5"),
    ({"dense.timestep": -1}, "dense.timestep must be null or a number of at least 0, got -1"),
    ({"dense.layers": 0.5}, "dense.layers must be an integer of at least 0, got 0.5"),
    ({"dense.foo": 1}, "unknown key dense.foo=1 (keys: dense.steps, dense.timestep, dense.layers)"),
    ({"metrics": ["fid"]}, "metrics must be a list of psnr_db, ssim, lpips, each once, got 'fid'"),
    ({"metrics": ["ssim", "ssim"]}, "got 'ssim' twice"),
    ({"lpips_net": "squeeze"}, "lpips_net must be one of alex, vgg, got 'squeeze'"),
    ({"latency.enabled": 1}, "latency.enabled must be true or false, got 1"),
    ({"latency.repeats": 0}, "latency.repeats must be an integer of at least 1, got 0"),
    *(({name: "yes"}, f"{name} must be true or false, got 'yes'") for name in ("diagnostics", "videos", "force")),
    ({"cache": None}, "cache must be a non-empty text, got null"),
    ({"tracking.mode": "on"}, "tracking.mode must be one of offline, online, disabled, got 'on'"),
    ({"tracking.project": ""}, "tracking.project must be a non-empty text, got ''"),
    ({"sparsty": 0.9}, "unknown key sparsty=0.9; did you mean sparsity? (keys: sparsity, prompts, "),
    ({"model": None}, "model must be keys and values, got null"),
    ({"model.frames": 0}, "model.frames must be an integer of at least 1, got 0"),
    ({"model.steps": 2.5}, "model.steps must be an integer of at least 1, got 2.5"),
    ({"model.shift": 0}, "model.shift must be a number above 0, got 0"),
    ({"model.geometry": None}, "model.geometry must be keys and values, got null"),
    (
        {"model.geometry.region": [0, 8]},
        "model.geometry.region must be null or two integers of at least 1 (h, w), got [0, 8]",
    ),
    ({"method.region": [8]}, "method.region must be null or two integers of at least 1 (h, w), got [8]"),
    ({"method.per_row": "abc"}, "method.per_row must be true or false, got 'abc'"),
    ({"method.pool": "median"}, "method.pool must be average or max, got 'median'"),
    ({"method.nope": 1}, "unknown key method.nope=1 (keys: method.sparsity, method.region, "),
    ({"method.sparsity": 1.5}, "sparsity must be in [0, 1), got 1.5"),
    ({"method._target_": "os.system"}, "method._target_ must be the path of a draftbench.attention.Method"),
    ({"method._target_": "draftbench.nope.X"}, "No module named 'draftbench.nope'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_a_bad_value_is_named_with_what_is_allowed(default, change, message):
    with pytest.raises(ValueError) as raised:
        schema.check(changed(default, change))
    text = str(raised.value)
    assert message in text and "\n" not in text and len(text) < 300
    assert next(iter(change)).partition(".")[2] in text


@pytest.mark.parametrize("key", ["sparsity", "model", "method", "dense.steps"])
def test_a_missing_key_is_named(default, key):
    config = changed(default, {})
    parent, _, name = key.rpartition(".")
    del (OmegaConf.select(config, parent) if parent else config)[name]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        schema.check(config)


def test_one_item_stands_for_a_list_and_an_integer_for_a_number(default):
    config = changed(default, {"prompts": "turn left", "seeds": 3, "metrics": "ssim", "sparsity": 0, "model.shift": 2})
    schema.check(config)
    assert (config.prompts, config.seeds, config.metrics) == (["turn left"], [3], ["ssim"])
    assert [type(x) for x in (config.sparsity, config.model.shift)] == [float, float]


def test_an_unknown_key_suggests_the_nearest_under_the_same_parent_first():
    known = ["sparsity", "method.sparsity", "model.frames", "model.steps", "dense.steps"]
    assert "did you mean sparsity?" in str(schema.unknown("sparsty=1", known))
    assert "did you mean model.frames?" in str(schema.unknown("frames=1", known))
    assert "did you mean dense.steps or model.steps?" in str(schema.unknown("steps=1", known))
    assert str(schema.unknown("model.stepz=1", known, ["a", "b"])) == (
        "unknown key model.stepz=1; did you mean model.steps? (keys: a, b)"
    )
    assert "did you mean" not in str(schema.unknown("zzz=1", known))


class FakeModel:
    """Takes prompts of one word."""

    def __init__(self, words: int, name: str = "fake"):
        if words < 1:
            raise FileNotFoundError("no such weights: words.safetensors")
        self.words, self.device = words, torch.device("cpu")

    def check_memory(self):
        pass

    def check(self, prompts):
        for prompt in prompts:
            if len(prompt.split()) > self.words:
                raise ValueError(f"prompt has too many words: {prompt!r}")


@pytest.fixture
def fake(default, monkeypatch):
    module = types.ModuleType("fake_model")
    module.FakeModel = FakeModel
    monkeypatch.setitem(sys.modules, "fake_model", module)
    return lambda **change: changed(default, {"model": {"_target_": "fake_model.FakeModel", "words": 9}, **change})


def test_check_job_makes_the_model_and_asks_it_about_the_prompts(fake):
    assert isinstance(schema.check_job(fake(**{"model.geometry": {"region": [4, 8]}})), FakeModel)
    with pytest.raises(ValueError, match=r"^prompt has too many words: 'a b c d e f g h i j'$"):
        schema.check_job(fake(prompts=["a", "a b c d e f g h i j"]))


def test_check_job_raises_the_models_own_error(fake):
    with pytest.raises(FileNotFoundError, match=r"^no such weights: words.safetensors$"):
        schema.check_job(fake(model={"_target_": "fake_model.FakeModel", "words": 0}))
    with pytest.raises(ValueError, match=r"model has a key too many or too few: .*'wrds'"):
        schema.check_job(fake(model={"_target_": "fake_model.FakeModel", "wrds": 0}))
    with pytest.raises(ValueError, match=r"model\._target_ is missing"):
        schema.check_job(fake(model={"words": 0}))
    with pytest.raises(ValueError, match=r"model cannot be made: .*fake_model.Nope"):
        schema.check_job(fake(model={"_target_": "fake_model.Nope"}))


def test_check_job_looks_at_device_executor_and_lpips_weights(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda needs"):
        schema.check_job(fake(device="cuda"))
    with pytest.raises(RuntimeError, match="executor=triton cannot run here: it needs a CUDA device"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        schema.check_job(fake(executor="triton"))
    monkeypatch.setenv("DRAFTBENCH_LPIPS_VGG", str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        schema.check_job(fake(lpips_net="vgg"))
    schema.check_job(fake(lpips_net="vgg", metrics=["psnr_db"]))


@pytest.mark.parametrize(
    ("key", "count", "allowed"),
    [
        ("step", 8, "null or an integer from 0 to 7, of the model's 8 steps"),
        ("layer", 6, "null or an integer from 0 to 5, of the model's 6 layers"),
        ("head", 6, "an integer from 0 to 5, of the model's 6 heads"),
    ],
)
def test_maps_of_a_call_that_is_never_made_are_refused_before_work(default, key, count, allowed):
    change = {"diagnostics": True, f"maps.{key}": count, "device": "cpu"}
    with pytest.raises(ValueError, match=rf"^maps.{key} must be {allowed}, got {count}$"):
        schema.check_job(changed(default, change))
    schema.check_job(changed(default, change | {f"maps.{key}": count - 1}))
