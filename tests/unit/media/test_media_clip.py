"""The scan of a file's packets and the plan of what to decode, inside the decoder process."""

from __future__ import annotations

import os
from io import FileIO

import numpy as np
import pytest
from media_clips import CASES, NUM_FRAMES

from valley.media.decoders.bounds import Bounds
from valley.media.decoders.clip import Clip
from valley.media.decoders.containers import HEAD_BYTES, MPEG_TS, recognise
from valley.media.decoders.planned import plan
from valley.media.decoders.problems import Problem
from valley.media.decoders.pyav import read_pyav
from valley.media.decoders.wholeness import missing_bytes


def scanned(path, **options) -> Clip:
    file = FileIO(path)
    clip = Clip(file, recognise(os.pread(file.fileno(), HEAD_BYTES, 0)), bounds=Bounds(max_pixels=1 << 20), **options)
    clip.scan()
    return clip


@pytest.mark.parametrize("name", CASES)
def test_times_and_duration_are_exact(name, clips):
    clip = scanned(clips(name))

    times = CASES[name].times_s
    np.testing.assert_allclose(clip.times_s, times, atol=1e-3)
    assert clip.times_s[0] == 0
    last_s = 0.0 if name == "variable frame rate" else 0.04
    assert times[-1] + last_s - 1e-3 <= clip.duration_s <= times[-1] + 0.08
    assert clip.cut == ""


def test_only_what_is_needed_is_decoded(clips):
    """With a keyframe every 10 frames, frames 0, 25 and 50 take at most 1 + 6 + 1 packets."""
    clip = scanned(clips("short GOP"))

    runs = plan(clip, [int(clip.shown[position]) for position in (0, 25, 50)])

    assert [run.start for run in runs] == [0, 20, 50]
    assert [len(run.wanted) for run in runs] == [1, 1, 1]
    assert sum(run.stop - run.start for run in runs) <= 8


def test_frames_that_hang_on_one_keyframe_share_a_run(clips):
    clip = scanned(clips("long GOP"))

    (run,) = plan(clip, [int(clip.shown[position]) for position in (3, 30, 7)])

    assert run.start == 0
    assert len(run.wanted) == 3


def test_a_leading_picture_is_decoded_from_the_keyframe_before(clips):
    clip = scanned(clips("open GOP"))
    leading = next(packet for packet in range(len(clip.pts)) if clip.is_leading(packet))

    (run,) = plan(clip, [leading])

    assert clip.keys[1] < leading
    assert run.start == clip.keys[0]


def test_a_file_too_long_to_be_kept_is_read_twice_with_the_same_frames(clips):
    positions = [0, 17, 38, 59]

    for name in ("long GOP", "HEVC", "H.264 in MPEG-TS", "cut at an open GOP", "H.264 in AVI"):
        some = [position for position in positions if position < len(CASES[name].times_s)]
        kept = {n: pixels.copy() for n, pixels in read_pyav(scanned(clips(name)), some)}
        read_twice = {n: pixels.copy() for n, pixels in read_pyav(scanned(clips(name), kept_bytes=2000), some)}
        assert list(kept) == list(read_twice)
        for position in some:
            np.testing.assert_array_equal(kept[position], read_twice[position])


def test_only_a_bounded_part_of_a_file_is_kept(clips):
    clip = scanned(clips("long GOP"), kept_bytes=2000)

    assert clip.kept_packets == 0
    assert scanned(clips("long GOP")).kept_packets == NUM_FRAMES


@pytest.mark.parametrize("bounds", [Bounds(1 << 20, max_duration_s=0.5), Bounds(1 << 20, max_pictures=20)])
def test_a_clip_that_is_too_long_is_not_read_to_its_end(bounds, clips):
    file = FileIO(clips("H.264 in MPEG-TS"))
    clip = Clip(file, MPEG_TS, bounds=bounds)

    with pytest.raises(Problem, match=r"0\.5 s long or more|more than 20 pictures"):
        clip.scan()

    assert 10 < clip.kept_packets < 25


@pytest.mark.parametrize(
    "name",
    [
        "long GOP",
        "fragmented",
        "H.264 in Matroska",
        "VP9",
        "MPEG-4 in AVI",
        "H.264 in FLV",
        "Windows Media",
        "GIF",
        "H.264 in MPEG-TS",
    ],
)
def test_a_file_says_how_long_it_should_be(name, clips, tmp_path):
    whole = clips(name).read_bytes()
    container = recognise(whole[:HEAD_BYTES])
    path = tmp_path / "cut"

    for left in (len(whole), len(whole) - 10, len(whole) - 40):
        path.write_bytes(whole[:left])
        with FileIO(path) as file:
            missing = missing_bytes(file.fileno(), container, left)
        assert (missing > 0) == (left < len(whole)), left


def test_sound_beside_the_video_changes_nothing(tmp_path, clips):
    import av

    path = tmp_path / "with-sound.mp4"
    with av.open(str(clips("long GOP"))) as silent, av.open(str(path), "w") as output:
        video = output.add_stream_from_template(silent.streams.video[0])
        sound = output.add_stream("aac", rate=44100)
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 44100 * 5)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate = 44100
        packets = [packet for packet in silent.demux(video=0) if packet.size]
        for packet in packets:
            packet.stream = video
        for packet in [*packets, *sound.encode(frame), *sound.encode(None)]:
            output.mux(packet)

    clip = scanned(path)

    np.testing.assert_allclose(clip.times_s, CASES["long GOP"].times_s, atol=1e-6)
    assert clip.duration_s == pytest.approx(2.4)  # the sound's 5 s are not the video's
