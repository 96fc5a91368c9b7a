"""Batches: right-padded rows, media in the order of rows, and rows of weight 0 that count for nothing."""

import pickle
from dataclasses import replace

import numpy as np
import torch

from valley.data.collate import IGNORED, Sample, collate, make_filler

NONE = np.zeros((0, 2, 2, 3), dtype=np.uint8)


def make_sample(slot: int, tokens: list[int], num_frames: list[int], weight: float = 1.0) -> Sample:
    ids = np.array(tokens, dtype=np.int64)
    frames = np.full((sum(num_frames), 2, 2, 3), slot, dtype=np.uint8)
    labels = np.where(ids % 2 == 0, ids, IGNORED)
    return Sample(slot, slot + 100, f"s{slot}", 1, ids, labels, frames, np.array(num_frames, dtype=np.int64), weight)


def test_rows_are_padded_on_the_right_and_media_follow_the_rows() -> None:
    batch = collate([make_sample(1, [2, 3, 4], [2]), make_sample(2, [6], []), make_sample(3, [8, 9], [1, 3])], pad_id=7)
    assert batch.input_ids.tolist() == [[2, 3, 4], [6, 7, 7], [8, 9, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [[2, -100, 4], [6, -100, -100], [8, -100, -100]]
    assert batch.num_frames.tolist() == [2, 1, 3]
    assert batch.frames.shape == (6, 2, 2, 3)
    assert batch.frames[:, 0, 0, 0].tolist() == [1, 1, 3, 3, 3, 3]
    assert (batch.sample_ids, batch.sources, batch.slots) == (("s1", "s2", "s3"), (1, 1, 1), (1, 2, 3))
    assert batch.num_tokens == 6
    assert batch.padding_share == 1 - 6 / 9
    assert batch.num_supervised == 1  # the first token of a row is predicted by nothing


def test_weight_0_supervises_nothing_and_leaves_a_token_to_attend_to() -> None:
    batch = collate([make_sample(1, [2, 4], [1], weight=0.0), make_filler(9, NONE)], pad_id=7)
    assert (batch.labels == IGNORED).all()
    assert batch.num_supervised == 0
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]  # a row of nothing but padding is NaN in attention
    assert batch.sources == (1, -1)


def test_a_batch_without_media_has_no_pictures_for_the_model() -> None:
    batch = collate([make_filler(1, NONE), make_sample(2, [2], [])], pad_id=0)
    assert batch.frames.shape == (0, 2, 2, 3)
    inputs = batch.model_inputs()
    assert inputs["num_frames"] is None
    assert sorted(inputs) == ["attention_mask", "input_ids", "labels", "num_frames"]


def test_the_model_is_given_pictures_as_pictures_and_tokens_as_tokens() -> None:
    sample = make_sample(1, [2, 3, 4], [2])
    assert collate([sample], pad_id=0).model_inputs()["pixel_values"].tolist() == sample.frames.tolist()
    tokens = torch.tensor([[[1.5, -2.0]], [[0.0, 3.25]]], dtype=torch.bfloat16)
    bits = tokens.view(torch.int16).numpy().view(np.uint16)
    inputs = collate([replace(sample, frames=bits)], pad_id=0).model_inputs()
    assert "pixel_values" not in inputs
    assert torch.equal(inputs["frame_tokens"], tokens)


def test_a_batch_moves_as_a_whole_and_a_sample_travels() -> None:
    sample = make_sample(1, [2, 3, 4], [2])
    moved = collate([sample], pad_id=0).to("meta")
    assert {value.device for value in moved.model_inputs().values()} == {torch.device("meta")}
    assert moved.slots == (1,)
    again = pickle.loads(pickle.dumps(sample))
    assert again.frames.tobytes() == sample.frames.tobytes()
