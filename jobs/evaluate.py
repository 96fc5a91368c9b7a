#!/usr/bin/env python3
"""Asks a trained model questions with known answers, and counts the right ones by kind of question.

python jobs/evaluate.py model=runs/scenes/model questions=samples-scenes/scenes/heldout_questions.json

An answer is right when the true choice, and no other choice, stands in it as a word. The output folder then holds
`summary.json` (accuracy, chance and Wilson's 95 % interval of each kind) and `answers.json` (every answer).
"""

import sys

from valley.launch import launch_evaluation

if __name__ == "__main__":
    sys.exit(launch_evaluation(__doc__ or ""))
