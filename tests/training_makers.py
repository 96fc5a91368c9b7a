"""The tiny model, samples for it, and processes that train it together."""

from __future__ import annotations

import functools
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from valley.data.collate import Batch, Sample, collate
from valley.media.sampling import Sampling
from valley.model.build import build_model
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor, build_processor
from valley.model.settings import LLMSettings, ModelSettings, VisionSettings
from valley.training.engines import ENGINES, Engine
from valley.training.settings import EngineSettings, RunSettings, StageSettings
from valley.training.stage import compute_dtype, prepare

MODEL = ModelSettings(
    vision=VisionSettings(name="tiny", pretrained=None, micro_batch=2), llm=LLMSettings(name="tiny"), temporal="v3"
)
STAGE = StageSettings(
    train_added_tokens=True,
    learning_rate=1e-2,
    module_learning_rates={"projector": 5e-3},
    global_batch=8,
    micro_batch=8,
    precision="fp32",
    gradient_checkpointing=False,
)
EXACT = EngineSettings(overlap_comm=False)

# frames of each medium, and the answer: lengths, media and supervised tokens differ from row to row
_ROWS: list[tuple[list[int], str]] = [
    ([3], "a red ball moves left"),
    ([], "forty two"),
    ([1], "a still picture of a blue square that nobody moves at all"),
    ([2, 5], "first the one, then the other"),
    ([], "yes"),
    ([6], "green"),
    ([4], "two shapes: a circle grows, a triangle vanishes, and the background stays the same"),
    ([], "no, that is not how it went"),
]


@functools.cache
def processor() -> ValleyProcessor:
    return build_processor(MODEL, Sampling())


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Eight samples; the second, fifth and eighth are text only."""
    generator = np.random.default_rng(0)
    made = []
    for slot, (num_frames, answer) in enumerate(_ROWS):
        content: list[Any] = [{"type": "video"} for _ in num_frames] + [{"type": "text", "text": "what happens?"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        encoded = processor().encode(messages, num_frames)
        size = processor().size_px
        made.append(
            Sample(
                slot=slot,
                row=slot,
                sample_id=f"s{slot}",
                source=0,
                input_ids=encoded.input_ids,
                labels=encoded.labels,
                frames=generator.integers(0, 256, (sum(num_frames), size, size, 3), dtype=np.uint8),
                num_frames=np.array(num_frames, dtype=np.int64),
            )
        )
    return tuple(made)


def batch(rows: Sequence[int]) -> Batch:
    return collate([samples()[row] for row in rows], processor().tokenizer.pad_token_id)


def new_model(stage: StageSettings = STAGE) -> ValleyForConditionalGeneration:
    return build_model(MODEL, seed=0, dtype=compute_dtype(stage))


def new_engine(name: str, stage: StageSettings = STAGE, settings: EngineSettings = EXACT) -> Engine:
    model = new_model(stage)
    return ENGINES[name](model, prepare(model, stage), stage, settings, torch.device("cpu"))


def train(
    engine: Engine, steps: int, rows: Sequence[Sequence[int]], factors: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Takes steps on the same eight samples, this rank's micro-batches being `rows`; returns losses and norms."""
    num_items = sum(collate([sample], 0).num_supervised for sample in samples())
    losses, norms = [], []
    for step in range(steps):
        loss = 0.0
        for index, chosen in enumerate(rows, start=1):
            part = engine.loss(batch(chosen), num_items)
            engine.backward(part, last=index == len(rows))
            loss += part.item()
        norms.append(engine.step(factors[step] if factors else 1.0))
        losses += engine.all_reduce_sum([loss])
    return losses, norms


def trained_weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for group in engine.groups for name, parameter in group.parameters.items()}


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Runs `work(*arguments)` in processes that form a gloo group; returns what each returned, by rank."""
    mp.spawn(_run_rank, args=(world_size, work, arguments, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(work(*arguments), Path(folder) / f"result-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    dist.barrier()
    dist.destroy_process_group()


def write_data(folder: Path, name: str, num_records: int, *, pictures: bool = True) -> Path:
    """A data file of short dialogues; every second one is about a picture, unless there are none."""
    records = []
    for index in range(num_records):
        record: dict[str, Any] = {"id": f"{name}-{index}"}
        question = f"What is {index} in words?"
        if pictures and index % 2 == 0:
            record["image"] = f"{name}-{index}.png"
            Image.fromarray(np.full((40, 40, 3), index * 20 % 256, dtype=np.uint8)).save(folder / record["image"])
            question = f"<image>\nWhich grey is number {index}?"
        answer = " ".join(["number", *("one" for _ in range(index % 5)), str(index)])
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


def run_settings(folder: Path, sources: Sequence[Path], **changes: Any) -> RunSettings:
    """Settings of a small run of the tiny model in `folder / "run"`."""
    return RunSettings.model_validate(
        {
            "output": str(folder / "run"),
            "model": MODEL.model_dump(),
            "data": {"sources": [{"path": str(path)} for path in sources], "validation": {"fraction": 0.2}},
            "train": STAGE.model_dump() | {"global_batch": 4, "micro_batch": 2, "module_learning_rates": {}},
            "engine": {"name": "torch"},
            "tracking": {"enabled": False},
            **changes,
        }
    )
