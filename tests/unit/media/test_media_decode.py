"""The frame on screen at a time, for every kind of file that decoders are known to get wrong."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_clips import CASES, FPS, NUM_FRAMES, Case, decode_all, encode, numbers_in, picture

from valley.errors import UnsupportedMediaError
from valley.media.decode import read_frames, sample_clip
from valley.media.sampling import Sampling
from valley.media.transform import resize_crop


def times_to_try(case: Case) -> list[float]:
    """Times at, just before and between the changes of pictures all over the clip, ascending."""
    some = case.times_s[:: max(1, len(case.times_s) // 7)]
    after = [shown + 0.013 for shown in some]
    before = [shown - 0.0011 for shown in case.times_s[5::11]]
    return sorted([*some, *after, *before, case.times_s[-1]])


@pytest.mark.parametrize("name", CASES)
def test_the_frame_is_the_one_on_screen_and_equals_decoding_everything(name, clips):
    case = CASES[name]
    times = times_to_try(case)

    frames = read_frames(clips(name), times)

    assert numbers_in(frames.pixels) == [case.number_at(time) for time in times]
    every = decode_all(clips(name))
    expected = np.stack([every[case.number_at(time) - case.first] for time in times])
    np.testing.assert_array_equal(frames.pixels, expected)
    assert frames.times_s == tuple(times)
    assert frames.notes == ()


@pytest.mark.parametrize("name", CASES)
def test_every_frame_is_sampled_at_its_time(name, clips):
    case = CASES[name]

    frames = sample_clip(clips(name), Sampling(mode="fixed", num_frames=1000))

    assert numbers_in(frames.pixels) == list(range(case.first, case.first + len(case.times_s)))
    np.testing.assert_allclose(frames.times_s, case.times_s, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_decord_gives_the_same_frames_or_leaves_the_file_to_pyav(name, clips):
    pytest.importorskip("decord")
    case = CASES[name]
    times = times_to_try(case)

    frames = read_frames(clips(name), times, decoder="decord")

    np.testing.assert_array_equal(frames.pixels, read_frames(clips(name), times, decoder="pyav").pixels)
    assert [note.startswith("read by pyav, since decord is not right for") for note in frames.notes] == (
        [] if case.decord else [True]
    )


@pytest.mark.parametrize(
    "name", ["long GOP", "variable frame rate", "edit list", "gradual refresh", "VP9", "AV1", "GIF"]
)
def test_torchcodec_gives_the_frames_on_screen(name, clips):
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("torchcodec or FFmpeg's libraries are not installed")
    case = CASES[name]
    times = times_to_try(case)

    frames = read_frames(clips(name), times, decoder="torchcodec")

    assert numbers_in(frames.pixels) == [case.number_at(time) for time in times]


def test_bytes_are_read_like_files(clips):
    path = clips("HEVC")

    frames = read_frames(path.read_bytes(), [0.5, 1.5])

    np.testing.assert_array_equal(frames.pixels, read_frames(str(path), [0.5, 1.5]).pixels)


def test_a_relative_path_is_relative_to_the_caller(clips, tmp_path, monkeypatch):
    path = clips("long GOP")
    read_frames(path, [0.0])  # the decoder process has started in another folder
    monkeypatch.chdir(tmp_path)

    frames = read_frames(Path(os.path.relpath(path)), [1.0])

    assert numbers_in(frames.pixels) == [FPS]


def test_times_may_repeat_and_come_in_any_order(clips):
    frames = read_frames(clips("short GOP"), [2.0, 0.0, 1.0, 2.0])

    assert numbers_in(frames.pixels) == [50, 0, 25, 50]


def test_behind_the_end_the_last_frame_is_on_screen(clips):
    frames = read_frames(clips("long GOP"), [1000.0])

    assert numbers_in(frames.pixels) == [NUM_FRAMES - 1]


@pytest.mark.parametrize("times", [[], [-0.1], [0.0, float("nan")], [float("inf")]])
def test_times_that_are_none_are_refused(times, clips):
    with pytest.raises(ValueError, match="times_s"):
        read_frames(clips("long GOP"), times)


def test_frames_are_resized_as_they_come(clips):
    full = read_frames(clips("turned by 90"), [0.0, 1.0, 2.0])

    small = read_frames(
        clips("turned by 90"), [0.0, 1.0, 2.0], size_px=64, interpolation="bilinear", resize_mode="squash"
    )

    expected = resize_crop(full.pixels, 64, interpolation="bilinear", resize_mode="squash")
    np.testing.assert_array_equal(small.pixels, expected)


def test_more_frames_than_fit_between_the_processes_all_arrive(tmp_path):
    path = encode(tmp_path / "large.mp4", num_frames=12, draw=lambda number: picture(number, (1280, 720)))

    frames = sample_clip(path, Sampling(mode="fixed", num_frames=12))

    assert frames.pixels.shape == (12, 720, 1280, 3)
    assert frames.pixels.nbytes > 8 << 20
    assert numbers_in(frames.pixels) == list(range(12))


def test_a_clip_that_changes_its_size_needs_a_size_to_be_resized_to(tmp_path):
    path = tmp_path / "growing.ts"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height = 192, 128
        for start, size in ((0, (192, 128)), (25, (384, 256))):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height = size
            encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, FPS)
            pictures = [
                av.VideoFrame.from_ndarray(picture(start + n, size)).reformat(format="yuv420p") for n in range(25)
            ]
            for number, frame in enumerate(pictures):
                frame.pts, frame.time_base = start + number, Fraction(1, FPS)
            for packet in [p for frame in [*pictures, None] for p in encoder.encode(frame)]:
                packet.stream = stream
                output.mux(packet)

    with pytest.raises(UnsupportedMediaError, match="size"):
        read_frames(path, [0.5, 1.5])
    small, large = read_frames(path, [0.5], size_px=96).pixels, read_frames(path, [1.5], size_px=96).pixels
    np.testing.assert_array_equal(read_frames(path, [0.5, 1.5], size_px=96).pixels, np.concatenate([small, large]))


def test_half_a_frame_a_second_is_the_paper_s_sampling(clips):
    frames = sample_clip(clips("variable frame rate"), Sampling(), size_px=64)

    last_s = CASES["variable frame rate"].times_s[-1]
    assert last_s == pytest.approx(4.2067)
    assert frames.times_s == (0.0, 2.0, 4.0)
    assert frames.pixels.shape == (3, 64, 64, 3)
