"""Slots become samples: media decoded, dialogue encoded, bad files refilled from the same source and written down."""

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import PIL
import pytest
from data_makers import LetterEncoder, ask, write_clip, write_json, write_picture
from test_data_storage import PATIENT, FlakyFileSystem, ServerError

from valley.data.collate import IGNORED, collate
from valley.data.loading import Loader, decoder_versions, reading_policy
from valley.data.manifest import build_manifest
from valley.data.order import EMPTY, EpochOrder
from valley.data.rejects import KnownRejects, Reject
from valley.data.settings import DataSettings, SourceSettings
from valley.errors import StorageError
from valley.media.decode import Limits
from valley.media.sampling import Sampling


def make_loader(
    tmp_path: Path,
    *records: dict[str, Any],
    root: str = "",
    more: tuple[SourceSettings, ...] = (),
    known: KnownRejects | None = None,
    **settings: Any,
) -> Loader:
    source = SourceSettings(path=write_json(tmp_path / "data.json", *records), root=root)
    data = DataSettings(sources=[source, *more], **settings)
    manifest = build_manifest(data.sources, tmp_path / "manifests", sampling=data.sampling)
    order = EpochOrder(manifest.row_sources, manifest.lengths(4), [1.0] * len(data.sources), global_batch=4, seed=0)
    return Loader(
        manifest,
        order,
        LetterEncoder(),
        data,
        size_px=32,
        interpolation="bicubic",
        resize_mode="shortest",
        known=known,
        retry=PATIENT,
    )


def slot_of(loader: Loader, sample_id: str) -> int:
    rows = loader.order.rows(0).tolist()
    return next(slot for slot, row in enumerate(rows) if row != EMPTY and loader.manifest.record(row).id == sample_id)


def test_a_clip_becomes_frames_and_tokens(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "a.mp4", 7)
    loader = make_loader(tmp_path, ask("<video>hm?", "so", id="a", video="clips/a"))
    sample = loader.load(0)
    assert (sample.slot, sample.row, sample.sample_id, sample.source, sample.weight) == (0, 0, "a", 0, 1.0)
    assert sample.frames.shape == (4, 32, 32, 3)
    brightness = sample.frames.mean(axis=(1, 2, 3))
    assert np.abs(brightness - [20, 40, 60, 80]).max() < 4  # at 0, 2, 4 and 6 s
    assert sample.num_frames.tolist() == [4]
    assert sample.input_ids.tolist() == [1004, *map(ord, "hm?so")]
    assert sample.labels.tolist() == [IGNORED] * 4 + [*map(ord, "so")]
    assert (sample.rejects, sample.notes, sample.cut_tokens) == ((), (), 0)
    assert sample.timings.num_frames == 4
    assert sample.timings.decode_s > 0


def test_every_source_is_sampled_in_its_own_way(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 7)
    fixed = SourceSettings(
        path=write_json(tmp_path / "fixed.json", ask(id="f", video="a.mp4")),
        sampling=Sampling(mode="fixed", num_frames=3),
    )
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), more=(fixed,))
    assert loader.load(slot_of(loader, "a")).num_frames.tolist() == [4]
    assert loader.load(slot_of(loader, "f")).num_frames.tolist() == [3]


def test_pictures_text_and_clips_of_pictures(tmp_path: Path) -> None:
    for level in range(10, 100, 10):
        write_picture(tmp_path / f"{level}.png", level)
    loader = make_loader(
        tmp_path,
        ask("<image>", id="one", image="30.png"),
        ask("<image> or <image>", id="two", image=["30.png", "60.png"]),
        ask("<image>", id="clip", image=[f"{level}.png" for level in range(10, 100, 10)]),
        ask("hi", "ho", id="text"),
        sampling=Sampling(max_frames=3),
    )

    def load(sample_id: str) -> tuple[list[int], list[int]]:
        sample = loader.load(slot_of(loader, sample_id))
        assert sample.frames.shape[1:] == (32, 32, 3)
        return sample.num_frames.tolist(), sample.frames[:, 0, 0, 0].tolist()

    assert load("one") == ([1], [30])
    assert load("two") == ([1, 1], [30, 60])
    assert load("clip") == ([3], [10, 50, 90])
    assert load("text") == ([], [])


def write_bad_files(folder: Path) -> None:
    """What a folder of downloads holds, besides a good clip."""
    whole = write_clip(folder / "good.mp4", 6).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "text.mp4").write_text("<html>Not found</html>\n" * 50)
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:6,\n{folder / 'good.mp4'}\n#EXT-X-ENDLIST\n")
    (folder / "empty.mp4").write_bytes(b"")


