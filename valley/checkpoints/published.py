"""Turn weights of the original Valley code into a folder that this project loads.

SOURCE is a folder as its authors published it: a whole model (Valley2-7b), differences to a LLaMA that --base gives
(valley-13b-v1-delta), or weights of pre-training only, projector and temporal module, for a language model that --base
gives. TARGET is then loaded like any other checkpoint:

    import valley
    AutoModelForImageTextToText.from_pretrained(TARGET)
    AutoProcessor.from_pretrained(TARGET)
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from valley.checkpoints.published_config import (
    build_published_processor,
    llama_config,
    read_config,
    temporal_name,
    tower_config,
)
from valley.checkpoints.published_layout import FINAL_NORM, Kind, Layout, check_delta, find_tower, stored_rows
from valley.checkpoints.store import publish
from valley.checkpoints.weight_files import WeightFiles, write_weights
from valley.command import run_command
from valley.errors import CheckpointError
from valley.model.build import generation_config
from valley.model.configuration import ValleyConfig, ValleyVisionConfig
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor

logger = logging.getLogger(__name__)


def convert_published(
    source: Path | str, target: Path | str, base: Path | str | None = None, *, vision: Path | str | None = None
) -> Path:
    """Converts a folder of the original Valley code; tensors are read and written one shard at a time.

    Differs from the paper: the temporal module stands behind the projector, as in the published code.

    Args:
        source: the published folder.
        target: the folder to write; must not exist yet, or be empty.
        base: a LLaMA folder, for a delta or for weights of pre-training.
        vision: the CLIP folder of the tower, for its configuration, and for its weights when `source` has none; by
            default the folder that `mm_vision_tower` names, if there is one. OpenAI's towers need no configuration.

    Returns:
        `target`. The model keeps the precision of its language model.

    Raises:
        CheckpointError: something is missing, unknown or does not fit; nothing is written then.
        ModelError: the tokenizer cannot be used.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name a new folder")
    config, source_files = read_config(source), WeightFiles(source)
    clip = Path(vision) if vision is not None else _named_folder(config.get("mm_vision_tower"))
    tower = tower_config(config, source, clip)
    base_files = None if base is None else WeightFiles(Path(base))
    kind = _kind(source_files, base_files)
    processor, lacking = build_published_processor(source, None if base is None else Path(base), tower)
    if lacking and kind != "pretrain":
        raise CheckpointError(f"{source}: the tokenizer lacks {', '.join(lacking)}")

    language = base_files if kind == "pretrain" and base_files else source_files
    num_rows = max(stored_rows(language), len(processor.tokenizer))
    text = llama_config(
        config if language is source_files else read_config(language.folder), language.folder, vocab_size=num_rows
    )
    text.bos_token_id, text.eos_token_id = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    ours = _config(tower, text, temporal_name(config, source), processor)
    added = ours.added_token_ids
    if kind != "pretrain" and (outside := [token for token in added if token >= stored_rows(language)]):
        raise CheckpointError(f"{source}: the added tokens {outside} have no rows in the embedding")
    if stored := language.tensors.get(FINAL_NORM):
        ours.dtype = stored.dtype
    clip_files = None if clip is None or not _has_weights(clip) else WeightFiles(clip)
    layout = Layout(source_files, kind, base_files, *find_tower(source_files, clip_files), added)
    return _convert(layout, ours, processor, target)


def _convert(layout: Layout, config: ValleyConfig, processor: ValleyProcessor, target: Path) -> Path:
    with torch.device("meta"):
        model = ValleyForConditionalGeneration(config)
    buffers = {name for name, _ in model.named_buffers()}  # few and small: they stay in fp32, as in training
    specs: dict[str, Tensor] = {
        name: spec if name in buffers else spec.to(config.dtype) for name, spec in model.state_dict().items()
    }
    recipes = layout.recipes(specs)
    if problems := layout.problems(recipes.values()):
        raise CheckpointError("\n".join(problems))
    if layout.kind != "pretrain":
        check_delta(layout.source, layout.base)
    else:
        logger.warning("%s has no embeddings: those of the added tokens start at the mean.", layout.source.folder)
    config.architectures = [type(model).__name__]

    def write(folder: Path) -> None:
        write_weights(folder, specs, lambda name: recipes[name].cook())
        config.save_pretrained(folder)
        generation_config(processor).save_pretrained(folder)
        processor.save_pretrained(folder)

    return publish(target, write)


def _kind(source: WeightFiles, base: WeightFiles | None) -> Kind:
    """Tells by the layers of a language model what a folder holds.

    Raises:
        CheckpointError: it has none and there is no base.
    """
    if any(name.startswith("model.layers.") for name in source.tensors):
        return "whole" if base is None else "delta"
    if base is None:
        raise CheckpointError(
            f"{source.folder}: no language model here (model.layers.*, model.embed_tokens.weight, {FINAL_NORM}, "
            "lm_head.weight are missing): give the LLaMA that these weights belong to (--base)"
        )
    return "pretrain"


def _config(tower: ValleyVisionConfig, text: object, temporal: str, processor: ValleyProcessor) -> ValleyConfig:
    def id_of(token: str) -> int:
        return int(processor.tokenizer.convert_tokens_to_ids(token))

    return ValleyConfig(
        vision_config=tower,
        text_config=text,
        temporal=temporal,
        placement="after_projector",
        image_start_token_id=id_of("<im_start>"),
        image_patch_token_id=id_of("<im_patch>"),
        image_end_token_id=id_of("<im_end>"),
        video_start_token_id=id_of("<vi_start>"),
        video_frame_token_id=id_of("<vi_frame>"),
        video_end_token_id=id_of("<vi_end>"),
    )


def _named_folder(name: object) -> Path | None:
    return Path(name) if isinstance(name, str) and (Path(name) / "config.json").is_file() else None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and converts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m valley.checkpoints.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the published folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the folder to write")
    parser.add_argument("--base", type=Path, help="a LLaMA folder, for a delta or for weights of pre-training")
    parser.add_argument("--vision", type=Path, help="the CLIP folder of the vision tower, if SOURCE does not suffice")
    given = parser.parse_args(arguments)

    def job() -> None:
        logger.info("written: %s", convert_published(given.source, given.target, given.base, vision=given.vision))

    return run_command(job)


if __name__ == "__main__":
    sys.exit(main())
