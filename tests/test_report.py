"""The page of a run: what is in it, what its limit leaves out, and that a browser loads, plays, sorts and steps it."""

import itertools
import json
import re
import shutil
import time

import pytest
import torch
from PIL import Image

from draftbench import media, records, report

FPS, FRAMES = 8, 6
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def clip(shade, frames=FRAMES):
    """Frame t is of one grey, shade + 12 t, so that what is seen tells which frame it is."""
    levels = shade + 12 * torch.arange(frames)
    return levels[:, None, None, None].expand(-1, 3, 64, 96).to(torch.uint8)


def cell(folder, number, method="draft", sparsity=0.9, prompt="turn left", seed=0, shade=100, **values):
    known = {
        "model": "pocket", "grid": (2, 4, 6), "device": "CPU", "versions": {"torch": "2.13"}, "status": "ok",
        "commit": "c" * 40, "dirty": False, "psnr_db": 30.0, "executor": "cpu", "steps": 8, "method_settings": {},
    }  # fmt: skip
    names = {"method": method, "sparsity": sparsity, "prompt": prompt, "seed": seed, "cell_id": f"{folder}{number}"}
    records.write(records.new(**known | names | values), folder / f"record_{number:03}.json")
    if shade is not None:
        media.write_video(clip(60 + seed), folder / f"{number:03}_dense.mp4", FPS)
        media.write_video(clip(shade), folder / f"{number:03}_{method}.mp4", FPS)


@pytest.fixture
def sweep(tmp_path):
    """Two methods on two clips, one cell that failed, a dense cell, a picture, and a reason that tries to break out."""
    run = tmp_path / "sweep"
    for job, (method, level) in enumerate((("draft", 0.9), ("sta", 0.5))):
        for seed in (0, 1):
            cell(run / str(job), seed, method, level, seed=seed, shade=100 + 20 * job, psnr_db=30.0 + seed + 10 * job)
    cell(run / "2", 0, "svg", 0.5, shade=None, status="failed: out of memory </script><b>", psnr_db=None)
    cell(run / "3", 0, "dense", 0.0, shade=None, psnr_db=100.0)
    Image.new("RGB", (40, 20), "red").save(run / "0" / "recall.png")
    Image.new("RGB", (40, 20), "blue").save(run / "0" / "000_side_by_side.png")
    return run


def data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_everything_is_in_one_file_and_nothing_is_fetched(sweep, capsys):
    assert report.main([str(sweep)]) == 0
    text = (sweep / "report.html").read_text()
    assert "4 of 4 clips with videos" in capsys.readouterr().out
    assert not re.search(r"https?://|src=\"(?!data:)|href=\"(?!data:)|@import", text)
    found = data(text)
    assert len(found["cells"]["rows"]) == 6 and len(found["means"]["rows"]) == 3
    assert [picture["name"] for picture in found["pictures"]] == ["0/recall"]
    assert sum(clip["picture"] is not None for clip in found["clips"]) == 1
    used = {clip[name] for clip in found["clips"] for name in ("dense", "method")}
    assert len(used) == 2 + 2  # a dense clip is held once; so is one of the same shade
    assert report.page([sweep], 10**7) == report.page([sweep], 10**7)


def test_a_page_over_its_limit_samples_the_clips_and_says_so(sweep, capsys):
    whole, _ = report.page([sweep], 10**7)
    limit = len(whole.encode()) - 3000
    text, shown = report.page([sweep], limit)
    assert len(text.encode()) <= limit and 1 <= len(data(text)["clips"]) < 4 and data(text)["shown"] == shown
    assert re.fullmatch(r"\d of 4 clips with videos \(the page is at most [\d.e-]+ MB; taken in turn from .*\)", shown)
    none, shown = report.page([sweep], 1000)
    assert data(none)["clips"] == [] and shown.startswith("0 of 4 clips") and len(data(none)["cells"]["rows"]) == 6


