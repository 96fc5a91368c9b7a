"""Put a folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from valley.errors import CheckpointError


class Hub(Protocol):
    """What is asked of a hub."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Makes a repository, unless it is there."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        """Puts all files of a folder there, as one commit."""
        ...


def check_name(name: str) -> None:
    """Refuses what cannot be the name of a repository, before any work is done for it.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a name on the hub: {error}") from error


def push_folder(folder: Path, name: str, hub: Hub | None = None) -> str:
    """Puts a folder on the hub, under the account that `hf auth login` or `$HF_TOKEN` gives.

    A repository that is made for it is private: whom a model may be shown to is for its owner to say.

    Args:
        folder: what to put there.
        name: the repository, `user/name`.
        hub: where to; None: `$HF_ENDPOINT`, else huggingface.co.

    Returns:
        Where it is now.

    Raises:
        CheckpointError: it cannot be put there. The folder stays.
    """
    hub = hub or HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a Valley model"))
    except Exception as error:  # the rim: its HTTP library's errors and its own have no common base
        raise CheckpointError(f"{folder}: written, but not pushed to {name}: {error}") from error
