#!/usr/bin/env python3
"""Makes the sample data: generated scenes, and four real clips, with captions and questions.

python jobs/samples.py output=samples clips=160

The folder then holds `scenes/` and `clips/`, each with `train.json` (captions, for pre-training) and `instruct.json`
(dialogues, for instruction tuning); `scenes/` also has the held-out `heldout.json` and `heldout_questions.json`. Media
paths are relative to the JSON files. What is there already is kept: repeating the command costs nothing.
"""

import sys

from valley.command import parse_command, run_command
from valley.data.samples import SamplesSettings, make_samples


def main() -> None:
    """Parses the settings, makes what is missing, and says what is there."""
    command = parse_command(SamplesSettings, __doc__ or "")
    settings = command.settings
    if command.dry_run:
        print(f"{settings.clips} clips to train on and {settings.heldout} to ask about, in {settings.output}")
    else:
        print(make_samples(settings))


if __name__ == "__main__":
    sys.exit(run_command(main))
