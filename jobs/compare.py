#!/usr/bin/env python3
"""Compares variants of a training: Ray Tune trains each with several seeds, then all are asked the same questions.

python jobs/compare.py --config scenes
python jobs/compare.py --config scenes seeds='[0,1,2,3,4]' --resume
python jobs/compare.py --config tiny search='{finetune.train.learning_rate: [1e-3, 1e-4], model.temporal: [v1, v3]}'

Without a `search`, the temporal modules v1, v2 and v3 are compared. Frames are encoded once, for all trials. The output
folder then holds `report.html` and `report.md` (tables with intervals, paired tests, what follows from them),
pictures, `summary.json`, and every trial's runs; MLflow has one run for all, with a child for each trial.

Killed, the same command with `--resume` goes on: finished trials are kept, unfinished ones go on from their last
checkpoint. Seeds and points of the search space may be added on the way.
"""

import sys

from valley.launch import launch_comparison

if __name__ == "__main__":
    sys.exit(launch_comparison(__doc__ or ""))
