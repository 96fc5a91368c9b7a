"""The clips that the chat page offers."""

from __future__ import annotations

from pathlib import Path

from valley.errors import SettingsError

_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif", ".jpg", ".jpeg", ".png", ".webp")


def find_clips(folder: str | None) -> dict[str, Path]:
    """Returns the clips of a folder by their names; what is not among them is never opened.

    Raises:
        SettingsError: the folder cannot be read.
    """
    if not folder:
        return {}
    try:
        return {path.name: path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in _ENDINGS}
    except OSError as error:
        raise SettingsError([f"clips: {folder} cannot be read: {type(error).__name__}"]) from None
