"""Messages between the two processes: a JSON object and, behind it, a block of bytes.

JSON, and not pickle: the child reads hostile files, so the parent does not run what the child sends.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_HEAD = struct.Struct("!II")
_AT_LEAST_BYTES = 1 << 16


class GoneError(Exception):
    """There is nobody at the other end any more."""


class Wire:
    """One end of a stream socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._received = bytearray()

    def send(self, message: dict[str, Any], block: bytes = b"") -> None:
        """Sends a message.

        Raises:
            GoneError: the other end is gone.
            TimeoutError: it did not read in time.
        """
        text = json.dumps(message).encode()
        try:
            self._end.sendall(_HEAD.pack(len(text), len(block)) + text + block)
        except ConnectionError:
            raise GoneError from None

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Returns the next message and its block.

        Raises:
            GoneError: the other end is gone.
            TimeoutError: it sent nothing in time.
        """
        text_bytes, block_bytes = _HEAD.unpack(self._exactly(_HEAD.size))
        text = self._exactly(text_bytes)
        return json.loads(text), self._exactly(block_bytes)

    def set_timeout(self, seconds: float | None) -> None:
        """Bounds every wait from now on."""
        self._end.settimeout(seconds)

    def close(self) -> None:
        """Closes this end; the other one sees the end of the stream."""
        self._end.close()

    def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            try:
                chunk = self._end.recv(max(count - len(self._received), _AT_LEAST_BYTES))
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise GoneError
            self._received += chunk
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken
