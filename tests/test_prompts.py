"""Prompts from a suite, a CSV column or as they are."""

import pytest
from hydra import compose, initialize_config_module

from draftbench import schema
from draftbench.models.pocket import check
from draftbench.models.pocket.prompts import MOTIONS, SCENES, sentence
from draftbench.prompts import SUITES, expand, suites


def test_every_suite_is_a_list_of_distinct_texts():
    assert suites() == sorted(path.stem for path in SUITES.iterdir())  # no file of another kind
    for name in suites():
        prompts = expand(name)
        assert len(set(prompts)) == len(prompts) > 1
        assert all(prompt == prompt.strip() and not prompt.startswith("#") for prompt in prompts)
    assert len(expand("dozen")) == 12


def test_a_csv_column(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text('\ufeffid,text\n1,"a cat, wet"\n2,\n3, a dog \n', encoding="utf-8")
    assert expand(f"{path}:text") == ["a cat, wet", "a dog"]
    assert expand(f"{path}:id") == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"some\.csv has no column 'name'; it has id, text"):
        expand(f"{path}:name")
    with pytest.raises(ValueError, match=r"prompts: cannot read .*none.csv: No such file"):
        expand(f"{tmp_path / 'none.csv'}:text")
    path.write_text("id,text\n1,\n")
    with pytest.raises(ValueError, match=r"prompts: .*some.csv has no text in its column 'text'"):
        expand(f"{path}:text")


@pytest.mark.parametrize("text", ["a cat", "dozens", "look: a cat", "../suites/dozen", "a.csv file"])
def test_any_other_text_is_a_prompt(text):
    assert expand(text) == [text]


@pytest.mark.parametrize("text", ["my.csv", "~/MY.CSV", "my.txt", "two words.txt"])
def test_a_files_name_alone_is_no_prompt(text):
    with pytest.raises(ValueError, match=rf"prompts must be dozen, paper, .*, FILE.csv:COLUMN or \[.*\], got '{text}'"):
        expand(text)


def test_configs_take_all_three(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("text\na cat\n")

    def prompts(value):
        with initialize_config_module("draftbench.conf", version_base="1.3"):
            config = compose("config", [f"prompts={value}"])
        schema.check(config)
        return list(config.prompts)

    assert prompts("dozen") == expand("dozen")
    assert prompts(f"'{path}:text'") == ["a cat"]
    assert prompts("[dozen,a cat]") == ["dozen", "a cat"]  # lines of one's own are taken as they are
    path.write_text("text\na cat\na cat\n")
    with pytest.raises(ValueError, match=r"prompts must be .* got 'a cat' twice"):
        prompts(f"'{path}:text'")
    path.write_text("text\n")
    with pytest.raises(ValueError, match=r"some.csv has no text in its column 'text'"):
        prompts(f"'{path}:text'")


def test_pockets_suite_is_all_that_calibrations_leave():
    with initialize_config_module("draftbench.conf", version_base="1.3"):
        used = set(compose("calibrate").prompts)
    everything = {sentence(motion, scene) for motion in range(len(MOTIONS)) for scene in range(len(SCENES))}
    assert set(expand("pocket")) == everything - used and len(used) == 4


def test_headlines_clips_are_of_no_other_use():
    with initialize_config_module("draftbench.conf", version_base="1.3"):
        headline, methods, calibrated = (
            compose(name, chosen)
            for name, chosen in (
                ("config", ["experiment=headline"]), ("config", ["experiment=pocket_methods"]), ("calibrate", []),
            )
        )  # fmt: skip
    seeds = set(headline.seeds)
    assert len(seeds) == 2 and not seeds & {*range(check.Settings().seeds), *methods.seeds, *calibrated.seeds}
    assert not headline.latency.enabled and not headline.diagnostics


@pytest.mark.parametrize("method", ["xattention", "sparge", "jenga"])  # svg2 is not calibrated yet
def test_headlines_knobs_are_calibrated(method):
    """At every sparsity of the experiment, but for jenga's 95%, which is out of its reach."""
    for sparsity in (0.5, 0.75, 0.9, 0.95)[: 3 if method == "jenga" else 4]:
        with initialize_config_module("draftbench.conf", version_base="1.3"):
            chosen = ["experiment=headline", "device=cpu", f"method={method}", f"sparsity={sparsity}"]
            config = compose("config", chosen)
        schema.check(config)
        made = schema.method(config)
        made.meet(schema.model(config), schema.parts(config))
        assert made.calibrated["prompts"] and made.sparsity == sparsity
