"""What every format of the table promises, so that a new line there is tested the moment it is listed."""

import pytest

from valley.data.records import FORMATS, parse_record
from valley.errors import RecordError


@pytest.mark.parametrize("field", FORMATS)
@pytest.mark.parametrize("value", [[], "text", 3, {}, [None], ["text"], [[]], [{}], [{"other": "field"}], [3, {}]])
def test_a_malformed_dialogue_is_a_record_error_of_that_field(field: str, value: object) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record({"id": "x", field: value}, 0, "s")
    assert (caught.value.sample_id, caught.value.field) == ("x", field)
    assert caught.value.reason
    assert "\n" not in caught.value.reason


SAMPLES = {
    "conversations": [{"from": "human", "value": "<video>what?"}, {"from": "gpt", "value": "that"}],
    "QA": [{"q": "what?", "a": "that"}],
}


@pytest.mark.parametrize("field", FORMATS)
def test_a_dialogue_about_a_clip_reads_alike_in_every_format(field: str) -> None:
    record = parse_record({"video": "a.mp4", field: SAMPLES[field]}, 0, "s")
    question, answer = record.messages
    assert question["role"] == "user"
    assert answer["role"] == "assistant"
    assert question["content"][0] == {"type": "video"}
    assert question["content"][1]["text"].strip() == "what?"
    assert answer["content"] == [{"type": "text", "text": "that"}]
