"""A still image is a clip of one frame, decoded as Pillow decodes it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from media_clips import picture
from PIL import Image

from valley.errors import DamagedMediaError, MediaLimitError
from valley.media.decode import Limits, read_frames, sample_clip
from valley.media.probe import MediaInfo, probe
from valley.media.sampling import Sampling

MODES = [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGB"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("PNG", "1"),
    ("WEBP", "RGB"),
    ("WEBP", "RGBA"),
    ("BMP", "RGB"),
]


def image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(7, (120, 80))).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_an_image_is_one_frame(kind, mode):
    data = image(kind, mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    for frames in (read_frames(data, [0.0, 1.0, 5.0]), sample_clip(data, Sampling(mode="fixed", num_frames=8))):
        np.testing.assert_array_equal(frames.pixels, expected[None])
        assert frames.times_s == (0.0,)
        assert frames.notes == ()


def test_sixteen_bits_of_grey_keep_their_upper_eight():
    levels = np.arange(0, 65536, 13, dtype=np.uint16)[:5040].reshape(70, 72)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    assert Image.open(file).mode.startswith("I")

    frames = read_frames(file.getvalue(), [0.0])

    np.testing.assert_array_equal(frames.pixels[0], np.repeat((levels // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image("JPEG", exif=exif, quality=95)
    stored = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    mirrored = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
    upright = np.rot90(mirrored, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0))

    frames = read_frames(data, [0.0])

    np.testing.assert_array_equal(frames.pixels[0], upright)
    info = probe(data)
    assert (info.height, info.width) == frames.pixels.shape[1:3]


def test_the_orientation_behind_the_picture_of_a_png_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image("PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    moved = data.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")

    assert moved.index(b"IDAT") < moved.index(b"eXIf")
    assert (probe(moved).width, probe(moved).height, probe(moved).rotation) == (80, 120, 270)
    np.testing.assert_array_equal(read_frames(moved, [0.0]).pixels[0], np.rot90(picture(7, (120, 80)), 3))


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded():
    """The compressed data are rubbish: whoever looks at them finds the file damaged."""
    data = image("PNG")
    start = data.index(b"IDAT") + 4
    hostile = data[:start] + bytes(100) + data[start + 100 :]

    with pytest.raises(MediaLimitError, match="120x80"):
        probe(hostile, Limits(max_pixels=9599))
    with pytest.raises(DamagedMediaError):
        probe(hostile, Limits(max_pixels=9600))


def test_an_image_is_known_by_its_bytes_not_its_name(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(image("PNG"))

    assert probe(path) == MediaInfo("image", "png", "png", 0.0, 120, 80, 0.0, 0, 1)


@pytest.mark.parametrize("limits", [Limits(), Limits(damaged="use")])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_image_is_damaged(kind, limits):
    data = image(kind)

    with pytest.raises(DamagedMediaError):
        read_frames(data[: len(data) // 2], [0.0], limits=limits)


def test_of_an_animated_image_the_first_picture_is_used():
    others = [Image.fromarray(picture(number, (120, 80))) for number in (1, 2)]
    data = image("PNG", save_all=True, append_images=others)

    frames = read_frames(data, [0.0])

    np.testing.assert_array_equal(frames.pixels[0], picture(7, (120, 80)))
    assert frames.notes == ("animated: the first picture is used",)
