"""A trained model out of whatever a run leaves behind: its final model, its low-rank update, or a checkpoint.

model/                       the whole model
adapter/                     a low-rank update and what trained beside it, for the model named in `base.json`
checkpoints/step-00000500/   what trains; the frozen parts are built again from the run's settings and compared
                             with the hashes in the manifest
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from valley.checkpoints import store
from valley.checkpoints.frozen import name_frozen
from valley.checkpoints.places import Place, on_disk
from valley.checkpoints.standardisation import read_moments
from valley.data.manifest import differing_sampling
from valley.data.settings import SourceSettings
from valley.errors import CheckpointError, ModelError
from valley.media.sampling import Sampling
from valley.model.build import build_model, load_saved
from valley.model.configuration import ValleyConfig
from valley.model.lora import ADAPTER_WEIGHTS, BASE_FILE, add_lora, merge_adapter, merge_lora
from valley.model.modeling import PARTS, ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor, build_processor, load_saved_processor
from valley.model.saved import MODEL_FOLDER, saved_folder
from valley.model.settings import LoRASettings, ModelSettings

RUN_SETTINGS = "settings.yaml"
RUN_SUMMARY = "summary.json"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, yaml.YAMLError)
"""What damaged files raise: pydantic's ValidationError is a ValueError, a wrong shape a RuntimeError."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, and what is known of how it came to be.

    Attributes:
        kind: what it was read from, in words.
        model: its class and configuration; its weights may still have an update beside them.
        weights: the whole model's, by name, any update merged.
        processor: its processor.
        settings: of the run, as they were written down; empty when unknown.
        summary: what the run amounted to, or what is known of this step of it; empty when unknown.
        versions: of the software that trained it, as far as known.
    """

    kind: str
    model: ValleyForConditionalGeneration
    weights: Mapping[str, Tensor]
    processor: ValleyProcessor
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def read_trained(path: Place, dtype: torch.dtype | None) -> TrainedModel:
    """Reads a trained model.

    Args:
        path: a Hugging Face folder of this project, a run folder, a run's `adapter/`, or one of its checkpoints, which
            alone may lie in an object store.
        dtype: what the weights become; None: what they were trained to be used in.

    Raises:
        CheckpointError: it is none of these, cannot be read, does not fit what it stands on, or that has changed.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    try:
        if (path / store.MANIFEST).is_file() or (path / "rank-00000").is_dir():
            return _read_checkpoint(store.read(path), dtype)
        if not isinstance(path, Path):
            raise CheckpointError(f"{path}: of object stores, only training checkpoints (…/step-…) are read")
        if (path / BASE_FILE).is_file():
            return _read_adapter(path, dtype)
        return _read_folder(path, dtype)
    except (ModelError, *_UNREADABLE) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_folder(path: Path, dtype: torch.dtype | None) -> TrainedModel:
    try:
        folder = Path(saved_folder(str(path)))
    except ModelError:
        raise CheckpointError(
            f"{path}: nothing to export: expected a Hugging Face folder of this project, a run folder with a model in "
            "it, a run's adapter/, or one of its checkpoints/step-…"
        ) from None
    if dtype is None:
        saved = ValleyConfig.from_pretrained(folder).dtype
        dtype = saved if isinstance(saved, torch.dtype) else torch.float32
    model = load_saved(str(folder), dtype=dtype)
    of_run = folder.name == MODEL_FOLDER
    return TrainedModel(
        "a saved model",
        model,
        _weights_in(model, dtype),
        load_saved_processor(str(folder)),
        settings=_run_settings(folder.parent) if of_run else {},
        summary=_run_summary(folder.parent) if of_run else {},
    )


def _read_adapter(folder: Path, dtype: torch.dtype | None) -> TrainedModel:
    base: str = json.loads((folder / BASE_FILE).read_text())["model"]
    settings = _run_settings(folder.parent)
    if not settings and not base:
        raise CheckpointError(f"{folder}: it stands on a new model, which only the run's {RUN_SETTINGS} describes")
    chosen = ModelSettings.model_validate(settings["model"]) if settings else ModelSettings(path=base)
    dtype = dtype or _stored_dtype(folder / ADAPTER_WEIGHTS)
    model = build_model(chosen, seed=settings.get("seed", 0), dtype=dtype)
    if moments := read_moments(folder.parent):
        model.standardisation.set_moments(moments)
    merge_adapter(folder, model)
    processor = _processor(settings) if settings else load_saved_processor(base)
    return TrainedModel(
        "a low-rank update, merged into the model it stands on",
        model,
        _weights_in(model, dtype),
        processor,
        settings=settings,
        summary=_run_summary(folder.parent),
    )


