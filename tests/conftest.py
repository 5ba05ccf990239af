"""A random network of pocket's anatomy, and configs that run it in a moment."""

import itertools
import os
import random
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

# Triton reads it when it is first imported, by whichever test that is.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from hydra import compose, initialize_config_module

from draftbench import schema
from draftbench.models.pocket.model import PocketConfig, PocketDiT
from draftbench.models.pocket.train import save

LAYERS = 2


def pytest_addoption(parser):
    """A folder with clones of official repositories, as tests/test_official.py names them; where logs, pictures go."""
    parser.addoption("--official", help="folder with clones of the methods' official repositories")
    parser.addoption("--slurm-log", help="file that tests/test_slurm.py writes what it saw to")
    parser.addoption("--screenshots", metavar="FOLDER", help="where tests/test_report.py saves what a browser showed")


def pairwise(axes):
    """Few rows, as tuples, that hold every pair of values of two axes; axes: {name: values}."""
    draw = random.Random(0)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b]}
    while left:
        (a, x), (b, y) = min(left, key=repr)
        rows = [{name: draw.choice(values) for name, values in axes.items()} | {a: x, b: y} for _ in range(100)]
        best = max(rows, key=lambda row: len(left.intersection(itertools.combinations(row.items(), 2))))
        left -= set(itertools.combinations(best.items(), 2))
        yield tuple(best.values())


def pytest_generate_tests(metafunc):
    """`@pytest.mark.pairs(a=[...], b=[...])`: pairs of values by default, the other combinations as `full`.

    `@pytest.mark.together("a")` beside it: those of one value run in one process with `--dist loadgroup`.
    """
    marker, together = (metafunc.definition.get_closest_marker(name) for name in ("pairs", "together"))
    if marker:
        few = set(pairwise(marker.kwargs))
        rows = []
        for row in itertools.product(*marker.kwargs.values()):
            marks = [] if row in few else [pytest.mark.full]
            if together:
                named = dict(zip(marker.kwargs, row, strict=True))
                group = " ".join(str(named[name]) for name in together.args)
                marks.append(pytest.mark.xdist_group(f"{metafunc.function.__name__} {group}"))
            rows.append(pytest.param(*row, marks=marks))
        metafunc.parametrize(list(marker.kwargs), rows, ids=lambda value: str(value).removeprefix("torch."))


def pytest_collection_modifyitems(config, items):
    """What is `full` runs only if it is asked for, also where another mark selects it."""
    if "full" not in config.option.markexpr or config.option.markexpr == "not full":
        rest = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if item not in set(rest)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Makes a weights file from a seed: two layers, random throughout, so that attention shapes the frames."""

    def make(seed=0):
        path = folder / f"{seed}.safetensors"
        if not path.exists():
            torch.manual_seed(seed)
            model = PocketDiT(PocketConfig(width=32, depth=LAYERS, heads=2, hidden=32))
            for layer in (model.out, model.modulation, model.last):
                torch.nn.init.normal_(layer.weight, std=0.1)
            save(model.state_dict(), model.config, path)
        return path

    folder = tmp_path_factory.mktemp("weights")
    return make


@pytest.fixture
def one_thread():
    """Threads that wait for one another cost a tiny network more than they bring, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path, tiny):
    """Overrides that run a job in a moment: a grid of 5x8x12 tokens, two steps, the first dense."""
    return [
        f"model.weights={tiny()}", "model.frames=5", "model.height=32", "model.width=48", "model.steps=2",
        "model.geometry.region=[4,4]", "device=cpu", "tracking=disabled", "videos=false", "metrics=[psnr_db]",
        f"cache={tmp_path}/cache",
    ]  # fmt: skip


@pytest.fixture
def configured(one_thread, small):
    """Composes and checks a config of `small`'s size; untimed unless asked for."""

    def make(*overrides):
        with initialize_config_module("draftbench.conf", version_base="1.3"):
            config = compose("config", [*common, *overrides])
        schema.check(config)
        return config

    common = [*small, "model.geometry.tile=[1,4,4]", "model.geometry.block=16", "latency.enabled=false"]
    return make


COMPILED = r"""
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)

def compiled(kernel, launch, aligned=(), **types):
    # What Triton made of a kernel, and its registers, without a spill; its pointers are multiples of 16, and `aligned`
    fixed = {name: launch.pop(name) for name in list(launch) if name.isupper()}
    names = [param.name for param in kernel.params]
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    multiples = {name for name in names if signature[name][0] == "*"} | set(aligned)
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in multiples}
    made = triton.compile(ASTSource(kernel, signature, fixed, hints), target=HOPPER, options=launch)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(made.asm["ptx"])
        ptx.flush()
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", ptx.name, "-o", ptx.name + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    return made, int(re.search(r"Used (\d+) registers", said)[1])

"""


@pytest.fixture
def compiled_alone(tmp_path):
    """Run a script that compiles kernels for a GPU and then prints "compiled", in a process without the interpreter.

    It has `compiled` and `HOPPER` of `COMPILED`.
    """

    def run(text):
        script = tmp_path / "compiled.py"  # Triton reads the source of its kernels from files
        script.write_text(COMPILED + text)
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, env=env, check=False)
        assert ran.stdout.startswith("compiled"), ran.stderr

    return run


@pytest.fixture
def no_waiting():
    """A context in which whatever waits for the GPU is an error."""

    @contextmanager
    def context():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
