"""A server on Ray under mixed load for long: hostile requests among the others, a killed replica, a rolling update."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

from valley.config import load_settings
from valley.distributed.cluster import connect
from valley.distributed.serve import build, http_options
from valley.media.sampling import Sampling
from valley.model.build import build_model
from valley.model.processing import build_processor
from valley.model.settings import LLMSettings, ModelSettings, VisionSettings
from valley.performance.load import Ask, Outcome, closed_loop
from valley.performance.report import table, versions
from valley.performance.serve import await_ready, make_clips, request_body
from valley.serving.settings import ServeSettings
from valley.training.settings import ClusterSettings

REQUESTS, CLIENTS, CLIPS, PORT = 1000, 8, 12, 8017
_KILL_AT, _UPDATE_AT = 0.5, 0.6
"""Shares of the requests that have ended then."""
_WEIGHINGS = 20
PHASES = ("before the kill", "between", "after the update")
KINDS = ("Ingress", "Model", "Decoder")
"""Of replicas, as they stand in the titles of their processes."""

HOSTILE: dict[str, tuple[Any, int]] = {
    # what it is: url of a video, or body; the status it must get
    "local address": ("https://127.0.0.1:8265/api/jobs/", 400),
    "cloud metadata": ("https://169.254.169.254/latest/meta-data/", 400),
    "local file": ("file:///etc/passwd", 400),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n", 415),
    "text": (b"this is no video, whatever its name says", 415),
    "half a file": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + b"\0\0\1\0mdat" + bytes(64), 422),
    "not base64": ("data:video/mp4;base64,####", 400),
    "not JSON": (None, 400),
}


@dataclass(frozen=True)
class Weighing:
    """The memory of the replicas at one moment.

    Attributes:
        phase: one of `PHASES`.
        ended: requests that had ended.
        sizes: bytes of one process of a kind, on average over those there are.
    """

    phase: str
    ended: int
    sizes: Mapping[str, float]


@dataclass
class Soak:
    """What came of it.

    Attributes:
        outcomes: of all requests, in the order of their ends.
        killed_at: requests that had ended when a replica was killed.
        updated_at: likewise when the update began, and when it was complete.
        memory: of the replicas, in all three phases.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    killed_at: int = 0
    updated_at: tuple[int, int] = (0, 0)
    memory: list[Weighing] = field(default_factory=list)

    @property
    def growth(self) -> dict[str, float]:
        """What one process of each kind takes in the end, as a multiple of what one took after the first requests.

        Of one, for there are fewer of them after the kill and more during the update.
        """
        first, *_, last = (one.sizes for one in self.memory if one.ended)
        return {kind: last[kind] / first[kind] for kind in KINDS if kind in first and kind in last}

    @property
    def wrong(self) -> list[Outcome]:
        """Requests that were not answered as they should be."""
        expected = {f"hostile: {name}": status for name, (_, status) in HOSTILE.items()}
        return [one for one in self.outcomes if one.status != expected.get(one.kind, 200)]


def run_soak(output: Path) -> str:
    """Runs it and returns a Markdown section; raw figures go to `soak.json` in `output`."""
    soak = soak_on_ray(output.absolute() / "soak", REQUESTS)
    raw = {"memory": [asdict(one) for one in soak.memory], "killed_at": soak.killed_at, "updated_at": soak.updated_at}
    (output / "soak.json").write_text(json.dumps(raw, indent=1))
    return _report(soak)


