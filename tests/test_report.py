"""Videos read back, pictures of the right size and content, and the table."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from draftbench import records, report


def clip(frames=9, height=48, width=64):
    """Smooth colours that move."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([x, y, (x + t) / 2], 1).mul(255).byte()


@pytest.mark.parametrize(
    ("size", "expected"), [((48, 64), (288, 384)), ((51, 77), (306, 462)), ((301, 257), (302, 258)), ((256, 300), None)]
)
def test_video_read_back(tmp_path, size, expected):
    frames = clip(5, *size)
    report.write_video(frames, tmp_path / "clip.mp4", fps=7.5)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 7.5
        assert (stream.height, stream.width) == (expected or size)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(pictures) == 5
    scale = max(1, -(-256 // min(size)))
    for picture, frame in zip(pictures, frames, strict=True):
        shown = picture[: size[0] * scale, : size[1] * scale][::scale, ::scale].astype(int)
        assert abs(shown - frame.permute(1, 2, 0).numpy()).mean() < 4
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_video_refuses_what_it_cannot_show(tmp_path):
    for frames, fps in ((clip()[:0], 8), (clip(), 0), (clip(), float("nan"))):
        with pytest.raises(ValueError, match="at least one frame and fps > 0"):
            report.write_video(frames, tmp_path / "clip.mp4", fps)
    with pytest.raises(TypeError, match="uint8"):
        report.write_video(clip().float(), tmp_path / "clip.mp4", 8)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        report.write_video(clip(), tmp_path / "file" / "clip.mp4", 8)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_side_by_side(tmp_path):
    """Frames 0, 4, 8 enlarged three times; the difference row is |a - b| times the gain, capped."""
    reference = clip()
    frames = reference.clone()
    frames[:, 0] = torch.where(reference[:, 0] > 245, 255, reference[:, 0] + 10).byte()
    report.side_by_side(reference, frames, tmp_path / "x.png", {"method": "draft"}, columns=3, gain=20)
    page = np.array(Image.open(tmp_path / "x.png"))
    assert page.shape[2] == 3 and (page[:10] == 255).all() and (page[:, -10:] == 255).all()
    (top,) = [y for y in range(len(page)) if (page[y, 160:352] != 255).any(1).mean() > 0.9][:1]
    pictures = [[page[top + 152 * row :, 160 + 200 * i :][:144, :192] for i in range(3)] for row in range(3)]
    for i, number in enumerate((0, 4, 8)):
        for row, source in enumerate((reference, frames)):
            expected = source[number].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
            assert (pictures[row][i] == expected).all()
        assert (pictures[2][i][..., 0].max(), pictures[2][i][..., 1:].max()) == (200, 0)
    assert (page[:, :150] < 128).any(), "labels"


def test_contact_sheet_takes_clips_of_any_length_and_size(tmp_path):
    rows = [
        ("turn left in the brick hall", clip(1)),
        ("real", clip(20, 768, 1280)),
        ("a_label_too_long_to_wrap", clip(3)),
    ]
    report.contact_sheet(rows, tmp_path / "x.png", title={"n": 3, "note": "word " * 60})
    with Image.open(tmp_path / "x.png") as page:
        assert page.width < 6 * 340 + 200 and page.height > 400
    with pytest.raises(ValueError, match="at least one clip"):
        report.contact_sheet([], tmp_path / "y.png")
    with pytest.raises(ValueError, match="one shape"):
        report.side_by_side(clip(3), clip(4), tmp_path / "y.png", {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


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


def test_table_has_the_baseline_first_means_and_dashes():
    rows = [
        row(psnr_db=20.0, lpips=0.1),
        row(psnr_db=30.0, generate_s=2.0),
        row("dense", 0.0, psnr_db=100.0),
        row("a", 0.5),
    ]
    lines = [line.split() for line in report.table(rows).splitlines()]
    assert lines[0] == ["NVIDIA", "H200,", "torch", "2.11"]
    head = lines[1]
    assert [line[:4] for line in lines[2:]] == [
        ["pocket", "dense", "0", "1"], ["pocket", "a", "0.5", "1"], ["pocket", "draft", "0.9", "2"]
    ]  # fmt: skip
    cells = dict(zip(head, lines[-1], strict=True))
    assert (cells["psnr_db"], cells["lpips"], cells["generate_s"], cells["ssim"]) == ("25.00", "0.1000", "2.00", "-")


def test_table_mixes_neither_machines_nor_settings():
    rows = [row(psnr_db=1.0), row(psnr_db=2.0, device="AMD EPYC"), row(psnr_db=3.0, method_settings={"pool": "max"})]
    text = report.table(rows)
    assert text.count("psnr_db") == 2 and "AMD EPYC, torch 2.11\n" in text
    assert [group["psnr_db"] for group in report.means(rows)] == [2.0, 3.0, 1.0]
    assert text.count("pool=max") == 1 and "executor" not in text
    assert "sparsity=None" not in report.table([row(sparsity=None, method="dense"), row()])


def test_table_lists_what_failed():
    text = report.table([row(), row(status="failed: out of memory", seed=3)])
    assert text.endswith("failed: out of memory (pocket draft sparsity 0.9, prompt 'turn left', seed 3)")
    assert [group["n"] for group in report.means([row(), row(status="failed: x")])] == [1]
    assert report.table([]) == "no records"
