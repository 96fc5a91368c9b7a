"""The API as OpenAI's own client speaks it: what it answers, what it counts, and whom it lets in."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import operator
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from asking import (
    HTTP,
    START,
    FakeBackend,
    assert_is_error,
    assert_tells_nothing,
    chat,
    events,
    figures,
    picture,
    post,
    two_words,
)
from serving_makers import asked, data_url, running, serve_settings, serving
from training_makers import processor

from valley.errors import DeadlineError
from valley.media import sandbox
from valley.serving.contract import Event, Order
from valley.serving.engine.interface import EngineState

FRAMES = {"return_frames": True}


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def video(clip: Path) -> str:
    return data_url(clip)


def say(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    known = {"model": "valley", "max_tokens": 6, "temperature": 0} | fields
    return client.chat.completions.create(messages=messages, **known)


def image_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image_url(picture(colour)), "detail": "high"}}


def expected_tokens(messages: Any, num_frames: list[int]) -> tuple[int, int]:
    """Tokens of a prompt by the processor's own count, and how many of them are visual."""
    kinds = {"video_url": "video", "image_url": "image"}
    turns = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [{**part, "type": kinds.get(part["type"], "text")} for part in message["content"]]}
        for message in messages
    ]
    ids = processor().encode_prompt(turns, num_frames)
    marks = processor().tokenizer.convert_tokens_to_ids(["<im_patch>", "<vi_frame>"])
    return len(ids), int(np.isin(ids, marks).sum())


FRAME_LIST = "data:video/jpeg;base64," + ",".join(
    base64.b64encode(picture(colour, "JPEG")).decode() for colour in ("red", "green", "blue", "white")
)
CONVERSATIONS: dict[str, tuple[Any, list[int]]] = {
    # name: messages, frames of each medium at the model's own half a frame a second
    "text": ([{"role": "user", "content": "what is it?"}], []),
    "text parts": (
        [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is"}]}],
        [],
    ),
    "video": (asked("what happens?", "VIDEO"), [3]),
    "two videos": (asked("what differs?", "VIDEO", FRAME_LIST), [3, 4]),
    "frame list": (asked("what happens?", FRAME_LIST), [4]),
    "image": ([{"role": "user", "content": [image("red"), {"type": "text", "text": "which colour?"}]}], [1]),
    "images": ([{"role": "user", "content": [image("red"), image("blue"), {"type": "text", "text": "and"}]}], [1, 1]),
    "media without text": ([{"role": "user", "content": [image("red")]}], [1]),
    "image and video": (
        [{"role": "user", "content": [*asked("which?", "VIDEO")[0]["content"], image("red")]}],
        [3, 1],
    ),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it?"}], []),
    "turns": (
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            *asked("what happens?", "VIDEO"),
            {"role": "assistant", "content": "a square moves"},
            {"role": "user", "content": [{"type": "text", "text": "to the left? "}, image("green")]},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            {"role": "user", "content": "sure?"},
        ],
        [3, 1],
    ),
}


def with_video(messages: Any, video: str) -> Any:
    return json.loads(json.dumps(messages).replace('"VIDEO"', json.dumps(video)))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_answered_and_its_tokens_are_counted_truly(
    client: openai.OpenAI, video: str, name: str
) -> None:
    written, num_frames = CONVERSATIONS[name]
    messages = with_video(written, video)
    answer = say(client, messages, extra_body=FRAMES)
    num_tokens, num_visual = expected_tokens(messages, num_frames)
    assert num_visual == sum(processor().num_patches + frames for frames in num_frames)
    assert answer.usage.prompt_tokens == num_tokens
    assert answer.usage.prompt_tokens_details.visual_tokens == num_visual
    assert answer.usage.total_tokens == num_tokens + answer.usage.completion_tokens
    assert [len(medium["frames"]) for medium in answer.valley["media"]] == num_frames
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "valley", 0)
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.id.startswith("chatcmpl-")


def test_a_developer_message_is_a_system_message(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "what is it?"}
    answers = [
        say(client, [{"role": role, "content": "Be brief."}, question], max_tokens=12)
        for role in ("system", "developer")
    ]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def streamed(client: openai.OpenAI, messages: Any, **fields: Any) -> tuple[str, list[Any]]:
    chunks = list(say(client, messages, stream=True, **fields))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


