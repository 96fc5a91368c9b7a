"""The card of an exported model: what it is, what it learned from, how well, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from valley.checkpoints.source import TrainedModel
from valley.checkpoints.versions import software_versions
from valley.model.modeling import LORA_MARK

CARD_FILE = "README.md"
_DECIDING = ("seed", "model", "train", "lora")
_METRICS = {
    "loss_first": "training loss, first step",
    "loss_last": "training loss, last step",
    "validation_loss": "validation loss",
    "best_validation_loss": "best validation loss",
    "best_step": "step of the best",
    "steps": "steps",
    "samples": "samples",
    "tokens": "tokens",
    "frames": "frames",
    "rejected": "rejected samples",
}
_HEAD = """---
library_name: transformers
pipeline_tag: video-text-to-text
tags: [valley, video]
---
"""


def write_card(trained: TrainedModel, name: str, dtype: str) -> str:
    """Returns the text of a model card.

    Local paths are given by their last two names: where files lie on somebody's machine is nobody else's business.

    Args:
        trained: the model and what is known of it.
        name: what the model is called, and loaded by.
        dtype: precision of its weights.
    """
    sections = [
        f"{_HEAD}\n# {name.rpartition('/')[2]}\n\n{_what_it_is(trained, dtype)}",
        _use(name),
        _data(trained.settings),
        _training(trained.settings),
        _metrics(trained.summary),
        _made_by(trained),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(trained: TrainedModel, dtype: str) -> str:
    model, config, processor = trained.model, trained.model.config, trained.processor
    numbers = sum(value.numel() for name, value in model.named_parameters() if LORA_MARK not in name)
    tower, text = config.vision_config, config.text_config
    layers = getattr(text, "num_hidden_layers", "some")
    return "\n".join(
        [
            f"A video assistant ({type(model).__name__}): frames of a clip and a question in, an answer out.",
            "",
            f"- vision tower: {tower.name}, frozen; frames of {processor.size_px} pixels",
            f"- temporal module: {config.temporal}, {config.placement.replace('_', ' the ')}",
            f"- language model: {text.model_type}, {layers} layers",
            f"- prompt template: {processor.template}; frames: {_sampling(processor.sampling.model_dump())}",
            f"- {numbers:,} parameters in {dtype}; made from {trained.kind}",
        ]
    )


def _use(name: str) -> str:
    return f"""## Use

```python
import valley
model = valley.load("{name}")
print(valley.chat(model, "clip.mp4", "What happens?"))
```"""


def _data(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    data = settings["data"]
    lines = ["## Data", "", "| source | file | passes | sampling |", "| --- | --- | --- | --- |"]
    for source in data["sources"]:
        sampling = _sampling(source["sampling"] or data["sampling"])
        name = source["name"] or Path(source["path"]).name.split(".")[0]
        lines.append(f"| {name} | {_shown(source['path'])} | {source['weight']:g} | {sampling} |")
    return "\n".join(lines)


def _training(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    deciding = {key: _shorten(settings[key]) for key in _DECIDING if key in settings}
    deciding["data"] = {key: settings["data"][key] for key in ("sampling", "max_tokens")}
    return f"## Training\n\nThe settings that decided it:\n\n```yaml\n{yaml.safe_dump(deciding, sort_keys=False)}```"


def _metrics(summary: Mapping[str, Any]) -> str:
    rows = [f"| {text} | {_number(summary[key])} |" for key, text in _METRICS.items() if summary.get(key) is not None]
    return "\n".join(["## Metrics", "", "| what | value |", "| --- | --- |", *rows]) if rows else ""


def _made_by(trained: TrainedModel) -> str:
    done = {"trained": trained.versions, "exported": software_versions()}
    lines = [f"- {what} with {', '.join(f'{n} {v}' for n, v in by.items())}" for what, by in done.items() if by]
    return "\n".join(["## Made by", "", *lines]) if lines else ""


def _sampling(sampling: Mapping[str, Any]) -> str:
    if sampling["mode"] == "fixed":
        return f"{sampling['num_frames']} frames a clip"
    return f"{sampling['fps']:g} a second, at most {sampling['max_frames']}"


def _shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorten(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shorten(part) for part in value]
    return _shown(value) if isinstance(value, str) else value


def _shown(path: str) -> str:
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
