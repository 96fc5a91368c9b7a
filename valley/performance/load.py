"""Load on a chat-completions server, and what its clients saw: closed loops and open ones."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Ask:
    """One request of a load.

    Attributes:
        body: of the request; bytes are sent as they are.
        kind: what it is counted as.
    """

    body: dict[str, Any] | bytes
    kind: str = "request"


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one request.

    Attributes:
        kind: of the request.
        status: of HTTP; 0: the connection failed; -1: the stream broke off.
        first_token_s: from sending to the first text.
        total_s: from sending to the end.
        num_tokens: of the answer, as the server counts them.
        text: the answer.
        code: of an error.
    """

    kind: str
    status: int
    first_token_s: float = 0.0
    total_s: float = 0.0
    num_tokens: int = 0
    text: str = ""
    code: str = ""

    @property
    def token_s(self) -> float:
        """Seconds between two tokens after the first."""
        return (self.total_s - self.first_token_s) / max(self.num_tokens - 1, 1)


async def send(session: aiohttp.ClientSession, url: str, ask: Ask) -> Outcome:
    """Sends one request and reads its answer to the end."""
    began = time.monotonic()
    body = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status != 200:
                problem = await answer.json(content_type=None)
                return Outcome(ask.kind, answer.status, total_s=time.monotonic() - began, code=_code(problem))
            return await _read(answer, ask.kind, began)
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
        return Outcome(ask.kind, 0, total_s=time.monotonic() - began, code=type(error).__name__)


async def _read(answer: aiohttp.ClientResponse, kind: str, began: float) -> Outcome:
    text, first, num_tokens = "", 0.0, 0
    is_done = False
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            is_done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return Outcome(kind, -1, first, time.monotonic() - began, num_tokens, text, _code(event))
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.monotonic() - began
                text += piece
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    status, code = (200, "") if is_done else (-1, "cut")
    return Outcome(kind, status, first, time.monotonic() - began, num_tokens, text, code)


def _code(problem: Any) -> str:
    try:
        return str(problem["error"]["code"])
    except (KeyError, TypeError):
        return "not OpenAI's form"


async def closed_loop(
    url: str, asks: Sequence[Ask], clients: int, outcomes: list[Outcome] | None = None
) -> list[Outcome]:
    """Sends requests from so many clients, each the next one when it has its answer.

    Args:
        url: of the completions.
        asks: the requests.
        clients: how many.
        outcomes: a list that what came of them is added to, for those who want to watch.
    """
    left = list(reversed(asks))
    outcomes = [] if outcomes is None else outcomes
    async with _session() as session:

        async def client() -> None:
            while left:
                outcomes.append(await send(session, url, left.pop()))

        await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def open_loop(url: str, asks: Sequence[Ask], per_second: float, *, seed: int = 0) -> list[Outcome]:
    """Sends requests at times that do not wait for answers (a Poisson process)."""
    draw = random.Random(seed)  # of arrival times
    async with _session() as session:
        tasks = []
        for ask in asks:
            tasks.append(asyncio.create_task(send(session, url, ask)))
            await asyncio.sleep(draw.expovariate(per_second))
        return list(await asyncio.gather(*tasks))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600), read_bufsize=1 << 20
    )


def statuses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many ended how."""
    return dict(sorted(Counter(f"{outcome.status} {outcome.code}".strip() for outcome in outcomes).items()))


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """The 50th, 95th and 99th percentile."""
    if len(values) < 2:
        return tuple(values[0] if values else float("nan") for _ in PERCENTILES)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return tuple(cuts[percent - 1] for percent in PERCENTILES)
