"""One model behind the API: what is refused is refused before anything is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from serving_makers import new_assistant, serve_settings

from valley.assistant.loading import Assistant
from valley.errors import DamagedMediaError, EngineError, OverloadError, RequestError
from valley.media.sampling import Sampling
from valley.serving.contract import Event, Medium, Order
from valley.serving.engine.batching import BatchingEngine, batching_engine
from valley.serving.engine.interface import Decoding, Finish
from valley.serving.engine.settings import EngineSettings
from valley.serving.plain import serve_plain
from valley.serving.service import Service
from valley.serving.sources import Source
from valley.serving.viewing import Clip, Decode, Look


def order(text: str, *names: str, name: str = "one", **more: Any) -> Order:
    """A question about media of these names."""
    content = [*({"type": "video"} for _ in names), {"type": "text", "text": text}]
    media = [Medium(Source(b"", one), f"messages[0].content[{place}]") for place, one in enumerate(names)]
    return Order(name, [{"role": "user", "content": content}], media, Decoding(4), 60.0, **more)


async def events(service: Service, *orders: Order) -> list[list[Event] | BaseException]:
    async def all_of(answer: AsyncIterator[Event]) -> list[Event]:
        return [event async for event in answer]

    return await asyncio.gather(*(all_of(service.answer(one)) for one in orders), return_exceptions=True)


class Eyes:
    """Notes what it is asked to look at."""

    def __init__(self, see: Callable[[Look], Awaitable[Clip]]) -> None:
        self._see, self.looks = see, list[Look]()

    async def __call__(self, look: Look) -> Clip:
        self.looks.append(look)
        return await self._see(look)


async def never(_: Look) -> Clip:
    await asyncio.Event().wait()
    raise AssertionError


def answered(decode: Decode, overrides: Sequence[str], *orders: Order) -> list[list[Event] | BaseException]:
    service = Service(serve_settings(*overrides), decode, new_assistant())
    try:
        return asyncio.run(asyncio.wait_for(events(service, *orders), 60))
    finally:
        service.close()


def test_what_is_too_long_is_refused_before_it_is_looked_at() -> None:
    eyes = Eyes(never)
    (error,) = answered(eyes, ["engine.max_tokens=64"], order("who? " * 60, "clip"))
    assert isinstance(error, RequestError)
    assert error.code == "context_length_exceeded"
    assert not eyes.looks


def test_more_than_can_wait_is_refused_before_it_is_looked_at() -> None:
    async def broken(_: Look) -> Clip:
        await asyncio.sleep(0)
        raise DamagedMediaError("", "cut")

    eyes = Eyes(broken)
    orders = [order("what?", f"clip {number}", name=str(number)) for number in range(4)]
    errors = answered(eyes, ["engine.slots=1", "engine.max_waiting=1"], *orders)
    assert [type(error) for error in errors] == [DamagedMediaError] * 2 + [OverloadError] * 2
    assert len(eyes.looks) == 2


def test_what_was_refused_or_answered_makes_room() -> None:
    settings = serve_settings("engine.slots=1", "engine.max_waiting=0")
    service = Service(settings, never, new_assistant())

    async def main() -> None:
        for _ in range(3):
            (told,) = await events(service, order("what?"))
            assert isinstance(told, list)
            assert isinstance(told[-1], Finish)
        leaving = service.answer(order("what?"))
        await anext(leaving)
        await leaving.aclose()
        (told,) = await events(service, order("what?"))
        assert isinstance(told, list)

    asyncio.run(main())
    service.close()


def test_the_first_medium_that_fails_is_told_whatever_the_others_do() -> None:
    async def see(look: Look) -> Clip:
        if look.source.digest == "broken":
            raise DamagedMediaError("", "cut")
        return await never(look)

    (error,) = answered(see, [], order("what?", "slow", "broken"))
    assert isinstance(error, DamagedMediaError)
    assert error.path == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"mode": "fps", "fps": 3.0, "max_frames": 6}),
        ({"fps": 1.0}, {"mode": "fps", "fps": 1.0, "max_frames": 6}),
        ({"fps": 100.0}, {"mode": "fps", "fps": 8.0, "max_frames": 6}),
        ({"num_frames": 4}, {"mode": "fixed", "fps": 3.0, "num_frames": 4}),
        ({"num_frames": 400}, {"mode": "fixed", "fps": 3.0, "num_frames": 6}),
    ],
)
def test_frames_are_the_models_own_or_those_asked_for_within_limits(
    asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    async def refuse(_: Look) -> Clip:
        raise DamagedMediaError("", "cut")

    eyes, assistant = Eyes(refuse), new_assistant()
    assistant.processor.sampling = Sampling(fps=3.0, max_frames=20)
    service = Service(serve_settings("limits.max_frames=6", "limits.max_fps=8"), eyes, assistant)
    asyncio.run(events(service, order("what?", "clip", **asked)))
    service.close()
    (look,) = eyes.looks
    assert look.sampling.model_dump(include=set(expected)) == expected


def test_a_server_whose_engine_ends_ends_with_an_error(tmp_path: Any) -> None:
    def dead(assistant: Assistant, settings: EngineSettings) -> BatchingEngine:
        engine = batching_engine(assistant, settings)
        engine.close()
        return engine

    assistant = new_assistant()
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="ended"):
        serve_plain(serve_settings(f"model={tmp_path}"), new_engine=dead)
