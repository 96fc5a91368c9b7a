"""The rows of the six added tokens: trained by themselves, saved, and in the way of nothing."""

from pathlib import Path
from typing import Any

import torch
from model_makers import batch_of, llama, make_model, media_of, place

from valley.model.modeling import ValleyForConditionalGeneration


def train_only(model: Any, *parts: str, steps: int = 3) -> float:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [p for part in parts for p in model.module_parameters(part).values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    inputs = batch_of([5, *place(3), 6, 7], [8, 9, 10]) | media_of(3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 70, -100)
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model(**inputs, labels=labels).loss.item()


def test_they_train_while_the_language_model_is_frozen_and_nothing_else_moves() -> None:
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_only(model, "added_tokens")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"added_tokens.weight"}
    moved = (model.added_tokens.weight - before["added_tokens.weight"]).abs().amax(1) > 0
    # The features stand where <im_patch> and <vi_frame> were, so those two rows are never read.
    assert moved.tolist() == [True, False, True, True, False, True]


def test_the_rows_of_the_language_model_are_not_read() -> None:
    model = make_model(text=llama(tie_word_embeddings=False))
    inputs = batch_of([5, *place(2), 6]) | media_of(2)
    expected = model(**inputs).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.added_token_ids] = torch.nan
    assert torch.equal(model(**inputs).logits, expected)


def test_a_trained_tied_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = make_model("v2", llama(tie_word_embeddings=True)).train()
    loss = train_only(model, "added_tokens", "projector", "temporal", "llm")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = ValleyForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    inputs = batch_of([5, *place(3), 6, 7], [8, 9, 10]) | media_of(3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 70, -100)
    assert loaded(**inputs, labels=labels).loss.item() == loss
