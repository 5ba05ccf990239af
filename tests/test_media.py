"""Videos read back, and pictures of the right size and content."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from draftbench import media


def clip(frames=9, height=48, width=64):
    """Smooth colours that move."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([x, y, (x + t) / 2], 1).mul(255).byte()


@pytest.mark.parametrize(
    ("size", "expected"), [((48, 64), (288, 384)), ((51, 77), (306, 462)), ((301, 257), (302, 258)), ((256, 300), None)]
)
def test_video_read_back(tmp_path, size, expected):
    frames = clip(5, *size)
    media.write_video(frames, tmp_path / "clip.mp4", fps=7.5)
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
            media.write_video(frames, tmp_path / "clip.mp4", fps)
    with pytest.raises(TypeError, match="uint8"):
        media.write_video(clip().float(), tmp_path / "clip.mp4", 8)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        media.write_video(clip(), tmp_path / "file" / "clip.mp4", 8)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_side_by_side(tmp_path):
    """Frames 0, 4, 8 enlarged three times; the difference row is |a - b| times the gain, capped."""
    reference = clip()
    frames = reference.clone()
    frames[:, 0] = torch.where(reference[:, 0] > 245, 255, reference[:, 0] + 10).byte()
    media.side_by_side(reference, frames, tmp_path / "x.png", {"method": "draft"}, columns=3, gain=20)
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
    media.contact_sheet(rows, tmp_path / "x.png", title={"n": 3, "note": "word " * 60})
    with Image.open(tmp_path / "x.png") as page:
        assert page.width < 6 * 340 + 200 and page.height > 400
    with pytest.raises(ValueError, match="at least one clip"):
        media.contact_sheet([], tmp_path / "y.png")
    with pytest.raises(ValueError, match="one shape"):
        media.side_by_side(clip(3), clip(4), tmp_path / "y.png", {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
