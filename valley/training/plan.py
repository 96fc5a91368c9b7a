"""What a run is going to do, told before it starts and from metadata alone (`--dry-run`).

Nothing is decoded and no weights are loaded: lengths come from the tokenizer and the files' headers, memory from the
model's shapes. Of large datasets a seeded draw is looked at, and the plan says of how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from valley.data.estimate import most_frames
from valley.data.manifest import Manifest
from valley.data.records import Record
from valley.data.settings import DataSettings
from valley.data.storage import Root
from valley.errors import MediaError, RecordError
from valley.media.probe import probe
from valley.media.sampling import Sampling, expected_frames
from valley.model.build import build_model
from valley.model.configuration import ValleyConfig
from valley.model.lora import add_lora
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor
from valley.model.saved import saved_folder
from valley.training.job import prepare_job
from valley.training.settings import RunSettings
from valley.training.stage import ModuleRow, format_table, prepare, what_trains

LOOKED_AT = 2000
"""Records of a source that are looked at, at most."""
_PROBES_AT_ONCE = 8
_BINS = 10
_BAR_WIDTH = 40
_TEMPORAL_COPIES = 16
GIB = 2**30


@dataclass(frozen=True)
class SourcePlan:
    """What is known of one source.

    Attributes:
        name: its name.
        num_records: usable records of its data file.
        unreadable: reason → records of its data file that cannot be parsed for it.
        passes: over it in an epoch.
        looked_at: records that the following were found in.
        tokens: of each of these that can be used, visual tokens included, before any cut.
        num_cut: records whose text is longer than `data.max_tokens` allows.
        problems: reason → records that will be rejected for it.
    """

    name: str
    num_records: int
    unreadable: Counter[str]
    passes: float
    looked_at: int
    tokens: Int64[np.ndarray, " n"]
    num_cut: int
    problems: Counter[str]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one worker needs on its device, estimated.

    Attributes:
        weights: of all parameters, frozen ones in the compute precision.
        optimizer: gradients, fp32 masters and AdamW's two moments of what trains, this worker's share under ZeRO.
        activations: of the longest micro-batch.
        logits: of the supervised positions, in fp32, with their gradient.
    """

    weights: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """What a run is going to do."""

    sources: Sequence[SourcePlan]
    max_tokens: int
    steps: int
    samples_per_epoch: int
    modules: Sequence[ModuleRow]
    memory: MemoryPlan
    num_workers: int

    def __str__(self) -> str:
        return "\n\n".join([self._sources(), self._histogram(), self._run(), format_table(self.modules)])

    def _sources(self) -> str:
        lines = [
            f"{'source':<24}{'records':>10}{'passes':>8}{'tokens p50':>12}{'p95':>7}{'max':>7}{'cut':>7}  rejected"
        ]
        for source in self.sources:
            p50, p95, most = np.percentile(source.tokens, [50, 95, 100]) if len(source.tokens) else (0.0, 0.0, 0.0)
            rejected = sum(source.problems.values())
            looked = "" if source.looked_at == source.num_records else f" of {source.looked_at} looked at"
            lines.append(
                f"{source.name:<24}{source.num_records:>10,}{source.passes:>8g}{p50:>12.0f}{p95:>7.0f}{most:>7.0f}"
                f"{source.num_cut:>7}  {rejected}{looked}, {source.unreadable.total()} unreadable in the data file"
            )
            lines += [f"    will be rejected: {count} × {reason}" for reason, count in source.problems.most_common()]
            lines += [f"    unreadable: {count} × {reason}" for reason, count in source.unreadable.most_common()]
        return "\n".join(lines)

    def _histogram(self) -> str:
        tokens = np.concatenate([source.tokens for source in self.sources])
        if not len(tokens):
            return "no sample can be used"
        counts, edges = np.histogram(tokens, bins=min(_BINS, int(np.ptp(tokens)) + 1))
        lines = [f"tokens a sample (longer than {self.max_tokens} are cut at the end of their text)"]
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            bar = "█" * round(_BAR_WIDTH * count / counts.max())
            lines.append(f"  {np.ceil(low):>6.0f} to {np.floor(high):<6.0f}{count:>8}  {bar}".rstrip())
        return "\n".join(lines)

    def _run(self) -> str:
        memory = self.memory
        parts = {
            "weights": memory.weights,
            "gradients and optimizer": memory.optimizer,
            "activations": memory.activations,
            "logits": memory.logits,
        }
        shown = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
        return (
            f"{self.steps:,} steps; {self.samples_per_epoch:,} samples an epoch\n"
            f"memory of each of {self.num_workers} worker(s), estimated: {memory.total / GIB:.2f} GiB ({shown})"
        )


def plan_run(settings: RunSettings) -> Plan:
    """Returns what a run is going to do; its model is laid out without memory or weights.

    Raises:
        ValleyError: settings, data or model cannot be used.
    """
    job = prepare_job(settings)
    manifest, data = job.loader.manifest, settings.data
    sources = [
        plan_source(manifest, index, job.processor, data, seed=settings.seed) for index in range(len(manifest.sources))
    ]
    model = _lay_out(settings)
    if settings.lora and "llm" in settings.train.modules:
        add_lora(model, settings.lora, seed=settings.seed)
    modules = what_trains(model, prepare(model, settings.train))
    longest = max((int(source.tokens.max()) for source in sources if len(source.tokens)), default=data.max_tokens)
    num_workers = settings.cluster.num_workers if isinstance(settings.cluster.num_workers, int) else 1
    num_workers = max(num_workers, 1)
    return Plan(
        sources=sources,
        max_tokens=data.max_tokens,
        steps=job.total_steps,
        samples_per_epoch=job.loader.order.samples_per_epoch,
        modules=modules,
        memory=plan_memory(modules, model.config, settings, longest=longest, num_workers=num_workers),
        num_workers=num_workers,
    )


