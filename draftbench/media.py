"""What a run shows: MP4s that play in a browser, side-by-side pictures and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import replacing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_INK, _GREY = "#1a1a1a", "#70757a"
_MARGIN, _GAP, _LABEL = 28, 8, 132


def write_video(frames: Tensor, path: Path | str, fps: float) -> None:
    """Write uint8 frames [T, 3, h, w] as H.264, yuv420p, BT.709, MP4 with its index in front.

    Frames whose shorter side is below 256 pixels are enlarged by a whole factor; an odd side grows by one pixel.
    Raises TypeError or ValueError for other frames or fps <= 0, OSError naming the path if it cannot be written.
    """
    import av
    import torch

    from .metrics import check_frames

    check_frames(frames, frames)
    if not len(frames) or not fps > 0:
        raise ValueError(f"a video needs at least one frame and fps > 0, got {len(frames)} and {fps}")
    frames = _enlarge(frames, 256)
    rows, columns = (torch.arange(size + size % 2).clamp(max=size - 1) for size in frames.shape[-2:])
    frames = frames[..., rows[:, None], columns].permute(0, 2, 3, 1).contiguous()
    options = {"movflags": "+faststart"}
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709, so that players agree on the colours
        codec.color_range = 1
        for picture in frames.numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def side_by_side(
    reference: Tensor, frames: Tensor, path: Path | str, title: Mapping[str, object], columns: int = 6, gain: int = 4
) -> None:
    """A PNG of the dense frames, the method's and |difference| times `gain`; both clips are uint8 [T, 3, h, w].

    title: what to write above, name to value; its "method" labels the second row. Errors as `write_video`.
    """
    from .metrics import check_frames

    check_frames(frames, reference)
    difference = ((frames.int() - reference.int()).abs() * gain).clamp(max=255).byte()
    label = str(title.get("method", "method"))
    rows = [("dense", reference), (label, frames), (f"difference x{gain}", difference)]
    _page(rows, path, columns, title)


def contact_sheet(
    rows: Sequence[tuple[str, Tensor]], path: Path | str, columns: int = 6, title: Mapping[str, object] | None = None
) -> None:
    """A PNG with a row for each clip: its label, then evenly spaced frames of uint8 [T, 3, h, w]; errors as above."""
    from .metrics import check_frames

    for _, frames in rows:
        check_frames(frames, frames)
    _page(rows, path, columns, title or {})


def _enlarge(frames: Tensor, shorter: int) -> Tensor:
    """Repeat pixels by the least whole factor that brings the shorter side to `shorter` pixels."""
    factor = max(1, math.ceil(shorter / min(frames.shape[-2:])))
    return frames.cpu().repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _pictures(frames: Tensor, columns: int) -> tuple[list[int], list[Image.Image]]:
    """Up to `columns` evenly spaced frames: their numbers, and pictures of a size to print."""
    from PIL import Image

    last = len(frames) - 1
    count = min(columns, len(frames))
    numbers = [round(i * last / max(1, count - 1)) for i in range(count)]
    chosen = _enlarge(frames[numbers], 128).permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(picture) for picture in chosen]
    return numbers, [picture.reduce(max(1, math.ceil(picture.width / 320))) for picture in pictures]


def _page(rows: Sequence[tuple[str, Tensor]], path: Path | str, columns: int, title: Mapping[str, object]) -> None:
    """Draw a white page: title, frame numbers where all clips share them, labels left, pictures."""
    from PIL import Image, ImageDraw, ImageFont

    if not rows or columns < 1 or not all(len(frames) for _, frames in rows):
        raise ValueError("a picture needs at least one clip, one frame in each and one column")
    font = ImageFont.load_default(size=16)
    cells = [_pictures(frames, columns) for _, frames in rows]
    step = max(picture.width for _, pictures in cells for picture in pictures) + _GAP
    left = _MARGIN + _LABEL
    width = left + step * max(len(pictures) for _, pictures in cells) - _GAP + _MARGIN
    labels = [_wrap(label.split(), " ", font, _LABEL - 14) for label, _ in rows]
    heights = [max(pictures[0].height, 20 * len(label)) for (_, pictures), label in zip(cells, labels, strict=True)]
    header = _wrap([f"{name}: {value}" for name, value in title.items()], "     ", font, width - 2 * _MARGIN)
    numbered = all(numbers == cells[0][0] for numbers, _ in cells)
    y = _MARGIN + 24 * len(header) + (12 if header else 0)
    page = Image.new("RGB", (width, y + 24 * numbered + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(header):
        draw.text((_MARGIN, _MARGIN + 24 * i), line, _INK, font)
    if numbered:
        for i, number in enumerate(cells[0][0]):
            draw.text((left + step * i + (step - _GAP) / 2, y), f"frame {number}", _GREY, font, anchor="ma")
        y += 24
    for label, (_, pictures), height in zip(labels, cells, heights, strict=True):
        for i, line in enumerate(label):
            draw.text((_MARGIN, y + height / 2 + 20 * (i - (len(label) - 1) / 2)), line, _INK, font, anchor="lm")
        for i, picture in enumerate(pictures):
            x = left + step * i + (step - _GAP - picture.width) // 2
            page.paste(picture, (x, y + (height - picture.height) // 2))
        y += height + _GAP
    with replacing(path) as temporary:
        page.save(temporary, format="PNG")


def _wrap(pieces: Sequence[str], gap: str, font: Any, width: float) -> list[str]:
    """Join pieces by `gap` into lines of at most `width` pixels; a longer piece has a line of its own."""
    lines: list[str] = []
    for piece in pieces:
        if lines and font.getlength(lines[-1] + gap + piece) <= width:
            lines[-1] += gap + piece
        else:
            lines.append(piece)
    return lines
