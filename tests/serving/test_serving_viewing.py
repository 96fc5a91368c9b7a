"""Media are looked at once for all who wait, for as long as somebody does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import picture
from serving_makers import new_assistant

from valley.errors import DamagedMediaError, DecodeTimeoutError, OverloadError
from valley.media.decode import sample_clip
from valley.media.sampling import Sampling
from valley.serving.sources import Source, serving_limits
from valley.serving.viewing import Clip, LocalDecoder, Look, Viewer, decode


@pytest.fixture
def look(clip: Path) -> Look:
    return Look(Source(clip.read_bytes(), "digest"), Sampling(), new_assistant().processor.framing, serving_limits())


class Gate:
    """Decodes when it is let."""

    def __init__(self) -> None:
        self.go, self.calls, self.cancelled = asyncio.Event(), 0, 0

    async def __call__(self, look: Look) -> Clip:
        self.calls += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return decode(look)


def test_a_list_of_frames_has_the_deadline_of_one_clip(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def noted(*arguments: Any, **options: Any) -> Any:
        limits.append(options["limits"])
        return sample_clip(*arguments, **options)

    monkeypatch.setattr("valley.serving.viewing.sample_clip", noted)
    files = (picture("red"), picture("green"), picture("blue"))
    most = look.limits.deadline_s + 3 * look.limits.deadline_s_per_frame
    assert len(decode(replace(look, source=Source(files, "frames"))).pixels) == 3
    assert most > limits[0].deadline_s > limits[1].deadline_s > limits[2].deadline_s
    assert {one.deadline_s_per_frame for one in limits} == {0.0}

    brief = look.limits.model_copy(update={"deadline_s": 1e-9, "deadline_s_per_frame": 0.0})
    with pytest.raises(DecodeTimeoutError):
        decode(replace(look, source=Source(files, "frames"), limits=brief))


def test_one_look_serves_all_and_ends_with_the_last_of_them(look: Look) -> None:
    async def main() -> None:
        gate = Gate()
        viewer = Viewer(new_assistant().model, gate, 1 << 20, 1)
        first, second = (asyncio.create_task(viewer.view(look)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(viewer.view(look))
        gate.go.set()
        views = [await second, await third, await viewer.view(look)]
        assert (gate.calls, gate.cancelled) == (1, 0)
        assert [view.is_kept for view in views] == [False, False, True]
        assert len({view.tokens.data_ptr() for view in views}) == 1

        other = Look(look.source, Sampling(fps=1.0), look.framing, look.limits)
        gate.go.clear()
        leaving = asyncio.create_task(viewer.view(other))
        await asyncio.sleep(0.01)
        leaving.cancel()
        coming = asyncio.create_task(viewer.view(other))  # in the same turn: it must not end with the one that left
        await asyncio.gather(leaving, return_exceptions=True)
        gate.go.set()
        assert len((await coming).times_s) == 6
        assert gate.cancelled <= 1
        viewer.close()

    asyncio.run(main())


def test_what_fails_is_told_to_all_and_tried_again(look: Look) -> None:
    async def main() -> None:
        answers = [DamagedMediaError("x", "cut"), decode(look)]

        async def once_broken(_: Look) -> Clip:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        viewer = Viewer(new_assistant().model, once_broken, 1 << 20, 1)
        both = await asyncio.gather(viewer.view(look), viewer.view(look), return_exceptions=True)
        assert all(isinstance(one, DamagedMediaError) for one in both)
        assert (await viewer.view(look)).tokens.shape[0] == 16 + 3
        viewer.close()

    asyncio.run(main())


def test_memory_for_what_was_seen_is_bounded(look: Look) -> None:
    async def main() -> None:
        clip = decode(look)

        async def known(_: Look) -> Clip:
            return clip

        viewer = Viewer(new_assistant().model, known, 60_000, 1)
        for number in range(12):
            await viewer.view(Look(Source(b"", str(number)), look.sampling, look.framing, look.limits))
            assert 0 < viewer.num_bytes <= 60_000
        assert (await viewer.view(Look(Source(b"", "11"), look.sampling, look.framing, look.limits))).is_kept
        assert not (await viewer.view(Look(Source(b"", "0"), look.sampling, look.framing, look.limits))).is_kept
        viewer.close()

    asyncio.run(main())


def test_too_many_media_at_once_are_turned_away(look: Look) -> None:
    async def main() -> None:
        decoder = LocalDecoder(at_once=1, most_waiting=1)
        done = await asyncio.gather(*(decoder(look) for _ in range(4)), return_exceptions=True)
        assert [type(one) for one in done] == [Clip, Clip, OverloadError, OverloadError]
        assert isinstance(await decoder(look), Clip)

    asyncio.run(main())


def test_other_content_and_other_sampling_have_other_keys(look: Look) -> None:
    async def main() -> None:
        viewer = Viewer(new_assistant().model, LocalDecoder(), 1 << 20, 1)
        one = await viewer.view(look)
        other = await viewer.view(Look(look.source, Sampling(mode="fixed", num_frames=3), look.framing, look.limits))
        another = await viewer.view(Look(Source(look.source.data, "other"), look.sampling, look.framing, look.limits))
        keys = [set(view.keys.tolist()) for view in (one, other, another)]
        assert not keys[0] & keys[1]
        assert not keys[0] & keys[2]
        assert max(max(some) for some in keys) < 0
        viewer.close()

    asyncio.run(main())
