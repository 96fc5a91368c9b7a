"""The transform is open_clip's own, within 1/255: a fiftieth of a level on average, a third where it enlarges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from valley.media.transform import CLIP_STD, make_transform, normalise, resize_crop

SIZES = [(336, 596), (720, 1280), (952, 720), (100, 150), (224, 224), (225, 224), (500, 64)]


def frames_of(height: int, width: int, count: int = 2) -> np.ndarray:
    """Pictures with detail and smooth parts, as photographs have."""
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 256, (count, height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]
    noise = random.integers(-12, 13, (count, height, width, 3))
    return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_transform_is_open_clip_s(size, resize_mode, interpolation):
    frames = frames_of(*size)
    theirs = image_transform(224, False, interpolation=interpolation, resize_mode=resize_mode, fill_color=9)
    expected = torch.stack([theirs(Image.fromarray(frame)) for frame in frames])

    transform = make_transform(224, interpolation=interpolation, resize_mode=resize_mode, fill=9)
    found = transform(frames)

    assert found.shape == (2, 3, 224, 224)
    assert found.dtype == torch.float32
    levels = (found - expected).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert levels.mean() < (0.02 if min(size) >= 224 else 0.3)
    assert levels.max() < 3.01


@pytest.mark.parametrize(
    "size", [(64, 500), (500, 64), (3, 200), (301, 5), (1, 333), (250, 1100), (1999, 301), (30, 121)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_middle_of_a_strip_is_the_middle_of_the_whole_strip_resized(size, interpolation):
    frames = frames_of(*size, count=1)
    theirs = image_transform(48, False, interpolation=interpolation).transforms[:2]  # resize, then crop
    expected = Image.fromarray(frames[0])
    for step in theirs:
        expected = step(expected)

    found = resize_crop(frames, 48, interpolation=interpolation)[0]

    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2  # PIL chooses which axis comes first, and rounds


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_takes_no_memory_but_for_its_middle(turned):
    """Resized as a whole, it would have 20 million million pixels."""
    strip = np.zeros((1, 1, 3_000_001, 3), np.uint8)
    strip[:, :, 1_500_000] = 200

    square = resize_crop(strip.swapaxes(1, 2) if turned else strip, 2700, interpolation="bilinear")[0]

    np.testing.assert_array_equal(square[1350, 1350], [200, 200, 200])
    assert 90 <= square[0 if turned else 1350, 1350 if turned else 0].max() <= 110


def test_another_mean_and_std_are_used():
    frames = frames_of(300, 400)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.125)
    theirs = image_transform(64, False, mean=mean, std=std)
    expected = torch.stack([theirs(Image.fromarray(frame)) for frame in frames])

    found = make_transform(64, mean, std)(torch.from_numpy(frames))

    torch.testing.assert_close(found, expected, atol=2.01 / 255 / min(std), rtol=0)
    assert (found - expected).abs().mean() < 0.02 / 255 / min(std)


def test_normalising_squares_ends_where_the_whole_transform_ends():
    frames = frames_of(336, 596)

    squares = torch.from_numpy(resize_crop(frames, 224))

    torch.testing.assert_close(normalise(squares), make_transform(224)(frames), rtol=0, atol=0)


def test_frames_in_any_layout_give_the_same_squares():
    frames = frames_of(200, 320)
    expected = resize_crop(frames, 96)
    read_only = frames.copy()
    read_only.flags.writeable = False
    turned = np.rot90(np.rot90(frames, axes=(1, 2)).copy(), -1, axes=(1, 2))

    np.testing.assert_array_equal(resize_crop(read_only, 96), expected)
    np.testing.assert_array_equal(resize_crop(turned, 96), expected)
