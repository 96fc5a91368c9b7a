"""Model inputs from prompts and clips."""

import numpy as np
import pytest
import torch
from PIL import Image

from valley.media.sampling import Sampling
from valley.media.transform import resize_crop
from valley.model.conversation import RenderedPrompt
from valley.model.processing import ValleyProcessor, build_processor
from valley.model.settings import LLMSettings, ModelSettings, VisionSettings
from valley.model.vision import vision_config

SIZE_PX = 16


def clip(num_frames: int, level: int, height: int = SIZE_PX, width: int = SIZE_PX) -> np.ndarray:
    return np.full((num_frames, height, width, 3), level, np.uint8)


def levels(inputs: dict[str, torch.Tensor]) -> list[int]:
    return inputs["pixel_values"][:, 0, 0, 0].tolist()


def user(*kinds: str, text: str = "Which?") -> dict[str, object]:
    return {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}


def test_media_follow_the_order_of_their_places_over_rows_and_kinds(processor: ValleyProcessor) -> None:
    prompts = [
        processor.apply_chat_template([user("image", "video")], add_generation_prompt=True),
        processor.apply_chat_template([user()], add_generation_prompt=True),
        processor.apply_chat_template([user("video", "image")], add_generation_prompt=True),
    ]
    inputs = processor(
        text=prompts, videos=[clip(2, 10), clip(3, 20)], images=[clip(1, 30)[0], clip(1, 40)[0]], return_tensors="pt"
    )
    assert inputs["num_frames"].tolist() == [1, 2, 3, 1]
    assert levels(inputs) == [30, 10, 10, 20, 20, 20, 40]
    assert inputs["pixel_values"].dtype == torch.uint8
    assert inputs["pixel_values"].shape == (7, SIZE_PX, SIZE_PX, 3)
    frame = processor.tokenizer.convert_tokens_to_ids("<vi_frame>")
    assert (inputs["input_ids"] == frame).sum(1).tolist() == [3, 0, 4]


def test_frames_of_the_towers_size_pass_untouched_and_others_are_fitted(processor: ValleyProcessor) -> None:
    rng = np.random.default_rng(0)
    fitting = rng.integers(0, 256, (2, SIZE_PX, SIZE_PX, 3), np.uint8)
    large = rng.integers(0, 256, (1, 40, 50, 3), np.uint8)
    inputs = processor(text="<video><video>", videos=[fitting, large])
    assert (inputs["pixel_values"][:2].numpy() == fitting).all()
    assert (inputs["pixel_values"][2:].numpy() == resize_crop(large, SIZE_PX)).all()


def test_clips_come_in_every_usual_form(processor: ValleyProcessor) -> None:
    array = np.random.default_rng(1).integers(0, 256, (2, SIZE_PX, SIZE_PX, 3), np.uint8)
    pictures = [Image.fromarray(frame) for frame in array]
    prompt = "<video>"
    expected = processor(text=prompt, videos=array)["pixel_values"]
    for videos in (torch.from_numpy(array), [array], [[array]], [pictures], pictures, [list(array)], array[None]):
        inputs = processor(text=prompt, videos=videos)
        assert torch.equal(inputs["pixel_values"], expected)
        assert inputs["num_frames"].tolist() == [2]
    for images in (pictures[0], [pictures[0]], [[array[0]]], array[0], array[:1], pictures[0].convert("RGBA")):
        inputs = processor(text="<image>", images=images)
        assert torch.equal(inputs["pixel_values"], expected[:1])
        assert inputs["num_frames"].tolist() == [1]


@pytest.mark.parametrize(
    ("media", "complaint"),
    [
        ({}, "1 <video> in the text, but 0 videos given"),
        ({"videos": [clip(1, 0)] * 3}, "1 <video> in the text, but 3 videos given"),
        ({"videos": [clip(1, 0)], "images": [clip(1, 0)[0]]}, "0 <image> in the text, but 1 images given"),
        ({"videos": ["clip.mp4"]}, r"expected clips \[T, H, W, 3\], found str"),
        ({"videos": [clip(0, 0)]}, r"with T >= 1, found uint8 \[0, 16, 16, 3\]"),
        ({"videos": [clip(1, 0) / 255]}, r"expected uint8 frames .* found float64 \[1, 16, 16, 3\]"),
        ({"videos": [clip(1, 0).transpose(0, 3, 1, 2)]}, r"found uint8 \[1, 3, 16, 16\]"),
        ({"videos": [[clip(1, 0)[0], clip(1, 0, 8, 8)[0]]]}, "the pictures of one clip differ in size"),
        ({"images": [3]}, "expected images"),
    ],
)
def test_media_that_do_not_agree_are_refused_with_numbers(
    processor: ValleyProcessor, media: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        processor(text=["<video> What?"], **media)


def test_prompts_are_padded_left_for_generation_and_right_on_demand(processor: ValleyProcessor) -> None:
    prompts = processor.apply_chat_template(
        [[user(text="Why?")], [user(text="Why do they move to the left?")]], add_generation_prompt=True
    )
    alone = [processor(text=prompt)["input_ids"][0].tolist() for prompt in prompts]
    missing = len(alone[1]) - len(alone[0])
    assert missing > 0
    left, right = processor(text=prompts), processor(text=prompts, padding_side="right")
    padding = [processor.tokenizer.pad_token_id] * missing
    assert left["input_ids"].tolist() == [padding + alone[0], alone[1]]
    assert right["input_ids"].tolist() == [alone[0] + padding, alone[1]]
    assert left["attention_mask"][0].tolist() == [0] * missing + [1] * len(alone[0])
    assert right["attention_mask"][0].tolist() == [1] * len(alone[0]) + [0] * missing
    assert processor(text=prompts, padding=False, return_tensors=None)["input_ids"] == alone


def test_the_assistants_tokens_are_masked_like_the_labels(processor: ValleyProcessor) -> None:
    messages = [user("video"), {"role": "assistant", "content": "The left one."}]
    encoded = processor.encode(messages, [2])
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, videos=[clip(2, 0)]
    )
    assert inputs["input_ids"][0].tolist() == encoded.input_ids.tolist()
    assert inputs["assistant_masks"][0].tolist() == (encoded.labels != -100).astype(int).tolist()