def test_nothing_but_damaged_records_is_refused_and_named(tmp_path, capsys):
    (tmp_path / "record.json").write_text("garbage")
    assert report.main([str(tmp_path)]) == 2
    assert "there are no records of cells under" in (said := capsys.readouterr().err)
    assert f"{tmp_path / 'record.json'} is not a draftbench record" in said


def test_a_damaged_record_is_left_out_and_named(sweep):
    (sweep / "1" / "record_001.json").write_text("{")
    found = data(report.page([sweep], 10**7)[0])
    assert len(found["cells"]["rows"]) == 5 and "record_001.json is not a draftbench record" in found["about"][-1]


def test_a_page_of_ten_thousand_cells_is_small(tmp_path):
    cell(tmp_path, 0, shade=None)
    row = records.read(tmp_path / "record_000.json")
    lines = [
        json.dumps(row | {"seed": i, "lpips": 1 / (i + 3), "density_effective": 0.1 + i / 1e5}) for i in range(10_000)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text, _ = report.page([tmp_path / "rows.jsonl"], 20 * 10**6)
    assert len(data(text)["cells"]["rows"]) == 10_000 and len(text) < 4e6


def test_the_first_clip_of_every_method_comes_before_the_second_of_any(sweep):
    found = [(path, row) for path in records.files([sweep]) for row in records.parse(path)]
    clips = report._in_turn(filter(None, (report._clip(i, *pair) for i, pair in enumerate(found))))
    assert [(clip["group"][1], clip["order"][1]) for clip in clips] == [
        ("draft", 0),
        ("sta", 0),
        ("draft", 1),
        ("sta", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "no such run folder or record: nowhere"), (["."], "there are no records of cells under ."),
     ([".", "--limit=0"], "--limit must be above 0 MB, got 0")],
)  # fmt: skip
def test_bad_input_is_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert capsys.readouterr().err == f"draftbench: {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, sweep):
    """The page in a browser without a network; whatever reaches the console fails the test."""
    report.main([str(sweep)])
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((sweep / "report.html").as_uri())
    yield page
    assert not said
    context.close()


SEEN = """() => [a, b, canvas].map((source) => {
  const pen = Object.assign(document.createElement("canvas"), {width: 4, height: 4}).getContext("2d");
  pen.drawImage(source, 0, 0, 4, 4);
  return pen.getImageData(2, 2, 1, 1).data[1];
})"""


def wait_for_frame(page, number):
    page.wait_for_function(f"() => count.textContent === 'frame {number} of {FRAMES}' && !a.seeking && !b.seeking")


def check_seen(page, frame, method=100, dense=60, gain=4):
    """Both videos and their difference come to show frame `frame`, counted from 0."""
    expected = [dense + 12 * frame, method + 12 * frame, min(255, gain * (method - dense))]
    end = time.monotonic() + 5
    while True:
        found = page.evaluate(SEEN)
        if found[:2] == pytest.approx(expected[:2], abs=4) and found[2] == pytest.approx(expected[2], abs=4 * gain):
            return
        assert time.monotonic() < end, (found, expected)


def test_it_steps_frame_by_frame_and_shows_the_difference(opened):
    wait_for_frame(opened, 1)
    check_seen(opened, 0)
    for number in (1, 2, 3):
        opened.click("#forth")
        wait_for_frame(opened, number + 1)
        check_seen(opened, number)
    opened.click("#back")
    wait_for_frame(opened, 3)
    check_seen(opened, 2)
    opened.select_option("#gain", "0")
    check_seen(opened, 2, gain=1)
    opened.focus("#player")
    opened.keyboard.press("ArrowRight")
    wait_for_frame(opened, 4)
    opened.evaluate("() => { frame.value = 0; frame.oninput({target: frame}); }")
    wait_for_frame(opened, 1)
    opened.click("#back")  # round the end
    wait_for_frame(opened, FRAMES)
    check_seen(opened, FRAMES - 1, gain=1)


