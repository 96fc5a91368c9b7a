"""Intervals hold as often as they say, on answers that depend on each other as real ones do."""

from __future__ import annotations

import numpy as np
import pytest

from valley.comparison.statistics import estimate, holm
from valley.evaluation.metrics import wilson_interval


def answers(
    rng: np.random.Generator, num_seeds: int, num_groups: int, size: int, seed_sd: float, group_sd: float
) -> np.ndarray:
    """0 and 1 around a half, with a part that all answers of a seed share and one that a group shares."""
    level = 0.5 + rng.normal(0, seed_sd, (num_seeds, 1, 1)) + rng.normal(0, group_sd, (1, num_groups, 1))
    return (rng.random((num_seeds, num_groups, size)) < level).astype(float).reshape(num_seeds, -1)


@pytest.mark.parametrize(
    ("num_seeds", "seed_sd", "group_sd"), [(2, 0.0, 0.2), (3, 0.05, 0.2), (5, 0.1, 0.0), (2, 0.0, 0.0)], ids=str
)
def test_the_interval_holds_the_true_share_about_as_often_as_it_says(
    num_seeds: int, seed_sd: float, group_sd: float
) -> None:
    rng, groups, held, widths = np.random.default_rng(0), np.repeat(np.arange(60), 3), 0, []
    for _ in range(300):
        low, high = estimate(answers(rng, num_seeds, 60, 3, seed_sd, group_sd), groups).share_interval
        held += low <= 0.5 <= high
        widths.append(high - low)
    assert held / 300 >= 0.92  # and more where few seeds differ little: what they may differ by is then hardly known
    assert np.median(widths) < 0.25


def test_no_difference_is_found_about_as_seldom_as_it_says() -> None:
    rng, groups, found = np.random.default_rng(1), np.repeat(np.arange(60), 3), 0
    for _ in range(300):
        one, other = (answers(rng, 3, 60, 3, 0.03, 0.0) for _ in range(2))
        found += estimate(one - other, groups).p_value < 0.05
    assert found / 300 <= 0.08


def test_a_difference_shared_by_all_questions_is_found() -> None:
    rng, groups = np.random.default_rng(2), np.arange(300)
    one, other = (rng.random((3, 300)) < share for share in (0.8, 0.5))
    found = estimate(one.astype(float) - other, groups)
    low, high = found.difference_interval
    assert found.p_value < 0.001
    assert 0 < low < found.mean < high < 1


def test_one_seed_with_independent_questions_gives_wilsons_interval() -> None:
    right = np.zeros((1, 2000))
    right[0, :1400] = 1
    assert estimate(right, np.arange(2000)).share_interval == pytest.approx(wilson_interval(1400, 2000), abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_right_and_all_wrong_leave_room_for_doubt(share: float) -> None:
    low, high = estimate(np.full((2, 40), share), np.repeat(np.arange(20), 2)).share_interval
    assert high - low > 0.1
    assert low == 0 or high == pytest.approx(1)


def test_twins_count_as_one_question() -> None:
    rng = np.random.default_rng(3)
    right = (rng.random((1, 200)) < 0.5).astype(float)
    doubled = np.repeat(right, 2, axis=1)
    single, twins = estimate(right, np.arange(200)), estimate(doubled, np.repeat(np.arange(200), 2))
    assert twins.share_interval == pytest.approx(single.share_interval)
    assert estimate(doubled, np.arange(400)).variance < 0.6 * single.variance


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree, disagree = np.zeros((2, 100)), np.zeros((2, 100))
    agree[:, :50], disagree[0, :] = 1, 1
    narrow, wide = (estimate(values, np.arange(100)).share_interval for values in (agree, disagree))
    assert wide[1] - wide[0] > 0.9 > 0.3 > narrow[1] - narrow[0]


def test_few_questions_that_all_agree_prove_little() -> None:
    three = estimate(np.ones((2, 3)), np.arange(3))
    assert three.p_value >= 0.25
    low, high = three.difference_interval
    assert low < 0.5 < high
    assert estimate(np.ones((2, 40)), np.zeros(40, dtype=int)).p_value == 1
    same = estimate(np.zeros((2, 30)), np.arange(30))
    assert same.p_value == 1
    assert same.difference_interval[0] < 0 < same.difference_interval[1]


def test_nothing_to_estimate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate(np.zeros((2, 0)), np.zeros(0, dtype=int))


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
