"""The NAL units that H.264 and HEVC packets are made of, as far as their headers."""

from __future__ import annotations

from collections.abc import Iterator

H264_SLICES = range(1, 6)
H264_IDR = 5
HEVC_SLICES = range(32)


def length_bytes(codec: str, configuration: bytes) -> int:
    """Returns in how many bytes each unit's length is written before it; 0: start codes part them, as in MPEG-TS."""
    if configuration[:1] != b"\x01":
        return 0
    at = 4 if codec == "h264" else 21
    return (configuration[at] & 3) + 1 if len(configuration) > at else 0


def temporal_layers(configuration: bytes) -> int:
    """Returns how many temporal layers an HEVC stream has; 0 when its configuration does not say."""
    return configuration[21] >> 3 & 7 if len(configuration) > 21 and configuration[0] == 1 else 0


def headers(packet: memoryview, length_bytes: int) -> Iterator[int]:
    """Yields the first byte of every unit of a packet."""
    start = 0
    if length_bytes:
        while start + length_bytes < len(packet):
            yield packet[start + length_bytes]
            start += length_bytes + int.from_bytes(packet[start : start + length_bytes], "big")
    else:
        data = bytes(packet)
        while 0 <= (start := data.find(b"\0\0\1", start)) < len(data) - 3:
            start += 3
            yield data[start]


def is_disposable(packet: memoryview, codec: str, length_bytes: int) -> bool:
    """Whether no other picture refers to the picture in a packet, within its temporal layer in HEVC."""
    for header in headers(packet, length_bytes):
        if codec == "h264" and header & 31 in H264_SLICES:
            return header >> 5 & 3 == 0
        if codec == "hevc" and (kind := header >> 1) in HEVC_SLICES:
            return kind < 16 and kind % 2 == 0
    return False
