#!/usr/bin/env python3
"""Computes the frozen tower's tokens once, for all runs on the same data.

python jobs/encode.py --config valley-7b features=features/valley-7b data.sources=[…]
python jobs/pretrain.py --config valley-7b features=features/valley-7b data.sources=[…]

Takes the settings of the runs that are to read the store, so that files, sampling, tower and its transform are theirs.
`--dry-run` tells files, frames, size and time. What the store has already is not encoded again: a job that was killed
goes on, and new files are added. A file that changes is not found until it is encoded anew.
"""

import sys

from valley.launch import launch_encoding

if __name__ == "__main__":
    sys.exit(launch_encoding(__doc__ or ""))
