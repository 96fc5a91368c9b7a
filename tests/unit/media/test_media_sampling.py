"""Which times of a clip are looked at (paper 4.1; the published code's fixed frames)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from valley.media.probe import MediaInfo
from valley.media.sampling import Sampling, expected_frames, sample_times

CLIP = MediaInfo("video", "mp4", "h264", 10.0, 640, 360, 25.0, 0, 250)


def lasting(duration_s: float) -> MediaInfo:
    return replace(CLIP, duration_s=duration_s, num_frames=round(duration_s * 25))


@pytest.mark.parametrize(
    ("duration_s", "times"),
    [
        (0.0, [0.0]),
        (0.04, [0.0]),
        (2.0, [0.0]),
        (2.04, [0.0, 2.0]),
        (9.99, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (10.0, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (10.0000000001, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (10.04, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
    ],
)
def test_half_a_frame_a_second_before_the_end(duration_s, times):
    assert sample_times(lasting(duration_s), Sampling()) == times
    assert expected_frames(lasting(duration_s), Sampling()) == len(times)


def test_another_rate():
    assert sample_times(lasting(1.0), Sampling(fps=3)) == [0.0, 1 / 3, 2 / 3]


def test_more_than_the_most_are_thinned_evenly():
    times = sample_times(lasting(500.0), Sampling(max_frames=100))

    assert len(times) == 100
    assert times == [2.0 * index for index in np.linspace(0, 249, 100).round()]
    assert (times[0], times[1], times[-1]) == (0.0, 6.0, 498.0)


def test_as_many_as_the_most_are_all_taken():
    assert sample_times(lasting(8.0), Sampling(max_frames=4)) == [0.0, 2.0, 4.0, 6.0]
    assert sample_times(lasting(8.5), Sampling(max_frames=1)) == [0.0]


def test_fixed_frames_are_spread_from_the_first_to_the_last():
    shown = [0.0, 0.1, 0.5, 0.6, 3.0, 3.1, 7.0]

    assert sample_times(CLIP, Sampling(mode="fixed", num_frames=3), shown) == [0.0, 0.6, 7.0]
    assert sample_times(CLIP, Sampling(mode="fixed", num_frames=4), shown) == [0.0, 0.5, 3.0, 7.0]
    assert sample_times(CLIP, Sampling(mode="fixed", num_frames=1), shown) == [0.0]


def test_a_clip_of_fewer_frames_gives_all_it_has():
    assert sample_times(CLIP, Sampling(mode="fixed", num_frames=8), [0.0, 0.3, 0.4]) == [0.0, 0.3, 0.4]


def test_fixed_frames_without_their_times_are_taken_as_even():
    assert sample_times(CLIP, Sampling(mode="fixed", num_frames=3)) == pytest.approx([0.0, 124 / 25, 249 / 25])
    assert expected_frames(lasting(0.2), Sampling(mode="fixed", num_frames=8)) == 5
    assert expected_frames(replace(CLIP, num_frames=0, duration_s=0.0), Sampling(mode="fixed")) == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(mode="fixed", num_frames=8)])
def test_an_image_is_looked_at_once(sampling):
    image = MediaInfo("image", "png", "png", 0.0, 640, 360, 0.0, 0, 1)

    assert sample_times(image, sampling) == [0.0]
