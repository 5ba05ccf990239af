"""The table of a run: means, what it keeps apart, what failed."""

from draftbench import records, summary


def row(method="draft", sparsity=0.9, **values):
    known = {
        "model": "pocket",
        "prompt": "turn left",
        "seed": 0,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11"},
        "status": "ok",
        "executor": "triton",
    }
    return records.new(method=method, sparsity=sparsity, steps=20, **known | values)


def test_no_mean_is_over_cells_of_other_settings():
    kinds = [
        {}, {"model_settings": {"guidance": 3.0}}, {"model_settings": {"guidance": 4.5}}, {"dense_kernel": "fa4"},
        {"batch": 2}, {"lpips_net": "vgg"}, {"commit": "a"},
    ]  # fmt: skip
    rows = summary.means([row(psnr_db=20.0, **kind) for kind in kinds])
    assert [one["n"] for one in rows] == [1] * len(kinds)
    assert "model.guidance=4.5" in summary.table([row(psnr_db=20.0, **kind) for kind in kinds[1:3]])


def test_two_calibrations_of_one_method_are_told_apart():
    """By a digest, as their accounts are long; by the weights alone where those differ."""
    kinds = [{"calibrated": {"value": value}, "calibration": None} for value in (0.5, 0.6)]
    rows = [row("svg2", method_settings=kind, weights_hash="a") for kind in kinds]
    first, second = summary.differing([{**one, "variant": summary.variant(one)} for one in rows])
    assert first != second and first.startswith("calibrated=") and len(first) == len("calibrated=") + 8
    rows[1]["weights_hash"] = "b"
    assert summary.differing([{**one, "variant": summary.variant(one)} for one in rows]) == ["weights=a", "weights=b"]


def test_table_has_the_baseline_first_means_and_dashes():
    rows = [
        row(psnr_db=20.0, lpips=0.1),
        row(psnr_db=30.0, generate_s=2.0),
        row("dense", 0.0, psnr_db=100.0),
        row("a", 0.5),
    ]
    lines = [line.split() for line in summary.table(rows).splitlines()]
    assert lines[0] == ["NVIDIA", "H200,", "torch", "2.11"]
    head = lines[1]
    assert [line[:4] for line in lines[2:]] == [
        ["pocket", "dense", "0", "1"], ["pocket", "a", "0.5", "1"], ["pocket", "draft", "0.9", "2"]
    ]  # fmt: skip
    cells = dict(zip(head, lines[-1], strict=True))
    assert (cells["psnr_db"], cells["lpips"], cells["generate_s"], cells["ssim"]) == ("25.00", "0.1000", "2.00", "-")


def test_table_mixes_neither_machines_nor_settings():
    rows = [row(psnr_db=1.0), row(psnr_db=2.0, device="AMD EPYC"), row(psnr_db=3.0, method_settings={"pool": "max"})]
    text = summary.table(rows)
    assert text.count("psnr_db") == 2 and "AMD EPYC, torch 2.11\n" in text
    assert [group["psnr_db"] for group in summary.means(rows)] == [2.0, 3.0, 1.0]
    assert text.count("pool=max") == 1 and "executor" not in text
    assert "sparsity=None" not in summary.table([row(sparsity=None, method="dense"), row()])


def test_table_mixes_neither_warm_ups_nor_weights():
    def dense(steps):
        return {"steps": steps, "timestep": None, "layers": 0}

    rows = [row(psnr_db=1.0, dense=dense(0.0)), row(psnr_db=2.0, dense=dense(0.25)), row(psnr_db=3.0, weights_hash="b")]
    assert sorted(group["psnr_db"] for group in summary.means(rows)) == [1.0, 2.0, 3.0]
    text = summary.table(rows[:2])
    assert "dense.steps=0.25" in text and "dense.layers" not in text


def test_table_shows_a_knob_in_place_of_the_sparsity():
    rows = [row("svg2", 0.0, knob={"top_p": p}, method_settings={"top_p": p}) for p in (0.8, 0.9)]
    lines = [line.split() for line in summary.table(rows).splitlines()]
    assert [line[:4] for line in lines[2:]] == [["pocket", "svg2", f"top_p={p}", "1"] for p in (0.8, 0.9)]
    assert summary.table(rows).count("top_p") == 2


def test_table_lists_what_failed():
    text = summary.table([row(), row(status="failed: out of memory", seed=3)])
    assert text.endswith("failed: out of memory (pocket draft sparsity 0.9, prompt 'turn left', seed 3)")
    assert [group["n"] for group in summary.means([row(), row(status="failed: x")])] == [1]
    assert summary.table([]) == "no records"


def test_a_sparsity_that_was_missed_is_told_below_the_table():
    rows = [row(sparsity_achieved=0.9), row("sta", 0.75, sparsity_achieved=0.7), row("dense", 0.0, sparsity_achieved=0)]
    rows += [row("fewer_steps", 0.9, sparsity_achieved=0.0, method_settings={"sparsity": 0.0})]
    assert summary.table(rows).splitlines()[-1] == "off by more than 2 points, 1 beyond 90%: sta achieved 0.700 of 0.75"
    assert "off by" not in summary.table(rows[:1]) and "off by" not in summary.table([row(sparsity_achieved=None)])
