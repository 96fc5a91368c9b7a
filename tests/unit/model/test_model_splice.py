"""Visual tokens and their places, against loops."""

import pytest
import torch

from valley.model.splice import frame_places, join_clips, pad_clips, repeat_rows

LENGTHS = [[1], [3, 1, 4], [2, 2], [5, 1, 1, 9]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_clip_gets_a_row_with_its_frames_and_a_mask(lengths: list[int]) -> None:
    frames = torch.randn(sum(lengths), 2, 3)
    clips, mask = pad_clips(frames, torch.tensor(lengths))
    assert mask.sum(1).tolist() == lengths
    assert clips.shape == (len(lengths), max(lengths), 2, 3)
    first = 0
    for row, length in enumerate(lengths):
        assert torch.equal(clips[row, :length], frames[first : first + length])
        assert mask[row].tolist() == [True] * length + [False] * (max(lengths) - length)
        first += length


@pytest.mark.parametrize("lengths", LENGTHS)
def test_patches_come_before_the_frames_of_their_own_clip(lengths: list[int]) -> None:
    clips, frames = torch.randn(len(lengths), 4, 3), torch.randn(sum(lengths), 3)
    expected, first = [], 0
    for row, length in enumerate(lengths):
        expected += [*clips[row], *frames[first : first + length]]
        first += length
    assert torch.equal(join_clips(clips, frames, torch.tensor(lengths)), torch.stack(expected))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_places_are_patches_then_frames_clip_by_clip(lengths: list[int]) -> None:
    expected = [kind for length in lengths for kind in [False] * 4 + [True] * length]
    assert frame_places(torch.tensor(lengths), 4).tolist() == expected


def test_rows_are_repeated_whole_and_empty_rows_stay_empty() -> None:
    items = torch.tensor([10, 11, 12, 30])
    repeated = repeat_rows(items, torch.tensor([3, 0, 1]), 2)
    assert repeated.tolist() == [10, 11, 12, 10, 11, 12, 30, 30]
