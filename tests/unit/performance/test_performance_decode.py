"""The decoding benchmark's files are whole, and what a reader cannot read is told or stops it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from valley.errors import MediaError
from valley.performance.decode import Kind, encode, measure, read_valley, report

KIND = Kind("small", "small.mp4", "libx264", (64, 48), 12, 5, 10, {"crf": "23"})


def refuse(path: str) -> Any:
    raise LookupError("no such codec")


def test_a_file_appears_whole_and_once_for_each_recipe(tmp_path: Path) -> None:
    path = encode(KIND, tmp_path)
    assert len(read_valley(str(path))) == 2
    made = path.stat().st_mtime_ns
    (tmp_path / f".{path.name}").write_bytes(b"what an interrupted run left")
    assert encode(KIND, tmp_path) == path
    assert path.stat().st_mtime_ns == made
    other = encode(replace(KIND, options={"crf": "30"}), tmp_path)
    assert other != path
    assert other.read_bytes() != path.read_bytes()


def test_a_peer_that_cannot_read_is_quoted_and_valley_stops_the_benchmark(tmp_path: Path) -> None:
    path = encode(KIND, tmp_path)
    spent = measure({"Valley": read_valley, "peer": refuse}, path)
    assert spent["peer"] == "LookupError: no such codec"
    assert np.isfinite(spent["Valley"])
    assert "cannot read it" in report({"small": spent}, ["Valley", "peer"])
    path.write_bytes(b"no video")
    with pytest.raises(MediaError):
        measure({"Valley": read_valley, "peer": refuse}, path)
