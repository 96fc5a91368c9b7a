"""Data files: JSON arrays, JSON Lines and Parquet, also with what JSON forbids, also compressed and remote."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valley.data.datafile import DataFileError, digest, open_records
from valley.errors import RecordError

RECORDS: list[dict[str, Any]] = [{"id": 1, "text": "größer"}, {"id": 2, "text": 'quote " and [ bracket'}, {"id": 3}]


def read(path: Path | str, scratch: Path) -> list[object]:
    with open_records(str(path), scratch) as records:
        return list(records)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "\ufeff" + json.dumps(RECORDS),
        " \n" + json.dumps(RECORDS) + "\n",
        "\n".join(map(json.dumps, RECORDS)),
        "\ufeff" + "\n\n".join(map(json.dumps, RECORDS)) + "\n\n",
        "\r\n".join(map(json.dumps, RECORDS)),
    ],
)
def test_arrays_and_lines_give_the_same_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    assert read(tmp_path / "data.json", tmp_path) == RECORDS


def test_parquet(tmp_path: Path) -> None:
    rows = [{"id": "a", "video": None, "conversations": [{"from": "human", "value": "hi"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet", tmp_path) == rows


def test_compressed_and_remote_files_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    fsspec.filesystem("memory").pipe_file("/bucket/data.jsonl", "\n".join(map(json.dumps, RECORDS)).encode())
    (tmp_path / "scratch").mkdir()
    assert read(tmp_path / "data.json.gz", tmp_path / "scratch") == RECORDS
    assert read("memory://bucket/data.jsonl", tmp_path / "scratch") == RECORDS
    assert not list((tmp_path / "scratch").iterdir())


def test_what_python_writes_though_json_forbids_it_is_read(tmp_path: Path) -> None:
    records = [{"id": "a", "score": float("inf")}, {"id": "b", "text": "half \ud83d pair"}, {"id": "c"}]
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    assert read(tmp_path / "array.json", tmp_path) == records
    assert read(tmp_path / "lines.json", tmp_path) == records


def test_a_broken_line_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"id": 1}\n{"id": 2\n{"id": "\xff"}\n{"id": 4}\n')
    first, second, third, fourth = read(tmp_path / "data.jsonl", tmp_path)
    assert (first, fourth) == ({"id": 1}, {"id": 4})
    assert isinstance(second, RecordError)
    assert second.sample_id == "#1"
    assert second.reason.startswith("not JSON")
    assert isinstance(third, RecordError)
    assert third.sample_id == "#2"


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, DEEP.replace("]", ", NaN]")])
def test_a_line_nested_too_deeply_is_one_bad_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"id": 1}}\n{{"id": 2, "conversations": {text}}}\n{{"id": 3}}\n')
    first, second, third = read(tmp_path / "data.jsonl", tmp_path)
    assert (first, third) == ({"id": 1}, {"id": 3})
    assert isinstance(second, RecordError)
    assert (second.sample_id, second.field, second.reason) == ("#1", "record", "nested too deeply")


@pytest.mark.parametrize("odd", ["1", "NaN"])  # Python's NaN has the array read in another way
def test_an_array_with_a_record_nested_too_deeply_is_no_data_file(tmp_path: Path, odd: str) -> None:
    (tmp_path / "data.json").write_text(f'[{{"id": {odd}}}, {{"id": 2, "conversations": {DEEP}}}]')
    with pytest.raises(DataFileError, match="a record of the array is nested too deeply"):
        read(tmp_path / "data.json", tmp_path)


def test_a_corrupt_parquet_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    random = np.random.default_rng(0)
    rows = [{"id": str(number), "conversations": random.bytes(40).hex()} for number in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    whole = path.read_bytes()
    for start in range(100, len(whole) - 200, len(whole) // 12):  # the footer stays whole
        path.write_bytes(whole[:start] + b"\xa5" * 64 + whole[start + 64 :])
        with contextlib.suppress(DataFileError):  # not all damage can be told
            read(path, tmp_path)
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataFileError, match="corrupt"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0\1\2 anything\nbut JSON", "neither a JSON array nor JSON Lines"),
        (b"id,video\n1,a.mp4\n", "neither a JSON array nor JSON Lines"),
        (b'{\n  "data": [\n  ]\n}\n', "neither a JSON array nor JSON Lines"),
        (b'[{"id": 1}, {"id": 2}', "not JSON"),
        (b'[{"id": 1} {"id": 2}]', "not JSON: expected ','"),
        (b'[{"id": 1}, {"id": \\x}]', "not JSON"),
        (b"[\xff\xfe]", "not JSON"),
    ],
)
def test_what_is_no_data_file_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(DataFileError, match=reason):
        read(tmp_path / "data.json", tmp_path)


def test_a_false_parquet_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("[]")
    with pytest.raises(DataFileError, match="not Parquet"):
        read(tmp_path / "data.parquet", tmp_path)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text("[1]")
    first = digest(str(tmp_path / "a.json"))
    assert digest(str(tmp_path / "b.json")) == first
    (tmp_path / "a.json").write_text("[2]")
    assert digest(str(tmp_path / "a.json")) != first
    for path, reason in ((tmp_path, "a folder"), (tmp_path / "c.json", "no such file")):
        with pytest.raises(DataFileError, match=reason):
            digest(str(path))
