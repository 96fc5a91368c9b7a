"""A folder of scenes: clips made in parallel, records beside them, safe to interrupt and to repeat."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from valley.data.scenes.encode import film
from valley.data.scenes.plan import DESIGNS, SPANS_S, Split, carriers, plan_scenes
from valley.data.scenes.questions import KINDS, caption_records, dialogue_records, question_records
from valley.data.scenes.scene import PATTERNS, Scene
from valley.data.scenes.workers import film_all
from valley.data.writing import write_records, write_text
from valley.errors import SettingsError

_log = logging.getLogger(__name__)

_VERSION = 3
"""Raised whenever the same arguments come to mean other scenes or other frames."""

_ARGUMENTS = "scenes.json"
"""File with the arguments that a folder's clips were made with."""


@dataclass(frozen=True, slots=True)
class ScenesInfo:
    """Where a set of scenes is."""

    folder: Path
    """The root that the records' media paths are relative to."""
    train: Path
    """Caption records of the training clips, for pre-training."""
    instruct: Path
    """Dialogues about the training clips, for instruction tuning."""
    heldout: Path
    """Caption records of the held-out clips."""
    heldout_questions: Path
    """Single questions about the held-out clips, with `kind`, `answer`, `choices`, `single_frame` and `pair`."""
    num_clips: int
    num_made: int
    """Clips that this call had to make; the others were there already."""


def make_scenes(
    folder: str | Path,
    *,
    num_train: int,
    num_heldout: int,
    seed: int = 0,
    workers: int = 1,
    kinds: Sequence[str] = tuple(KINDS),
    designs: Sequence[str] = DESIGNS,
    patterns: Sequence[str] = PATTERNS,
    longest_s: int = max(SPANS_S),
) -> ScenesInfo:
    """Make a set of generated clips, or find it finished.

    The same arguments give the same records, byte for byte, and the same frames, whatever the number of workers. Clips
    are written whole or not at all, so an interrupted call is continued by repeating it. A folder whose set was made
    with other arguments is made anew.

    Args:
        folder: made if need be; holds the records, the clips under `train/` and `heldout/`, and `scenes.json`.
        num_train: clips to train on.
        num_heldout: clips to ask questions about.
        seed: of everything.
        workers: processes that paint and encode; 1 works in this process.
        kinds: kinds of question, out of `KINDS`; only scenes that carry one of them are made.
        designs: designs of scenes, out of `DESIGNS`.
        patterns: patterns of the grounds, out of `PATTERNS`.
        longest_s: seconds that no clip exceeds, at least 4.

    Raises:
        SettingsError: a count or a name makes no sense, or the folder holds clips that nothing says are ours.
    """
    names = {"kinds": (kinds, tuple(KINDS)), "designs": (designs, DESIGNS), "patterns": (patterns, PATTERNS)}
    _check(names, num_train=num_train, num_heldout=num_heldout, seed=seed, workers=workers, longest_s=longest_s)
    content: dict[str, Any] = {
        what: [name for name in known if name in given] for what, (given, known) in names.items()
    }
    content["longest_s"] = longest_s
    folder = Path(folder)
    _claim(
        folder,
        {"version": _VERSION, "num_train": num_train, "num_heldout": num_heldout, "seed": seed, **content},
    )
    train = plan_scenes("train", num_train, seed=seed, **content)
    heldout = plan_scenes("heldout", num_heldout, seed=seed, **content)
    clips = [(scene, folder / _clip_of(scene)) for scene in (*train, *heldout)]
    missing = [(scene, path) for scene, path in clips if not path.exists()]
    _film(missing, workers)
    return ScenesInfo(
        folder=folder,
        train=write_records(folder / "train.json", _gather(train, caption_records)),
        instruct=write_records(folder / "instruct.json", _gather(train, dialogue_records)),
        heldout=write_records(folder / "heldout.json", _gather(heldout, caption_records)),
        heldout_questions=write_records(folder / "heldout_questions.json", _gather(heldout, question_records)),
        num_clips=len(clips),
        num_made=len(missing),
    )


def _check(names: dict[str, tuple[Sequence[str], tuple[str, ...]]], **counts: int) -> None:
    least = {"workers": 1, "longest_s": min(SPANS_S)}
    problems = [
        f"{name}: must be at least {least.get(name, 0)}, not {count}"
        for name, count in counts.items()
        if count < least.get(name, 0)
    ]
    for what, (chosen, known) in names.items():
        problems += [f"{what}: no {name!r}; known: {', '.join(known)}" for name in chosen if name not in known]
        if not chosen:
            problems.append(f"{what}: name at least one of {', '.join(known)}")
    kinds, designs = names["kinds"][0], names["designs"][0]
    if not problems and not carriers(kinds, designs):
        problems.append(f"designs: {', '.join(designs)} carry no question about {', '.join(kinds)}")
    if problems:
        raise SettingsError(problems)


def _claim(folder: Path, arguments: dict[str, Any]) -> None:
    """Leave in the folder only clips made with these arguments.

    Raises:
        SettingsError: there are clips, but not the marker of a folder of ours.
    """
    text = json.dumps(arguments, indent=2) + "\n"
    marker = folder / _ARGUMENTS
    if marker.exists() and marker.read_text(encoding="utf-8") == text:
        return
    found = [
        clip
        for split in get_args(Split)
        for pattern in (f"{split}-*.mp4", f".{split}-*.mp4")  # whole ones, and what a killed process left
        for clip in (folder / split).glob(pattern)
    ]
    if found and not marker.exists():
        raise SettingsError([f"folder: {folder} has {found[0].relative_to(folder)}, but no {_ARGUMENTS}: not ours"])
    if found:
        write_text(marker, "{}\n")  # first: until all is deleted, the clips are ours, but of no known arguments
    for clip in found:
        clip.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, text)


def _clip_of(scene: Scene) -> str:
    """The clip's path in the folder."""
    return f"{scene.id.split('-')[0]}/{scene.id}.mp4"


def _film(clips: Sequence[tuple[Scene, Path]], workers: int) -> None:
    if workers == 1 or len(clips) < 2:
        for scene, path in clips:
            film(scene, path)
        return
    # long clips first, so that no worker is left with one at the end
    by_length = sorted(clips, key=lambda clip: -clip[0].num_frames)
    for done, _ in enumerate(film_all(by_length, min(workers, len(clips))), 1):
        if done % 500 == 0:
            _log.info("%d of %d clips made", done, len(clips))


def _gather(scenes: Sequence[Scene], records: Callable[[Scene, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [record for scene in scenes for record in records(scene, _clip_of(scene))]
