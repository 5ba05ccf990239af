"""Pocket: prompts, sampler, network, weights, adapter, judge, and what training feeds it."""

import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from draftbench.kernels import dense as dense_kernel
from draftbench.kernels import run
from draftbench.methods.dense import Dense
from draftbench.methods.draft import Draft
from safetensors.torch import save_file

from draftbench.attention import DenseParts, Request, Session
from draftbench.models.pocket import adapter, card, check, judge, model, prompts, sampler, train

FOLDER = Path(adapter.__file__).parent
WEIGHTS = FOLDER / "weights" / "pocket.safetensors"


@pytest.fixture
def pocket(tiny, one_thread):
    def make(**options):
        small = {"weights": str(tiny()), "frames": 5, "height": 32, "width": 40, "steps": 2, "device": "cpu"}
        return adapter.Pocket(**small | options)

    return make


def session(method=None, parts=None):
    return Session(method or Dense(), run("cpu"), dense_kernel.run, parts or DenseParts(0))


def test_a_prompt_is_its_words_padded():
    ids = prompts.tokens("Turn left, in the brick hall.")
    assert len(ids) == prompts.LENGTH and ids[6:] == [0, 0]
    assert [prompts.WORDS[i] for i in ids[:6]] == ["turn", "left", "in", "the", "brick", "hall"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("turn left in the blue maze", r"\['blue', 'maze'\]; its words are: walk forward .* lamp"),
        ("", "must name a motion or a scene, got ''; words: walk forward"),
        (" , ", "must name a motion or a scene"),
        ("turn left " * 5, "at most 8 words, got 10"),
        ("<pad>", "does not know"),
    ],
)
def test_a_bad_prompt_is_told_what_is_allowed(prompt, message):
    with pytest.raises(ValueError, match=message):
        prompts.tokens(prompt)


def test_labels_are_what_a_sentence_was_made_of():
    for motion, scene in itertools.product([None, *range(6)], [None, *range(6)]):
        for scene_first in (False, True):
            text = prompts.sentence(motion, scene, scene_first)
            assert prompts.labels(text) == (motion, scene)
            assert not text or len(prompts.tokens(text)) == prompts.LENGTH
    assert prompts.labels("Turn LEFT, in the brick hall.") == (2, 4)


def test_noise_levels_fall_from_one_to_zero_and_shift_lifts_them():
    for steps, shift in itertools.product((1, 2, 20), (0.5, 1.0, 3.0)):
        levels = sampler.noise_levels(steps, shift)
        assert len(levels) == steps + 1 and levels[0] == 1 and levels[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(levels))
    plain, shifted = sampler.noise_levels(4, 1.0), sampler.noise_levels(4, 3.0)
    assert plain == [1, 0.75, 0.5, 0.25, 0]
    assert shifted == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_initial_noise_is_of_the_seed_and_not_of_the_batch():
    shape = (2, 3, 8, 8)
    both = sampler.initial_noise([4, 9], shape)
    assert torch.equal(both[1], sampler.initial_noise([9], shape)[0]) and not torch.equal(*both)
    assert abs(float(both.std()) - 1) < 0.1


def test_the_sampler_ends_at_what_a_model_that_knows_predicts():
    noise, tokens = torch.randn(2, 1, 3, 4, 4), torch.tensor([[1] * 8, [2] * 8])
    seen = []

    def knows(x, t, text):  # cond says tokens / 8, the unconditional branch 0
        seen.append((float(t[0]), x.shape[0], text[:, 0].tolist()))
        return (text[:, 0] / 8).view(-1, 1, 1, 1, 1).expand_as(x)

    steps = []
    clips = sampler.sample(knows, noise, tokens, 3, 1.0, 2.0, lambda step, level: steps.append((step, level)))
    expected = ((torch.tensor([0.25, 0.5]) + 1) * 127.5).round().byte()  # guidance 2 doubles cond - uncond
    assert torch.equal(clips, expected.view(2, 1, 1, 1, 1).expand_as(clips))
    assert steps == [(0, 1), (1, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3))]
    assert [(batch, words) for _, batch, words in seen] == [(4, [1, 2, 0, 0])] * 3
    seen.clear()
    sampler.sample(knows, noise, tokens, 3, 1.0, 2.0, last_step=1)
    assert len(seen) == 1


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 9, 7), (5, 8, 12), (3, 2, 30)], ids=str)
def test_the_network_takes_any_grid(tiny, grid, one_thread):
    network = model.load(tiny())
    video = torch.randn(2, grid[0], 3, 4 * grid[1], 4 * grid[2])
    text = torch.tensor([prompts.tokens("turn left"), prompts.tokens("walk forward")])
    out = network(video, torch.tensor([1.0, 0.5]), text)
    assert out.shape == video.shape and out.isfinite().all() and network.grid(video) == grid
    alone = network(video[1:], torch.tensor([0.5]), text[1:])
    torch.testing.assert_close(out[1:], alone, atol=1e-4, rtol=1e-4)