NAMES = ("good", "truncated", "text", "playlist", "empty", "missing")
ERRORS = {
    "truncated": ("decode", "DamagedMediaError"),
    "text": ("decode", "UnsupportedMediaError"),
    "playlist": ("decode", "UnsupportedMediaError"),
    "empty": ("decode", "EmptyMediaError"),
    "missing": ("read", "MissingMediaError"),
}


def test_bad_files_are_refilled_in_their_slot_and_written_down(tmp_path: Path) -> None:
    write_bad_files(tmp_path)
    loader = make_loader(tmp_path, *[ask(id=name, video=f"{name}.mp4") for name in NAMES])
    found: dict[str, Reject] = {}
    for slot in range(6):
        sample = loader.load(slot)
        assert sample.slot == slot
        assert len(sample.rejects) <= 4
        assert (sample.weight == 1.0) == (sample.sample_id == "good")
        assert all(reject.slot == slot for reject in sample.rejects)
        found |= {reject.sample_id: reject for reject in sample.rejects}
    assert {name: (reject.stage, reject.error) for name, reject in found.items()} == ERRORS
    for name, reject in found.items():
        assert reject.path == f"{tmp_path}/{name}.mp4"
        assert reject.source == "data"
        assert reject.reason
        assert (reject.size_bytes is None) == (name == "missing")


def test_a_refill_comes_from_the_same_source_and_counts_in_full(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4", 2)
    other = SourceSettings(path=write_json(tmp_path / "other.json", *[ask("hi")] * 20))
    records = [ask(id="bad", video="missing.mp4"), ask(id="good", video="good.mp4")]
    loader = make_loader(tmp_path, *records, more=(other,))
    sample = loader.load(slot_of(loader, "bad"))
    assert (sample.sample_id, sample.source, sample.weight) == ("good", 0, 1.0)
    assert [reject.sample_id for reject in sample.rejects] == ["bad"]


def test_after_three_refills_the_slot_has_weight_0(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, *[ask(id=n, video=f"{n}.mp4") for n in range(9)])
    sample = loader.load(2)
    assert (sample.slot, sample.row, sample.weight) == (2, EMPTY, 0.0)
    assert len({reject.sample_id for reject in sample.rejects}) == 4
    assert collate([sample, loader.load(EMPTY)], pad_id=0).num_supervised == 0
    assert loader.load(EMPTY).rejects == ()


def test_what_cannot_be_encoded_is_rejected_and_long_texts_are_cut(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, ask("hi", "silence", id="a"), ask("hi", "so it is", id="b"), max_tokens=6)
    sample = loader.load(slot_of(loader, "a"))
    (reject,) = sample.rejects
    assert (reject.sample_id, reject.stage, reject.error) == ("a", "encode", "RecordError")
    assert (reject.path, reject.reason) == (f"{tmp_path}/data.json", "nothing supervised is left")
    assert (len(sample.input_ids), sample.cut_tokens) == (6, 4)


def test_a_video_among_the_pictures_of_a_clip_is_rejected(tmp_path: Path) -> None:
    write_picture(tmp_path / "1.png", 10)
    write_clip(tmp_path / "2.mp4", 6).rename(tmp_path / "2.png")
    loader = make_loader(tmp_path, ask("<image>", id="a", image=["1.png", "2.png"]))
    (reject,) = loader.load(0).rejects
    assert (reject.path, reject.error) == (f"{tmp_path}/2.png", "UnsupportedMediaError")


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    write_clip(tmp_path / "outside" / "secret.mp4", 2)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").symlink_to(tmp_path / "outside" / "secret.mp4")
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), root=str(tmp_path / "root"))
    (reject,) = loader.load(0).rejects
    assert (reject.stage, reject.error, reject.reason) == ("read", "MissingMediaError", "leads outside the root")


def test_known_rejects_are_not_opened_until_they_change(tmp_path: Path) -> None:
    # A good file stands in for a bad one: only a loader that does not open it believes the table.
    path = write_clip(tmp_path / "a.mp4", 2)
    status = path.stat()
    earlier = Reject(
        5,
        "a",
        "data",
        str(path),
        "decode",
        "DamagedMediaError",
        "cut short",
        9.0,
        status.st_size,
        str(status.st_mtime_ns),
    )
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), known=KnownRejects([earlier]))
    sample = loader.load(0)
    (reject,) = sample.rejects
    assert (reject.slot, reject.stage, reject.error, reject.reason) == (0, "known", "DamagedMediaError", "cut short")
    assert (sample.weight, sample.timings.decode_s) == (0.0, 0.0)
    assert loader.known.find(reject.path, reject.size_bytes, reject.modified) is not None

    os.utime(path)
    assert loader.load(0).weight == 1.0


