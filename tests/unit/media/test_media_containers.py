"""What a file's first bytes say."""

from __future__ import annotations

import pytest

from valley.media.decoders import containers, nal
from valley.media.decoders.containers import recognise
from valley.media.decoders.problems import Problem

HEADS = [
    (b"\x00\x00\x00\x18ftypisom" + bytes(16), containers.MP4),
    (b"\x00\x00\x00\x14ftypqt  " + bytes(16), containers.MOV),
    (b"\x00\x00\x00\x08wide\x00\x00\x00\x00mdat" + bytes(16), containers.MOV),
    (b"\x1a\x45\xdf\xa3\x93\x42\x82\x88matroska", containers.MATROSKA),
    (b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webm", containers.WEBM),
    ((b"\x47" + bytes(187)) * 5, containers.MPEG_TS),
    (b"\0\0\0\0" + (b"\x47" + bytes(191)) * 5, containers.MPEG_TS),
    (b"RIFF\x00\x10\x00\x00AVI LIST", containers.AVI),
    (b"RIFF\x00\x10\x00\x00WEBPVP8 ", containers.WEBP),
    (b"FLV\x01\x05" + bytes(16), containers.FLV),
    (b"GIF89a" + bytes(16), containers.GIF),
    (b"\xff\xd8\xff\xe0" + bytes(16), containers.JPEG),
    (b"BM" + bytes(12) + b"\x28\x00\x00\x00" + bytes(16), containers.BMP),
]


@pytest.mark.parametrize(("head", "container"), HEADS)
def test_containers_are_recognised(head, container):
    assert recognise(head) is container


@pytest.mark.parametrize(
    "head",
    [
        b"RIFF\x00\x10\x00\x00WAVEfmt ",
        b"BM is how this text begins" + bytes(16),
        b"\x47" + bytes(1000),
        b"\x00\x00\x00\x18moof" + bytes(16),
        b"#EXTM3U" + b"\x47" * 1000,
        b"\xef\xbb\xbf#EXTM3U\n",
        b"\x00",
    ],
)
def test_what_only_looks_like_one_is_refused(head):
    with pytest.raises(Problem) as caught:
        recognise(head)

    assert caught.value.kind == "unsupported"


def test_pictures_nothing_refers_to_are_told_by_their_units():
    """H.264: nal_ref_idc 0 of the first slice. HEVC: even types below 16. Other units do not count."""
    sei, slice_kept, slice_left = b"\x06\x01", b"\x61\x9a", b"\x01\x9a"

    def packet(*units: bytes, parted: bytes | None = None) -> memoryview:
        return memoryview(b"".join((parted or len(unit).to_bytes(4, "big")) + unit for unit in units))

    for length_bytes, parted in ((4, None), (0, b"\0\0\1"), (0, b"\0\0\0\1")):
        assert nal.is_disposable(packet(sei, slice_left, parted=parted), "h264", length_bytes)
        assert not nal.is_disposable(packet(sei, slice_kept, parted=parted), "h264", length_bytes)
        assert not nal.is_disposable(packet(sei, parted=parted), "h264", length_bytes)
    for kind, disposable in ((0, True), (1, False), (8, True), (9, False), (16, False), (19, False), (20, False)):
        assert nal.is_disposable(packet(bytes([kind << 1, 1, 7])), "hevc", 4) is disposable
