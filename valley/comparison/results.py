"""What all finished trials came to, put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from valley.comparison.statistics import Estimate, estimate, holm
from valley.comparison.trial import ASKED, is_finished, read_accuracy, read_answers, read_result
from valley.comparison.trials import Trial

ALL = "all"
"""The kind that every question is of."""
LENGTHS_S = (0, 5, 10, 15, 20, 30, 60, 120, 300, float("inf"))
"""Bounds of the classes of clips by length."""


@dataclass(frozen=True)
class Question:
    """A question that all trials were asked."""

    kind: str
    pair: str
    num_choices: int
    single_frame: bool | None
    duration_s: float | None


@dataclass(frozen=True)
class Cell:
    """How a variant did on some of the questions.

    Attributes:
        variant: who.
        what: on what: a kind of question, or a class of clips.
        num_questions: how many there are.
        accuracy: share of right answers, over seeds and questions.
        chance: share that guessing would get right.
    """

    variant: str
    what: str
    num_questions: int
    accuracy: Estimate
    chance: float


@dataclass(frozen=True)
class Difference:
    """A variant against another, on the same questions with the same seeds.

    Attributes:
        one: a variant.
        other: the one that is subtracted.
        kind: of the questions.
        gain: difference of the shares of right answers.
        p_value: of no difference, corrected for the number of comparisons.
    """

    one: str
    other: str
    kind: str
    gain: Estimate
    p_value: float


class Results:
    """All finished trials; what one of them could not be asked counts for none.

    Args:
        trials: of the comparison, finished or not.

    Attributes:
        trials: the finished ones.
        results: the same order: what each came to.
        questions: what all were asked, by id.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = [trial for trial in trials if is_finished(trial)]
        self.unfinished = [trial for trial in trials if not is_finished(trial)]
        self.results = [read_result(trial) for trial in self.trials]
        self._rows = {
            (trial.name, frames): {row["id"]: row for row in rows}
            for trial in self.trials
            for frames in ASKED
            if (rows := read_answers(trial, frames))
        }
        asked = [set(rows) for rows in self._rows.values()]
        common = sorted(set.intersection(*asked)) if asked else []
        some: Mapping[str, Any] = next(iter(self._rows.values()), {})
        self.questions = {
            name: Question(
                (row := some[name])["kind"], row["pair"], len(row["choices"]), row["single_frame"], row["duration_s"]
            )
            for name in common
        }

    @property
    def variants(self) -> list[str]:
        """What competes, in the order of the search space."""
        return list(dict.fromkeys(trial.variant for trial in self.trials if not trial.baseline))

    @property
    def baselines(self) -> list[str]:
        """What checks the questions."""
        return list(dict.fromkeys(trial.variant for trial in self.trials if trial.baseline))

    @property
    def kinds(self) -> list[str]:
        """Kinds of question."""
        return sorted({question.kind for question in self.questions.values()})

    @property
    def is_shuffled(self) -> bool:
        """Whether the variants were asked with shuffled frames, too."""
        return any(frames == "shuffled" for _, frames in self._rows)

    def of(self, variant: str) -> list[dict[str, Any]]:
        """What the trials of a variant came to."""
        return [result for result in self.results if result["variant"] == variant]

    def seeds(self, variant: str) -> list[int]:
        """Seeds with which a variant was trained."""
        return [trial.seed for trial in self.trials if trial.variant == variant]

    def curves(self) -> Iterator[tuple[Trial, dict[int, float]]]:
        """Yields the competing trials with their accuracy by step."""
        yield from ((trial, read_accuracy(trial)) for trial in self.trials if not trial.baseline)

    def cell(self, variant: str, kind: str = ALL, frames: str = "all") -> Cell | None:
        """Returns how a variant did on a kind; None when it was not asked that."""
        return self._cell(variant, kind, self._of_kind(kind), frames)

    def chance(self, kind: str = ALL) -> float:
        """Returns the share of a kind that guessing would get right."""
        return self._chance(self._of_kind(kind))

    def number(self, kind: str = ALL) -> int:
        """Returns how many questions of a kind all were asked."""
        return len(self._of_kind(kind))

    def minutes(self, variant: str) -> float:
        """Returns how long a trial of a variant was trained, on average."""
        trials = self.of(variant)
        return float(sum(trial["seconds"] for trial in trials) / len(trials) / 60)

    def lengths(self) -> Iterator[Cell]:
        """Yields how each variant did on clips of each length."""
        for low, high in pairwise(LENGTHS_S):
            chosen = [
                name for name, asked in self.questions.items() if asked.duration_s and low < asked.duration_s <= high
            ]
            label = f"{low} to {high} s" if high < float("inf") else f"over {low} s"
            for variant in self.variants:
                if cell := self._cell(variant, label, chosen, "all"):
                    yield cell

    def differences(self, kinds: Sequence[str] = (ALL,)) -> list[Difference]:
        """Returns every variant against every other one on each of the kinds, over the seeds that both have.

        The p-values are corrected for the number of them all.
        """
        found = []
        for kind in kinds:
            chosen = self._of_kind(kind)
            for other, one in combinations(self.variants, 2):
                seeds = [seed for seed in self.seeds(one) if seed in self.seeds(other)]
                if seeds and chosen:
                    values = self._right(one, chosen, "all", seeds) - self._right(other, chosen, "all", seeds)
                    found.append((one, other, kind, self._estimate(values, chosen)))
        corrected = holm([gain.p_value for *_, gain in found])
        return [Difference(*row, p) for row, p in zip(found, corrected, strict=True)]

    def best(self) -> dict[str, Any]:
        """Returns the result of the best trial of the variant that is best over its seeds."""

        def accuracy(variant: str) -> float:
            cell = self.cell(variant)
            return cell.accuracy.mean if cell else 0.0

        variant = max(self.variants, key=accuracy)
        rows = [
            (self._right(variant, list(self.questions), "all", [seed]).mean(), seed) for seed in self.seeds(variant)
        ]
        seed = max(rows)[1]
        return next(result for result in self.of(variant) if result["seed"] == seed)

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name, question in self.questions.items() if kind in (ALL, question.kind)]

    def _cell(self, variant: str, what: str, chosen: Sequence[str], frames: str) -> Cell | None:
        seeds = [trial.seed for trial in self.trials if trial.variant == variant and (trial.name, frames) in self._rows]
        if not seeds or not chosen:
            return None
        values = self._right(variant, chosen, frames, seeds)
        return Cell(variant, what, len(chosen), self._estimate(values, chosen), self._chance(chosen))

    def _chance(self, chosen: Sequence[str]) -> float:
        return float(np.mean([1 / self.questions[name].num_choices for name in chosen]))

    def _right(
        self, variant: str, chosen: Sequence[str], frames: str, seeds: Sequence[int]
    ) -> Float[np.ndarray, "S Q"]:
        names = {trial.seed: trial.name for trial in self.trials if trial.variant == variant}
        return np.array(
            [[float(self._rows[names[seed], frames][name]["right"]) for name in chosen] for seed in seeds]
        ).reshape(len(seeds), len(chosen))

    def _estimate(self, values: Float[np.ndarray, "S Q"], chosen: Sequence[str]) -> Estimate:
        pairs = [self.questions[name].pair for name in chosen]
        return estimate(values, np.unique(pairs, return_inverse=True)[1])
