"""Right or wrong, the share of right answers, and how sure one can be of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Standard deviations around the mean that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Score:
    """What became of the questions of one kind.

    Attributes:
        kind: their kind.
        num_questions: how many were asked.
        num_right: how many were answered rightly.
        chance: the share that guessing would get right, in [0, 1]: the mean of one over the number of choices.
    """

    kind: str
    num_questions: int
    num_right: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.num_right / self.num_questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy; too narrow where questions depend on each other."""
        return wilson_interval(self.num_right, self.num_questions)


def is_right(answer: str, truth: str, choices: Sequence[str]) -> bool:
    """Returns whether the true choice, and no other choice, stands in an answer as a word, in whatever case."""
    return [choice for choice in choices if _says(answer, choice)] == [truth]


def wilson_interval(num_right: float, num_questions: float, z: float = Z_95) -> tuple[float, float]:
    """Returns the bounds of Wilson's score interval of a share; unlike the usual one it holds near 0 and 1.

    Args:
        num_right: successes.
        num_questions: trials; no whole number where it stands for as many independent ones as would tell as much.
        z: half its width in standard deviations.
    """
    share, weight = num_right / num_questions, z * z / num_questions
    centre = share + weight / 2
    spread = math.sqrt(weight * (share * (1 - share) + weight / 4))
    low, high = (centre - spread) / (1 + weight), (centre + spread) / (1 + weight)
    return max(low, 0.0), min(high, 1.0)


def score(outcomes: Iterable[tuple[str, bool, int]]) -> list[Score]:
    """Returns a score for each kind, in order of name.

    Args:
        outcomes: the kind of each question, whether it was answered rightly, and the number of its choices.
    """
    kinds: dict[str, list[tuple[bool, int]]] = {}
    for kind, right, num_choices in outcomes:
        kinds.setdefault(kind, []).append((right, num_choices))
    return [
        Score(kind, len(asked), sum(right for right, _ in asked), sum(1 / count for _, count in asked) / len(asked))
        for kind, asked in sorted(kinds.items())
    ]


def format_scores(scores: Sequence[Score]) -> str:
    """Lays scores out as a Markdown table."""
    lines = ["| kind | questions | accuracy | 95 % interval | chance |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in scores:
        low, high = row.interval
        lines.append(
            f"| {row.kind} | {row.num_questions} | {row.accuracy:.3f} | {low:.3f} to {high:.3f} | {row.chance:.3f} |"
        )
    return "\n".join(lines)


def _says(answer: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer, re.IGNORECASE) is not None
