"""Every dataset's records, as their authors publish them, come out in one shape; bad ones with their reason."""

from typing import Any

import pytest

from valley.data.records import Media, Turn, parse_record
from valley.errors import RecordError


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(turns)]


def test_valley_702k() -> None:
    raw = {
        "id": "25116338",
        "video": "037551_037600/25116338.mp4",
        "conversations": talk("Describe the following video concisely.\n<video>", "Smiling young girl picking fingers"),
    }
    record = parse_record(raw, 7, "webvid")
    assert (record.id, record.source) == ("25116338", "webvid")
    assert record.media == (Media("video", ("037551_037600/25116338.mp4",)),)
    assert record.messages == [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Describe the following video concisely.\n"}, {"type": "video"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Smiling young girl picking fingers"}]},
    ]


def test_valley_instruct_73k() -> None:
    raw = {
        "id": "jukin_1285059",
        "v_id": "1285059",
        "video": "jukinmedia_v_1285059.mp4",
        "source": "jukinmedia",
        "conversations": talk("<video>\nHow do they do it?", "By flipping.", "Where?", "At the airport."),
    }
    record = parse_record(raw, 0, "instruct")
    assert record.media == (Media("video", ("jukinmedia_v_1285059.mp4",), "jukinmedia"),)
    assert record.turns == (
        Turn("user", (None, "\nHow do they do it?")),
        Turn("assistant", ("By flipping.",)),
        Turn("user", ("Where?",)),
        Turn("assistant", ("At the airport.",)),
    )


def test_llava_cc3m_and_instruct_150k_hold_images() -> None:
    pretrain = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": talk("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture"),
    }
    record = parse_record(pretrain, 0, "cc3m")
    assert record.messages[0]["content"][1] == {"type": "image"}
    assert record.media == (Media("image", ("00453/004539375.jpg",)),)

    instruct = {"id": "000000033471", "image": "000000033471.jpg", "conversations": talk("<image>\nColours?", "White.")}
    assert parse_record(instruct, 0, "llava").turns[0] == Turn("user", (None, "\nColours?"))


def test_videochat_11k_has_questions_and_answers_without_placeholders() -> None:
    raw = {
        "video": "011851_011900/1009382042.mp4",
        "QA": [{"q": "What is shown?", "a": "A river."}, {"i": "Answer in a word.", "q": "Whose?", "a": "Nobody's."}],
    }
    record = parse_record(raw, 41, "videochat")
    assert record.id == "#41"
    assert record.turns == (
        Turn("user", (None, "\nWhat is shown?")),
        Turn("assistant", ("A river.",)),
        Turn("user", ("Answer in a word.\nWhose?",)),
        Turn("assistant", ("Nobody's.",)),
    )


def test_ids_may_be_numbers_or_missing() -> None:
    dialogue = talk("hello", "hello")
    assert parse_record({"id": 12, "conversations": dialogue}, 3, "s").id == "12"
    assert parse_record({"conversations": dialogue}, 3, "s").id == "#3"
    assert parse_record({"id": None, "conversations": dialogue}, 3, "s").id == "#3"


def test_text_only_is_legal_and_its_placeholders_are_text() -> None:
    record = parse_record({"conversations": talk("What is <video> in HTML?", "The <video> tag.")}, 0, "s")
    assert record.media == ()
    assert record.turns == (
        Turn("user", ("What is <video> in HTML?",)),
        Turn("assistant", ("The <video> tag.",)),
    )


def test_a_placeholder_is_one_only_while_media_remain() -> None:
    raw = {"video": "a.mp4", "conversations": talk("<video>What does the tag <video> do?", "<image>", "<image>?", "no")}
    record = parse_record(raw, 0, "s")
    assert record.turns == (
        Turn("user", (None, "What does the tag <video> do?")),
        Turn("assistant", ("<image>",)),
        Turn("user", ("<image>?",)),
        Turn("assistant", ("no",)),
    )


