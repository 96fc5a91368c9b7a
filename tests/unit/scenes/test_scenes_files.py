"""What is on disk: clips that show what is said of them, the same whoever makes them, and safe to make again."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from valley.data.scenes import DESIGNS, KINDS, ScenesInfo, make_scenes
from valley.data.scenes.encode import film
from valley.data.scenes.plan import plan_scenes
from valley.data.scenes.questions import caption
from valley.data.scenes.render import Painter
from valley.data.scenes.scene import CODINGS, COLOURS, PATTERNS, Scene
from valley.errors import SettingsError
from valley.media.decode import sample_clip
from valley.media.sampling import Sampling

ARGUMENTS = {"num_train": 14, "num_heldout": 12, "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> ScenesInfo:
    return make_scenes(tmp_path_factory.mktemp("scenes"), **ARGUMENTS, workers=2)


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    return {
        scene.id: scene
        for split, number in (("train", 14), ("heldout", 12))
        for scene in plan_scenes(split, number, seed=3, kinds=tuple(KINDS))
    }


def decode(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_clips_are_h264_of_the_planned_size_rate_and_length(made, scenes):
    for scene in scenes.values():
        with av.open(made.folder / scene.id.split("-")[0] / f"{scene.id}.mp4") as container:
            stream = container.streams.video[0]
            times = [packet.pts * packet.time_base for packet in container.demux(video=0) if packet.pts is not None]
            assert (container.format.name, stream.codec_context.name) == ("mov,mp4,m4a,3gp,3g2,mj2", "h264")
            assert (stream.width, stream.height, stream.average_rate) == (scene.width, scene.height, scene.fps)
            assert sorted(times)[0] == 0
            assert sorted(times)[-1] == scene.span_s
            assert len(times) == scene.num_frames


def test_codings_differ_in_their_key_frames(made, scenes):
    seen = set()
    for scene in scenes.values():
        with av.open(made.folder / scene.id.split("-")[0] / f"{scene.id}.mp4") as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        assert max(np.diff([*keys, len(packets)])) == min(scene.coding.gop, len(packets))
        seen.add(scene.coding)
    assert len(seen) == 3


def test_every_object_has_its_colour_where_it_should_be(made, scenes):
    checked = Counter()
    for scene in scenes.values():
        pictures = decode(made.folder / scene.id.split("-")[0] / f"{scene.id}.mp4")
        half = min(scene.width, scene.height) / 2
        for index in (0, len(pictures) // 2, len(pictures) - 1):
            for actor, state in zip(scene.actors, scene.states(scene.stage_time(index)), strict=True):
                if state.opacity < 1:
                    continue
                x = scene.width / 2 + (state.x + (0.74 * state.radius if actor.shape == "ring" else 0)) * half
                y = scene.height / 2 + state.y * half
                if not (1 < x < scene.width - 1 and 1 < y < scene.height - 1):
                    continue
                seen = pictures[index, round(y) - 1 : round(y) + 1, round(x) - 1 : round(x) + 1].mean((0, 1))
                distances = {colour: np.abs(seen - rgb).sum() for colour, rgb in COLOURS.items()}
                assert min(distances, key=distances.__getitem__) == actor.colour
                checked[scene.design] += 1
    assert set(checked) == set(DESIGNS)


def in_sight(state):
    return max(abs(state.x), abs(state.y)) + state.radius <= 1


@pytest.mark.parametrize("change", ["left", "right", "up", "down", "grow", "shrink"])
def test_an_object_goes_where_its_caption_says(change, tmp_path):
    scene = next(
        scene
        for scene in plan_scenes("train", 200, seed=1, kinds=("direction", "size"))
        if scene.changes()[0][1] == change and scene.span_s == 4 and scene.actors[0].shape != "ring"
    )
    film(scene, tmp_path / "clip.mp4")
    pictures = decode(tmp_path / "clip.mp4").astype(int)
    away = np.abs(pictures - np.array(scene.actors[0].rgb)).sum(-1) < 40
    centres = np.array([[*(axis.mean() for axis in np.nonzero(mask)), mask.sum()] for mask in away])
    whole = np.array([in_sight(scene.states(scene.stage_time(index))[0]) for index in range(len(pictures))])
    before, after = (np.arange(len(pictures))[part] for part in (slice(None, -2), slice(2, None)))
    pairs = whole[before] & whole[after]
    steps = np.median((centres[after] - centres[before])[pairs], axis=0)  # few of them jump back
    column, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1), "grow": (2, 1), "shrink": (2, -1)}[
        change
    ]
    assert np.sign(steps[column]) == sign
    assert f"keeps {'moving ' * (column < 2)}{change}" in caption(scene)


def test_decoded_frames_of_twins_are_equal_so_that_the_codec_betrays_no_direction(tmp_path):
    """A codec that loses anything leaves other traces behind an object than before it."""
    scenes = plan_scenes("heldout", 300, seed=8, kinds=("direction", "size", "order"))
    short = [scene for scene in scenes if scene.span_s == 4 and scene.fps <= 12 and not scene.backwards]
    looks = list(itertools.product(CODINGS, PATTERNS))
    for planned, (coding, pattern) in zip(short[: len(looks)], looks, strict=True):
        scene = replace(planned, coding=coding, background=replace(planned.background, pattern=pattern))
        film(scene, tmp_path / "one.mp4")
        film(replace(scene, backwards=True), tmp_path / "other.mp4")
        one, other = decode(tmp_path / "one.mp4"), decode(tmp_path / "other.mp4")
        assert np.array_equal(one, other[::-1])
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_decoded_frame_is_the_painted_one(coding, tmp_path):
    scene = replace(plan_scenes("train", 1, seed=8, kinds=("size",))[0], coding=coding)
    film(scene, tmp_path / "clip.mp4")
    painter = Painter(scene)
    last_s = float(scene.span_s)
    read = sample_clip(tmp_path / "clip.mp4", Sampling()).pixels
    assert len(read) == scene.span_s / 2 + 1
    for time_s, picture in ((0.0, read[0]), (last_s, read[-1])):
        painted = painter.paint(last_s - time_s if scene.backwards else time_s)
        there_and_back = av.VideoFrame.from_ndarray(painted, format="rgb24").reformat(format="yuv420p")
        assert np.abs(picture.astype(int) - there_and_back.to_ndarray(format="rgb24")).max() <= 2


def test_captions_and_dialogues_have_the_form_of_the_papers_data(made):
    assert set(records(made.train)[0]) == {"id", "video", "conversations"}
    for path, number in ((made.train, 14), (made.heldout, 12), (made.instruct, 14)):
        entries = records(path)
        assert len({entry["id"] for entry in entries}) == number
        for entry in entries:
            assert (path.parent / entry["video"]).is_file()
            speakers = [turn["from"] for turn in entry["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            values = [turn["value"] for turn in entry["conversations"]]
            assert [value.count("<video>") for value in values] == [1] + [0] * (len(values) - 1)
            assert all(value.strip() == value != "" for value in values)


def test_heldout_questions_say_what_an_evaluation_needs(made):
    entries = records(made.heldout_questions)
    assert {entry["kind"] for entry in entries} == set(KINDS)
    for entry in entries:
        human, gpt = entry["conversations"]
        assert entry["answer"] in entry["choices"]
        assert entry["answer"] in gpt["value"]
        assert "<video>" in human["value"]
        assert entry["single_frame"] == (entry["kind"] in ("colour", "shape", "count"))
        assert entry["duration_s"] >= 4
    assert len({entry["id"] for entry in entries}) == len(entries)


def test_the_same_arguments_give_the_same_bytes_whatever_the_number_of_workers(made, tmp_path):
    alone = make_scenes(tmp_path, **ARGUMENTS, workers=1)
    assert contents(alone.folder) == contents(made.folder)


def test_a_second_call_does_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    again = make_scenes(made.folder, **ARGUMENTS, workers=1)
    assert (again.num_made, again.num_clips) == (0, 26)
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


SMALL = {"num_train": 5, "num_heldout": 0, "seed": 1, "kinds": ("count",), "workers": 2}


def test_missing_clips_and_records_are_made_again(tmp_path):
    make_scenes(tmp_path, **SMALL)
    whole = contents(tmp_path)
    (tmp_path / "train" / "train-00002.mp4").unlink()
    (tmp_path / "instruct.json").unlink()
    assert make_scenes(tmp_path, **SMALL).num_made == 1
    assert contents(tmp_path) == whole


def test_other_arguments_make_the_folder_anew_and_leave_other_files_alone(tmp_path):
    make_scenes(tmp_path, **SMALL)
    (tmp_path / "train" / "mine.mp4").write_bytes(b"not ours")
    other = make_scenes(tmp_path, **SMALL | {"seed": 2, "num_train": 3})
    assert other.num_made == 3
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "mine.mp4",
        "train-00000.mp4",
        "train-00001.mp4",
        "train-00002.mp4",
    ]


def test_clips_that_nothing_says_are_ours_are_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train-holiday.mp4").write_bytes(b"not ours")
    with pytest.raises(SettingsError, match=r"train/train-holiday.mp4, but no scenes.json"):
        make_scenes(tmp_path, **SMALL)
    assert contents(tmp_path) == {"train/train-holiday.mp4": hashlib.sha256(b"not ours").hexdigest()}


KILLED_IN_THE_FOURTH = """
import itertools, os, signal, sys
from valley.data.scenes import encode, make_scenes

