"""What the header says, without decoding."""

from __future__ import annotations

import pytest
from media_clips import CASES, SIZE

from valley.media.probe import probe

CODECS = {
    "long GOP": ("mp4", "h264"),
    "turned by 270": ("mov", "h264"),
    "H.264 in Matroska": ("matroska", "h264"),
    "H.264 in MPEG-TS": ("mpegts", "h264"),
    "H.264 in FLV": ("flv", "h264"),
    "HEVC": ("mp4", "hevc"),
    "VP9": ("webm", "vp9"),
    "AV1": ("mp4", "av1"),
    "MPEG-4 in AVI": ("avi", "mpeg4"),
    "MPEG-2 in MPEG-PS": ("mpeg", "mpeg2video"),
    "Windows Media": ("asf", "wmv2"),
    "GIF": ("gif", "gif"),
}


@pytest.mark.parametrize("name", CODECS)
def test_container_codec_and_measures_are_told(name, clips):
    info = probe(clips(name))

    case = CASES[name]
    assert (info.kind, info.container, info.codec) == ("video", *CODECS[name])
    assert (info.width, info.height) == SIZE
    # MPEG-PS states no duration: FFmpeg estimates it from the timestamps it happens to see.
    assert info.duration_s == pytest.approx(case.times_s[-1] + 0.04, abs=0.35 if "PS" in name else 0.09)
    assert info.fps == pytest.approx(25, abs=0.1)
    assert info.num_frames == pytest.approx(len(case.times_s), abs=9 if "PS" in name else 2)


TURNED = {
    "turned by 90": 90,
    "turned by 180": 180,
    "turned by 270": 270,
    "turned by 90 in Matroska": 90,
    "mirrored": 0,
    "mirrored, turned by 90": 90,
    "mirrored, turned by 180": 180,
    "mirrored, turned by 270 in Matroska": 270,
}


@pytest.mark.parametrize(("name", "degrees"), TURNED.items())
def test_width_and_height_are_those_shown(name, degrees, clips):
    info = probe(clips(name).read_bytes())

    assert info.rotation == degrees
    assert (info.width, info.height) == SIZE  # the stored pictures lie on their sides
