"""LoRA: a low-rank update beside the language model's linear layers, instead of new values for all of its weights.

peft puts the update's layers into the language model. Everything else about the model stays as it is: its class, its
other names, its forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from valley.errors import ModelError
from valley.model.modeling import LORA_MARK, PARTS, ValleyForConditionalGeneration
from valley.model.settings import LoRASettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = "other_weights.safetensors"
BASE_FILE = "base.json"
_BASE = ".base_layer."
# A state dict tells of a layer no more than its name, and a square weight does not show which way it lies: so peft's
# name of the update says it. Conv1D (GPT-2) keeps its weight as [in, out].
_LINEAR, _CONV1D = "default", "conv1d"
_LLM = f"{PARTS['llm']}."
_PEFT_PREFIX = "base_model.model."


def add_lora(model: ValleyForConditionalGeneration, settings: LoRASettings, *, seed: int) -> None:
    """Puts a new update, which changes nothing yet, into the language model.

    Args:
        model: a model without one.
        settings: its rank, scale and places.
        seed: of its first factors; the second begin at 0.

    Raises:
        ModelError: the language model has none of the places, or one of them is not a linear layer of its own.
    """
    from peft import inject_adapter_in_model

    has_conv1d = any(isinstance(layer, Conv1D) for layer in model.language_model.modules())
    adapter = _CONV1D if has_conv1d else _LINEAR
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_peft_config(settings, adapter), model.language_model, adapter_name=adapter)
        except ValueError as error:
            raise ModelError(f"lora.targets: {settings.targets}: {error}") from error
    _check_places(model, settings, Conv1D if has_conv1d else nn.Linear)


def _check_places(model: ValleyForConditionalGeneration, settings: LoRASettings, kind: type[nn.Module]) -> None:
    """Refuses an update that could not be merged at the end."""
    from peft.tuners.lora import LoraLayer

    embeddings: Any = model.get_input_embeddings()
    for name, layer in model.language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        found = layer.get_base_layer()
        if not isinstance(found, kind):
            raise ModelError(
                f"lora.targets: {settings.targets}: {name} is a layer of class {type(found).__name__}; in this "
                f"language model only those of class {kind.__name__} can have an update"
            )
        # Embeddings may have got an update of their own by now, and are then told by the check above.
        if found.weight is getattr(embeddings, "weight", None):
            raise ModelError(
                f"lora.targets: {settings.targets}: {name} shares its weights with the input embeddings: an update of "
                "the one would change the other"
            )


def merge_lora(weights: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, Tensor]:
    """Returns a whole state dict with the update added to the weights it stands beside: W + scale * B A.

    Args:
        weights: of a model with an update, by their names.
        settings: the update's.

    Returns:
        The weights of a plain model, in the precision they came in; tensors without an update are not copied.
    """
    merged = {}
    for name, value in weights.items():
        if LORA_MARK in name:
            continue
        plain = name.replace(_BASE, ".")
        place = plain.removesuffix(".weight")
        if plain != name and plain.endswith(".weight"):
            adapter = _CONV1D if f"{place}.lora_A.{_CONV1D}.weight" in weights else _LINEAR
            down, up = (weights[f"{place}.lora_{factor}.{adapter}.weight"] for factor in "AB")
            merged[plain] = _add(value, down, up, settings, transposed=adapter == _CONV1D)
        else:
            merged[plain] = value
    return merged


def save_adapter(weights: Mapping[str, Tensor], settings: LoRASettings, folder: Path, *, base: str, llm: str) -> None:
    """Writes what was trained: the update as peft reads it, the other trained weights, and what they stand on.

    Args:
        weights: what was trained, by its names in the model.
        settings: the update's.
        folder: where to.
        base: the Valley model that the training began from.
        llm: name or path of its language model, for peft.
    """
    has_conv1d = any(f".{_CONV1D}." in name for name in weights if LORA_MARK in name)
    config = _peft_config(settings, _CONV1D if has_conv1d else _LINEAR)
    config.base_model_name_or_path = llm
    config.save_pretrained(folder)
    update = {_peft_name(name): value for name, value in weights.items() if LORA_MARK in name}
    others = {name: value for name, value in weights.items() if LORA_MARK not in name}
    save_file(update, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_file(others, folder / OTHER_WEIGHTS)
    (folder / BASE_FILE).write_text(json.dumps({"model": base, "lora": settings.model_dump(mode="json")}, indent=1))


def merge_adapter(folder: Path, base: ValleyForConditionalGeneration) -> None:
    """Adds what `save_adapter` wrote to the model it was trained from.

    Raises:
        ModelError: it does not fit.
    """
    settings = LoRASettings.model_validate(json.loads((folder / BASE_FILE).read_text())["lora"])
    update, others = load_file(folder / ADAPTER_WEIGHTS), load_file(folder / OTHER_WEIGHTS)
    state = base.state_dict()
    places = {name.removesuffix(".lora_A.weight") for name in update if name.endswith(".lora_A.weight")}
    new = dict(others)
    for place in places:
        name = f"{_LLM}{place.removeprefix(_PEFT_PREFIX)}.weight"
        if name not in state:
            raise ModelError(f"{folder}: an update of {name}, which the base model does not have")
        down, up = (update[f"{place}.lora_{factor}.weight"] for factor in "AB")
        is_conv1d = isinstance(base.get_submodule(name.removesuffix(".weight")), Conv1D)
        new[name] = _add(state[name], down, up, settings, transposed=is_conv1d)
    found: Any = base.load_state_dict(new, strict=False)
    if found.unexpected_keys:
        raise ModelError(f"{folder}: the base model does not have {', '.join(found.unexpected_keys[:5])}")


def _add(weight: Tensor, down: Tensor, up: Tensor, settings: LoRASettings, *, transposed: bool) -> Tensor:
    """A weight with its update added; `transposed`: the weight is kept as [in, out]."""
    change = settings.scale * (up.float() @ down.float())
    return (weight.float() + (change.T if transposed else change)).to(weight.dtype)


def _peft_config(settings: LoRASettings, adapter: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        bias="none",
        fan_in_fan_out=adapter == _CONV1D,
        task_type="CAUSAL_LM",
    )


def _peft_name(name: str) -> str:
    """The name that peft gives a weight of the language model's update in a file."""
    plain = name.removeprefix(_LLM).replace(f".{_LINEAR}.weight", ".weight").replace(f".{_CONV1D}.weight", ".weight")
    return _PEFT_PREFIX + plain
