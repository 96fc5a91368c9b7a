"""The engine writes what the model alone would write, for many at once, whatever happens to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_makers import TOKENS, Told, expected, frames, make_prompt, new_engine, smol_assistant, tell, tell_all
from serving_makers import new_assistant

from valley.assistant.loading import Assistant
from valley.errors import DeadlineError, EngineError, GenerationError, OverloadError
from valley.serving.engine.batching import BatchingEngine
from valley.serving.engine.interface import Decoding, Finish, Generation, Piece

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea and what lives in it, for children of six years.",
    "Is water wet?",
    "Count from one to ten in words.",
    "Describe the video.",
]
CLIPS = [None, frames(1, 3), None, frames(2, 12), None, frames(1, 3)]


@pytest.fixture(scope="module")
def smol() -> Assistant:
    return smol_assistant()


@pytest.fixture(scope="module")
def answers(smol: Assistant) -> dict[int, str]:
    """By plain transformers, before any engine takes the model."""
    return {
        number: expected(smol, text, clip) for number, (text, clip) in enumerate(zip(QUESTIONS, CLIPS, strict=True))
    }


@pytest.fixture(scope="module")
def engine(smol: Assistant, answers: dict[int, str]) -> Iterator[BatchingEngine]:
    """Three slots for six answers, and prompts taken in by pieces."""
    engine = new_engine(smol, slots=3, chunk_tokens=16)
    yield engine
    engine.close()


def prompts(assistant: Assistant) -> list[Any]:
    return [
        make_prompt(assistant, text, clip, name=1 if number in (1, 5) else 2)
        for number, (text, clip) in enumerate(zip(QUESTIONS, CLIPS, strict=True))
    ]


def test_answers_are_those_of_the_model_alone_in_any_company(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    asked = prompts(smol)
    together = asyncio.run(tell_all(engine, asked))
    alone = [asyncio.run(tell(engine, prompt, Told())) for prompt in asked]

    assert [told.text for told in together] == list(answers.values())
    assert [told.text for told in alone] == list(answers.values())
    assert len(set(answers.values())) == len(answers)
    sizes = [told.finish.batch_size for told in together if told.finish]
    assert len(sizes) == len(asked)
    assert max(sizes) > 2
    assert {told.finish.batch_size for told in alone if told.finish} == {1.0}


def test_what_was_read_before_is_not_read_again(smol: Assistant, answers: dict[int, str]) -> None:
    engine = new_engine(smol, slots=2)
    first = make_prompt(smol, QUESTIONS[1], CLIPS[1])
    other = make_prompt(smol, QUESTIONS[5], CLIPS[5])
    elsewhere = make_prompt(smol, QUESTIONS[1], CLIPS[1], name=2)
    shared = int((first.keys[: len(other)] != other.keys[: len(first)]).argmax())
    before_clip = int((first.keys != elsewhere.keys).argmax())

    told = [asyncio.run(tell(engine, prompt, Told())) for prompt in (first, first, other, elsewhere)]
    engine.close()

    assert [one.text for one in told] == [answers[1], answers[1], answers[5], answers[1]]
    cached = [one.finish.num_cached for one in told if one.finish]
    assert cached == [0, len(first) - 1, shared, before_clip]
    assert shared >= before_clip + len(CLIPS[1]) + 16  # all of the clip


def test_an_answer_that_nobody_wants_ends_and_the_others_do_not_notice(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    async def leave(after: int) -> None:
        generation = Generation("left", make_prompt(smol, "Tell a long story."), Decoding(400))
        async for number, _ in aenumerate(engine.generate(generation)):
            if number == after:
                return

    async def main() -> Told:
        other = asyncio.create_task(tell(engine, prompts(smol)[0], Told()))
        await leave(3)
        return await other

    assert asyncio.run(main()).text == answers[0]
    written = engine.state().tokens
    asyncio.run(tell(engine, prompts(smol)[3], Told()))
    assert engine.state().running == engine.state().waiting == 0
    assert engine.state().tokens - written <= TOKENS + 1


async def aenumerate(events: Any) -> Any:
    number = 0
    async for event in events:
        yield number, event
        number += 1


@contextmanager
def failing(assistant: Assistant, mark: float) -> Iterator[None]:
    """The language model raises whenever a token with this value in its embedding comes by."""

    def fail(module: Any, args: Any, given: dict[str, Any]) -> None:
        if (given["inputs_embeds"][..., 0] == mark).any():
            raise RuntimeError("secret of the backbone")

    hook = assistant.model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_a_prompt_that_breaks_the_model_breaks_only_its_own_answer(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    asked = prompts(smol)[:3]
    asked[1] = make_prompt(smol, "Something that was never asked before.")
    asked[1].embeds[-9, 0] = 123.0
    with failing(smol, 123.0):
        told = asyncio.run(tell_all(engine, asked))
    assert [told[0].text, told[2].text] == [answers[0], answers[2]]
    assert isinstance(told[1].error, GenerationError)
    assert "secret" not in str(told[1].error)


def test_scores_that_are_not_finite_end_one_answer_and_leave_nothing_behind(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    asked = prompts(smol)[:3]
    poisoned = make_prompt(smol, "Poison " * 40)
    poisoned.embeds[-90:] = float("nan")
    told = asyncio.run(tell_all(engine, [poisoned, asked[0], asked[2]]))
    assert isinstance(told[0].error, GenerationError)
    assert [told[1].text, told[2].text] == [answers[0], answers[2]]
    # The same slots, whose positions behind a short prompt were poisoned.
    after = asyncio.run(tell_all(engine, asked))
    assert [one.text for one in after] == [answers[0], answers[1], answers[2]]


def test_a_prompt_that_is_given_up_unread_leaves_nothing_behind() -> None:
    assistant = new_assistant()
    engine = new_engine(assistant, slots=2, chunk_tokens=4)
    poisoned = make_prompt(assistant, "Poison " * 40)
    poisoned.embeds[:] = float("nan")
    mate, short = make_prompt(assistant, "Who? " * 60), make_prompt(assistant, "Hi")

    async def main() -> tuple[Told, Told]:
        writing = asyncio.create_task(tell(engine, mate, Told(), "mate", max_tokens=300, min_tokens=300))
        while not engine.state().tokens:
            await asyncio.sleep(0.001)
        steps = engine.state().steps
        leaving = asyncio.create_task(tell(engine, poisoned, Told(), "leaving"))
        while engine.state().steps < steps + 5:
            await asyncio.sleep(0.001)
        leaving.cancel()
        while engine.state().running > 1:
            await asyncio.sleep(0.001)
        return await tell(engine, short, Told(), "next"), await writing

    for told in asyncio.run(main()):
        assert told.finish
    engine.close()


def test_draws_belong_to_their_answer_alone(engine: BatchingEngine, smol: Assistant) -> None:
    asked = prompts(smol)
    together = asyncio.run(tell_all(engine, asked[:3], temperature=1.0, seed=7))
    alone = asyncio.run(tell(engine, asked[2], Told(), temperature=1.0, seed=7))
    another = asyncio.run(tell(engine, asked[2], Told(), temperature=1.0, seed=8))
    assert together[2].text == alone.text
    assert another.text != alone.text


def test_stop_texts_end_an_answer_and_are_not_told(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    stop = answers[4][5:12]
    told = asyncio.run(tell(engine, prompts(smol)[4], Told(), stop=(stop,)))
    assert told.text == answers[4].partition(stop)[0].rstrip()
    assert told.finish
    assert told.finish.reason == "stop"
    assert asyncio.run(tell(engine, prompts(smol)[4], Told(), max_tokens=2)).finish.reason == "length"


@contextmanager
def held(assistant: Assistant) -> Iterator[threading.Event]:
    """The language model waits, until the event is set."""
    go = threading.Event()
    hook = assistant.model.language_model.register_forward_pre_hook(lambda *_: go.wait(60) and None)
    try:
        yield go
    finally:
        go.set()
        hook.remove()


def test_what_is_too_much_too_long_or_too_late_is_refused() -> None:
    assistant = new_assistant()
    engine = new_engine(assistant, slots=1, max_waiting=1, stuck_after_s=0.05)
    prompt = make_prompt(assistant, "Hi")

    async def main() -> None:
        with pytest.raises(GenerationError, match="512"):
            await anext(engine.generate(Generation("long", prompt, Decoding(512))))
        with held(assistant) as go:
            first = asyncio.create_task(tell(engine, prompt, Told(), "first", max_tokens=3))
            while not engine.state().running:
                await asyncio.sleep(0.01)
            late = engine.generate(Generation("late", prompt, Decoding(3), timeout_s=0.0))
            waiting = asyncio.create_task(anext(late))
            while not engine.state().waiting:
                await asyncio.sleep(0.01)
            with pytest.raises(OverloadError):
                await anext(engine.generate(Generation("third", prompt, Decoding(3))))
            with pytest.raises(EngineError, match="no step"):
                await sick(engine)
            go.set()
            assert (await first).finish
            with pytest.raises(DeadlineError):
                await waiting
        engine.check_health()

    asyncio.run(main())
    engine.close()
    with pytest.raises(EngineError):
        engine.check_health()


async def sick(engine: BatchingEngine) -> None:
    """Asks for its health until it has none."""
    while True:
        engine.check_health()
        await asyncio.sleep(0.01)


def test_closing_ends_the_answers_that_are_being_written() -> None:
    assistant = new_assistant()
    engine = new_engine(assistant, slots=1)

    async def main() -> Told:
        with held(assistant) as go:
            told = asyncio.create_task(tell(engine, make_prompt(assistant, "Hi"), Told(), max_tokens=300))
            while not engine.state().running:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            while not engine._is_closing:
                await asyncio.sleep(0.01)
            go.set()
            await closing
            return await told

    assert isinstance(asyncio.run(main()).error, EngineError)


def test_pieces_are_the_text_and_count_every_token(
    engine: BatchingEngine, smol: Assistant, answers: dict[int, str]
) -> None:
    async def main() -> list[Any]:
        return [event async for event in engine.generate(Generation("pieces", prompts(smol)[4], Decoding(TOKENS)))]

    *pieces, finish = asyncio.run(main())
    assert "".join(piece.text for piece in pieces) == answers[4]
    assert [piece.num_tokens for piece in pieces] == list(range(1, len(pieces) + 1))
    assert isinstance(finish, Finish)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert finish.num_tokens == len(pieces)


def test_a_model_in_the_engine_holds_no_grown_memory(engine: BatchingEngine, smol: Assistant) -> None:
    """Slots are set aside once, and the cache of prefixes keeps to its size."""
    small = new_assistant()
    bounded = new_engine(small, slots=2, prefix_bytes=200_000)
    for number in range(30):
        asyncio.run(tell(bounded, make_prompt(small, f"Question {number}", frames(number, 2), name=number), Told()))
    assert 0 < bounded.state().prefix_bytes <= 200_000
    assert bounded.state().running == bounded.state().waiting == 0
    assert torch.is_inference_mode_enabled() is False
    bounded.close()