def test_it_plays_in_step_and_over_again(opened):
    wait_for_frame(opened, 1)
    opened.select_option("#speed", "0.5")
    opened.click("#play")
    assert opened.inner_text("#play") == "Pause"
    seen = opened.evaluate(
        """() => new Promise((done) => {
          const seen = [], look = () => {
            if (!a.seeking && !b.seeking) seen.push([at(), Math.abs(a.currentTime - b.currentTime)]);
            seen.length < 200 ? requestAnimationFrame(look) : done(seen);
          };
          look();
        })"""
    )
    frames = [frame for frame, _ in seen]
    assert set(frames) == set(range(FRAMES)) and any(y < x for x, y in itertools.pairwise(frames))
    apart = sorted(gap for _, gap in seen)
    assert apart[int(0.9 * len(apart))] < 0.5 / FPS
    opened.click("#play")
    assert opened.inner_text("#play") == "Play"
    opened.wait_for_function("() => a.paused && b.paused && !a.seeking && !b.seeking")
    check_seen(opened, opened.evaluate("at()"))


def test_another_method_and_another_clip(opened):
    wait_for_frame(opened, 1)
    assert opened.inner_text("#name") == "draft at 90%"
    opened.select_option("#method", "sta at 50%")
    wait_for_frame(opened, 1)
    check_seen(opened, 0, method=120)
    assert opened.inner_text("#score") == "PSNR dB 40.00"
    opened.select_option("#clip", "pocket: turn left, seed 1")
    opened.wait_for_function("() => score.textContent === 'PSNR dB 41.00'")
    assert opened.inner_text("#name") == "sta at 50%"
    wait_for_frame(opened, 1)
    check_seen(opened, 0, method=120, dense=61)
    opened.click("#cells tr[data-clip]:has-text('draft') >> nth=0")
    opened.wait_for_function("() => document.getElementById('name').textContent === 'draft at 90%'")


def test_it_sorts_and_filters(opened):
    def column():
        return opened.locator("#cells tbody tr td:nth-child(6)").all_inner_texts()

    assert opened.locator("#cells th").nth(5).inner_text() == "PSNR dB"
    opened.click("#cells th button:has-text('PSNR')")
    assert column() == ["30.00", "31.00", "40.00", "41.00", "100.00", "-"]
    opened.click("#cells th button:has-text('PSNR')")
    assert column() == ["100.00", "41.00", "40.00", "31.00", "30.00", "-"]
    assert opened.get_attribute("#cells th:nth-child(6)", "aria-sort") == "descending"
    opened.fill("#filter", "STA turn")
    assert column() == ["41.00", "40.00"] and opened.inner_text("#found") == "2 of 2 rows"
    opened.fill("#filter", "memory")
    assert "failed: out of memory </script><b>" in opened.inner_text("#cells tbody")


def test_it_is_light_and_dark_and_fits_a_narrow_window(opened):
    shades = []
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        shades.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert shades == ["rgb(247, 247, 245)", "rgb(23, 24, 26)"]
    opened.click("#theme")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == shades[0]
    opened.set_viewport_size({"width": 420, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 420


def test_a_runs_own_videos_play_in_a_browser(browser, tmp_path):
    """The files as a run writes them, opened as they are."""
    media.write_video(clip(60), tmp_path / "clip.mp4", FPS)
    page = browser.new_page()
    page.goto((tmp_path / "clip.mp4").as_uri())
    page.wait_for_function("() => document.querySelector('video')?.readyState >= 2")
    size = page.evaluate("() => [(v = document.querySelector('video')).videoWidth, v.videoHeight, v.duration]")
    assert size == [384, 256, pytest.approx(FRAMES / FPS)]
    page.evaluate(
        "() => { const v = document.querySelector('video'); v.muted = true; v.currentTime = 0; return v.play(); }"
    )
    page.wait_for_function("() => document.querySelector('video').ended")
    page.close()
