"""Generation: what may come out, and that neither padding, batching, beams nor the cache change it."""

from typing import Any

import pytest
import torch
from model_makers import EOS, PAD, batch_of, frames, make_model, media_of, neox, place
from torch import Tensor
from transformers import GenerationConfig

CASES = {
    "a video": ([5, *place(3), 6, 7], (3,)),
    "an image": ([8, *place(1), 9], (1,)),
    "text alone": ([10, 11, 12, 13, 14], ()),
    "several turns": ([5, *place(2), 6, 20, 21, *place(4), 7, 22], (2, 4)),
}


def media_for(clips: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    return media_of(*clips, seed=seed) if clips else {}


def answers(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temporal", ["v1", "v3"])
def test_greedy_answers_are_those_of_whole_forward_passes(case: str, temporal: str) -> None:
    model = make_model(temporal)
    prompt, clips = CASES[case]
    found = answers(model, batch_of(prompt) | media_for(clips))[0].tolist()
    ids = list(prompt)
    for token in found:
        scores = model(**batch_of(ids), **media_for(clips)).logits[0, -1]
        scores[model.config.added_token_ids] = -torch.inf
        assert token == scores.argmax().item()
        ids.append(token)


@pytest.mark.parametrize("text", [None, neox()], ids=["llama", "neox"])
def test_a_batch_of_different_lengths_answers_as_each_prompt_alone(text: Any) -> None:
    model = make_model("v3", text)
    prompts = [prompt for prompt, _ in CASES.values()]
    alone = [
        answers(model, batch_of(prompt) | media_for(clips, seed=row))
        for row, (prompt, clips) in enumerate(CASES.values())
    ]
    parts = [media_for(clips, seed=row) for row, (_, clips) in enumerate(CASES.values()) if clips]
    media = {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "num_frames")}
    together = answers(model, batch_of(*prompts, left=True) | media)
    assert torch.equal(together, torch.cat(alone))


def test_beams_and_samples_get_their_own_rows_media() -> None:
    model = make_model("v2")
    rows = [([5, *place(3), 6, *place(1), 7], (3, 1)), ([10, 11, 12], ()), ([8, *place(2), 9], (2,))]
    prompts = batch_of(*(prompt for prompt, _ in rows), left=True)
    clips = tuple(clip for _, clips in rows for clip in clips)
    media = media_for(clips)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    together = answers(model, prompts | media, **options)
    assert together.shape == (6, 4)
    first, start = 0, 0
    for row, (prompt, lengths) in enumerate(rows):
        part = {}
        if lengths:
            part = {
                "pixel_values": media["pixel_values"][start : start + sum(lengths)],
                "num_frames": torch.tensor(lengths),
            }
            start += sum(lengths)
        alone = answers(model, batch_of(prompt) | part, **options)
        assert torch.equal(together[first : first + 2], alone), row
        first += 2


def test_the_tower_sees_each_frame_once_whatever_the_beams_and_the_length() -> None:
    model = make_model("v3")
    seen = []
    model.vision_tower.visual.conv1.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    answers(model, batch_of([5, *place(3), 6]) | media_of(3), num_beams=4, num_return_sequences=4)
    assert seen == [3]
    seen.clear()
    answers(model, batch_of([5, *place(3), 6]) | media_of(3))
    assert seen == [3]


def test_answers_without_a_cache_are_the_same() -> None:
    model = make_model("v3")
    inputs = batch_of([5, *place(3), 6]) | media_of(3)
    assert torch.equal(answers(model, inputs), answers(model, inputs, use_cache=False))


def test_stored_frame_tokens_generate_what_their_pixels_do() -> None:
    model = make_model("v3")
    prompt, media = batch_of([5, *place(3), 6]), media_of(3)
    stored = {"frame_tokens": model.encode_frames(media["pixel_values"]), "num_frames": media["num_frames"]}
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(answers(model, prompt | stored, **options), answers(model, prompt | media, **options))


def test_a_conversation_goes_on_from_its_cache_with_a_new_clip() -> None:
    model = make_model("v3")
    first, clip, later = [5, *place(2), 6], media_of(2), [7, *place(3), 8]
    begun = model.generate(**batch_of(first), **clip, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([begun.sequences, torch.tensor([later])], dim=1)
    new = {"pixel_values": frames(3, seed=9), "num_frames": torch.tensor([3])}
    both = {
        "pixel_values": torch.cat([clip["pixel_values"], new["pixel_values"]]),
        "num_frames": torch.tensor([2, 3]),
    }
    fresh = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **both, max_new_tokens=4)
    going_on = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=begun.past_key_values,
        **new,
        max_new_tokens=4,
    )
    assert torch.equal(fresh, going_on)


def test_added_tokens_never_come_out_even_when_they_score_highest() -> None:
    model = make_model()
    inputs = batch_of([5, *place(2), 6]) | media_of(2)
    head = model.get_output_embeddings()
    states = []
    hook = head.register_forward_hook(lambda module, args, output: states.append(args[0][0, -1]))
    model(**inputs)
    hook.remove()
    with torch.no_grad():
        head.weight[model.config.added_token_ids] = 50 * states[0]
    scores = model(**inputs).logits[0, -1]
    assert scores.argmax().item() in model.config.added_token_ids
    own = GenerationConfig(max_new_tokens=3, eos_token_id=EOS)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 5.0}, {"generation_config": own}):
        assert not set(answers(model, inputs, **options).flatten().tolist()) & set(model.config.added_token_ids)


def test_generation_stops_at_the_end_token_and_pads_the_rest() -> None:
    model = make_model()
    inputs = batch_of([5, *place(2), 6], [7, 8, 9], left=True) | media_of(2)
    free = answers(model, inputs, eos_token_id=None)
    stop = free[0, 2].item()
    found = answers(model, inputs, eos_token_id=stop)
    length = free[0].tolist().index(stop) + 1
    assert found[0, :length].tolist() == free[0, :length].tolist()
    assert set(found[0, length:].tolist()) <= {PAD}


def test_a_repetition_penalty_can_look_up_every_token_of_the_prompt() -> None:
    inputs = batch_of([5, *place(2), 6]) | media_of(2)
    assert answers(make_model(), inputs, repetition_penalty=1.3).shape == (1, 6)
