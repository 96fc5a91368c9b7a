#!/usr/bin/env python3
"""Make the sample data: generated scenes, and four real clips, with captions and questions.

The folder then holds `scenes/` and `clips/`, each with `train.json` (captions, for pre-training) and `instruct.json`
(dialogues, for instruction tuning); `scenes/` also has the held-out `heldout.json` and `heldout_questions.json`. Media
paths are relative to the JSON files. What is there already is kept: repeating the command costs nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from valley.data.clips import make_clips
from valley.data.scenes import KINDS, make_scenes
from valley.errors import MissingMediaError, SettingsError


def main() -> int:
    """Parse the command line, make what is missing, and say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder to fill (default: samples)")
    parser.add_argument("--clips", type=int, default=160, help="generated clips to train on (default: 160)")
    parser.add_argument("--heldout", type=int, default=40, help="generated clips to ask about (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data (default: 0)")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=f"kinds of question, of: {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)"
    )
    parser.add_argument("--no-real", action="store_true", help="leave the real clips out")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    start = time.perf_counter()
    try:
        scenes = make_scenes(
            arguments.output / "scenes",
            num_train=arguments.clips,
            num_heldout=arguments.heldout,
            seed=arguments.seed,
            workers=arguments.workers,
            kinds=arguments.kinds,
        )
    except SettingsError as error:
        print("\n".join(f"samples.py: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{scenes.num_clips} scenes in {scenes.folder} ({scenes.num_made} made now, {seconds:.1f} s)")
    if not arguments.no_real:
        try:
            clips = make_clips(arguments.output / "clips")
            print(f"{clips.num_clips} real clips in {clips.folder}")
        except MissingMediaError as error:
            print(f"No real clips: {error.reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
