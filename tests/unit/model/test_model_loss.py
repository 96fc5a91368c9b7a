"""The loss on supervised positions: its value, what it costs, and what every forward must touch."""

from typing import Any

import pytest
import torch
from model_makers import PAD, VOCABULARY, batch_of, make_model, media_of, place
from torch.nn.functional import cross_entropy

PROMPTS = ([5, *place(3), 6, 7, 8, 9], [10, 11, 12, 13], [*place(1), 14, 15], [16, *place(2), 17, 18, 19])


def labelled(*spans: tuple[int, int], prompts: Any = PROMPTS, clips: tuple[int, ...] = (3, 1, 2)) -> dict[str, Any]:
    """A batch that is supervised in these columns of its rows."""
    inputs = batch_of(*prompts)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (start, stop) in enumerate(spans):
        labels[row, start:stop] = inputs["input_ids"][row, start:stop]
    return inputs | media_of(*clips) | {"labels": labels}


SPANS = ((13, 16), (2, 4), (9, 11), (12, 15))


def test_the_head_sees_only_columns_in_which_a_row_is_supervised() -> None:
    model, inputs = make_model(), labelled(*SPANS)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    found = model(**inputs)
    columns = {column - 1 for start, stop in SPANS for column in range(start, stop)}
    assert seen == [len(columns)]
    assert found.logits is None
    assert found.get("past_key_values") is None


def test_the_loss_equals_cross_entropy_over_all_logits() -> None:
    model, inputs = make_model("v3"), labelled(*SPANS)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    expected = cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), inputs["labels"][:, 1:].reshape(-1))
    assert model(**inputs).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with_logits = model(**inputs, return_logits=True)
    torch.testing.assert_close(with_logits.logits, logits)
    assert with_logits.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_first_token_is_never_a_target() -> None:
    model = make_model()
    inputs = batch_of([5, 6, 7])
    labels = torch.tensor([[5, -100, -100]])
    assert model(**inputs, labels=labels).loss.item() == 0
    assert model(input_ids=torch.tensor([[5]]), labels=torch.tensor([[5]])).loss.item() == 0


@pytest.mark.parametrize("temporal", ["v1", "v2", "v3"])
def test_splitting_a_batch_changes_neither_loss_nor_gradients(temporal: str) -> None:
    model = make_model(temporal).train()
    whole = labelled(*SPANS)
    model(**whole, num_items_in_batch=8).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = model(**whole, num_items_in_batch=8).loss.item()
    model.zero_grad()
    total, first = 0.0, 0
    for rows, clips in (((0, 1), 1), ((1, 2), 0), ((2, 4), 2)):
        part = {name: whole[name][slice(*rows)] for name in ("input_ids", "attention_mask", "labels")}
        if clips:
            lengths = whole["num_frames"][first : first + clips]
            start = int(whole["num_frames"][:first].sum())
            part["pixel_values"] = whole["pixel_values"][start : start + int(lengths.sum())]
            part["num_frames"] = lengths
            first += clips
        split = model(**part, num_items_in_batch=torch.tensor(8)).loss
        split.backward()
        total += split.item()
    assert total == pytest.approx(loss, rel=1e-5)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("temporal", ["v1", "v2", "v3"])
@pytest.mark.parametrize("supervised", [True, False])
def test_every_forward_touches_every_parameter_that_may_train(temporal: str, supervised: bool) -> None:
    model = make_model(temporal).train()
    inputs = batch_of([5, 6, 7, 8])
    labels = inputs["input_ids"] if supervised else torch.full_like(inputs["input_ids"], -100)
    found = model(**inputs, labels=labels)
    found.loss.backward()
    for part in ("temporal", "projector", "added_tokens"):
        for name, parameter in model.module_parameters(part).items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name
    llm = model.module_parameters("llm")
    assert all(parameter.grad is not None for parameter in llm.values())
    largest = max(parameter.grad.abs().max().item() for parameter in llm.values())
    assert (largest > 0) == supervised
    assert (found.loss.item() > 0) == supervised


def test_the_blank_frame_does_not_change_the_loss() -> None:
    model, inputs = make_model("v3"), batch_of([5, 6, 7, 8])
    alone = model.language_model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"])).logits
    expected = cross_entropy(alone[0, :-1], inputs["input_ids"][0, 1:])
    assert model(**inputs, labels=inputs["input_ids"]).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_on_either_side_changes_nothing() -> None:
    model = make_model("v2")
    prompts = ([5, *place(3), 6, 7], [10, 11, 12])
    losses = []
    for left in (False, True):
        inputs = batch_of(*prompts, left=left)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)
        labels[(labels >= 70) & (labels < 76)] = -100
        if left:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            labels[1, labels.shape[1] - 3] = -100  # the first token of a row follows padding here
        losses.append(model(**inputs, **media_of(3), labels=labels).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model, inputs = make_model("v3").train(), labelled(*SPANS)
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    layer = model.language_model.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda module, args, output: runs.append(1))
    model(**inputs).loss.backward()
    assert len(runs) == 2  # forward, and once more on the way back
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
