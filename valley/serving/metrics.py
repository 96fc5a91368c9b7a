"""Figures for Prometheus, under the names that `dashboards/` and the alerts know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from valley.serving.contract import Start
from valley.serving.engine.interface import EngineState, Finish

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)

_HISTOGRAMS: dict[str, tuple[str, Iterable[float]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to the first token.", _SECONDS),
    "time_per_output_token_seconds": ("Between two tokens after the first, mean of an answer.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From the request's arrival to its end.", _SECONDS),
    "request_queue_time_seconds": ("Waiting for a slot of the engine.", _SECONDS),
    "fetch_seconds": ("Reading the media of a request.", _SECONDS),
    "decode_seconds": ("Decoding the media of a request that were not seen before.", _SECONDS),
    "encode_seconds": ("The tower's time for them.", _SECONDS),
    "batch_size": ("Answers written in the same step, mean of an answer.", _BATCH),
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts, visual ones among them.",
    "visual_tokens": "Visual tokens of prompts.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens of prompts that were looked for in the cache of prefixes.",
    "prefix_cache_hits": "Those that were found.",
    "mm_cache_queries": "Media that were looked for in the cache of visual tokens.",
    "mm_cache_hits": "Those that were found.",
}


class Metrics:
    """What happened, counted.

    Args:
        model: the label that every figure carries.
    """

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        labels: dict[str, Any] = {"labelnames": ("model_name",), "namespace": "valley", "registry": self._registry}
        self._histograms = {
            name: Histogram(name, text, buckets=tuple(buckets), **labels).labels(model)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {name: Counter(name, text, **labels).labels(model) for name, text in _COUNTERS.items()}
        by_status = {**labels, "labelnames": ("model_name", "status")}
        self._requests = Counter("requests", "Requests by status; 499: the client left.", **by_status)
        self._in_hand = Gauge("requests_in_hand", "Requests that are not answered yet.", **labels).labels(model)
        self._running = Gauge("num_requests_running", "Answers being written.", **labels).labels(model)
        self._waiting = Gauge("num_requests_waiting", "Answers that wait for a slot.", **labels).labels(model)
        self._model = model

    def began(self) -> None:
        """A request has come."""
        self._in_hand.inc()

    def ended(self, status: int) -> None:
        """It has been answered, with an error perhaps."""
        self._in_hand.dec()
        self._requests.labels(self._model, str(status)).inc()

    def refused(self, status: int) -> None:
        """One was turned away at the door."""
        self._requests.labels(self._model, str(status)).inc()

    def fetched(self, seconds: float) -> None:
        """Its media have been read."""
        self._histograms["fetch_seconds"].observe(seconds)

    def started(self, start: Start) -> None:
        """It has been understood."""
        self._counters["prompt_tokens"].inc(start.prompt_tokens)
        self._counters["visual_tokens"].inc(start.visual_tokens)
        self._counters["prefix_cache_queries"].inc(start.prompt_tokens)
        self._counters["mm_cache_queries"].inc(len(start.media))
        self._counters["mm_cache_hits"].inc(start.num_kept)
        if start.num_kept < len(start.media):
            self._histograms["decode_seconds"].observe(start.decode_s)
            self._histograms["encode_seconds"].observe(start.encode_s)

    def first_token(self, seconds: float) -> None:
        """The first token is there."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def finished(self, finish: Finish, first_token_s: float, total_s: float) -> None:
        """The answer is complete.

        Args:
            finish: what the engine says of it.
            first_token_s: seconds from the request's arrival to the first token.
            total_s: seconds to its end.
        """
        self._counters["generation_tokens"].inc(finish.num_tokens)
        self._counters["prefix_cache_hits"].inc(finish.num_cached)
        self._histograms["request_queue_time_seconds"].observe(finish.queue_s)
        self._histograms["batch_size"].observe(finish.batch_size)
        self._histograms["e2e_request_latency_seconds"].observe(total_s)
        if finish.num_tokens > 1:
            self._histograms["time_per_output_token_seconds"].observe(
                (total_s - first_token_s) / (finish.num_tokens - 1)
            )

    def text(self, state: EngineState | None) -> tuple[bytes, str]:
        """Returns all figures in Prometheus' form, and the type of that."""
        if state is not None:
            self._running.set(state.running)
            self._waiting.set(state.waiting)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
