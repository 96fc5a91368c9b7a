"""The decoder process has no network: what a file names cannot be reached, whatever a demuxer makes of it."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Literal

Isolation = Literal["namespace", "protocols"]

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


def leave_network() -> Isolation:
    """Moves this process into an empty network namespace of its own, where the system allows that.

    To be called before there are threads: a process that has some may not leave its user namespace, which is what
    anyone but root has to do on the way. Files are still opened with the rights that the process had.

    Returns:
        `namespace` when done. `protocols` when it is not allowed, as in many containers and outside Linux; then what
        remains is that `Clip` hands FFmpeg open files only, and forbids it every protocol.
    """
    if not sys.platform.startswith("linux"):
        return "protocols"
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    try:
        failed = ctypes.CDLL(None).unshare(flags)
    except (OSError, AttributeError):  # a C library that cannot be loaded, or that lacks the call
        return "protocols"
    return "protocols" if failed else "namespace"
