"""What counts as right, and how sure one can be of a share of right answers."""

from __future__ import annotations

import pytest

from valley.evaluation.metrics import Score, format_scores, is_right, score, wilson_interval

COLOURS = ("red", "blue", "green")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is red.", True),
        ("RED", True),
        ("red, a deep red", True),
        ("It is red or blue.", False),
        ("It is blue.", False),
        ("It is coloured.", False),  # "red" within a word
        ("It is reddish", False),
        ("", False),
    ],
)
def test_right_is_the_true_choice_alone_as_a_word(answer: str, right: bool) -> None:
    assert is_right(answer, "red", COLOURS) is right


def test_a_choice_may_be_several_words() -> None:
    choices = ("red star", "blue star")
    assert is_right("The red star is first.", "red star", choices)
    assert not is_right("The red and blue star", "red star", choices)


@pytest.mark.parametrize(
    ("num_right", "num_questions", "bounds"),
    [
        (81, 263, (0.2553, 0.3662)),  # the example of Newcombe 1998, table I
        (15, 148, (0.0624, 0.1605)),  # likewise
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_wilsons_interval_is_that_of_the_literature(
    num_right: int, num_questions: int, bounds: tuple[float, float]
) -> None:
    assert wilson_interval(num_right, num_questions) == pytest.approx(bounds, abs=1e-4)


def test_scores_are_counted_by_kind_with_the_mean_of_their_chances() -> None:
    scores = score(
        [("size", True, 2), ("colour", False, 4), ("size", False, 2), ("size", True, 4), ("colour", True, 4)]
    )
    assert scores == [Score("colour", 2, 1, 0.25), Score("size", 3, 2, pytest.approx((0.5 + 0.5 + 0.25) / 3))]
    assert "| size | 3 | 0.667 | 0.208 to 0.939 | 0.417 |" in format_scores(scores)