def _read_checkpoint(checkpoint: store.Checkpoint, dtype: torch.dtype | None) -> TrainedModel:
    """Rebuilds the model as the run built it, so that frozen parts hash as they did, then puts in what was trained."""
    settings: Mapping[str, Any] = checkpoint.info["settings"]
    stage = settings["train"]
    compute_dtype = torch.bfloat16 if stage["precision"] == "bf16" else torch.float32
    lora = LoRASettings.model_validate(settings["lora"]) if settings.get("lora") and "llm" in stage["modules"] else None
    model = build_model(ModelSettings.model_validate(settings["model"]), seed=settings["seed"], dtype=compute_dtype)
    if lora:
        add_lora(model, lora, seed=settings["seed"])
    _compare_frozen(checkpoint, model)
    _put_in(checkpoint, model)
    if moments := checkpoint.info.get("standardisation"):
        model.standardisation.set_moments(moments)
    weights = _weights_in(model, dtype or compute_dtype)
    is_last = checkpoint.step == checkpoint.info["position"]["total_steps"]
    known = {"steps": checkpoint.step, "validation_loss": checkpoint.validation_loss}
    return TrainedModel(
        f"the training checkpoint after {checkpoint.step} steps",
        model,
        merge_lora(weights, lora) if lora else weights,
        _processor(settings),
        settings=settings,
        summary=(is_last and _run_summary(checkpoint.path.parent.parent)) or known,
        versions=checkpoint.info.get("versions", {}),
    )


def _compare_frozen(checkpoint: store.Checkpoint, model: ValleyForConditionalGeneration) -> None:
    for part, named in checkpoint.info["frozen"].items():
        found = name_frozen(named["source"], model.module_parameters(part).items())
        if found.sha256 != named["sha256"]:
            raise CheckpointError(
                f"{checkpoint.path}: the frozen part {part!r} ({named['source']}) is not what this was trained with: "
                f"expected sha256 {named['sha256']}, found {found.sha256}"
            )


def _put_in(checkpoint: store.Checkpoint, model: ValleyForConditionalGeneration) -> None:
    """Replaces the parameters of all parts that are not frozen by the checkpoint's."""
    path = checkpoint.rank_folder(0) / store.WEIGHTS_FILE
    entry = checkpoint.files[f"{path.parent.name}/{path.name}"]
    with on_disk(path) as file:
        if (found := store.hash_file(file)) != entry.sha256:
            raise CheckpointError(f"{path}: expected sha256 {entry.sha256}, found {found}")
        trained = load_file(file)
    parts = [part for part in PARTS if part not in checkpoint.info["frozen"]]
    parameters = {name: value for part in parts for name, value in model.module_parameters(part).items()}
    if odd := sorted(parameters.keys() ^ trained.keys()):
        raise CheckpointError(f"{path}: does not fit the model of its settings: {', '.join(odd[:5])}")
    for name, value in trained.items():
        if value.shape != parameters[name].shape:
            shapes = f"expected {tuple(parameters[name].shape)}, found {tuple(value.shape)}"
            raise CheckpointError(f"{path}: {name}: {shapes}")
        parameters[name].data = value


def _weights_in(model: ValleyForConditionalGeneration, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the state dict, parameters in `dtype`; what is one weight under two names stays one.

    Buffers stay as they are: they are few and small.
    """
    for name, parameter in model.named_parameters():
        value = parameter.data.to(dtype)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} is not finite, or too large for {str(dtype).removeprefix('torch.')}")
        parameter.data = value
    return dict(model.state_dict())


def _processor(settings: Mapping[str, Any]) -> ValleyProcessor:
    """The processor as the run built it."""
    data = settings["data"]
    sampling = Sampling.model_validate(data["sampling"])
    processor = build_processor(ModelSettings.model_validate(settings["model"]), sampling)
    sources = [SourceSettings.model_validate(source) for source in data["sources"]]
    processor.source_sampling = differing_sampling(sources, sampling)
    return processor


def _stored_dtype(path: Path) -> torch.dtype:
    with safe_open(path, framework="pt") as file:
        name = next(iter(file.keys()))
        dtype: torch.dtype = file.get_tensor(name).dtype
    return dtype


def _run_settings(run: Path) -> dict[str, Any]:
    """The settings that a run wrote down; empty when there are none, or when the file is something else."""
    path = run / RUN_SETTINGS
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) and found.keys() >= {"seed", "model", "data", "train"} else {}


def _run_summary(run: Place) -> dict[str, Any]:
    path = run / RUN_SUMMARY
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