def test_the_network_hears_its_prompt_its_noise_level_and_where_tokens_are(tiny, one_thread):
    network = model.load(tiny())
    video, text = torch.randn(1, 3, 3, 16, 16), torch.tensor([prompts.tokens("turn left")])
    out = network(video, torch.tensor([0.5]), text)
    for other in (
        network(video, torch.tensor([0.9]), text),
        network(video, torch.tensor([0.5]), torch.tensor([prompts.tokens("turn right")])),
        network(video.flip(1), torch.tensor([0.5]), text).flip(1),
    ):
        assert (other - out).norm() > 1e-3 * out.norm()


def test_patches_are_the_pixels_of_a_token_with_a_margin():
    network = model.PocketDiT(model.PocketConfig(width=16, depth=1, heads=1, hidden=8))
    video = torch.randn(1, 2, 3, 12, 8)
    patch = network.patches(video)[0, 6 + 2].view(3, 8, 8)  # of the second frame, row 1, column 0
    assert torch.equal(patch[:, :, 2:], video[0, 1, :, 2:10, :6]) and not patch[:, :, :2].any()


def test_shipped_weights_load_fit_and_are_those_of_the_card():
    assert WEIGHTS.stat().st_size <= 24e6
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert re.search(r"SHA-256 `(\w+)`", card)[1] == digest == adapter.Pocket(device="cpu").weights_hash
    parameters = sum(p.numel() for p in model.load(WEIGHTS).parameters())
    assert f"{parameters / 1e6:.1f} million parameters" in card


def test_the_shipped_model_paints_the_scene_that_is_asked_for(one_thread):
    shipped, asked = adapter.Pocket(frames=8, height=32, width=48, device="cpu"), "turn left in the green yard"
    (clip,) = shipped.generate(Request((asked,), (100,), 4), session())
    seen = shipped.quality(clip, asked)
    assert seen["scene"] == "green yard" and seen["scene_right"] and seen["sharpness"] > 1e-4


