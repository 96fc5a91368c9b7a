"""The units that AV1 packets are made of, as far as the frame headers' list of buffers to refresh.

Names and order of the fields are those of the AV1 specification, sections 5.5 and 5.9.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_KEY_FRAME, _INTRA_ONLY_FRAME, _SWITCH_FRAME = 0, 2, 3
_CHOSEN_PER_FRAME = 2
_ALL_BUFFERS = 0xFF


class Sequence(NamedTuple):
    """What frame headers need of the sequence header."""

    screen_content_tools: int
    integer_mv: int
    order_hint_bits: int


class _Bits:
    """Reads a number bit by bit, from the highest."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)


def read_sequence(configuration: bytes) -> Sequence | None:
    """Returns the sequence header in an av1C record; None when there is none, or one with fields of rare use."""
    header = next((data for kind, data in _units(configuration[4:]) if kind == _SEQUENCE_HEADER), None)
    if configuration[:1] != b"\x81" or header is None or len(header) < 8:
        return None
    bits = _Bits(header[:32])
    _profile, still_picture, reduced_still_picture = bits.take(3), bits.take(1), bits.take(1)
    timing_info_present = bits.take(1) if not reduced_still_picture else 0
    if still_picture or reduced_still_picture or timing_info_present:
        return None
    initial_display_delay_present = bits.take(1)
    for _ in range(bits.take(5) + 1):  # operating points
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if initial_display_delay_present and bits.take(1):
            bits.take(4)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    bits.take(width_bits + height_bits)
    if bits.take(1):  # frame_id_numbers_present_flag
        return None
    bits.take(3 + 4)  # block size and intra tools; inter tools
    enable_order_hint = bits.take(1)
    if enable_order_hint:
        bits.take(2)
    screen_content_tools = _CHOSEN_PER_FRAME if bits.take(1) else bits.take(1)
    integer_mv = _CHOSEN_PER_FRAME
    if screen_content_tools > 0 and not bits.take(1):
        integer_mv = bits.take(1)
    return Sequence(screen_content_tools, integer_mv, bits.take(3) + 1 if enable_order_hint else 0)


def is_disposable(packet: memoryview, sequence: Sequence) -> bool:
    """Whether a packet's frames refresh no buffer, so that none refers to them."""
    frames = [data for kind, data in _units(bytes(packet)) if kind in (_FRAME_HEADER, _FRAME)]
    return bool(frames) and all(_refreshed(_Bits(data[:16]), sequence) == 0 for data in frames)


def _refreshed(bits: _Bits, sequence: Sequence) -> int:
    """The buffers that a frame is kept in, a bit each."""
    if bits.take(1):  # show_existing_frame: may be a keyframe that refreshes all
        return _ALL_BUFFERS
    frame_type, show_frame = bits.take(2), bits.take(1)
    if not show_frame:
        bits.take(1)  # showable_frame
    is_whole_start = frame_type == _SWITCH_FRAME or (frame_type == _KEY_FRAME and show_frame)
    if is_whole_start:
        return _ALL_BUFFERS
    error_resilient_mode = bits.take(1)
    bits.take(1)  # disable_cdf_update
    screen_content_tools = sequence.screen_content_tools
    if screen_content_tools == _CHOSEN_PER_FRAME:
        screen_content_tools = bits.take(1)
    if screen_content_tools and sequence.integer_mv == _CHOSEN_PER_FRAME:
        bits.take(1)  # force_integer_mv
    bits.take(1)  # frame_size_override_flag
    bits.take(sequence.order_hint_bits)
    if not (frame_type in (_KEY_FRAME, _INTRA_ONLY_FRAME) or error_resilient_mode):
        bits.take(3)  # primary_ref_frame
    return bits.take(8)


def _units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields type and content of each unit."""
    start = 0
    while start < len(data):
        header = data[start]
        start += 2 if header & 4 else 1
        size = len(data) - start
        if header & 2:
            size, start = _leb128(data, start)
        yield header >> 3 & 15, data[start : start + size]
        start += size


def _leb128(data: bytes, start: int) -> tuple[int, int]:
    """A number in groups of seven bits, from the lowest, and where it ends."""
    value = 0
    for shift, byte in enumerate(data[start : start + 8]):
        value |= (byte & 0x7F) << 7 * shift
        start += 1
        if byte < 0x80:
            break
    return value, start
