"""Damaged files are told from whole ones, and either rejected or used as far as they are whole."""

from __future__ import annotations

import av
import numpy as np
import pytest
from media_clips import FPS, NUM_FRAMES, encode, numbers_in

from valley.errors import DamagedMediaError, EmptyMediaError
from valley.media.decode import Limits, read_frames, sample_clip
from valley.media.probe import probe
from valley.media.sampling import Sampling

USE = Limits(damaged="use")
EVERY = Sampling(mode="fixed", num_frames=1000)
INDEX_FIRST = {"movflags": "faststart"}

CONTAINERS = {
    "mp4": lambda p: encode(p.with_suffix(".mp4"), muxer_options=INDEX_FIRST),
    "mov": lambda p: encode(p.with_suffix(".mov"), muxer_options=INDEX_FIRST),
    "fragmented mp4": lambda p: encode(
        p.with_suffix(".mp4"), muxer_options={"movflags": "frag_keyframe+empty_moov", "frag_size": "2000"}
    ),
    "Matroska": lambda p: encode(p.with_suffix(".mkv")),
    "WebM": lambda p: encode(p.with_suffix(".webm"), "libvpx-vp9"),
    "VP8 in WebM": lambda p: encode(p.with_suffix(".webm"), "libvpx"),
    "AV1 in mp4": lambda p: encode(p.with_suffix(".mp4"), "libsvtav1", muxer_options=INDEX_FIRST),
    "AV1 in Matroska": lambda p: encode(p.with_suffix(".mkv"), "libsvtav1"),
    "MPEG-4 in mp4": lambda p: encode(p.with_suffix(".mp4"), "mpeg4", muxer_options=INDEX_FIRST),
    "AVI": lambda p: encode(p.with_suffix(".avi"), "mpeg4"),
    "GIF": lambda p: encode(p.with_suffix(".gif"), "gif", pix_fmt="rgb8"),
    "FLV": lambda p: encode(p.with_suffix(".flv")),
    "ASF": lambda p: encode(p.with_suffix(".wmv"), "wmv2", container="asf"),
    "MPEG-TS": lambda p: encode(p.with_suffix(".ts")),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_truncated_file_is_rejected_or_used_as_far_as_it_goes(name, tmp_path):
    whole = CONTAINERS[name](tmp_path / "whole").read_bytes()
    cut = whole[: len(whole) * 6 // 10 - 20]  # not just between two packets, where an FLV tells nothing

    with pytest.raises(DamagedMediaError, match=r"truncated|readable"):
        sample_clip(cut, EVERY)
    frames = sample_clip(cut, EVERY, limits=USE)

    numbers = numbers_in(frames.pixels)
    assert NUM_FRAMES // 4 < len(numbers) <= numbers[-1] + 1 < NUM_FRAMES
    assert numbers[:15] == list(range(15))
    assert frames.notes[0].startswith(("truncated", "not readable"))
    np.testing.assert_array_equal(frames.pixels, sample_clip(whole, EVERY).pixels[numbers])


@pytest.mark.parametrize("limits", [Limits(), USE])
def test_an_mp4_whose_index_was_at_the_lost_end_is_damaged(limits, tmp_path):
    whole = encode(tmp_path / "whole.mp4").read_bytes()

    with pytest.raises(DamagedMediaError, match="header"):
        read_frames(whole[: len(whole) * 9 // 10], [0.0], limits=limits)


TAILS = {
    "zeros": bytes(1000),
    "an ID3 tag": b"TAG" + b"A song that nobody knows".ljust(125, b"\0"),
    "an ID3 tag of spaces": b"TAG" + b" " * 125,
    "text": b"downloaded from a site that signs its files\n",
    "four letters": b"\x7f\xff\xff\xffabcd",
}


@pytest.mark.parametrize("tail", TAILS)
def test_rubbish_behind_an_mp4_is_no_damage(tail, clips):
    whole = clips("long GOP").read_bytes()

    assert sample_clip(whole + TAILS[tail], Sampling()).notes == ()


def with_overwritten_packets(path, numbers, start=1 / 3, num_bytes=200):
    """The bytes of a file with a part of some of its packets, by their number in the file, overwritten."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in numbers:
        position, size = places[number]
        where = position + max(4, int(size * start))  # behind the length of the first NAL unit
        stop = min(where + num_bytes, position + size)
        data[where:stop] = b"\x5a" * (stop - where)
    return bytes(data)


@pytest.mark.parametrize(("codec", "packet", "start"), [("libx264", 20, 1 / 3), ("libx264", 22, 0), ("libx265", 24, 0)])
def test_damage_in_the_middle_is_told_from_its_first_picture_to_the_next_keyframe(codec, packet, start, tmp_path):
    path = encode(tmp_path / "whole.mp4", codec, gop=20)
    damaged = with_overwritten_packets(path, [packet], start)
    times = [number / FPS for number in (0, 15, 39, 40, 55)]

    with pytest.raises(DamagedMediaError, match="1 of the 5 frames wanted are damaged"):
        read_frames(damaged, times)
    frames = read_frames(damaged, times, limits=USE)

    assert frames.times_s == tuple(times[:2] + times[3:])
    assert numbers_in(frames.pixels) == [0, 15, 40, 55]
    assert frames.notes == ("1 of the 5 frames wanted are damaged and left out",)
    np.testing.assert_array_equal(frames.pixels, read_frames(path, list(frames.times_s)).pixels)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_of_vp8_and_vp9_damage_at_the_beginning_of_a_packet_is_told(codec, tmp_path):
    path = encode(tmp_path / "whole.webm", codec, gop=20)
    damaged = with_overwritten_packets(path, [22], 0)

    with pytest.raises(DamagedMediaError, match="1 of the 3 frames wanted are damaged"):
        read_frames(damaged, [number / FPS for number in (15, 39, 40)])
    frames = read_frames(damaged, [number / FPS for number in (15, 39, 40)], limits=USE)

    assert numbers_in(frames.pixels) == [15, 40]


def test_damage_that_the_frames_wanted_do_not_hang_on_is_not_looked_for(tmp_path):
    damaged = with_overwritten_packets(encode(tmp_path / "whole.mp4", gop=20), [22])

    assert numbers_in(read_frames(damaged, [0.0, 2.0]).pixels) == [0, 50]


def test_a_file_with_nothing_whole_in_it_is_damaged_under_either_setting(tmp_path):
    damaged = with_overwritten_packets(encode(tmp_path / "whole.mp4", gop=20), range(NUM_FRAMES), 0, 1 << 20)

    with pytest.raises(DamagedMediaError, match="3 of the 3"):
        read_frames(damaged, [0.0, 1.0, 2.0], limits=USE)


def test_a_video_without_a_frame_is_empty(tmp_path):
    path = tmp_path / "empty.mp4"
    with av.open(str(path), "w", options={"movflags": "empty_moov"}) as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height = 64, 64
        stream.codec_context.open()
        output.start_encoding()

    assert probe(path).codec == "h264"
    with pytest.raises(EmptyMediaError, match="not one frame"):
        read_frames(path, [0.0])


def test_a_truncated_file_is_not_given_to_decord(tmp_path):
    pytest.importorskip("decord")
    whole = encode(tmp_path / "whole.mp4", muxer_options=INDEX_FIRST).read_bytes()

    frames = sample_clip(whole[: len(whole) // 2], EVERY, decoder="decord", limits=USE)

    assert numbers_in(frames.pixels) == list(range(len(frames.pixels)))
    assert any("damaged files" in note for note in frames.notes)