def bad_file(kind, path, tiny):
    if kind == "pickle":
        torch.save({"words.weight": torch.zeros(2)}, path)
    elif kind == "cut short":
        path.write_bytes(tiny.read_bytes()[:-100])
    elif kind == "empty":
        path.touch()
    elif kind == "judge":
        path.write_bytes((FOLDER / "weights" / "judge.safetensors").read_bytes())
    elif kind == "other shape":
        train.save(model.load(tiny).state_dict(), model.PocketConfig(width=64, depth=2, heads=2, hidden=32), path)
    elif kind == "other names":
        save_file({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        ("pickle", "is no whole safetensors file of pocket's"),
        ("cut short", "is no whole safetensors file of pocket's"),
        ("empty", "is no whole safetensors file of pocket's"),
        ("judge", "is no whole safetensors file of pocket's"),
        ("other shape", r"holds another network, see blocks\.0"),
        ("other names", "holds another network"),
    ],
)
def test_a_bad_weights_file_is_refused_in_a_line(kind, message, tmp_path, tiny):
    path = tmp_path / "some.safetensors"
    bad_file(kind, path, tiny())
    for refuse in (lambda: adapter.Pocket(weights=str(path), device="cpu"), lambda: model.load(path)):
        with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match=message) as found:
            refuse()
        assert str(found.value).startswith("model.weights: ") and str(path) in str(found.value)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frames", 0), ("steps", 0), ("fps", -1), ("height", 30), ("height", 34), ("width", 0), ("width", 50),
        ("shift", 0), ("dtype", "float16"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(pocket, key, value):
    with pytest.raises(ValueError, match=rf"^model\.{key} must be .*, got '?{value}'?$"):
        pocket(**{key: value})


def test_without_a_plan_the_frames_are_the_unpatched_networks(pocket):
    made = pocket(guidance=2.5, shift=2.0, steps=3)
    request = Request(("turn left", "walk forward in the green yard"), (3, 4), 3)
    text = torch.tensor([prompts.tokens(prompt) for prompt in request.prompts])
    noise = sampler.initial_noise([3, 4], (5, 3, 32, 40))
    expected = sampler.sample(made.network, noise, text, 3, 2.0, 2.5)
    frames = made.generate(request, session())
    assert torch.equal(frames, expected) and frames.dtype == torch.uint8 and frames.shape == (2, 5, 3, 32, 40)


def test_a_session_sees_steps_layers_both_branches_and_the_layout(pocket):
    made, calls = pocket(), []

    class Spy(Draft):
        def attend(self, q, k, v, call):
            calls.append((call.step, call.layer, call.branch, call.seeds, call.layout.grid, tuple(q.shape)))
            return super().attend(q, k, v, call)

    spy = session(Spy(0.5, (4, 4)))
    spy.parts = DenseParts(0, timestep=900)
    made.generate(Request(("turn left",), (7,), 4), spy)
    shape = (2, 5 * 8 * 10 + prompts.LENGTH, 2, 16)
    assert calls == [(s, layer, "both", (7, 7), (5, 8, 10), shape) for s in (1, 2, 3) for layer in (0, 1)]


def test_the_network_is_restored_after_an_exception(pocket):
    made = pocket()

    class Broken(Draft):
        def plan(self, q, k, v, call):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        made.generate(Request(("turn left",), (0,), 2), session(Broken(0.5)))
    assert made.network.attend is model.dense


HELD = """
import re, torch
from draftbench.models.pocket.adapter import Pocket
torch.set_num_threads(1)
network = Pocket(device="cpu").network
network.attend = lambda q, k, v, layer: q + k  # the blocks' own is what counts

def peak(*size):
    network(torch.zeros(2, *size), torch.ones(2), torch.zeros(2, 8, dtype=torch.long))
    # getrusage() would begin with the peak of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

print(-peak(1, 3, 32, 32) + peak(16, 3, 96, 96))
"""


def test_what_surely_fits_no_memory_is_refused_and_no_more(monkeypatch):
    """The memory that a forward of both branches took, in a process of its own, is enough; half of it is not."""
    took = int(subprocess.run([sys.executable, "-P", "-c", HELD], capture_output=True, text=True, check=True).stdout)
    made = adapter.Pocket(device="cpu", frames=16, height=96, width=96)
    monkeypatch.setattr(adapter, "memory", lambda: took)
    made.check_memory()
    monkeypatch.setattr(adapter, "memory", lambda: took // 2)
    with pytest.raises(
        ValueError, match=r"^model=pocket does not .* of 16x24x24 tokens takes at least 0.5 GiB, and the "
    ):
        made.check_memory()
    adapter.Pocket(device="cpu", frames=8, height=96, width=96).check_memory()


def test_settings_are_what_shapes_the_frames(pocket):
    assert pocket().settings() == pocket(fps=9, steps=5).settings()
    for change in ({"frames": 6}, {"height": 36}, {"width": 32}, {"shift": 2.0}, {"guidance": 1.0}):
        assert pocket(**change).settings() != pocket().settings()
    assert pocket().grid == (5, 8, 10) and pocket().dtype == "float32"


def test_quality_of_a_clip_too_short_for_the_judge_is_its_sharpness(pocket):
    clip = torch.zeros(5, 3, 32, 40, dtype=torch.uint8)
    assert pocket().quality(clip[:4], "turn left") == {"sharpness": 0.0}
    full = pocket().quality(clip, "in the green yard")
    assert full["motion"] in prompts.MOTIONS and full["motion_right"] is None
    assert full["scene_right"] == (full["scene"] == "green yard")


def test_verdicts_are_one_a_clip_whatever_the_batch_and_the_size():
    fitted = judge.load(FOLDER / "weights" / "judge.safetensors")
    clips = torch.randint(0, 256, (3, 6, 3, 32, 40), dtype=torch.uint8)
    motion, scene = judge.verdicts(fitted, clips)
    assert motion.shape == scene.shape == (3,)
    alone = [judge.verdicts(fitted, clip[None]) for clip in clips]
    assert motion.tolist() == [int(m) for m, _ in alone] and scene.tolist() == [int(s) for _, s in alone]


def test_sharpness_is_the_mean_gradient_energy():
    stripes = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert judge.sharpness(torch.cat([stripes, torch.full_like(stripes, 9)])).tolist() == [1, 0]


def test_a_judge_learns_what_it_is_shown(one_thread):
    clips = torch.zeros(12, 10, 3, 16, 24, dtype=torch.uint8)
    scenes = torch.arange(12) % 2
    clips[scenes == 1] = 200
    fitted = judge.fit(clips, torch.zeros(12, dtype=torch.long), scenes, 6, 0)
    assert judge.verdicts(fitted, clips)[1].tolist() == scenes.tolist()


def test_captions_are_the_sentences():
    table = train.captions(torch.device("cpu"))
    assert table.shape == (2, 7, 7, prompts.LENGTH)
    for order, motion, scene in itertools.product(range(2), range(7), range(7)):
        text = prompts.sentence(motion if motion < 6 else None, scene if scene < 6 else None, bool(order))
        assert table[order, motion, scene].tolist() == (prompts.tokens(text) if text else [0] * prompts.LENGTH)


def test_the_schedule_runs_through_every_phase_and_rehearses():
    total = sum(phase.steps for phase in train.PHASES)
    phases, done = zip(*(train.schedule(step) for step in range(total)), strict=True)
    assert done[0] == 0 and all(a < b for a, b in itertools.pairwise(done)) and done[-1] < 1
    ends = list(itertools.accumulate(phase.steps for phase in train.PHASES))
    for phase, start, end in zip(train.PHASES[:-1], [0, *ends], ends, strict=False):
        assert set(phases[start:end]) == {phase}
    last = phases[ends[-2] :]
    assert set(last) == set(train.PHASES[1:])
    share = sum(phase is train.PHASES[-1] for phase in last) / len(last)
    assert share == pytest.approx(1 - 1 / train.REHEARSE, abs=0.01)


def test_weights_survive_saving(tmp_path):
    made = model.PocketDiT(model.PocketConfig(width=16, depth=1, heads=1, hidden=8))
    train.save(made.state_dict(), made.config, tmp_path / "w.safetensors")
    loaded = model.load(tmp_path / "w.safetensors")
    assert loaded.config == made.config and not loaded.training
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, made.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_options_of_the_training_command(capsys):
    assert train.parse(train.Settings, ["out=x", "gpus=2"]) == train.Settings(out="x", gpus=2)
    for argument, message in (
        ("gpu=2", "unknown option 'gpu=2'; options: out"),
        ("seed=x", "seed must be of type int"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.parse(train.Settings, [argument])
    for command in (train, check, card):
        with pytest.raises(SystemExit) as end:
            train.parse(command.Settings, ["--help"])
        page = capsys.readouterr().out
        assert end.value.code == 0 and page.startswith(command.__doc__) and "  out=outputs/pocket_training\n" in page
        assert all(f"  {name}={value}" in page for name, value in vars(command.Settings()).items())


def test_a_loss_of_zero_is_the_clean_clip():
    clean = torch.randn(2, 2, 3, 8, 8)
    level = torch.tensor([0.5, 0.9])
    losses = [train.loss_of(lambda *_, off=off: clean + off, clean, clean, level, None) for off in (0.0, 0.9)]
    assert losses[0].tolist() == [0, 0]
    assert losses[1].tolist() == pytest.approx([(0.9 / 0.5) ** 2, 1.0], rel=1e-4)


def test_vizdoom_renders_a_clip(monkeypatch, tmp_path):
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)  # ViZDoom leaves its settings where it runs
    from draftbench.models.pocket.clips import HEIGHT, WIDTH, clips

    source = clips(prompts.SCENES.index("green yard"), 5, 4)
    clip, motion = next(source)
    source.close()
    assert clip.shape == (4, 3, HEIGHT, WIDTH) and clip.dtype == "uint8" and 0 <= motion < 6
    assert clip.std() > 5 and all((a != b).any() for a, b in itertools.pairwise(clip))