def _lay_out(settings: RunSettings) -> ValleyForConditionalGeneration:
    """The model on the meta device: shapes and dtypes, nothing else."""
    with torch.device("meta"):
        if settings.model.path is not None:
            return ValleyForConditionalGeneration(ValleyConfig.from_pretrained(saved_folder(settings.model.path)))
        vision = settings.model.vision.model_copy(update={"pretrained": None})
        llm = settings.model.llm.model_copy(update={"random_weights": True})
        return build_model(settings.model.model_copy(update={"vision": vision, "llm": llm}), seed=settings.seed)


def plan_source(
    manifest: Manifest, source: int, processor: ValleyProcessor, settings: DataSettings, *, seed: int
) -> SourcePlan:
    """Looks at a source's records: do their files exist, are they media, how long will the samples be?"""
    rows = np.flatnonzero(manifest.row_sources == source)
    if len(rows) > LOOKED_AT:
        rows = np.sort(np.random.default_rng(seed).choice(rows, LOOKED_AT, replace=False))
    described = manifest.sources[source]
    root = Root(described.root)
    records = [manifest.record(int(row)) for row in rows]
    problems: Counter[str] = Counter()
    tokens = []
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        looked = pool.map(lambda record: _count_frames(record, root, described.sampling, settings), records)
        for record, frames in zip(records, looked, strict=True):
            if isinstance(frames, str):
                problems[frames] += 1
                continue
            try:
                processor.encode(record.messages, frames, max_tokens=settings.max_tokens)
            except RecordError as error:
                problems[f"{error.field}: {error.reason}"] += 1
                continue
            tokens.append(processor.count_tokens(record.messages, frames))
    lengths = np.array(tokens, dtype=np.int64)
    return SourcePlan(
        name=described.name,
        num_records=described.num_records,
        unreadable=Counter(reject.reason for reject in manifest.rejects() if reject.source == described.name),
        passes=settings.sources[source].weight,
        looked_at=len(rows),
        tokens=lengths,
        num_cut=int((lengths > settings.max_tokens).sum()),
        problems=problems,
    )


def plan_memory(
    modules: Sequence[ModuleRow], config: ValleyConfig, settings: RunSettings, *, longest: int, num_workers: int
) -> MemoryPlan:
    """Estimates what one worker needs.

    Weights and what AdamW keeps are exact; ZeRO shares out the optimizer's state and the fp32 masters from stage 1,
    gradients from stage 2, weights in stage 3; off-loading moves state and masters away. Activations are a rule of
    thumb: with gradient checkpointing each of the LLM's layers keeps its input (2 bytes a number in bf16) and one layer
    is recomputed at a time (about 34 numbers a hidden unit); without it every layer keeps all of its own. The temporal
    module keeps about as many copies of all patches as v3 makes (16), at the most frames that sampling gives.
    """
    stage, engine = settings.train, settings.engine
    text = config.text_config
    width, layers = text.hidden_size, text.num_hidden_layers
    compute_bytes = 2 if stage.precision == "bf16" else 4
    trainable = sum(row.num_trainable for row in modules)
    frozen = sum(row.num_parameters for row in modules) - trainable
    shards = num_workers if engine.name == "deepspeed" else 1
    weights = (frozen + trainable) * compute_bytes // (shards if engine.zero_stage == 3 else 1)
    masters = (4 * trainable if compute_bytes == 2 else 0) // shards
    moments = 8 * trainable // shards
    gradients = 4 * trainable // (shards if engine.zero_stage >= 2 else 1)
    places = stage.micro_batch * min(longest, settings.data.max_tokens)
    kept = layers + 34 if stage.gradient_checkpointing else 34 * layers
    vision = config.vision_config
    frames = stage.micro_batch * max(most_frames(s.sampling or settings.data.sampling) for s in settings.data.sources)
    patches = frames * vision.num_patches * vision.hidden_size * _TEMPORAL_COPIES
    return MemoryPlan(
        weights=weights,
        optimizer=gradients + (0 if engine.offload else masters + moments),
        activations=(places * width * kept + patches) * compute_bytes,
        logits=2 * 4 * places * text.vocab_size // 4,  # about a quarter of the places is supervised
    )


def _count_frames(record: Record, root: Root, sampling: Sampling, settings: DataSettings) -> list[int] | str:
    """Frames of each medium, from the files' headers; or why the record will be rejected."""
    counts = []
    try:
        for medium in record.media:
            if len(medium.paths) > 1:
                counts.append(min(len(medium.paths), sampling.max_frames))
                continue
            found = root.find(medium.candidates(medium.paths[0]))
            if not root.is_local:
                counts.append(1 if medium.kind == "image" else sampling.max_frames)
                continue
            counts.append(expected_frames(probe(found.address, settings.limits), sampling))
    except MediaError as error:
        return f"{type(error).__name__}: {error.reason}"
    return counts
