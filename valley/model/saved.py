"""Where a saved model lies, and what looks like one but is not."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import CONFIG_NAME

from valley.errors import ModelError

MODEL_FOLDER = "model"
"""In a run folder: the trained model whole, in Hugging Face form."""
_NOT_WHOLE = {"manifest.json": "a training checkpoint", "base.json": "a low-rank update alone"}
"""Files that tell what else a run writes."""
_PARTS_OF_A_HUBS_NAME = 2


def saved_folder(path: str) -> str:
    """Returns the folder of a saved model: `path` itself, or `model/` in it when it is a run folder.

    What is no folder, such as a name on a hub, comes back as it is.

    Raises:
        ModelError: there is no model, or what is there must be made one first.
    """
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > _PARTS_OF_A_HUBS_NAME):
        raise ModelError(f"there is no {path}")
    for file, kind in _NOT_WHOLE.items():
        if (folder / file).is_file():
            raise ModelError(
                f"{path} is {kind}, not a model; make one of it: python -m valley.checkpoints.export {path} TARGET"
            )
    if not folder.is_dir() or (folder / CONFIG_NAME).is_file():
        return path
    if (folder / MODEL_FOLDER / CONFIG_NAME).is_file():
        return str(folder / MODEL_FOLDER)
    raise ModelError(f"there is no model in {path}: neither {CONFIG_NAME} nor {MODEL_FOLDER}/{CONFIG_NAME}")
