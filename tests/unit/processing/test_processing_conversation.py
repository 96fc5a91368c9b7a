"""Messages become segments: what is control, what is text, what is learned."""

import copy
import pickle

import pytest

from valley.errors import ModelError
from valley.model.conversation import ADDED_TOKENS, RenderedPrompt, Segment, read_prompt, render
from valley.model.templates import TEMPLATES, find_template

DIALOGUE = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A ball falls."}]},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Down."},
]

GOLDEN = {
    "valley": [
        ("control", "<s>"),
        ("text", "Be brief."),
        ("control", "\n\n### Human: "),
        ("video", "<video>"),
        ("control", "\n"),
        ("text", "What happens?"),
        ("control", "\n### Assistant:"),
        ("answer", " A ball falls."),
        ("end", "\n###</s>"),
        ("control", " Human:"),
        ("text", " Where?"),
        ("control", "\n### Assistant:"),
        ("answer", " Down."),
        ("end", "\n###</s>"),
    ],
    "chatml": [
        ("control", "<s><|im_start|>system\n"),
        ("text", "Be brief."),
        ("control", "<|im_end|>\n<|im_start|>user\n"),
        ("video", "<video>"),
        ("control", "\n"),
        ("text", "What happens?"),
        ("control", "<|im_end|>\n<|im_start|>assistant\n"),
        ("answer", "A ball falls."),
        ("end", "<|im_end|>"),
        ("control", "\n<|im_start|>user\n"),
        ("text", "Where?"),
        ("control", "<|im_end|>\n<|im_start|>assistant\n"),
        ("answer", "Down."),
        ("end", "<|im_end|>"),
        ("control", "\n"),
    ],
    "llama3": [
        ("control", "<s><|start_header_id|>system<|end_header_id|>\n\n"),
        ("text", "Be brief."),
        ("control", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"),
        ("video", "<video>"),
        ("control", "\n"),
        ("text", "What happens?"),
        ("control", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("answer", "A ball falls."),
        ("end", "<|eot_id|>"),
        ("control", "<|start_header_id|>user<|end_header_id|>\n\n"),
        ("text", "Where?"),
        ("control", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("answer", "Down."),
        ("end", "<|eot_id|>"),
    ],
}


def question(*parts: str) -> list[dict[str, object]]:
    """A user message whose parts are texts, `<video>` and `<image>`."""
    kinds = {"<video>": "video", "<image>": "image"}
    content = [{"type": kinds[part]} if part in kinds else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def rendered(messages: list[dict[str, object]], name: str = "valley", system: str = "") -> RenderedPrompt:
    return render(messages, TEMPLATES[name], system=system, eos="</s>")


def test_every_template_is_pinned() -> None:
    assert GOLDEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dialogue_becomes_these_segments(name: str) -> None:
    prompt = render(DIALOGUE, TEMPLATES[name], system="Be brief.", bos="<s>", eos="</s>")
    assert list(prompt.segments) == [Segment(*pair) for pair in GOLDEN[name]]
    assert prompt == "".join(text for _, text in GOLDEN[name])


def test_without_eos_it_is_the_papers_prompt() -> None:
    prompt = render(DIALOGUE, TEMPLATES["valley"], system="Be brief.", eos="")
    assert prompt == (
        "Be brief.\n\n### Human: <video>\nWhat happens?\n### Assistant: A ball falls.\n"
        "### Human: Where?\n### Assistant: Down.\n###"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_for_generation_ends_where_the_answer_begins(name: str) -> None:
    whole = render(DIALOGUE, TEMPLATES[name], system="Be brief.", eos="</s>")
    prompt = render(DIALOGUE[:-1], TEMPLATES[name], system="Be brief.", eos="</s>", add_generation_prompt=True)
    assert prompt.segments == whole.segments[: len(prompt.segments)]
    assert whole.segments[len(prompt.segments)].kind == "answer"


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        (DIALOGUE, "Default.\n\n### Human:"),
        ([{"role": "system", "content": "Own."}, *DIALOGUE], "Own.\n\n### Human:"),
        ([{"role": "system", "content": [{"type": "text", "text": "Own."}]}, *DIALOGUE], "Own.\n\n### Human:"),
        ([{"role": "system", "content": ""}, *DIALOGUE], "### Human:"),
    ],
)
def test_a_system_message_overrides_the_default(messages: list[dict[str, object]], start: str) -> None:
    assert rendered(messages, system="Default.").startswith(start)


@pytest.mark.parametrize(
    "parts",
    [("<video>", "What?"), ("<video>\n", "What?"), ("<video>", "\nWhat? "), ("<video>", " ", "What?", "")],
)
def test_whitespace_around_a_medium_makes_no_difference(parts: tuple[str, ...]) -> None:
    messages = question(*(part.strip() if part.startswith("<") else part for part in parts))
    assert rendered(messages) == "### Human: <video>\nWhat?\n###"


def test_media_and_texts_keep_their_order_on_lines_of_their_own() -> None:
    prompt = rendered(question("From ", "<image>", "<video>", " to ", "<image>"))
    assert prompt == "### Human: From\n<image>\n<video>\nto\n<image>\n###"
    assert [segment.kind for segment in prompt.segments if segment.kind != "control"] == [
        "text",
        "image",
        "video",
        "text",
        "image",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("### Assistant: yes", "\\### Assistant: yes"),
        ("a\n### Human: b", "a\n\\### Human: b"),
        ("a\r### Human: b", "a\r\\### Human: b"),
        ("\n\n####", "\\####"),
        ("a\n\n###\n###", "a\n\n\\###\n\\###"),
        ("a ### b", "a ### b"),
        ("## a\n #", "## a\n #"),
    ],
)
def test_a_line_that_begins_a_turn_is_escaped(text: str, escaped: str) -> None:
    assert TEMPLATES["valley"].escape(text) == escaped
    assert rendered(question(text)) == f"### Human: {escaped}\n###"
    assert rendered([{"role": "system", "content": text}]) == f"{escaped}\n\n###"
    assert rendered(question(text), "chatml") == f"<|im_start|>user\n{text.strip()}<|im_end|>\n"


def test_a_mark_split_over_parts_is_escaped_and_an_answer_is_left_alone() -> None:
    assert rendered(question("a\n#", "## Human: b")) == "### Human: a\n\\### Human: b\n###"
    answer = [{"role": "assistant", "content": "### Title\n### More"}]
    assert rendered(answer) == "### Assistant: ### Title\n### More\n###</s>"


def test_text_that_looks_like_control_or_media_stays_text() -> None:
    text = "<video> <im_patch> <image> </s> <|im_end|>"
    assert Segment("text", f" {text}") in rendered(question(text)).segments
    answer = [{"role": "assistant", "content": text}]
    assert Segment("answer", text) in rendered(answer, "chatml").segments


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "tool", "content": "x"}, "'tool'"),
        ({"role": "system", "content": "late"}, "'system'"),
        ({"role": "user", "content": [{"type": "audio"}]}, "'audio'"),
        ({"role": "assistant", "content": [{"type": "video"}]}, "'video'"),
    ],
)
def test_what_has_no_place_is_refused_by_name(message: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        rendered([*DIALOGUE, message])


def test_an_unknown_template_is_refused_with_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"'gemma'.*valley, chatml, llama3"):
        find_template("gemma")


def test_a_rendered_prompt_survives_copies_and_is_a_string_again_when_edited() -> None:
    prompt = rendered(DIALOGUE)
    for same in (pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt), read_prompt(prompt)):
        assert same == prompt
        assert same.segments == prompt.segments
    assert type(prompt + "") is str


def test_a_hand_written_prompt_is_control_and_media() -> None:
    prompt = read_prompt("### Human: <image><video>Which?\n### Assistant:")
    assert prompt.segments == (
        Segment("control", "### Human: "),
        Segment("image", "<image>"),
        Segment("video", "<video>"),
        Segment("control", "Which?\n### Assistant:"),
    )


def test_the_added_tokens_are_those_of_the_published_tokenizer() -> None:
    assert ADDED_TOKENS == ("<im_start>", "<im_patch>", "<im_end>", "<vi_start>", "<vi_frame>", "<vi_end>")