def test_nobody_knows_whose_text_is_whose_in_a_prompt_by_hand(processor: ValleyProcessor) -> None:
    with pytest.raises(ValueError, match="only a prompt that apply_chat_template rendered"):
        processor(text="### Human: a\n### Assistant: b", return_assistant_tokens_mask=True)


def test_messages_may_carry_their_frames(processor: ValleyProcessor) -> None:
    carried = [
        {"role": "user", "content": [{"type": "video", "video": clip(2, 7)}, {"type": "image", "image": clip(1, 9)[0]}]}
    ]
    by_hand = processor(
        text=processor.apply_chat_template(carried, add_generation_prompt=True),
        videos=[clip(2, 7)],
        images=[clip(1, 9)[0]],
    )
    inputs = processor.apply_chat_template(
        carried, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert inputs.keys() == by_hand.keys() == {"input_ids", "attention_mask", "pixel_values", "num_frames"}
    assert all(torch.equal(inputs[key], by_hand[key]) for key in inputs)
    ids = processor.apply_chat_template([carried, carried], tokenize=True, add_generation_prompt=True)
    assert ids.tolist() == by_hand["input_ids"].tolist() * 2


def test_a_prompt_by_hand_is_read_as_control_and_media(processor: ValleyProcessor) -> None:
    rendered = processor.apply_chat_template([user("video")], add_generation_prompt=True)
    by_hand = processor(text=[str(rendered)], videos=[clip(2, 0)])
    assert isinstance(rendered, RenderedPrompt)
    assert torch.equal(by_hand["input_ids"], processor(text=[rendered], videos=[clip(2, 0)])["input_ids"])
    end = processor.tokenizer.convert_tokens_to_ids("</s>")
    assert end in processor(text="### Human: </s>")["input_ids"]
    assert end not in processor.apply_chat_template([user(text="</s>")], tokenize=True)


def test_another_template_is_rendered_as_hugging_face_does(processor: ValleyProcessor) -> None:
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    assert processor.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template) == "a|"
    video = "<video>{{ messages[0].content }}"
    ids = processor.apply_chat_template([[{"role": "user", "content": "a"}]], video, tokenize=True, videos=clip(2, 0))
    assert processor.tokenizer.decode(ids[0]).endswith("<vi_start><vi_frame><vi_frame><vi_end>a")
    started = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    continued = processor.apply_chat_template(started, continue_final_message=True)
    assert continued == "Be brief.\n\n### Human: a\n### Assistant: b c"


def test_generated_ids_are_read_back_as_the_answer(processor: ValleyProcessor) -> None:
    messages = [user(), {"role": "assistant", "content": "The left one."}]
    encoded = processor.encode(messages, [])
    answer = encoded.input_ids[encoded.labels != -100]
    assert processor.post_process_image_text_to_text([answer]) == ["The left one."]
    assert processor.post_process_image_text_to_text([answer[:-3]]) == ["The left one."]


def test_a_processor_is_built_for_its_tower_and_tokenizer() -> None:
    sampling = Sampling(mode="fixed", num_frames=4)
    settings = ModelSettings(llm=LLMSettings(name="tiny"), vision=VisionSettings(name="tiny", pretrained=None))
    processor, tower = build_processor(settings, sampling), vision_config(settings.vision)
    assert (processor.size_px, processor.num_patches, processor.sampling) == (
        tower.size_px,
        tower.num_patches,
        sampling,
    )
    assert tuple(processor.video_processor.image_mean) == tuple(tower.mean)
    assert tuple(processor.video_processor.image_std) == tuple(tower.std)
    assert processor.template == "valley"
    assert processor.stop_token_ids == [processor.tokenizer.eos_token_id]
