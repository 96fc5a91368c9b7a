"""A decoder that cannot be used is the settings' fault, never the files'."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
from valley.errors import SettingsError
from valley.media.decode import read_frames

clip, library = sys.argv[1], Path(sys.argv[2])

def read(decoder):
    try:
        print(read_frames(clip, [0.0], decoder=decoder).pixels.shape)
    except SettingsError as error:
        print(error)

for decoder in ("json", "clip"):  # modules that there are
    read(decoder)
for failure in sys.argv[3:]:
    library.write_text(failure)
    read("decord")
read("auto")
"""


def test_a_decoder_that_is_none_or_is_broken_is_a_matter_of_settings(tmp_path, clips):
    """In a process of its own, for the shape checks of the tests would refuse the name first."""
    failures = ["raise ImportError('no numpy')", "raise OSError(2, 'not there', 'libdecord.so')", "assert False"]
    (tmp_path / "decord.py").touch()

    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, clips("long GOP"), tmp_path / "decord.py", *failures],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
    )

    assert run.stdout.splitlines() == [
        "decoder: expected one of auto, pyav, decord, torchcodec, found json",
        "decoder: expected one of auto, pyav, decord, torchcodec, found clip",
        "decoder: decord cannot be loaded: no numpy",
        "decoder: decord cannot be loaded: [Errno 2] not there: 'libdecord.so'",
        "decoder: decord cannot be loaded: AssertionError",
        "(1, 128, 192, 3)",
    ], run.stderr
