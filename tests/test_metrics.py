"""Each metric against an independent implementation or published numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from draftbench.metrics.lpips import lpips, weights_path
from draftbench.metrics.psnr import psnr_db
from draftbench.metrics.ssim import ssim

DATA = Path(__file__).parent / "data"


def picture(name):
    return torch.from_numpy(np.array(Image.open(DATA / f"lpips_ex_{name}.png").convert("RGB"))).permute(2, 0, 1)[None]


@pytest.fixture
def clips():
    torch.manual_seed(0)
    reference = torch.nn.functional.interpolate(torch.rand(4, 3, 9, 12), size=(45, 60), mode="bicubic").clamp(0, 1)
    noise = torch.randn_like(reference) * torch.tensor([0.01, 0.05, 0.1, 0.3]).view(4, 1, 1, 1)
    return [(x.clamp(0, 1) * 255).round().byte() for x in (reference + noise, reference)]


def test_psnr_is_the_mean_of_frames(clips):
    expected = np.mean(
        [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=255) for a, b in zip(*clips, strict=False)]
    )
    assert psnr_db(*clips) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_identical_frames_is_capped(clips):
    assert psnr_db(clips[0], clips[0]) == 100.0


def test_ssim(clips):
    expected = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255,
        )
        for a, b in zip(*clips, strict=False)
    ]  # fmt: skip
    assert ssim(*clips) == pytest.approx(np.mean(expected), abs=1e-4)
    assert ssim(clips[0], clips[0]) == pytest.approx(1)


def test_lpips_gives_the_published_numbers():
    """The LPIPS repository's own example images: .722 and .138."""
    assert lpips(picture("ref"), picture("p0")) == pytest.approx(0.722, abs=5e-4)
    assert lpips(picture("ref"), picture("p1")) == pytest.approx(0.138, abs=5e-4)
    assert lpips(picture("ref"), picture("ref")) == 0


def test_lpips_does_not_depend_on_the_batch(clips):
    assert lpips(*clips, batch=1) == pytest.approx(lpips(*clips, batch=4), rel=1e-5)


@pytest.mark.parametrize("metric", [psnr_db, ssim, lpips])
def test_bad_frames_are_refused(metric, clips):
    with pytest.raises(TypeError, match=r"must be uint8, got torch\.float32"):
        metric(clips[0].float(), clips[1])
    with pytest.raises(ValueError, match=r"must be \[T, 3, h, w\]"):
        metric(clips[0][0], clips[1][0])
    with pytest.raises(ValueError, match="one shape"):
        metric(clips[0][:2], clips[1])


def test_vgg_without_weights_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTBENCH_LPIPS_VGG", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="convert_lpips"):
        weights_path("vgg")
    with pytest.raises(ValueError, match="alex or vgg"):
        weights_path("squeeze")