def test_a_stream_tells_what_the_whole_answer_tells(client: openai.OpenAI, video: str) -> None:
    messages = asked("what happens?", video)
    whole = say(client, messages, max_tokens=60)
    text, chunks = streamed(client, messages, max_tokens=60, stream_options={"include_usage": True}, extra_body=FRAMES)
    assert text == whole.choices[0].message.content
    *said, finish, usage = chunks
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * len(said)
    assert [chunk.usage for chunk in (*said, finish)] == [None] * (len(said) + 1)
    assert usage.choices == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(usage.usage, name) for name in counts] == [getattr(whole.usage, name) for name in counts]
    assert said[0].choices[0].delta.role == "assistant"
    assert len(said[0].valley["media"][0]["frames"]) == 3
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}, {"stream_options": None}])
def test_a_stream_counts_only_when_asked_to_and_ends_with_done(server: str, options: dict[str, Any]) -> None:
    response = post(server, chat(stream=True, **options))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_a_stream_is_ascii_for_clients_that_take_other_line_ends_for_ends(server: str) -> None:
    response = post(server, chat(stream=True, temperature=2, seed=3, max_tokens=60))
    assert response.content.isascii()
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response.text)[:-1])
    whole = post(server, chat(temperature=2, seed=3, max_tokens=60)).json()["choices"][0]["message"]["content"]
    assert text == whole
    assert not text.isascii()


def test_a_seed_makes_a_draw_repeatable(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "what is it?"}]
    texts = [
        say(client, messages, temperature=1.0, seed=seed, max_tokens=24).choices[0].message.content
        for seed in (7, 7, 8, 2**63 - 1, -(2**63))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_the_least_of_top_p_and_temperature_is_the_likeliest_answer(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "what is it?"}]
    likeliest = say(client, messages, max_tokens=24).choices[0].message.content
    for fields in ({"top_p": 1e-9, "temperature": 1.0}, {"temperature": 1e-46}, {"temperature": 2, "top_p": 1e-46}):
        assert say(client, messages, max_tokens=24, **fields).choices[0].message.content == likeliest


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("most", [1, 5])
def test_an_answer_is_as_long_as_asked(client: openai.OpenAI, name: str, most: int) -> None:
    answer = say(client, [{"role": "user", "content": "what is it?"}], **{"max_tokens": None, name: most})
    assert answer.usage.completion_tokens == most
    assert answer.choices[0].finish_reason == "length"


def test_stop_texts_end_the_answer_and_are_not_in_it(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "what is it?"}]
    whole = say(client, messages, max_tokens=60)
    text = whole.choices[0].message.content
    start = next(place for place in range(4, len(text)) if text[place : place + 12].isascii())
    stop = text[start : start + 12]
    assert len(processor().tokenizer.encode(stop, add_special_tokens=False)) > 2
    for stops in (stop, ["nobody says this", stop]):
        answer = say(client, messages, max_tokens=60, stop=stops)
        assert answer.choices[0].message.content == text[: text.index(stop)].rstrip()
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < whole.usage.completion_tokens
        assert streamed(client, messages, max_tokens=60, stop=stops)[0] == answer.choices[0].message.content


def test_how_many_frames_are_looked_at_is_asked_for_and_clamped(video: str) -> None:
    with serving("limits.max_frames=4", "limits.max_fps=1") as server:

        def num_frames(**fields: Any) -> int:
            seen = post(server, chat(messages=asked("what?", video), return_frames=True, max_tokens=1, **fields)).json()
            (medium,) = seen["valley"]["media"]
            assert len(medium["times_s"]) == len(medium["frames"])
            assert all(frame.startswith("data:image/jpeg;base64,") for frame in medium["frames"])
            return len(medium["frames"])

        assert num_frames() == 3  # six seconds at half a frame a second
        assert num_frames(fps=0.2) == 2
        assert num_frames(fps=1e9) == 4
        assert num_frames(num_frames=2) == 2
        assert num_frames(num_frames=10**9) == 4
        assert num_frames(fps=1e9, num_frames=None) == 4


def test_frames_come_only_when_asked_for(server: str, video: str) -> None:
    assert "valley" not in post(server, chat(messages=asked("what?", video))).json()


def test_models_are_listed_and_found_by_name(server: str, client: openai.OpenAI) -> None:
    assert [(model.id, model.object, model.owned_by) for model in client.models.list()] == [
        ("valley", "model", "valley")
    ]
    assert client.models.retrieve("valley").created > 0
    assert_is_error(HTTP.get(f"{server}/v1/models/gpt-4"), 404, "model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        say(client, [{"role": "user", "content": "?"}], model="gpt-4")


def test_a_model_whose_name_has_a_slash_is_found() -> None:
    with running(serve_settings("name=lab/valley-7b"), FakeBackend(two_words)) as server:
        one = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        assert one.models.retrieve("lab/valley-7b").id == "lab/valley-7b"
        assert HTTP.get(f"{server}/v1/models/lab/valley-7b").json()["id"] == "lab/valley-7b"
        assert_is_error(HTTP.get(f"{server}/v1/models/lab/other"), 404, "model_not_found", "model")


def test_what_the_description_of_the_api_refers_to_is_in_it(server: str) -> None:
    document = HTTP.get(f"{server}/openapi.json").json()

    def follow(reference: str) -> Any:
        root, *path = reference.split("/")
        assert root == "#"
        return functools.reduce(operator.getitem, path, document)

    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(document)))
    assert {follow(reference)["title"] for reference in references} >= {
        "ChatRequest",
        "ChatMessage",
        "VideoPart",
        "Link",
    }
    assert '"$defs"' not in json.dumps(document)
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    message = follow(follow(body["$ref"])["properties"]["messages"]["items"]["$ref"])
    assert message["properties"]["role"]["enum"] == ["system", "developer", "user", "assistant"]