def test_a_list_of_images_with_one_placeholder_is_a_clip() -> None:
    record = parse_record(
        {"image": ["1.jpg", "2.jpg", "3.jpg"], "conversations": talk("<image> what?", "that")}, 0, "s"
    )
    assert record.media == (Media("video", ("1.jpg", "2.jpg", "3.jpg")),)
    assert record.messages[0]["content"][0] == {"type": "video"}


def test_a_list_with_as_many_placeholders_is_that_many_media_in_order() -> None:
    raw = {"image": ["1.jpg", "2.jpg"], "conversations": talk("<image> or", "hm", "<image>?", "the second")}
    record = parse_record(raw, 0, "s")
    assert record.media == (Media("image", ("1.jpg",)), Media("image", ("2.jpg",)))
    assert [None in turn.parts for turn in record.turns] == [True, False, True, False]

    videos = parse_record({"video": ["1.mp4", "2.mp4"], "conversations": talk("<video><video>", "so")}, 0, "s")
    assert [medium.paths for medium in videos.media] == [("1.mp4",), ("2.mp4",)]


def test_either_placeholder_stands_for_either_kind() -> None:
    record = parse_record({"video": "a.mp4", "conversations": talk("<image>\nwhat?", "that")}, 0, "s")
    assert record.media[0].kind == "video"


def test_other_role_names_and_a_system_turn() -> None:
    turns = [("system", "Be brief."), ("User", "hi"), ("assistant", "ho")]
    record = parse_record({"conversations": [{"from": who, "value": text} for who, text in turns]}, 0, "s")
    assert [turn.role for turn in record.turns] == ["system", "user", "assistant"]


def test_paths_are_normalised_and_looked_for_where_the_data_may_mean() -> None:
    raw = {"video": "./clips//a", "source": "jukinmedia", "conversations": talk("<video>", "so")}
    (medium,) = parse_record(raw, 0, "s").media
    assert medium.paths == ("clips/a",)
    assert medium.candidates(medium.paths[0]) == [
        "clips/a",
        "clips/a.mp4",
        "jukinmedia/clips/a",
        "jukinmedia/clips/a.mp4",
    ]
    assert Media("video", ("b.mp4",)).candidates("b.mp4") == ["b.mp4", "b"]
    assert Media("image", ("b.jpg",)).candidates("b.jpg") == ["b.jpg"]


def test_a_source_that_is_no_folder_below_the_root_is_a_remark() -> None:
    for source in ("../elsewhere", "/etc", 7, "s3://bucket", ""):
        raw = {"video": "a.mp4", "source": source, "conversations": talk("<video>", "so")}
        assert parse_record(raw, 0, "s").media[0].folder == ""


GOOD: dict[str, Any] = {"id": "x", "video": "a.mp4", "conversations": talk("<video>", "so")}