def test_damaged_files_are_used_when_asked_and_it_is_noted(tmp_path: Path) -> None:
    write_bad_files(tmp_path)
    record = ask(id="a", video="truncated.mp4")
    assert make_loader(tmp_path, record).load(0).weight == 0.0
    sample = make_loader(tmp_path, record, limits=Limits(damaged="use")).load(0)
    assert sample.weight == 1.0
    assert sample.notes
    assert all(note.startswith(f"{tmp_path}/truncated.mp4: ") for note in sample.notes)


def test_the_reading_policy_follows_what_decides_about_files() -> None:
    one, two = (DataSettings(sources=[SourceSettings(path="/a.json")], max_tokens=n) for n in (10, 20))
    assert reading_policy(one) == reading_policy(two)
    assert reading_policy(one) != reading_policy(one.model_copy(update={"limits": Limits(damaged="use")}))
    assert reading_policy(one) != reading_policy(one.model_copy(update={"decoder": "pyav"}))
    assert reading_policy(one, {"av": "15.0.0"}) != reading_policy(one, {"av": "15.1.0"})
    assert reading_policy(one, decoder_versions("auto")) == reading_policy(one)


def test_the_versions_are_those_of_all_libraries_that_may_read_a_file() -> None:
    assert decoder_versions("auto") == {"av": av.__version__, "pillow": PIL.__version__}
    assert set(decoder_versions("decord")) >= {"av", "pillow"}


@pytest.fixture
def remote(tmp_path: Path) -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.answers.clear()
    FlakyFileSystem().pipe_file("/bucket/a.mp4", write_clip(tmp_path / "a.mp4", 7).read_bytes())
    return FlakyFileSystem


def test_a_remote_clip_equals_the_local_one(tmp_path: Path, remote: type[FlakyFileSystem]) -> None:
    record = ask(id="a", video="a.mp4")
    local = make_loader(tmp_path, record).load(0)
    far = make_loader(tmp_path, record, root="flaky://bucket").load(0)
    assert np.array_equal(far.frames, local.frames)
    assert (far.rejects, far.timings.num_frames) == ((), 4)


@pytest.mark.parametrize("bounds", [{"max_remote_bytes": 100}, {"limits": Limits(max_bytes=100)}])
def test_a_remote_file_beyond_a_bound_is_rejected_unread(
    tmp_path: Path, remote: type[FlakyFileSystem], bounds: dict[str, Any]
) -> None:
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), root="flaky://bucket", **bounds)
    (reject,) = loader.load(0).rejects
    assert (reject.stage, reject.error) == ("read", "MediaLimitError")
    assert reject.reason.endswith("bytes, more than 100")
    if "max_remote_bytes" in bounds:  # local files are not held in memory
        assert make_loader(tmp_path, ask(id="a", video="a.mp4"), **bounds).load(0).weight == 1.0


def test_storage_that_fails_for_a_moment_costs_no_sample(tmp_path: Path, remote: type[FlakyFileSystem]) -> None:
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), root="flaky://bucket")
    remote.answers[:] = [TimeoutError(), None, ServerError(503), ConnectionResetError()]
    sample = loader.load(0)
    assert (sample.weight, sample.rejects) == (1.0, ())


def test_storage_that_fails_for_good_stops_the_job(tmp_path: Path, remote: type[FlakyFileSystem]) -> None:
    loader = make_loader(tmp_path, ask(id="a", video="a.mp4"), root="flaky://bucket")
    remote.answers[:] = [ServerError(503)] * 20
    with pytest.raises(StorageError, match=r"^flaky://bucket/a\.mp4: ServerError"):
        loader.load(0)


def test_a_rejected_remote_file_is_shown_by_its_address(tmp_path: Path, remote: type[FlakyFileSystem]) -> None:
    remote().pipe_file("/bucket/b.mp4", b"#EXTM3U\nfile:///etc/passwd\n")
    (reject,) = make_loader(tmp_path, ask(id="b", video="b.mp4"), root="flaky://bucket").load(0).rejects
    assert (reject.path, reject.error) == ("flaky://bucket/b.mp4", "UnsupportedMediaError")
    assert (reject.size_bytes, reject.modified) == (27, "v1")


def test_a_slot_gives_the_same_sample_wherever_it_is_loaded(tmp_path: Path) -> None:
    write_bad_files(tmp_path)
    records = [ask(id=f"{name}{n}", video=f"{name}.mp4") for n, name in itertools.product(range(3), NAMES)]
    loader = make_loader(tmp_path, *records)
    elsewhere = pickle.loads(pickle.dumps(loader))
    for slot in (0, 5, 17, 23):
        here, there = loader.load(slot), elsewhere.load(slot)
        assert (here.row, here.sample_id, here.weight) == (there.row, there.sample_id, there.weight)
        assert np.array_equal(here.frames, there.frames)
        assert [reject.sample_id for reject in here.rejects] == [reject.sample_id for reject in there.rejects]
