"""The page of a run: what is in it, what its limit leaves out, and that a browser loads, plays, sorts and steps it."""

import itertools
import json
import re
import shutil
import time
from pathlib import Path

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
    assert capsys.readouterr().out.endswith("4 of 4 clips with videos, 2 of 2 pictures\n")
    assert not re.search(r"https?://|src=\"(?!data:)|href=\"(?!data:)|@import", text)
    found = data(text)
    assert len(found["cells"]["rows"]) == 6 and len(found["means"]["rows"]) == 3
    assert [picture["name"] for picture in found["pictures"]] == ["0/recall"]
    assert sum(clip["picture"] is not None for clip in found["clips"]) == 1
    used = {clip[name] for clip in found["clips"] for name in ("dense", "method")}
    assert len(used) == 2 + 2  # a dense clip is held once; so is one of the same shade
    assert report.page([sweep], 10**7) == report.page([sweep], 10**7)


def test_a_video_that_several_clips_show_is_decoded_once(sweep, monkeypatch):
    decoded, decode = [], report._fps
    monkeypatch.setattr(report, "_fps", lambda path: decoded.append(path) or decode(path))
    text, _ = report.page([sweep], 10**7)
    assert len(decoded) == len(data(text)["media"]) - 2  # all but the heat map and the side-by-side picture


def test_a_page_over_its_limit_samples_the_clips_and_says_so(sweep, capsys):
    whole, _ = report.page([sweep], 10**7)
    limit = len(whole.encode()) - 3000
    text, shown = report.page([sweep], limit)
    assert len(text.encode()) <= limit and 1 <= len(data(text)["clips"]) < 4 and data(text)["shown"] == shown
    said = r"\d of 4 clips with videos, \d of 2 pictures \(the page is at most [\d.e-]+ MB; clips come first, .*\)"
    assert re.fullmatch(said, shown)
    none, shown = report.page([sweep], 1000)
    assert (
        data(none)["clips"] == []
        and shown.startswith("0 of 4 clips with videos, 0 of 2 pictures (")
        and len(data(none)["cells"]["rows"]) == 6
    )


def test_tables_over_the_limit_are_told(sweep, capsys):
    assert report.main([str(sweep), "--limit=0.001"]) == 0
    told = capsys.readouterr()
    assert (
        told.err == "draftbench: the page is over --limit 0.001: its tables alone are\n" and "0 of 4 clips" in told.out
    )


def test_nothing_but_damaged_records_is_refused_and_named(tmp_path, capsys):
    (tmp_path / "record.json").write_text("garbage")
    assert report.main([str(tmp_path)]) == 2
    assert "there are no records of cells under" in (said := capsys.readouterr().err)
    assert f"{tmp_path / 'record.json'} is not a draftbench record" in said


def test_a_damaged_record_is_left_out_and_named(sweep, capsys):
    (sweep / "1" / "record_001.json").write_text("{")
    assert report.main([str(sweep)]) == 1 and "draftbench: left out: " in capsys.readouterr().err
    found = data(report.page([sweep], 10**7)[0])
    assert len(found["cells"]["rows"]) == 5 and "record_001.json is not a draftbench record" in found["about"][-1]