paint, clip = encode.pictures, itertools.count(1)

def pictures(scene):
    last = next(clip) == 4
    for number, picture in enumerate(paint(scene)):
        if last and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield picture

encode.pictures = pictures
make_scenes(sys.argv[1], **{arguments})
"""


def test_a_killed_run_leaves_only_whole_clips_and_is_continued(tmp_path):
    arguments = {"num_train": 24, "num_heldout": 0, "seed": 1, "kinds": ("count",)}
    code = KILLED_IN_THE_FOURTH.replace("{arguments}", repr(arguments))
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    finished = list((tmp_path / "train").glob("train-*.mp4"))
    assert len(finished) == 3
    assert len(list((tmp_path / "train").glob(".train-*.mp4"))) == 1  # the one it was at
    planned = {scene.id: scene for scene in plan_scenes("train", 24, seed=1, kinds=("count",))}
    for path in finished:
        assert len(decode(path)) == planned[path.stem].num_frames
    assert make_scenes(tmp_path, **arguments, workers=2).num_made == 24 - len(finished)
    assert len(records(tmp_path / "train.json")) == 24


def test_an_interrupted_set_becomes_the_set_that_was_never_interrupted(tmp_path):
    whole = make_scenes(tmp_path / "whole", **SMALL)
    broken = make_scenes(tmp_path / "broken", **SMALL)
    for name in ("train.json", "train/train-00001.mp4", "train/train-00004.mp4"):
        (broken.folder / name).unlink()
    half = broken.folder / "train" / ".train-00001-1.mp4"  # a killed process leaves one like this
    half.write_bytes(b"half a clip")
    assert make_scenes(broken.folder, **SMALL).num_made == 2
    half.unlink()
    assert contents(broken.folder) == contents(whole.folder)


def test_a_worker_that_fails_stops_the_call(tmp_path, capfd):
    (tmp_path / "train").write_text("a file where the clips should go")
    with pytest.raises(subprocess.CalledProcessError):
        make_scenes(tmp_path, **SMALL)
    assert "FileExistsError" in capfd.readouterr().err
    assert not (tmp_path / "train.json").exists()


def test_wrong_arguments_are_all_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        make_scenes(tmp_path, num_train=-1, num_heldout=2, workers=0, kinds=("colour", "taste"))
    assert len(caught.value.problems) == 3
    assert "taste" in caught.value.problems[2]
    assert "direction" in caught.value.problems[2]
    assert list(tmp_path.iterdir()) == []