BAD = [
    ([], "record", "expected an object, found a list"),
    ("text", "record", "expected an object, found text"),
    (None, "record", "expected an object, found nothing"),
    ({"id": "x", "video": "a.mp4"}, "conversations", "missing"),
    (GOOD | {"conversations": None}, "conversations", "missing"),
    (GOOD | {"conversations": []}, "conversations", "empty"),
    (GOOD | {"conversations": "hello"}, "conversations", "expected a list, found text"),
    (GOOD | {"conversations": ["hello"]}, "conversations", "turn 1: expected an object, found text"),
    (GOOD | {"conversations": [{"value": "hi"}]}, "conversations", "turn 1: unknown role None"),
    (GOOD | {"conversations": [{"from": "bot", "value": "hi"}]}, "conversations", "turn 1: unknown role 'bot'"),
    (GOOD | {"conversations": [{"from": "human", "value": 3}]}, "conversations", "turn 1: value: expected text"),
    (GOOD | {"conversations": [{"from": "human"}]}, "conversations", "turn 1: value: expected text, found nothing"),
    (GOOD | {"conversations": talk("<video>")}, "conversations", "ends with the human"),
    (GOOD | {"conversations": talk("<video>", "so", "and?")}, "conversations", "ends with the human"),
    (GOOD | {"conversations": talk("<video>", " \n")}, "conversations", "turn 2: the assistant says nothing"),
    (GOOD | {"conversations": talk("<video>", "so", "", "so")}, "conversations", "turn 3: the human says nothing"),
    (GOOD | {"conversations": talk("<video>", "so")[1:]}, "conversations", "turn 1: expected the human"),
    (GOOD | {"conversations": talk("<video>", "so")[:1] * 2}, "conversations", "turn 2: expected the assistant"),
    (GOOD | {"conversations": [{"from": "system", "value": "hi"}]}, "conversations", "ends with the system"),
    (
        GOOD | {"conversations": talk("<video>", "half \ud83d pair")},
        "conversations",
        "turn 2: value: not valid Unicode",
    ),
    (GOOD | {"conversations": talk("what?", "so")}, "conversations", "1 video path(s) but 0 placeholder(s)"),
    (GOOD | {"conversations": talk("what?", "<video>")}, "conversations", "1 video path(s) but 0 placeholder(s)"),
    (GOOD | {"video": ["a.mp4", "b.mp4"]}, "conversations", "2 video path(s) but 1 placeholder(s)"),
    (
        {"image": list("abc"), "conversations": talk("<image><image>", "so")},
        "conversations",
        "3 image path(s) but 2 placeholder(s)",
    ),
    (
        {"image": list("ab"), "conversations": talk("<image><image><image>", "so")},
        "conversations",
        "2 image path(s) but 3 placeholder(s)",
    ),
    (GOOD | {"image": "a.jpg"}, "video", "the record has both video and image"),
    (GOOD | {"video": []}, "video", "an empty list"),
    (GOOD | {"video": ""}, "video", "an empty path"),
    (GOOD | {"video": " "}, "video", "an empty path"),
    (GOOD | {"video": "./"}, "video", "an empty path"),
    (GOOD | {"video": 5}, "video", "expected a path, found a number"),
    (GOOD | {"video": [None]}, "video", "expected a path, found nothing"),
    (GOOD | {"video": {"path": "a.mp4"}}, "video", "expected a path, found an object"),
    (GOOD | {"video": "../a.mp4"}, "video", "climbs out of the root: ../a.mp4"),
    (GOOD | {"video": "clips/../../a.mp4"}, "video", "climbs out of the root"),
    (GOOD | {"video": "clips\\..\\..\\a.mp4"}, "video", "climbs out of the root"),
    (GOOD | {"video": "/etc/passwd"}, "video", "an absolute path"),
    (GOOD | {"video": "\\\\host\\share\\a.mp4"}, "video", "an absolute path"),
    (GOOD | {"video": "C:\\a.mp4"}, "video", "an absolute path"),
    (GOOD | {"video": "http://host/a.mp4"}, "video", "a URL"),
    (GOOD | {"video": "file:///etc/passwd"}, "video", "a URL"),
    (GOOD | {"video": "a\0.mp4"}, "video", "control characters"),
    (GOOD | {"video": "a\n.mp4"}, "video", "control characters"),
    (GOOD | {"video": "half \ud83d pair.mp4"}, "video", "control characters"),
    ({"video": "a.mp4", "QA": [{"q": "what?"}]}, "QA", "turn 1: a: expected text, found nothing"),
    ({"video": "a.mp4", "QA": [{"q": ["what?"], "a": "so"}]}, "QA", "turn 1: q: expected text, found a list"),
    ({"video": "a.mp4", "QA": [{"q": "", "a": "so"}]}, "QA", "turn 1: no question"),
    ({"video": "a.mp4", "QA": {}}, "QA", "expected a list, found an object"),
]


@pytest.mark.parametrize(("raw", "field", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_record_says_which_field_and_why(raw: object, field: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(raw, 9, "s")
    assert caught.value.field == field
    assert caught.value.reason.startswith(reason)
    assert caught.value.sample_id == ("x" if isinstance(raw, dict) and raw.get("id") else "#9")
