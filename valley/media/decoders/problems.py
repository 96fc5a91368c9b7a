"""What can be wrong with a file."""

from __future__ import annotations

from typing import Literal

Kind = Literal["missing", "empty", "unsupported", "damaged", "limit", "settings"]


class Problem(Exception):  # noqa: N818 - a finding about a file, raised as the errors of `valley.errors` by the parent
    """The file cannot be used.

    Attributes:
        kind: which error of `valley.errors` it is.
        reason: what is wrong, in one line.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(reason)


class UnfitError(Exception):
    """A decoder would get this file wrong; the message completes "is not right for …"."""
