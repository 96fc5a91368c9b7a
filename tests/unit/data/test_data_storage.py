"""Storage: a missing file is a bad sample, a passing fault is tried again, a lasting one stops the job."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from valley.data.storage import Retry, Root
from valley.errors import (
    MediaLimitError,
    MissingMediaError,
    SettingsError,
    StorageError,
    UnsupportedMediaError,
)

PATIENT = Retry(retries=3, first_wait_s=0.0)


class ServerError(Exception):
    """As an object store's client raises it: no OSError, the status inside."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class FlakyFileSystem(MemoryFileSystem):
    """A remote whose next answers a test writes down: an exception, or None for the true one."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    answers: list[Exception | None] = []
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _answer(self) -> None:
        type(self).calls += 1
        if self.answers and (fault := self.answers.pop(0)) is not None:
            raise fault

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._answer()
        return {**super().info(path, **kwargs), "ETag": "v1"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._answer()
        return bytes(super().cat_file(path, start, end, **kwargs))


@pytest.fixture
def flaky() -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.answers.clear()
    FlakyFileSystem.calls = 0
    FlakyFileSystem().pipe_file("/bucket/clips/a.mp4", b"0123456789")
    return FlakyFileSystem


def test_a_local_file_is_found_and_handed_over_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"0123")
    root = Root(str(tmp_path))
    found = root.find(["clips/a", "clips/a.mp4"])
    assert (found.path, found.size_bytes) == (f"{tmp_path}/clips/a.mp4", 4)
    assert root.read(found) == (tmp_path / "clips" / "a.mp4").resolve()
    os.utime(tmp_path / "clips" / "a.mp4", ns=(1, 1))
    assert root.find(["clips/a.mp4"]).modified != found.modified


def test_a_missing_file_is_named_by_its_first_candidate(tmp_path: Path) -> None:
    with pytest.raises(MissingMediaError) as caught:
        Root(str(tmp_path)).find(["a", "a.mp4"])
    assert (caught.value.path, caught.value.reason) == (f"{tmp_path}/a", "no such file")


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "rooted"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"secret")
    (root / "file.mp4").symlink_to(outside / "secret.mp4")
    (root / "folder").symlink_to(outside)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    for path in ("file.mp4", "folder/secret.mp4", "../rooted/secret.mp4"):
        with pytest.raises(MissingMediaError, match="leads outside the root"):
            Root(str(root)).find([path])
    with pytest.raises(MissingMediaError, match="no such file"):
        Root(str(root)).find(["loop.mp4"])


def test_links_that_stay_inside_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.mp4").write_bytes(b"0123")
    (tmp_path / "disk" / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    assert Root(str(tmp_path / "root")).find(["b.mp4"]).size_bytes == 4


def test_only_files_are_files(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    for name, kind in (("folder.mp4", "a folder"), ("pipe.mp4", "a device or pipe")):
        with pytest.raises(UnsupportedMediaError, match=kind):
            Root(str(tmp_path)).find([name])


def test_a_remote_file_is_read_whole(flaky: type[FlakyFileSystem]) -> None:
    root = Root("flaky://bucket", retry=PATIENT)
    found = root.find(["clips/a", "clips/a.mp4"])
    assert (found.size_bytes, found.modified) == (10, "v1")
    assert root.read(found) == b"0123456789"
    assert not root.is_local


@pytest.mark.parametrize(
    "path", ["a/%2e%2e/x", "%2E%2E/x", "a%2f..%2fx", "a/.%2e/x", "a/%252e%252e/x", "..%5cx", "../x"]
)
def test_nothing_outside_a_remote_root_is_asked_for(flaky: type[FlakyFileSystem], path: str) -> None:
    flaky().pipe_file("/bucket/x", b"secret")
    flaky().pipe_file("/bucket/clips/a/%2e%2e/x", b"would be found")
    with pytest.raises(MissingMediaError, match="leads outside the root"):
        Root("flaky://bucket/clips", retry=PATIENT).find([path])
    assert flaky.calls == 0


@pytest.mark.parametrize("path", ["a.mp4?file=x", "a.mp4#x", "?"])
def test_below_an_http_root_only_paths_are_asked_for(path: str) -> None:
    unreachable = Root("http://127.0.0.1:9/clips", retry=Retry(retries=0))
    with pytest.raises(MissingMediaError, match="has a query or fragment"):
        unreachable.find([path])


def test_names_with_percent_signs_and_marks_are_names_to_an_object_store(flaky: type[FlakyFileSystem]) -> None:
    for name in ("50%.mp4", "why?.mp4", "take #2.mp4", "a..b%2e.mp4"):
        flaky().pipe_file(f"/bucket/clips/{name}", b"0123")
        assert Root("flaky://bucket/clips", retry=PATIENT).find([name]).size_bytes == 4


def test_a_root_survives_the_way_to_a_worker(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"0123")
    for root in (Root(str(tmp_path)), Root("flaky://bucket/clips")):
        assert pickle.loads(pickle.dumps(root)).find(["a.mp4"]) == root.find(["a.mp4"])


@pytest.mark.parametrize(
    "fault",
    [TimeoutError(), ConnectionResetError(), OSError(5, "I/O error"), ServerError(503), ServerError(429)],
    ids=lambda fault: type(fault).__name__,
)
def test_a_passing_fault_is_tried_again(flaky: type[FlakyFileSystem], fault: Exception) -> None:
    root = Root("flaky://bucket", retry=PATIENT)
    flaky.answers[:] = [fault, None, fault, fault, None]
    assert root.read(root.find(["clips/a.mp4"])) == b"0123456789"
    assert flaky.calls == 5


def test_a_lasting_fault_is_nobodys_bad_sample(flaky: type[FlakyFileSystem]) -> None:
    flaky.answers[:] = [ServerError(500)] * 9
    with pytest.raises(StorageError, match=r"a.mp4: ServerError: status 500 \(4 tries\)"):
        Root("flaky://bucket", retry=PATIENT).find(["clips/a.mp4"])
    assert flaky.calls == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (FileNotFoundError(), "no such file"),
        (ServerError(404), "no such file"),
        (PermissionError(), "may not be read"),
        (ServerError(403), "may not be read"),
        (ServerError(451), "refused with status 451"),
    ],
)
def test_a_refusal_is_final(flaky: type[FlakyFileSystem], fault: Exception, reason: str) -> None:
    flaky.answers[:] = [fault]
    with pytest.raises(MissingMediaError, match=reason):
        Root("flaky://bucket", retry=PATIENT).find(["clips/a.mp4"])
    assert flaky.calls == 1


def test_a_cut_transfer_is_a_passing_fault(flaky: type[FlakyFileSystem]) -> None:
    root = Root("flaky://bucket", retry=PATIENT)
    found = root.find(["clips/a.mp4"])
    flaky().pipe_file("/bucket/clips/a.mp4", b"012")
    with pytest.raises(StorageError, match="got 3 of 10 bytes"):
        root.read(found)


def test_a_remote_file_beyond_the_limit_is_not_fetched(flaky: type[FlakyFileSystem]) -> None:
    root = Root("flaky://bucket", retry=PATIENT, max_bytes=9)
    found = root.find(["clips/a.mp4"])
    calls = flaky.calls
    with pytest.raises(MediaLimitError, match="10 bytes, more than 9"):
        root.read(found)
    assert flaky.calls == calls


def test_waits_grow_and_are_bounded() -> None:
    def fail_until(last: int) -> Callable[[], int]:
        calls = iter(range(99))

        def operation() -> int:
            if (call := next(calls)) < last:
                raise TimeoutError
            return call

        return operation

    assert Retry(retries=4, first_wait_s=0.001, longest_wait_s=0.002).run("a", fail_until(4)) == 4
    with pytest.raises(StorageError):
        Retry(retries=3, first_wait_s=0.0).run("a", fail_until(4))


def test_an_unknown_protocol_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match="nowhere://bucket"):
        Root("nowhere://bucket")
