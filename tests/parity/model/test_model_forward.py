"""Splice and loss against loops over tokens and formulas in NumPy, on tiny random weights."""

from typing import Any

import numpy as np
import pytest
import torch
from test_model_temporal import FORMULAS, weights_of
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from valley.model.configuration import ValleyConfig, ValleyVisionConfig
from valley.model.modeling import ValleyForConditionalGeneration

ADDED = range(60, 66)
PATCH, FRAME = 61, 64
PATCHES, SIZE_PX, WIDTH = 4, 28, 24


def build(temporal: str, placement: str) -> Any:
    torch.manual_seed(0)
    tower = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE_PX, "patch_size": 14, "width": WIDTH, "head_width": 8, "layers": 2},
    }
    vision = ValleyVisionConfig(tower=tower, hidden_size=WIDTH, num_patches=PATCHES, size_px=SIZE_PX, micro_batch=3)
    text = LlamaConfig(vocab_size=70, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    names = ("image_start", "image_patch", "image_end", "video_start", "video_frame", "video_end")
    ids = {f"{name}_token_id": token for name, token in zip(names, ADDED, strict=True)}
    config = ValleyConfig(vision_config=vision, text_config=text, temporal=temporal, placement=placement, **ids)
    model = ValleyForConditionalGeneration(config).double()
    with torch.no_grad():
        for part in (model.language_model, model.projector, model.temporal):
            for parameter in part.parameters():
                parameter.normal_(std=0.2)
        model.standardisation.mean.normal_()
        model.standardisation.std.uniform_(0.5, 2)
    return model


def place(num_frames: int) -> list[int]:
    return [60, *[PATCH] * PATCHES, 62, 63, *[FRAME] * num_frames, 65]


ROWS = [
    [5, 6, *place(3), 7, 8, 9, 10],
    [11, 12, 13],
    [*place(1), 14, 15, 16, *place(6), 17, 18],
]
SUPERVISED = [{13, 15, 16}, {1, 2}, {len(ROWS[2]) - 1}]
CLIPS = [3, 1, 6]  # of row 0, of row 2, of row 2


def batch() -> dict[str, torch.Tensor]:
    length = max(map(len, ROWS))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in ROWS])
    labels = torch.full_like(ids, -100)
    for row, columns in enumerate(SUPERVISED):
        for column in columns:
            labels[row, column] = ids[row, column]
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ROWS])
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (sum(CLIPS), SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs | {"pixel_values": pixels, "num_frames": torch.tensor(CLIPS)}


def expected_features(model: Any, pixels: torch.Tensor) -> list[np.ndarray]:
    """The visual tokens of each clip, by the formulas."""
    mean, std = (np.array(getattr(model.config.vision_config, name)) for name in ("mean", "std"))
    normalised = ((pixels.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)
    tokens = model.vision_tower(torch.from_numpy(normalised)).numpy()
    tokens = (tokens - model.standardisation.mean.numpy()) / model.standardisation.std.numpy()
    weight, bias = (value.detach().numpy() for value in (model.projector.weight, model.projector.bias))
    after = model.config.placement == "after_projector"
    if after:
        tokens = tokens @ weight.T + bias
    found, first = [], 0
    for length in CLIPS:
        clip = tokens[first : first + length]
        first += length
        merged = FORMULAS[model.config.temporal](clip[:, 1:], weights_of(model.temporal))
        joined = np.concatenate([merged, clip[:, 0]])
        found.append(joined if after else joined @ weight.T + bias)
    return found


def expected_embeddings(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    features = np.concatenate(expected_features(model, inputs["pixel_values"]))
    table = model.language_model.model.embed_tokens.weight.detach().numpy()
    added = model.added_tokens.weight.detach().numpy()
    embeddings = np.zeros((*inputs["input_ids"].shape, table.shape[1]))
    used = 0
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        for column, token in enumerate(ids):
            if token in (PATCH, FRAME):
                embeddings[row, column] = features[used]
                used += 1
            else:
                embeddings[row, column] = added[token - 60] if token in ADDED else table[token]
    assert used == len(features)
    return torch.from_numpy(embeddings)


@pytest.mark.parametrize("placement", ["before_projector", "after_projector"])
@pytest.mark.parametrize("temporal", ["v1", "v2", "v3"])
def test_loss_and_logits_equal_an_independent_computation(temporal: str, placement: str) -> None:
    model, inputs = build(temporal, placement), batch()
    with torch.no_grad():
        logits = model.language_model(
            inputs_embeds=expected_embeddings(model, inputs), attention_mask=inputs["attention_mask"]
        ).logits.numpy()
        found = model(**inputs, return_logits=True)
    losses = []
    for row, columns in enumerate(SUPERVISED):
        for column in columns:
            scores = logits[row, column - 1]  # the token at `column` is foretold one before it
            losses.append(np.log(np.exp(scores).sum()) - scores[ROWS[row][column]])
    present = inputs["attention_mask"].bool()
    np.testing.assert_allclose(found.logits[present], logits[present.numpy()], rtol=1e-5, atol=1e-6)
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-6)
    with torch.no_grad():
        shared = model(**inputs, num_items_in_batch=50)
    assert shared.loss.item() == pytest.approx(np.sum(losses) / 50, rel=1e-6)
    assert shared.logits is None


@pytest.mark.parametrize("placement", ["before_projector", "after_projector"])
@pytest.mark.parametrize("temporal", ["v1", "v2", "v3"])
def test_visual_features_equal_the_formulas_in_reading_order(temporal: str, placement: str) -> None:
    model, inputs = build(temporal, placement), batch()
    with torch.no_grad():
        found = model.visual_features(inputs["pixel_values"], inputs["num_frames"])
    expected = np.concatenate(expected_features(model, inputs["pixel_values"]))
    assert found.shape == (sum(PATCHES + length for length in CLIPS), 32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_both_placements_are_one_function_for_v1() -> None:
    before, after = build("v1", "before_projector"), build("v1", "after_projector")
    after.load_state_dict(before.state_dict())
    inputs = batch()
    with torch.no_grad():
        assert before(**inputs).loss.item() == pytest.approx(after(**inputs).loss.item(), rel=1e-9)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model, inputs = build("v3", "before_projector"), batch()
    model.train()
    model(**inputs).loss.backward()

    def loss() -> float:  # the model rounds its own to float32
        with torch.no_grad():
            logits = model(**inputs, return_logits=True).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()).item()

    for name in ("projector.weight", "temporal.layer.self_attn.in_proj_weight", "added_tokens.weight"):
        parameter = model.get_parameter(name)
        direction, step = torch.randn_like(parameter), 1e-3
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * step * direction
            ends.append(loss())
        with torch.no_grad():
            parameter += step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-4), name