@pytest.mark.parametrize("damage", [lambda video: b"", lambda video: video[: len(video) // 2]], ids=["empty", "cut"])
def test_a_video_that_does_not_play_is_left_out_and_named(sweep, capsys, damage):
    for name in ("0/000_dense.mp4", "1/001_sta.mp4"):
        (sweep / name).write_bytes(damage((sweep / name).read_bytes()))
    assert report.main([str(sweep)]) == 1
    told, found = capsys.readouterr(), data((sweep / "report.html").read_text())
    assert told.out.endswith("2 of 2 clips with videos, 1 of 1 pictures\n") and len(found["clips"]) == 2
    for line, name in zip(told.err.splitlines(), ("0/000_dense.mp4", "1/001_sta.mp4"), strict=True):
        assert line.startswith(f"draftbench: left out: {sweep / name} is no video that plays (")
        assert line.removeprefix("draftbench: l") in [said.removeprefix("L") for said in found["about"]]
    assert len(found["cells"]["rows"]) == 6  # the numbers are there


def test_a_page_of_ten_thousand_cells_is_small(tmp_path):
    cell(tmp_path, 0, shade=None)
    row = records.read(tmp_path / "record_000.json")
    lines = [
        json.dumps(row | {"cell_id": f"c{i}", "seed": i, "lpips": 1 / (i + 3), "density_effective": 0.1 + i / 1e5})
        for i in range(10_000)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text, _ = report.page([tmp_path / "rows.jsonl"], 20 * 10**6)
    assert len(data(text)["cells"]["rows"]) == 10_000 and len(text) < 4e6


def test_clips_come_before_pictures(sweep):
    (sweep / "0" / "recall.png").write_bytes(bytes(10**5))
    whole, _ = report.page([sweep], 10**7)
    text, shown = report.page([sweep], len(whole.encode()) - 1000)
    assert len(data(text)["clips"]) == 4 and not data(text)["pictures"]
    assert shown.startswith("4 of 4 clips with videos, 1 of 2 pictures (")


def test_a_cell_in_several_folders_counts_once(tmp_path):
    """A dense cell of every job of a sweep, and a run that was resumed in another folder, not with all its videos."""
    for name, shades in (("first", (100, 140)), ("second", (None, 140))):
        for job, shade in enumerate(shades):
            same = {"timestamp": "2026-01-01T00:00:00+00:00", "shade": shade}
            cell(tmp_path / name / str(job), 0, sparsity=0.5 + job / 4, cell_id=f"draft{job}", **same)
            cell(tmp_path / name / str(job), 1, "dense", 0.0, cell_id="dense", **same | {"shade": None})
    cell(tmp_path / "second" / "0", 2, cell_id="draft0", sparsity=0.5, shade=None, status="failed: out of memory")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "first" / "0" / "recall.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "second" / "0" / "recall.png")
    text, shown = report.page([tmp_path / "first", tmp_path / "second"], 10**7)
    found = data(text)
    assert shown == "2 of 2 clips with videos, 1 of 1 pictures" and len(found["cells"]["rows"]) == 3
    assert "failed" not in text.partition('id="data">')[2].partition("</script>")[0]
    counts = found["means"]["names"].index("n")
    assert [row[counts] for row in found["means"]["rows"]] == [1, 1, 1]


def test_rows_say_what_sets_them_apart(tmp_path):
    for i, steps in enumerate((0.0, 0.1)):
        cell(tmp_path, i, dense={"steps": steps, "timestep": None, "layers": 0}, method_settings={"pool": "mean"})
    for i, top_p in enumerate((0.8, 0.9), 2):
        settings = {"top_p": top_p, "calibrated": {"value": i}}
        cell(tmp_path, i, "svg2", 0.0, knob={"top_p": top_p}, method_settings=settings)
    for i, value in enumerate((1, 2), 4):
        cell(tmp_path, i, "sta", 0.5, method_settings={"tile": [value, 8], "calibrated": {"value": i}})
    found = data(report.page([tmp_path], 10**7)[0])
    for part in ("cells", "means"):
        at = [found[part]["names"].index(name) for name in ("method", "sparsity", "variant")]
        assert sorted((tuple(row[i] for i in at) for row in found[part]["rows"]), key=str) == [
            ("draft", 0.9, "dense.steps=0.0"), ("draft", 0.9, "dense.steps=0.1"),
            ("sta", 0.5, "tile=[1, 8]"), ("sta", 0.5, "tile=[2, 8]"),
            ("svg2", "top_p=0.8", ""), ("svg2", "top_p=0.9", ""),
        ]  # fmt: skip


def test_ten_thousand_cells_with_videos_make_a_page_under_its_limit_that_says_what_it_sampled(tmp_path):
    """Stand-ins: one real MP4 each time, made another file by a box that no player reads."""
    cell(tmp_path / "one", 0)
    row = records.read(tmp_path / "one" / "record_000.json")
    video = (tmp_path / "one" / "000_draft.mp4").read_bytes()
    for job in range(20):
        folder = tmp_path / "sweep" / str(job)
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 20), (job, 0, 0)).save(folder / "recall.png")
        for i in range(500):
            one = row | {"cell_id": f"{job}-{i}", "sparsity": job / 20, "seed": i}
            (folder / f"record_{i:03}.json").write_text(json.dumps(one))
            for name in ("dense", "draft"):
                box = f"{name}{i}{job if name == 'draft' else ''}".encode()  # dense clips are shared
                (folder / f"{i:03}_{name}.mp4").write_bytes(video + (8 + len(box)).to_bytes(4, "big") + b"free" + box)
    text, shown = report.page([tmp_path / "sweep"], 20 * 10**6)
    found = data(text)
    assert 18e6 < len(text.encode()) <= 20e6 and len(found["cells"]["rows"]) == 10_000
    count, taken = len(found["clips"]), [found["cells"]["rows"][clip["cell"]] for clip in found["clips"]]
    assert 1000 < count < 10_000 and shown.startswith(f"{count} of 10000 clips with videos, ")
    assert re.search(
        r" of 20 pictures \(the page is at most 20 MB; clips come first, taken in turn from every method", shown
    )
    assert found["shown"] == shown
    level, seed = (found["cells"]["names"].index(name) for name in ("sparsity", "seed"))
    each = [sum(row[level] == job / 20 for row in taken) for job in range(20)]
    assert max(each) - min(each) <= 1 and max(row[seed] for row in taken) < max(each) + 1


def test_the_first_clip_of_every_method_comes_before_the_second_of_any(sweep):
    found = [(path, row | {"variant": ""}) for path in records.files([sweep]) for row in records.parse(path)]
    clips = report._in_turn(report._clips(found, [row for _, row in found]))
    assert [(clip["group"][1], clip["order"][1]) for clip in clips] == [
        ("draft", 0),
        ("sta", 0),
        ("draft", 1),
        ("sta", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "no such run folder or record: nowhere"), (["."], "there are no records of cells under ."),
     ([".", "--limit=0"], "--limit must be above 0 and below a million MB, got 0")],
)  # fmt: skip
def test_bad_input_is_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert capsys.readouterr().err == f"draftbench: {message}\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path  # of `playwright install chromium`, whether or not it is there
        path = next(filter(None, map(shutil.which, (*BROWSERS, own))), None)
        if path is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, nor Playwright's own Chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        plays = page.evaluate("""document.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"')""")
        page.close()
        if not plays:
            browser.close()
            pytest.skip(f"{path} cannot play H.264")
        yield browser
        browser.close()


@pytest.fixture
def screenshot(request):
    """Saves what a page or a part of it shows as NAME.png, if --screenshots=FOLDER is given."""

    def save(shown, name, **options):
        if folder := request.config.getoption("--screenshots"):
            shown.screenshot(path=Path(folder) / f"{name}.png", **options)

    return save


@pytest.fixture
def settings(sweep):
    """Cells beside those of `sweep` that differ in their warm-up, or whose own knob is given."""
    for i, steps in enumerate((0.0, 0.1)):
        cell(sweep / "4", i, "svg", 0.75, dense={"steps": steps, "timestep": None, "layers": 0}, shade=140 + 10 * i)
    cell(sweep / "4", 2, "svg2", 0.0, knob={"top_p": 0.9}, shade=160)


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


def test_it_steps_frame_by_frame_and_shows_the_difference(opened, screenshot):
    wait_for_frame(opened, 1)
    check_seen(opened, 0)
    for number in (1, 2, 3):
        opened.click("#forth")
        wait_for_frame(opened, number + 1)
        check_seen(opened, number)
    opened.click("#back")
    wait_for_frame(opened, 3)
    check_seen(opened, 2)
    screenshot(opened.locator("#clips"), "player")
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


@pytest.mark.usefixtures("settings")
def test_settings_and_knobs_are_told_apart(opened):
    wait_for_frame(opened, 1)
    assert opened.locator("#method option").all_inner_texts() == [
        "draft at 90%", "sta at 50%", "svg at 75%, dense.steps=0.0", "svg at 75%, dense.steps=0.1", "svg2 at top_p=0.9"
    ]  # fmt: skip
    opened.select_option("#method", "svg at 75%, dense.steps=0.1")
    wait_for_frame(opened, 1)
    check_seen(opened, 0, method=150)
    opened.click("#means th button:has-text('sparsity')")
    asked = opened.locator("#means tbody td:nth-child(3)").all_inner_texts()
    assert asked == ["0", "0.5", "0.75", "0.75", "0.9", "top_p=0.9"]
    assert opened.locator("#means th").nth(3).inner_text() == "setting"
    assert "dense.steps=0.1" in opened.locator("#cells tbody tr", has_text="dense.steps=0.1").inner_text()


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


@pytest.mark.usefixtures("settings")
def test_it_is_light_and_dark_and_fits_a_narrow_window(opened, screenshot):
    wait_for_frame(opened, 1)
    shades = []
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        shades.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        screenshot(opened, scheme, full_page=True)
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