def soak_on_ray(folder: Path, requests: int, *, port: int = PORT) -> Soak:
    """Serves the tiny model from two replicas on a local Ray, and asks it so much.

    In the middle of them a replica is killed (`kill -9`), and a little later the application is updated.

    Args:
        folder: of model and clips; made anew.
        requests: how many; one in ten is hostile.
        port: to serve on.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _save_tiny(folder / "model")
    asks = mixed(make_clips(folder / "clips", CLIPS), requests)
    words = [f"model={folder / 'model'}", f"port={port}", "page=false", "engine.threads=1", "ray.replicas=2"]
    words += ["ray.cpus_per_replica=0.2", "ray.cpus_per_decoder=0.2", "ray.decoders=2", "engine.prefix_bytes=8000000"]
    settings = load_settings(ServeSettings, None, words)
    is_ours = not ray.is_initialized()
    connect(ClusterSettings())
    serve.start(http_options=http_options(settings))
    serve.run(build(settings), name="valley", route_prefix="/")
    try:
        await_ready(f"http://127.0.0.1:{port}", lambda: True)
        return asyncio.run(_soak(settings, asks))
    finally:
        serve.shutdown()
        if is_ours:
            ray.shutdown()


def mixed(clips: Sequence[str], count: int, *, seed: int = 0) -> list[Ask]:
    """Returns requests about videos, new and known, about nothing, and every tenth a hostile one."""
    draw = random.Random(seed)
    names = list(HOSTILE)
    asks = []
    for number in range(count):
        if number % 10 == 9:
            asks.append(_hostile(names[number // 10 % len(names)]))
        elif number % 10 == 4:
            body = request_body(clips[0], f"Question {number}?", 8)
            body["messages"][0]["content"] = f"Say something about the number {number}."
            asks.append(Ask(body, "text"))
        else:
            clip, question = draw.choice(clips), draw.choice(["What happens?", "Which way?", "What colour is it?"])
            asks.append(Ask(request_body(clip, question, draw.choice([4, 16, 48])), "video"))
    return asks


def _hostile(name: str) -> Ask:
    what, _ = HOSTILE[name]
    if what is None:
        return Ask(b'{"model": "valley", "messages": [', f"hostile: {name}")
    url = what if isinstance(what, str) else f"data:video/mp4;base64,{base64.b64encode(what).decode()}"
    return Ask(request_body(url, "What happens?", 8), f"hostile: {name}")


async def _soak(settings: ServeSettings, asks: Sequence[Ask]) -> Soak:
    soak, count = Soak(), len(asks)
    url = f"http://127.0.0.1:{settings.port}/v1/chat/completions"
    load = asyncio.create_task(closed_loop(url, asks, CLIENTS, soak.outcomes))
    changed = settings.model_copy(update={"engine": settings.engine.model_copy(update={"slots": 4})})

    def weigh(phase: str) -> None:
        soak.memory.append(Weighing(phase, len(soak.outcomes), _sizes()))

    async def until(share: float, phase: str) -> None:
        weigh(phase)
        while len(soak.outcomes) < share * count and not load.done():
            if len(soak.outcomes) - soak.memory[-1].ended >= count / _WEIGHINGS:
                weigh(phase)
            await asyncio.sleep(0.1)
        weigh(phase)

    before, between, after = PHASES
    await until(_KILL_AT, before)
    soak.killed_at = len(soak.outcomes)
    replica_processes("ServeReplica:valley:Model")[0].kill()
    await until(_UPDATE_AT, between)
    began = len(soak.outcomes)
    await asyncio.to_thread(serve.run, build(changed), name="valley", route_prefix="/")
    soak.updated_at = (began, len(soak.outcomes))
    await until(1.0, after)
    await load
    return soak


def replica_processes(name: str) -> list[psutil.Process]:
    """Returns the replicas in whose titles a name stands, such as `ServeReplica:valley:Model`.

    They are those of the cluster that this process has started; another one may be on the machine.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [""])[0]
            if title.startswith("ray::") and name in title:
                found.append(process)
    return found


def _sizes() -> dict[str, float]:
    """Bytes of one process of each kind; of one that ends meanwhile, nothing."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for kind, sizes in found.items():
        for process in replica_processes(f"ServeReplica:valley:{kind}"):
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
    return {kind: statistics.mean(sizes) for kind, sizes in found.items() if sizes}


def _save_tiny(folder: Path) -> None:
    settings = ModelSettings(vision=VisionSettings(name="tiny", pretrained=None), llm=LLMSettings(name="tiny"))
    build_model(settings, seed=0).save_pretrained(folder)
    build_processor(settings, Sampling(fps=2.0)).save_pretrained(folder)


def _report(soak: Soak) -> str:
    rows = []
    for kind in sorted({one.kind for one in soak.outcomes}):
        some = [one for one in soak.outcomes if one.kind == kind]
        counts = Counter(f"{one.status} {one.code}".strip() for one in some)
        rows.append([kind, str(len(some)), ", ".join(f"{status}: {count}" for status, count in counts.items())])
    wrong = Counter(f"{one.status} {one.code}" for one in soak.wrong)
    places = [place for place, one in enumerate(soak.outcomes) if one in soak.wrong]
    grown = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in soak.growth.items())
    return "\n\n".join(
        [
            f"{versions('ray', 'torch', 'fastapi')}. The tiny model, two replicas, two decoders, {CLIENTS} clients, "
            f"{len(soak.outcomes)} requests: a tenth of them hostile, the others about {CLIPS} clips and about none.",
            table(["requests", "how many", "status"], rows),
            f"A replica was killed (`kill -9`) after {soak.killed_at} requests; the application was updated between "
            f"{soak.updated_at[0]} and {soak.updated_at[1]}. Not answered as they should be: {len(soak.wrong)} "
            f"{dict(wrong) or ''}, at places {places}.",
            "Memory of one process, MiB, on average over those of its kind:",
            table(["phase", "requests", *KINDS], [_weighed(one) for one in soak.memory if one.ended]),
            f"Last against first: {grown}.",
        ]
    )


def _weighed(one: Weighing) -> list[str]:
    sizes = [f"{one.sizes[kind] / 2**20:.0f}" if kind in one.sizes else "-" for kind in KINDS]
    return [one.phase, str(one.ended), *sizes]
