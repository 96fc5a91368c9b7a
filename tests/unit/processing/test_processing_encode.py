"""Training samples: which tokens are learned, and where a long one is cut."""

import numpy as np
import pytest

from valley.errors import RecordError
from valley.media.sampling import Sampling
from valley.model.processing import Encoded, ValleyProcessor
from valley.model.templates import SYSTEM, TEMPLATES
from valley.model.tokenizer import prepare_tokenizer, tiny_tokenizer
from valley.model.video_processing import ValleyVideoProcessor

DIALOGUE = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
    {"role": "user", "content": "Left or right?"},
    {"role": "assistant", "content": "Left."},
]
NUM_VISUAL = 4 + 4 + 3  # marks, patches, frames of one clip of 3 frames

GOLDEN = {
    "valley": (
        "Be brief.\n\n### Human: <im_start><im_patch>*4<im_end><vi_start><vi_frame>*3<vi_end>\nWhat moves?\n"
        "### Assistant:[[ A red circle.\n###</s>]] Human: Left or right?\n### Assistant:[[ Left.\n###</s>]]"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<im_start><im_patch>*4<im_end><vi_start><vi_frame>*3<vi_end>\nWhat moves?<|im_end|>\n"
        "<|im_start|>assistant\n[[A red circle.<|im_end|>]]\n<|im_start|>user\nLeft or right?<|im_end|>\n"
        "<|im_start|>assistant\n[[Left.<|im_end|>]]\n"
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "<im_start><im_patch>*4<im_end><vi_start><vi_frame>*3<vi_end>\nWhat moves?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[A red circle.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nLeft or right?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Left.<|eot_id|>]]"
    ),
}


def make_processor(template: str, system: str | None = "Be brief.") -> ValleyProcessor:
    tokenizer = prepare_tokenizer(tiny_tokenizer(), TEMPLATES[template])
    return ValleyProcessor(
        tokenizer, ValleyVideoProcessor(16), template, system=system, num_patches=4, sampling=Sampling()
    )


def learned(processor: ValleyProcessor, encoded: Encoded) -> str:
    text = processor.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert isinstance(text, str)
    return text


def test_every_template_is_pinned() -> None:
    assert GOLDEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("template", GOLDEN)
def test_answers_and_their_end_marks_are_learned_and_nothing_else(template: str) -> None:
    processor = make_processor(template)
    encoded = processor.encode(DIALOGUE, [3])
    assert processor.mask_sample(encoded, colour=False) == GOLDEN[template]
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64
    assert encoded.cut_tokens == 0
    assert processor.count_tokens(DIALOGUE, [3]) == len(encoded.input_ids)


def test_the_papers_template_learns_token_by_token() -> None:
    processor = make_processor("valley")
    encoded = processor.encode(DIALOGUE, [3])
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.labels[encoded.labels != -100])
    first = ["ĠA", "Ġred", "Ġcircle", ".", "Ċ", "###", "</s>"]
    assert tokens == [*first, "ĠLeft", ".", "Ċ", "###", "</s>"]
    supervised = encoded.labels != -100
    assert (encoded.labels[supervised] == encoded.input_ids[supervised]).all()


def test_the_default_system_message_gives_way_to_settings_and_messages() -> None:
    for processor, messages, start in (
        (make_processor("valley", system=None), DIALOGUE, f"{SYSTEM}\n\n### Human:"),
        (make_processor("valley", system=""), DIALOGUE, "### Human:"),
        (make_processor("valley"), [{"role": "system", "content": "No haste."}, *DIALOGUE], "No haste.\n\n### Human:"),
    ):
        encoded = processor.encode(messages, [3])
        assert processor.tokenizer.decode(encoded.input_ids).startswith(start)


def test_a_terminal_gets_colour_and_a_file_brackets(processor: ValleyProcessor) -> None:
    encoded = processor.encode(DIALOGUE, [3])
    assert "\x1b[32m A red circle.\n###</s>\x1b[0m Human:" in processor.mask_sample(encoded, colour=True)
    assert processor.mask_sample(encoded) == processor.mask_sample(encoded, colour=False)


def test_what_is_too_long_is_cut_at_its_end(processor: ValleyProcessor) -> None:
    whole = processor.encode(DIALOGUE, [3])
    for max_tokens in (len(whole.input_ids) - 1, len(whole.input_ids) - 8):
        cut = processor.encode(DIALOGUE, [3], max_tokens=max_tokens)
        assert cut.cut_tokens == len(whole.input_ids) - max_tokens
        assert (cut.input_ids == whole.input_ids[:max_tokens]).all()
        assert (cut.labels == whole.labels[:max_tokens]).all()
    assert processor.encode(DIALOGUE, [3], max_tokens=len(whole.input_ids)).cut_tokens == 0


def test_a_cut_that_leaves_nothing_to_learn_rejects_the_record(processor: ValleyProcessor) -> None:
    first = int(np.flatnonzero(processor.encode(DIALOGUE, [3]).labels != -100)[0])
    assert learned(processor, processor.encode(DIALOGUE, [3], max_tokens=first + 1)) == " A"
    with pytest.raises(RecordError, match=f"no token of an answer within the limit of {first} tokens"):
        processor.encode(DIALOGUE, [3], max_tokens=first)


def test_the_cut_never_reaches_visual_tokens(processor: ValleyProcessor) -> None:
    later = [*DIALOGUE, {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A cat."}]
    whole = processor.encode(later, [3, 1])
    end = int(np.flatnonzero(whole.input_ids == processor.tokenizer.convert_tokens_to_ids("<vi_end>"))[-1]) + 1
    assert len(processor.encode(later, [3, 1], max_tokens=end).input_ids) == end
    with pytest.raises(RecordError, match=f"visual tokens reach position {end}, past the limit of {end - 1} tokens"):
        processor.encode(later, [3, 1], max_tokens=end - 1)


@pytest.mark.parametrize(
    ("messages", "num_frames", "reason"),
    [
        (DIALOGUE, [3, 1], "1 places for media in the prompt, but 2 media given"),
        (DIALOGUE, [], "1 places for media in the prompt, but 0 media given"),
        (DIALOGUE[:1], [3], "no token of an answer"),
        ([{"role": "tool", "content": "4"}, *DIALOGUE], [3], "message 0 has the role 'tool'"),
    ],
)
def test_a_record_that_teaches_nothing_or_does_not_agree_is_rejected(
    processor: ValleyProcessor, messages: list[dict[str, object]], num_frames: list[int], reason: str
) -> None:
    with pytest.raises(RecordError, match=reason) as caught:
        processor.encode(messages, num_frames)
    assert caught.value.field == "messages"


def test_visual_tokens_are_counted_by_patches_and_frames(processor: ValleyProcessor) -> None:
    text_only = [{"role": "user", "content": "\n"}, *DIALOGUE[1:]]
    with_video = [{"role": "user", "content": [{"type": "video"}]}, *DIALOGUE[1:]]
    extra = processor.count_tokens(with_video, [3]) - processor.count_tokens(text_only, [])
    assert extra == NUM_VISUAL + 1  # and the space before it
    assert processor.count_tokens(with_video, [100]) - processor.count_tokens(with_video, [3]) == 97


def test_an_empty_answer_still_ends(processor: ValleyProcessor) -> None:
    encoded = processor.encode([{"role": "user", "content": "Hush."}, {"role": "assistant", "content": " "}], [])
    assert learned(processor, encoded) == "\n###</s>"
