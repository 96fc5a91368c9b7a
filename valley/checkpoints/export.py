"""Make a plain Hugging Face folder of a trained model.

SOURCE is a run folder, its model/, its adapter/, or one of its checkpoints/step-XXXXXXXX. In TARGET the model is whole:
any low-rank update is merged, the weights are cast and sharded, and the processor and a model card lie beside them.

    python -m valley.checkpoints.export runs/mine/adapter models/mine --dtype bf16
    python -m valley.checkpoints.export runs/mine/checkpoints/step-00000500 models/mine-500 --push me/mine-500
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from valley.checkpoints.hub import check_name, push_folder
from valley.checkpoints.model_card import CARD_FILE, write_card
from valley.checkpoints.places import to_place
from valley.checkpoints.source import TrainedModel, read_trained
from valley.checkpoints.store import publish
from valley.command import run_command
from valley.errors import CheckpointError

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_GIB = 5.0


def export_model(
    source: Path | str,
    target: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_gib: float = SHARD_GIB,
    name: str | None = None,
) -> Path:
    """Writes a trained model as a Hugging Face folder, whole or not at all.

    Args:
        source: a Hugging Face folder of this project, a run folder, a run's `adapter/`, or one of its checkpoints; of
            these, only a checkpoint may be an fsspec URI.
        target: the folder to write; must not exist yet, or be empty.
        dtype: of the weights; None: what they were trained to be used in.
        shard_gib: largest size of a weight file, in GiB.
        name: what the card calls the model, and loads it by; None: the target's name.

    Returns:
        `target`.

    Raises:
        CheckpointError: the source cannot be read, does not fit what it stands on, or cannot be held in `dtype`; or the
            target exists, or cannot be written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name a new folder")
    if not shard_gib > 0:
        raise CheckpointError(f"{target}: weight files of {shard_gib} GiB cannot be written")
    trained = read_trained(to_place(str(source)), dtype)
    try:
        return publish(target, lambda partial: _write(partial, trained, shard_gib, name or target.name))
    except OSError as error:
        raise CheckpointError(f"{target}: not written: {error}") from error


def _write(folder: Path, trained: TrainedModel, shard_gib: float, name: str) -> None:
    model: Any = trained.model
    model.config.dtype = next(model.parameters()).dtype
    if not torch.cuda.is_available():
        # Hugging Face imports DeepSpeed when it saves a model; it would ask where its GPU is.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    disable_progress_bar: Any = hf_logging.disable_progress_bar
    disable_progress_bar()
    model.save_pretrained(folder, state_dict=dict(trained.weights), max_shard_size=int(shard_gib * 2**30))
    trained.processor.save_pretrained(folder)
    card = write_card(trained, name, str(model.config.dtype).removeprefix("torch."))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and exports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m valley.checkpoints.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to export")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights; without it, that of the training")
    parser.add_argument("--shard-gib", type=float, default=SHARD_GIB, help="largest weight file, in GiB (%(default)g)")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="put the folder on the hub too; a new repository is private"
    )
    given = parser.parse_args(arguments)

    def job() -> None:
        if given.push:
            check_name(given.push)
        dtype = DTYPES[given.dtype] if given.dtype else None
        written = export_model(given.source, given.target, dtype=dtype, shard_gib=given.shard_gib, name=given.push)
        logger.info("written: %s", written)
        if given.push:
            logger.info("pushed: %s", push_folder(written, given.push))

    return run_command(job)


if __name__ == "__main__":
    sys.exit(main())
