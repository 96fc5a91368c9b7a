"""What a prompt's places ask for and what came with it; the tower in the whole."""

from typing import Any

import pytest
import torch
from model_makers import (
    IM_PATCH,
    PATCHES,
    SIZE_PX,
    VI_FRAME,
    batch_of,
    frames,
    make_config,
    make_model,
    media_of,
    place,
)

from valley.model.modeling import PARTS, ValleyForConditionalGeneration


@pytest.mark.parametrize(
    ("prompts", "clips", "numbers"),
    [
        (([5, *place(3)],), (2,), "1 media of [2] frames need 4 places for patches and 2 for frames"),
        (([5, *place(3)],), (3, 1), "2 media of [3, 1] frames need 8 .* the prompt has 4 and 3"),
        (([5, *place(3)], [6, *place(1)]), (4,), "1 media of [4] frames need 4 .* the prompt has 8 and 4"),
        (([5, *place(3)], [6, *place(2)]), (2, 3), "2 media of [2, 3] frames need 8 .* the prompt has 8 and 5"),
        (([5, IM_PATCH, VI_FRAME],), (1,), "the prompt has 1 and 1"),
        (([5, 6, 7],), (1,), "the prompt has 0 and 0"),
    ],
)
def test_places_that_do_not_fit_the_media_are_refused_with_the_numbers(prompts: Any, clips: Any, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers.replace("[", r"\[").replace("]", r"\]")):
        make_model()(**batch_of(*prompts), **media_of(*clips))
    with pytest.raises(ValueError, match=numbers.replace("[", r"\[").replace("]", r"\]")):
        make_model().generate(**batch_of(*prompts, left=True), **media_of(*clips), num_beams=2, max_new_tokens=2)


def test_places_without_media_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="the prompt has 7 places for visual tokens, but no media came with it"):
        make_model()(**batch_of([5, *place(3)]))


@pytest.mark.parametrize(("counts", "given"), [([3], 2), ([2, 0], 2), ([1], 2)])
def test_frame_counts_that_do_not_add_up_are_refused(counts: list[int], given: int) -> None:
    inputs = batch_of([5, *place(2)])
    with pytest.raises(ValueError, match=f"do not make up the {given} frames"):
        make_model()(**inputs, pixel_values=frames(given), num_frames=torch.tensor(counts))


def test_media_without_counts_and_media_beside_embeddings_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="num_frames"):
        model(**batch_of([5, *place(2)]), pixel_values=frames(2))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32), **media_of(2))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_an_image_is_a_clip_of_one_frame_and_every_medium_changes_the_answer() -> None:
    model = make_model("v3")
    inputs = batch_of([5, *place(1), 6, *place(3), 7])
    base = model(**inputs, **media_of(1, 3)).logits[0, -1]
    other = media_of(1, 3)
    other["pixel_values"][0] = 255 - other["pixel_values"][0]
    assert (model(**inputs, **other).logits[0, -1] - base).abs().max() > 1e-4
    swapped = media_of(1, 3)
    swapped["pixel_values"][1:] = swapped["pixel_values"][1:].flip(0)
    assert (model(**inputs, **swapped).logits[0, -1] - base).abs().max() > 1e-4


def test_normalised_float_frames_equal_uint8_frames() -> None:
    model, inputs, media = make_model(), batch_of([5, *place(2), 6]), media_of(2)
    mean, std = (torch.tensor(getattr(model.config.vision_config, name))[:, None, None] for name in ("mean", "std"))
    pixels = (media["pixel_values"].permute(0, 3, 1, 2) / 255 - mean) / std
    found = model(**inputs, pixel_values=pixels, num_frames=media["num_frames"]).logits
    torch.testing.assert_close(found, model(**inputs, **media).logits)


def test_stored_frame_tokens_stand_in_for_pixels() -> None:
    model, inputs, media = make_model("v3"), batch_of([5, *place(2), 6, *place(3)]), media_of(2, 3)
    tokens = model.encode_frames(media["pixel_values"])
    assert tokens.shape == (5, 1 + PATCHES, 32)
    found = model(**inputs, frame_tokens=tokens, num_frames=media["num_frames"]).logits
    assert torch.equal(found, model(**inputs, **media).logits)


def test_the_tower_sees_each_frame_once_in_micro_batches_without_gradients() -> None:
    config = make_config("v3")
    config.vision_config.micro_batch = 2
    model = ValleyForConditionalGeneration(config).train()
    seen = []
    model.vision_tower.visual.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = batch_of([5, *place(3), 6], [7, *place(2), 8])
    model(**inputs, **media_of(3, 2), labels=inputs["input_ids"].clamp(max=60)).loss.backward()
    assert [len(output) for output in seen] == [2, 2, 1]
    assert not any(output.requires_grad for output in seen)
    assert all(p.grad is None and not p.requires_grad for p in model.module_parameters("vision").values())


def test_micro_batches_do_not_change_the_tokens() -> None:
    model, pixels = make_model(), frames(5)
    whole = model.encode_frames(pixels)
    model.config.vision_config.micro_batch = 2
    torch.testing.assert_close(model.encode_frames(pixels), whole)


def test_the_tower_stays_frozen_and_in_evaluation_mode() -> None:
    model = make_model().train()
    assert model.training
    assert model.language_model.training
    assert not any(module.training for module in model.vision_tower.modules())
    assert not any(p.requires_grad for p in model.vision_tower.parameters())


def test_standardisation_is_the_identity_until_set_and_then_changes_v3() -> None:
    model, media = make_model("v3"), media_of(3)
    plain = model.visual_features(**media)
    tokens = model.encode_frames(media["pixel_values"])
    assert torch.equal(model.standardisation(tokens), tokens)
    model.standardisation.mean.copy_(tokens.mean((0, 1)))
    model.standardisation.std.copy_(tokens.std((0, 1)))
    found = model.standardisation(tokens)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std((0, 1)), torch.ones(32), atol=1e-4, rtol=0)
    assert (model.visual_features(**media) - plain).abs().max() > 1e-2


def test_the_parts_hold_every_parameter_once() -> None:
    model = make_model("v2")
    names = [name for part in PARTS for name in model.module_parameters(part)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert make_model("v1").module_parameters("temporal") == {}
    with pytest.raises(ValueError, match="no part is called 'head'"):
        model.module_parameters("head")


def test_bfloat16_weights_give_nearly_the_same_answer() -> None:
    model, inputs, media = make_model("v3"), batch_of([5, *place(3), 6, 7]), media_of(3)
    exact = model(**inputs, **media, labels=inputs["input_ids"].clamp(max=60)).loss
    rough = model.to(torch.bfloat16)(**inputs, **media, labels=inputs["input_ids"].clamp(max=60)).loss
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)


def test_frames_of_another_size_are_refused() -> None:
    wrong = torch.zeros(1, SIZE_PX + 14, SIZE_PX + 14, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        make_model()(**batch_of([5, *place(1)]), pixel_values=wrong, num_frames=torch.tensor([1]))
