"""The manifest: records come back as they were parsed; it is reused until something changes, and there whole or not."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from data_makers import ask, write_clip, write_json

from valley.data.manifest import Manifest, build_manifest
from valley.data.records import parse_record
from valley.data.settings import SourceSettings
from valley.data.split import split_rows
from valley.errors import SettingsError
from valley.media.sampling import Sampling

FIXED = Sampling(mode="fixed", num_frames=8)


def build(*sources: SourceSettings, into: Path, sampling: Sampling = FIXED) -> Manifest:
    return build_manifest(sources, into / "manifests", sampling=sampling)


def test_records_come_back_as_they_were_parsed(tmp_path: Path) -> None:
    videos = [ask(f"<video>\nwhat is {n}?", f"größer\n{n}", id=n, video=f"{n}", source="f") for n in range(5000)]
    pictures = [ask("<image>", id="x", image="x.jpg"), ask("no picture", "none")]
    manifest = build(
        SourceSettings(path=write_json(tmp_path / "videos.json", *videos)),
        SourceSettings(path=write_json(tmp_path / "pictures.json", *pictures), name="stills"),
        into=tmp_path,
    )
    assert len(manifest) == 5002
    for row in (0, 1, 4095, 4096, 4999):
        assert manifest.record(row) == parse_record(videos[row], row, "videos")
    assert [manifest.record(row) for row in (5000, 5001)] == [
        parse_record(raw, position, "stills") for position, raw in enumerate(pictures)
    ]
    assert manifest.row_sources.tolist() == [0] * 5000 + [1] * 2
    assert [manifest.source_of(row) for row in (0, 4999, 5000)] == [0, 0, 1]
    assert [(source.name, source.num_records) for source in manifest.sources] == [("videos", 5000), ("stills", 2)]
    with pytest.raises(IndexError):
        manifest.record(5002)


def test_it_travels_as_its_path(tmp_path: Path) -> None:
    manifest = build(SourceSettings(path=write_json(tmp_path / "data.json", *[ask("hi")] * 999)), into=tmp_path)
    travelled = pickle.dumps(manifest)
    assert len(travelled) < 500
    assert pickle.loads(travelled).record(998) == manifest.record(998)
    assert Manifest.open(str(manifest.path)).content_hash == manifest.content_hash


def test_it_is_reused_until_content_or_settings_change(tmp_path: Path) -> None:
    source = SourceSettings(path=write_json(tmp_path / "data.json", ask("one"), ask("two")))
    first = build(source, into=tmp_path)
    written = (first.path / "records.arrow").stat()

    write_json(tmp_path / "data.json", ask("one"), ask("two"))  # the same content, at another time
    again = build(source, into=tmp_path)
    assert again.path == first.path
    assert (again.path / "records.arrow").stat() == written

    other_sampling = build(source, into=tmp_path, sampling=Sampling(mode="fixed", num_frames=4))
    other_root = build(source.model_copy(update={"root": str(tmp_path.parent)}), into=tmp_path)
    write_json(tmp_path / "data.json", ask("one"), ask("three"))
    other_content = build(source, into=tmp_path)
    assert len({first.path, other_sampling.path, other_root.path, other_content.path}) == 4
    assert other_content.content_hash != first.content_hash
    assert other_root.content_hash == first.content_hash


def test_bad_records_are_kept_as_rejects_also_when_it_is_reused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.json", ask("hi"), ask("what?", id="b", video="b.mp4"), 7, ask("ho", id="c"))
    for _ in range(2):
        manifest = build(SourceSettings(path=path), into=tmp_path)
        assert [manifest.record(row).id for row in range(2)] == ["#0", "c"]
        assert [(reject.sample_id, reject.stage, reject.reason) for reject in manifest.rejects()] == [
            ("b", "parse", "conversations: 1 video path(s) but 0 placeholder(s)"),
            ("#2", "parse", "record: expected an object, found a number"),
        ]
        assert {(reject.slot, reject.source, reject.path) for reject in manifest.rejects()} == {(None, "data", path)}
        assert manifest.sources[0].num_rejected == 2


def test_wrong_sources_are_all_named_by_their_setting(tmp_path: Path) -> None:
    good = write_json(tmp_path / "data.json", ask("hi"))
    sources = [
        SourceSettings(path=good),
        SourceSettings(path=str(tmp_path / "nothing.json")),
        SourceSettings(path=good, root=str(tmp_path / "nowhere")),
        SourceSettings(path="nowhere://bucket/data.json", root=str(tmp_path)),
        SourceSettings(path=str(tmp_path)),
    ]
    with pytest.raises(SettingsError) as caught:
        build_manifest(sources, tmp_path / "manifests", sampling=FIXED, setting="data.validation.sources")
    starts = [problem.split(": ")[0] for problem in caught.value.problems]
    assert starts == [f"data.validation.sources.{where}" for where in ("1.path", "2.root", "3.path", "4.path")]


def test_a_data_file_that_is_none_names_the_setting_and_leaves_nothing(tmp_path: Path) -> None:
    good = SourceSettings(path=write_json(tmp_path / "good.json", ask("hi")))
    for content, reason in [("<html>", "neither a JSON array"), ("[", "not JSON"), ("[]", "there is no record in it")]:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SettingsError, match=rf"data\.sources\.1\.path: .*bad\.json: {reason}"):
            build(good, SourceSettings(path=str(tmp_path / "bad.json")), into=tmp_path)
    assert not list((tmp_path / "manifests").iterdir())


def test_a_file_of_another_format_is_given_up_soon_with_the_reason(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.json", *[{"question": "what?"}] * 3000, ask("never reached"))
    with pytest.raises(
        SettingsError, match="none of the first 1001 records can be used; of the first: conversations: missing"
    ):
        build(SourceSettings(path=path), into=tmp_path)


def test_names_are_made_different(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    paths = [
        write_json(tmp_path / name, ask("hi")) for name in ("train.json", "more/train.jsonl", "more/train.v2.json")
    ]
    manifest = build(*[SourceSettings(path=path) for path in paths], into=tmp_path)
    assert [source.name for source in manifest.sources] == ["train", "train-2", "train-3"]


def test_remote_data_and_roots(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/train.json", json.dumps([ask(video="a.mp4")]).encode())
    source = SourceSettings(path="memory://set/train.json")
    manifest = build(source, into=tmp_path)
    assert (manifest.sources[0].root, manifest.record(0).media[0].paths) == ("memory://set", ("a.mp4",))
    assert build(source, into=tmp_path).path == manifest.path
    memory.pipe_file("/set/train.json", json.dumps([ask(video="b.mp4"), ask("hi")]).encode())
    assert len(build(source, into=tmp_path)) == 2


def test_lengths_are_estimated_from_text_and_headers(tmp_path: Path) -> None:
    write_clip(tmp_path / "short.mp4", 6)
    write_clip(tmp_path / "long.mp4", 20)
    path = write_json(
        tmp_path / "data.json",
        ask(video="short.mp4"),
        ask(video="long"),
        ask(video="missing.mp4"),
        ask("<image>", image="x.jpg"),
        ask("<image>", image=[f"{n}.jpg" for n in range(9)]),
        ask("<image><image>", image=["x.jpg", "y.jpg"]),
        ask("w" * 4000),
    )
    fps = build(SourceSettings(path=path), into=tmp_path, sampling=Sampling(fps=0.5, max_frames=8))
    assert fps.num_frames.tolist() == [3, 8, 6, 1, 8, 2, 0]  # what is missing is taken for the mean of 3 and 8
    fixed = build(SourceSettings(path=path), into=tmp_path, sampling=Sampling(mode="fixed", num_frames=4))
    assert fixed.num_frames.tolist() == [4, 4, 4, 1, 4, 2, 0]
    assert fixed.num_media.tolist() == [1, 1, 1, 1, 1, 2, 0]
    assert 1000 <= fixed.text_tokens[-1] < 1050
    assert (fixed.lengths(16) - fixed.text_tokens).tolist() == [24, 24, 24, 21, 24, 42, 0]


def test_media_are_told_apart_by_root_and_path(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "data.json",
        ask(video="a.mp4"),
        ask("<video> again", video="a"),
        ask(video="b.mp4"),
        ask("same"),
        ask("same"),
        ask("other"),
    )
    source = SourceSettings(path=path)
    manifest = build(source, source.model_copy(update={"root": str(tmp_path.parent)}), into=tmp_path)
    rows, keys = manifest.media_keys()
    assert rows.tolist() == list(range(12))
    first, second = keys[:6].tolist(), keys[6:].tolist()
    assert [first.index(key) for key in first] == [0, 0, 2, 3, 3, 5]
    assert not set(first[:3]) & set(second[:3])
    assert first[3:] == second[3:]


def test_a_split_of_it_keeps_clips_on_one_side(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.json", *[ask(f"<video> {n}", video=f"{n % 60}.mp4") for n in range(300)])
    manifest = build(SourceSettings(path=path), into=tmp_path)
    train, held_out = split_rows(manifest.row_sources, *manifest.media_keys(), fraction=0.1, seed=3)
    assert len(held_out) == 30
    clips = [{manifest.record(row).media[0].paths for row in rows.tolist()} for rows in (train, held_out)]
    assert not clips[0] & clips[1]


MEASURE = """
import sys, tracemalloc
from pathlib import Path
from valley.data.manifest import build_manifest
from valley.data.settings import SourceSettings
from valley.media.sampling import Sampling

folder, sampling = Path(sys.argv[3]), Sampling(mode="fixed")
build_manifest([SourceSettings(path=sys.argv[1])], folder, sampling=sampling)  # imports what is imported late
tracemalloc.start()
manifest = build_manifest([SourceSettings(path=sys.argv[2])], folder, sampling=sampling)
print(len(manifest), manifest.record(49_999).id, tracemalloc.get_traced_memory()[1])
"""


def test_fifty_thousand_records_take_little_memory(tmp_path: Path) -> None:
    answers = [" ".join(["word"] * (8 + n % 20)) for n in range(20)]
    records = [ask("Describe it.\n<video>", answers[n % 20], id=n, video=f"{n}.mp4") for n in range(50_000)]
    paths = [write_json(tmp_path / "one.json", records[0]), write_json(tmp_path / "all.json", *records)]
    # In a process of its own: here every call is checked, which takes its time a million times over.
    command = [sys.executable, "-c", MEASURE, *paths, str(tmp_path / "manifests")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    num_records, last, peak_bytes = map(int, output.split())
    assert (num_records, last) == (50_000, 49_999)
    assert peak_bytes < 16 << 20  # as Python objects the records alone take over 60 MB
