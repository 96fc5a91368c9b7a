"""A decode can neither hang nor kill the worker, and decodes at the same time do not meet."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from media_clips import encode, number_in, numbers_in

from valley.errors import DamagedMediaError, DecodeTimeoutError
from valley.media import sandbox
from valley.media.decode import Limits, read_frames, sample_clip
from valley.media.sampling import Sampling

TIMES = [0.0, 1.0, 2.0]
NUMBERS = [0, 25, 50]


@pytest.fixture
def child(clips) -> int:
    """The id of the decoder process that the next call will use."""
    read_frames(clips("long GOP"), [0.0])
    with sandbox.reading(clips("long GOP"), Limits(), decoder="auto", frames=False) as reading:
        return reading.process_id


def is_there(pid: int) -> bool:
    """Whether any thread of a process still runs; one that has ended but was not waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return len(threads) > 1 or (threads[0] / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until_gone(pid: int) -> bool:
    """Whether a process ends within a generous time."""
    give_up = time.monotonic() + 30
    while is_there(pid) and time.monotonic() < give_up:
        time.sleep(0.02)
    return not is_there(pid)


def test_a_process_serves_one_file_after_the_other(child, clips):
    for name in ("HEVC", "edit list", "VP9"):
        read_frames(clips(name), [0.0])

    assert child in sandbox.process_ids()


def test_bad_files_do_not_cost_a_process(child, tmp_path, clips):
    cut = clips("H.264 in Matroska").read_bytes()[:5000]
    for source in (b"", b"text", cut, tmp_path / "none.mp4"):
        with contextlib.suppress(Exception):
            sample_clip(source, Sampling())
    with pytest.raises(DamagedMediaError):
        sample_clip(cut, Sampling())

    assert child in sandbox.process_ids()


def test_a_decoder_that_hangs_is_killed_and_replaced(child, clips):
    os.kill(child, signal.SIGSTOP)

    with pytest.raises(DecodeTimeoutError, match="not decoded within 0"):
        read_frames(clips("long GOP"), TIMES, limits=Limits(deadline_s=0.5))

    assert wait_until_gone(child)
    assert numbers_in(read_frames(clips("long GOP"), TIMES).pixels) == NUMBERS


def test_each_frame_wanted_puts_the_deadline_off(child, clips):
    def read_and_stop() -> None:
        limits = Limits(deadline_s=3, deadline_s_per_frame=0.1)
        with sandbox.reading(clips("long GOP"), limits, decoder="auto", frames=True) as reading:
            os.kill(reading.process_id, signal.SIGSTOP)
            list(reading.pictures(NUMBERS))

    with pytest.raises(DecodeTimeoutError, match=r"not decoded within 3\.3 s"):
        read_and_stop()


def test_a_decoder_that_dies_in_the_middle_is_reported_and_replaced(child, clips):
    path = clips("long GOP")

    def read_and_kill() -> None:
        with sandbox.reading(path, Limits(), decoder="auto", frames=True) as reading:
            os.kill(reading.process_id, signal.SIGKILL)
            list(reading.pictures([0]))

    with pytest.raises(DecodeTimeoutError) as caught:
        read_and_kill()

    assert (caught.value.path, caught.value.reason) == (str(path), "the decoder process died: signal 9")
    assert child not in sandbox.process_ids()
    assert numbers_in(read_frames(path, TIMES).pixels) == NUMBERS


def test_a_decoder_that_died_between_calls_is_replaced(child, clips):
    os.kill(child, signal.SIGKILL)
    assert wait_until_gone(child)

    assert numbers_in(read_frames(clips("long GOP"), TIMES).pixels) == NUMBERS


def test_threads_decode_at_the_same_time(clips):
    both_are_open = threading.Barrier(2)

    def read(name: str) -> tuple[int, list[int]]:
        with sandbox.reading(clips(name), Limits(), decoder="auto", frames=True) as reading:
            both_are_open.wait(60)
            pictures = {position: number_in(pixels) for position, pixels in reading.pictures(NUMBERS)}
            return reading.process_id, [pictures[position] for position in NUMBERS]

    names = ["HEVC", "VP9"]
    list(map(clips, names))
    with ThreadPoolExecutor(2) as threads:
        (one, its_numbers), (other, others_numbers) = threads.map(read, names)

    assert one != other
    assert its_numbers == others_numbers == NUMBERS


def test_many_threads_get_the_frames_they_asked_for(clips):
    names = ["long GOP", "HEVC", "VP9", "H.264 in MPEG-TS"] * 4
    with ThreadPoolExecutor(4) as threads:
        frames = list(threads.map(lambda name: read_frames(clips(name), TIMES), names))

    assert [numbers_in(one.pixels) for one in frames] == [NUMBERS] * 16


def test_decoders_load_little_and_die_with_their_parent_even_if_it_is_killed(clips):
    script = """
import os, signal, sys
from pathlib import Path
from valley.media import sandbox
from valley.media.decode import read_frames
read_frames(sys.argv[1], [0.0])
(pid,) = sandbox.process_ids()
loaded = Path(f"/proc/{pid}/maps").read_text()
print(pid, "libavcodec" in loaded, "libtorch" in loaded, "av" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run(
        [sys.executable, "-c", script, str(clips("long GOP"))], capture_output=True, text=True, timeout=120, check=False
    )

    assert parent.returncode == -signal.SIGKILL, parent.stderr
    pid, *loads = parent.stdout.split()
    assert loads == ["True", "False", "False"]
    assert wait_until_gone(int(pid))


def test_a_forked_process_has_decoders_of_its_own(child, clips):
    before = set(sandbox.process_ids())

    def read_in_fork() -> None:
        right = numbers_in(read_frames(clips("long GOP"), TIMES).pixels) == NUMBERS
        os._exit(0 if right and not before & set(sandbox.process_ids()) else 1)

    fork = multiprocessing.get_context("fork").Process(target=read_in_fork)
    fork.start()
    numbers = numbers_in(read_frames(clips("long GOP"), TIMES).pixels)
    fork.join(60)

    assert fork.exitcode == 0
    assert numbers == NUMBERS
    assert set(sandbox.process_ids()) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by way of /proc")
def test_a_long_clip_never_stands_in_memory_at_full_size(tmp_path):
    """60 frames of 1080p are 373 MB."""
    for pid in sandbox.process_ids():  # a process keeps some memory of the files before
        os.kill(pid, signal.SIGKILL)
        assert wait_until_gone(pid)
    blank = np.full((1080, 1920, 3), 99, np.uint8)
    path = encode(tmp_path / "large.mp4", num_frames=60, options={"preset": "ultrafast"}, draw=lambda number: blank)
    sample_clip(path, Sampling(mode="fixed", num_frames=1), size_px=64)
    tracemalloc.start()

    with sandbox.reading(path, Limits(), decoder="auto", frames=False) as reading:
        child = reading.process_id
    frames = sample_clip(path, Sampling(mode="fixed", num_frames=60), size_px=64)

    parents_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    status = Path(f"/proc/{child}/status").read_text()
    childs_peak = int(status.split("VmHWM:")[1].split()[0]) << 10
    assert frames.pixels.shape == (60, 64, 64, 3)
    assert parents_peak < 40e6
    assert childs_peak < 250e6