def test_a_server_lives_and_is_ready(server: str) -> None:
    assert HTTP.get(f"{server}/health").json() == {"status": "ok"}
    ready = HTTP.get(f"{server}/ready", timeout=60)
    assert ready.status_code == 200
    body = ready.json()
    assert (body["status"], body["model"]) == ("ready", "valley")
    assert body["decoder_isolation"] == sandbox.isolation()


def test_a_server_whose_model_fails_is_not_ready_and_says_so_in_openais_form() -> None:
    class Broken(FakeBackend):
        async def isolation(self) -> str:
            raise RuntimeError("a secret of 0xdead at /tmp/x")

    backend = Broken(two_words)
    with running(serve_settings(), backend) as server:
        response = HTTP.get(f"{server}/ready")
        assert_is_error(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
        assert HTTP.get(f"{server}/health").status_code == 200
        assert post(server, chat()).status_code == 200


@pytest.mark.parametrize(("moves", "status"), [(True, 200), (False, 503)])
def test_a_server_with_too_much_to_do_is_ready_as_long_as_it_moves(moves: bool, status: int) -> None:
    class Busy(FakeBackend):
        steps = 0

        async def state(self) -> EngineState:
            self.steps += moves
            return EngineState(running=1, waiting=9, slots=1, steps=self.steps, tokens=0)

    async def late(order: Order) -> AsyncGenerator[Event]:
        yield START
        raise DeadlineError("no answer within 30 s")

    with running(serve_settings(), Busy(late)) as server:
        assert HTTP.get(f"{server}/ready").status_code == status


def test_figures_are_told_without_the_engines() -> None:
    class Gone(FakeBackend):
        async def state(self) -> EngineState:
            return await asyncio.Event().wait()

    with running(serve_settings(), Gone(two_words)) as server:
        assert figures(server)["requests_in_hand"] == 0


def test_many_who_ask_whether_it_is_ready_cost_one_token() -> None:
    async def ask(server: str) -> list[int]:
        async with httpx.AsyncClient(base_url=server) as many:
            return [answer.status_code for answer in await asyncio.gather(*(many.get("/ready") for _ in range(20)))]

    backend = FakeBackend(two_words)
    with running(serve_settings(), backend) as server:
        assert asyncio.run(ask(server)) == [200] * 20
        assert backend.num_begun == 1


def test_what_happens_is_counted_truly(video: str) -> None:
    with serving() as server:
        before = figures(server)
        usages = [
            post(server, chat(text, messages=asked(text, video), max_tokens=5)).json()["usage"]
            for text in ("what happens?", "which colour is it?")
        ]
        now = figures(server)
        assert before["mm_cache_hits_total"] == before["requests_in_hand"] == 0
        assert now["mm_cache_queries_total"] == 2
        assert now["mm_cache_hits_total"] == 1
        details = [usage["prompt_tokens_details"] for usage in usages]
        assert details[0]["cached_tokens"] == 0
        assert details[1]["cached_tokens"] > details[1]["visual_tokens"]
        assert now["prefix_cache_hits_total"] == details[1]["cached_tokens"]
        assert now["prefix_cache_queries_total"] == sum(usage["prompt_tokens"] for usage in usages)
        assert now["prompt_tokens_total"] == now["prefix_cache_queries_total"]
        assert now["visual_tokens_total"] == sum(detail["visual_tokens"] for detail in details)
        assert now["generation_tokens_total"] == 10
        assert now["requests_total 200"] == 2
        twice = ("time_to_first_token", "e2e_request_latency", "request_queue_time", "time_per_output_token", "fetch")
        assert [now[f"{name}_seconds_count"] for name in twice] == [2] * len(twice)
        assert now["batch_size_count"] == now["batch_size_sum"] == 2
        assert now["decode_seconds_count"] == now["encode_seconds_count"] == 1
        assert now["decode_seconds_sum"] > 0
        assert 0 < now["time_to_first_token_seconds_sum"] < now["e2e_request_latency_seconds_sum"]
        assert_is_error(post(server, chat(model="gpt-4")), 404)
        assert_is_error(post(server, chat(), **{"content-type": "text/plain"}), 415)
        assert post(server, chat()).status_code == 200
        now = figures(server)
        assert [now[f"requests_total {status}"] for status in (200, 404, 415)] == [3, 1, 1]
        assert now["fetch_seconds_count"] == 2
        assert now["requests_in_hand"] == now["num_requests_running"] == now["num_requests_waiting"] == 0


REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_object"},
    "n": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"7": 100},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "prompt_embeds": "AAAA",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"system": "x"},
    "mm_processor_kwargs": {"max_pixels": 1e12},
    "guided_json": {"type": "object"},
    "top_k": 5,
    "repetition_penalty": 1.2,
    "guided_choice": ["yes", "no"],
    "guided_regex": "yes|no",
    "guided_grammar": 'root ::= "yes"',
    "structured_outputs": {"choice": ["yes", "no"]},
    "min_p": 0.05,
    "stop_token_ids": [2],
    "allowed_token_ids": [2],
    "ignore_eos": True,
    "bad_words": ["no"],
    "best_of": 2,
    "length_penalty": 0.8,
    "use_beam_search": True,
    "continue_final_message": True,
    "add_generation_prompt": False,
    "documents": [{"title": "x", "text": "y"}],
    "echo": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 8,
    "prompt_logprobs": 1,
    "logits_processors": ["x.y"],
    "media_io_kwargs": {"video": {"num_frames": 40}},
    "parallel_tool_calls": "yes",
    "reasoning_effort": "high",
    "verbosity": "low",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_known_and_not_supported_is_refused_by_name(server: str, name: str) -> None:
    assert_is_error(post(server, chat(**{name: REFUSED[name]})), 400, param=name)


