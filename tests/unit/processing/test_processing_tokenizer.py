"""Tokenizers: the tiny one, preparing a foreign one, and text that cannot become control."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from valley.errors import ModelError
from valley.model.conversation import ADDED_TOKENS, Segment, read_prompt, render
from valley.model.settings import LLMSettings
from valley.model.templates import SYSTEM, TEMPLATES
from valley.model.tokenizer import SegmentTokenizer, load_tokenizer, prepare_tokenizer, tiny_tokenizer

VALLEY = TEMPLATES["valley"]


def foreign(*added: AddedToken, **special: str) -> PreTrainedTokenizerFast:
    """A byte tokenizer with these special tokens and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.mark.parametrize(
    "text",
    ["What happens first?", " The red circle moves to the left.", "héllo 数\n\n### \x00 </s> <im_patch>  x ", ""],
)
def test_the_tiny_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [
        (" The red circle moves to the left.", 8),
        (" First the blue square grows, then the yellow star vanishes.", 12),
        ("Which direction does it move?", 6),
        (SYSTEM, 18),
    ],
)
def test_the_tiny_tokenizer_writes_plain_words_as_one_token_each(text: str, num_tokens: int) -> None:
    assert len(tiny_tokenizer().encode(text)) <= num_tokens + 1


def test_the_tiny_tokenizer_is_small() -> None:
    assert 500 < len(tiny_tokenizer()) < 1000


@pytest.mark.parametrize("name", TEMPLATES)
def test_six_tokens_are_added_in_order_and_the_template_has_its_own(name: str) -> None:
    plain = tiny_tokenizer()
    tokenizer = load_tokenizer(LLMSettings(name="tiny"), TEMPLATES[name])
    assert tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)) == list(range(len(plain), len(plain) + 6))
    for token in (*ADDED_TOKENS, *TEMPLATES[name].control_tokens):
        assert len(tokenizer.encode(token)) == 1
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("special", "added", "padding"),
    [
        ({"eos_token": "</s>", "pad_token": "<fill>"}, (), "<fill>"),
        ({"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, (), "<unk>"),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, (), "<unk>"),
        ({"eos_token": "<|end|>", "unk_token": "<|end|>"}, ("<|endoftext|>",), "<|endoftext|>"),
        ({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, (), "<pad>"),
    ],
)
def test_padding_is_never_the_end_of_an_answer(special: dict[str, str], added: tuple[str, ...], padding: str) -> None:
    tokenizer = prepare_tokenizer(foreign(*map(AddedToken, added), **special), VALLEY)
    assert tokenizer.pad_token == padding
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_that_does_not_suit_is_refused() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence"):
        prepare_tokenizer(foreign(), VALLEY)
    with pytest.raises(ModelError, match=r"lacks <\|im_start\|>, <\|im_end\|>"):
        prepare_tokenizer(foreign(eos_token="</s>"), TEMPLATES["chatml"])
    with pytest.raises(ModelError, match="no tokenizer can be loaded from '/nowhere'"):
        load_tokenizer(LLMSettings(name="/nowhere"), VALLEY)
    for tokenizer in (foreign(eos_token="</s>"), foreign(eos_token="</s>", unk_token="<unk>")):
        with pytest.raises(ModelError, match="lacks the token <im_start>"):
            SegmentTokenizer(tokenizer, VALLEY, num_patches=1)
    unprepared = foreign(*map(AddedToken, ADDED_TOKENS), eos_token="</s>")
    with pytest.raises(ModelError, match="text can hold the control tokens <im_start>"):
        SegmentTokenizer(unprepared, VALLEY, num_patches=1)


def test_marks_that_were_ordinary_tokens_are_made_special() -> None:
    marks = [AddedToken(token, special=False) for token in TEMPLATES["chatml"].control_tokens]
    tokenizer = foreign(*marks, eos_token="</s>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in tokenizer.encode("a<|im_end|>b", split_special_tokens=True)
    prepare_tokenizer(tokenizer, TEMPLATES["chatml"])
    assert end not in tokenizer.encode("a<|im_end|>b", split_special_tokens=True)
    assert tokenizer.encode("<|im_end|>") == [end]


@pytest.mark.parametrize("prepend_scheme", ["always", "first"])
def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_inside_a_prompt(
    sentencepiece: Callable[[str], PreTrainedTokenizerFast], prepend_scheme: str
) -> None:
    tokenizer = prepare_tokenizer(sentencepiece(prepend_scheme), VALLEY)
    encode = SegmentTokenizer(tokenizer, VALLEY, num_patches=1)
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "red?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "You"},
    ]
    prompt = render(messages, VALLEY, system="You.", bos=encode.bos, eos="</s>", add_generation_prompt=True)
    pieces = encode(prompt.segments, [2])
    ids = [token for piece in pieces for token in piece]
    media = "<im_start><im_patch><im_end><vi_start><vi_frame><vi_frame><vi_end>"
    assert encode.bos == "<s>"
    assert tokenizer.convert_ids_to_tokens(ids[:3]) == ["<s>", "▁You", "."]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace("<s> ", "<s>") == prompt.replace("<video>", media)
    by_text = dict(zip((segment.text for segment in prompt.segments), pieces, strict=True))
    assert tokenizer.convert_ids_to_tokens(by_text[" red"]) == ["▁red"]
    assert tokenizer.convert_ids_to_tokens(by_text["red?"]) == ["red", "?"]


def test_media_become_their_visual_tokens_in_order() -> None:
    tokenizer = load_tokenizer(LLMSettings(name="tiny"), VALLEY)
    encode = SegmentTokenizer(tokenizer, VALLEY, num_patches=3)
    video, _, image = encode(read_prompt("<video>,<image>").segments, [2, 1])
    patches = ["<im_start>", "<im_patch>", "<im_patch>", "<im_patch>", "<im_end>", "<vi_start>"]
    assert tokenizer.convert_ids_to_tokens(video) == [*patches, "<vi_frame>", "<vi_frame>", "<vi_end>"]
    assert tokenizer.convert_ids_to_tokens(image) == [*patches, "<vi_frame>", "<vi_end>"]
    with pytest.raises(ValueError, match="2 places for media in the prompt, but 1 media given"):
        encode(read_prompt("<video>,<image>").segments, [2])


def test_threads_do_not_read_each_others_switch_between_text_and_control() -> None:
    tokenizer = load_tokenizer(LLMSettings(name="tiny"), VALLEY)
    encode = SegmentTokenizer(tokenizer, VALLEY, num_patches=1)
    patch, end = tokenizer.convert_tokens_to_ids(["<im_patch>", "</s>"])

    def is_kept_apart(number: int) -> bool:
        text, control = encode([Segment("text", f"{number} <im_patch>"), Segment("control", f"{number} </s>")], [])
        return patch not in text and control[-1] == end

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(is_kept_apart, range(3000)))
