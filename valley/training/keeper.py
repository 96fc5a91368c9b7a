"""What a run keeps: checkpoints to go on from, and the final model whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from valley.checkpoints import store
from valley.checkpoints.frozen import FrozenPart, name_frozen
from valley.checkpoints.places import Place
from valley.checkpoints.standardisation import read_moments
from valley.checkpoints.versions import software_versions
from valley.checkpoints.writer import Writer
from valley.model.lora import merge_lora, save_adapter
from valley.model.miniatures import LLMS
from valley.model.modeling import LORA_MARK, PARTS, ValleyForConditionalGeneration
from valley.model.saved import MODEL_FOLDER
from valley.model.settings import LoRASettings
from valley.training.engines import Engine
from valley.training.job import ADAPTER_FOLDER, Job
from valley.training.loop import FitResult
from valley.training.settings import RunSettings
from valley.training.stage import ParameterGroup, compute_dtype

logger = logging.getLogger(__name__)


class Keeper:
    """Writes checkpoints and the final model; every rank has one and calls it at the same steps.

    Args:
        job: the run.
        engine: holds weights and optimizer state.
        frozen: the parts that are named in a checkpoint instead of written.
    """

    def __init__(self, job: Job, engine: Engine, frozen: Mapping[str, FrozenPart]) -> None:
        self._job, self._engine, self.frozen = job, engine, frozen
        self._writer = Writer(
            job.checkpoints,
            rank=engine.rank,
            world_size=engine.world_size,
            agree=lambda ok: engine.all_reduce_sum([float(not ok)]) == [0.0],
            completed=self._prune,
        )

    def keep(self, result: FitResult, validation_loss: float | None) -> Place | None:
        """Begins to write a checkpoint; older ones are pruned when it is complete.

        Args:
            result: the figures so far; the number of steps among them is the checkpoint's.
            validation_loss: measured at this very step, if it was.

        Returns:
            The folder of the one before, now complete; None when there was none to finish.

        Raises:
            CheckpointError: on all ranks, when one of them could not write this one or the one before.
        """
        before = self._writer.finish()  # before the snapshot: two of them might not fit into memory
        self._writer.start(result.totals.num_steps, self._engine.snapshot(), self._describe(result, validation_loss))
        return before

    def finish(self) -> Place | None:
        """Waits for the last checkpoint; returns its folder.

        Raises:
            CheckpointError: on all ranks, when one of them could not write.
        """
        return self._writer.finish()

    def _prune(self) -> None:
        """Removes older checkpoints; what cannot be removed, as in a bucket that forbids it, is no reason to stop."""
        try:
            store.prune(self._job.checkpoints, self._job.settings.checkpoint.keep_last)
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)

    def save_model(self) -> Path:
        """Writes the whole model and its processor as a Hugging Face folder, in the precision it was trained in."""
        folder, settings = self._job.folder / MODEL_FOLDER, self._job.settings
        weights = self._engine.whole_weights(compute_dtype(settings.train))
        if self._engine.rank == 0:
            if settings.lora and any(LORA_MARK in name for name in weights):
                self._write_adapter(weights, settings.lora)
                weights = merge_lora(weights, settings.lora)
            store.publish(folder, lambda partial: self._write_model(partial, weights))
        self._engine.all_reduce_sum([0.0])
        return folder

    def _write_adapter(self, weights: Mapping[str, torch.Tensor], lora: LoRASettings) -> None:
        """Writes a low-rank update, and what trained beside it, by themselves; `model` has them merged."""
        settings = self._job.settings
        trained = {name: weights[name] for group in self._engine.groups for name in group.parameters}
        base, llm = settings.model.path or "", settings.model.llm.name
        store.publish(
            self._job.folder / ADAPTER_FOLDER, lambda partial: save_adapter(trained, lora, partial, base=base, llm=llm)
        )

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        model: Any = self._engine.model
        disable_progress_bar: Any = hf_logging.disable_progress_bar
        model.config.dtype = compute_dtype(self._job.settings.train)
        disable_progress_bar()
        model.save_pretrained(folder, state_dict=weights)
        self._job.processor.save_pretrained(folder)

    def _describe(self, result: FitResult, validation_loss: float | None) -> dict[str, Any]:
        """What the manifest of a checkpoint says: the position, and all that it must fit."""
        job, order = self._job, self._job.loader.order
        return {
            "validation_loss": validation_loss,
            "result": asdict(result),
            "position": {
                "step": result.totals.num_steps,
                "total_steps": job.total_steps,
                "seed": order.seed,
                "global_batch": order.global_batch,
                "samples_per_epoch": order.samples_per_epoch,
                "data": job.loader.manifest.content_hash,
            },
            "frozen": {part: asdict(named) for part, named in self.frozen.items()},
            "standardisation": read_moments(job.folder),
            "settings": job.settings.model_dump(mode="json"),
            "mlflow": asdict(job.mlflow) if job.mlflow else None,
            "versions": software_versions(),
        }


def name_frozen_parts(
    model: ValleyForConditionalGeneration, groups: Sequence[ParameterGroup], settings: RunSettings
) -> dict[str, FrozenPart]:
    """Names the parts that do not train by where they came from and what they hold.

    Call it before an engine takes the model apart (ZeRO-3).
    """
    trained = {group.module for group in groups}
    vision, llm = model.config.vision_config, settings.model.llm
    new = f"random, seed {settings.seed}"
    llm_weights = new if llm.name in LLMS or llm.random_weights else llm.gguf_file or ""
    sources = {"vision": f"{vision.name} {vision.pretrained or new}", "llm": f"{llm.name} {llm_weights}".strip()}
    return {
        part: name_frozen(settings.model.path or sources.get(part, new), parameters.items())
        for part in PARTS
        if part not in trained and (parameters := model.module_parameters(part))
    }