def test_what_asks_for_nothing_or_is_unknown_changes_nothing(server: str) -> None:
    nothing = {
        "tools": [], "tool_choice": "auto", "logprobs": False, "response_format": {"type": "text"}, "n": 1,
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "top_p": 1, "modalities": ["text"],
        "min_p": 0.0, "stop_token_ids": [], "ignore_eos": False, "bad_words": [], "best_of": 1, "length_penalty": 1.0,
        "use_beam_search": False, "continue_final_message": False, "add_generation_prompt": True, "documents": [],
        "echo": False, "skip_special_tokens": True, "include_stop_str_in_output": False, "logits_processors": [],
        "media_io_kwargs": {}, "reasoning_effort": "none", "verbosity": "medium", "top_k": -1, "repetition_penalty": 1.0,
        "user": "anna", "store": False, "metadata": {"a": "b"}, "an_unknown_field": [{"deep": None}], "stop": [],
    }  # fmt: skip
    assert post(server, chat(**nothing)).json()["choices"] == post(server, chat()).json()["choices"]
    assert post(server, chat(**dict.fromkeys(REFUSED))).json()["choices"] == post(server, chat()).json()["choices"]
    assert [post(server, chat(parallel_tool_calls=value)).status_code for value in (True, False)] == [200, 200]


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"max_tokens": 2040}, ["2040", "2048"]),  # with its prompt alone
        ({"max_tokens": 2048}, ["2048"]),
        ({"max_tokens": 10**9}, ["1000000000", "2048"]),
        ({"messages": [{"role": "user", "content": "who? " * 2000}]}, ["2048"]),
        ({"messages": [{"role": "user", "content": "who? " * 2_000_000}]}, ["10000000", "2048"]),
    ],
)
def test_what_is_too_long_is_refused_with_the_numbers(server: str, fields: Any, numbers: list[str]) -> None:
    said = assert_is_error(post(server, chat(**fields)), 400, "context_length_exceeded")
    assert [number for number in numbers if number not in said] == []


def test_the_client_raises_what_the_server_means(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, asked("what?", "http://127.0.0.1:1/x.mp4"))
    assert (caught.value.code, caught.value.param) == ("media_refused", "messages[0].content[0]")
    assert_tells_nothing(str(caught.value.body))
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, [])
    assert (caught.value.code, caught.value.param) == ("invalid_value", "messages")


def test_every_answer_has_an_id_that_the_log_knows(server: str, client: openai.OpenAI) -> None:
    answers = [post(server, chat()), post(server, chat(model="x")), HTTP.get(f"{server}/nowhere")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert answers[0].json()["id"] == f"chatcmpl-{ids[0]}"
    assert say(client, [{"role": "user", "content": "?"}])._request_id
