"""A store of features in the place of a decoder."""

from __future__ import annotations

from pathlib import Path

from valley.data.loading import Clip
from valley.data.storage import StoredFile
from valley.errors import MissingMediaError, SettingsError
from valley.features.identity import TowerIdentity
from valley.features.store import FeatureStore, key_of, read_header, stamp_of
from valley.media.sampling import Sampling


class StoredFeatures:
    """What `valley.data.loading.Loader` takes its frames from when a run has `features`.

    Args:
        store: the store.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Tokens and width of a frame, N and D."""
        tower = self.store.header.tower
        return 1 + tower.num_patches, tower.dim

    def find(self, file: StoredFile, sampling: Sampling) -> Clip | None:
        """Returns the clip of a file that bears the stamp it was encoded with."""
        return self._clip(self.store.find_unread(stamp_of(file, sampling)))

    def read(self, path: str, content: Path | bytes, sampling: Sampling) -> Clip:
        """Returns the clip of a file with this content.

        Raises:
            MissingMediaError: the store has none, or one of what the file held before.
        """
        clip = self._clip(self.store.find(key_of(content, sampling)))
        if clip is None:
            raise MissingMediaError(path, "not in the feature store as the file is now, with this sampling")
        return clip

    def _clip(self, row: int | None) -> Clip | None:
        if row is None:
            return None
        found = self.store.read(row)
        return Clip(found.tokens, found.notes)


def check_features(folder: Path, tower: TowerIdentity, *, temporal: str, standardise: bool) -> None:
    """Refuses a store whose tokens are not those of a model's tower, or do not suffice for it.

    Args:
        folder: the store.
        tower: the model's.
        temporal: the model's temporal module.
        standardise: whether the tower's output is to be measured, which takes the patches of single frames.

    Raises:
        SettingsError: with every difference.
    """
    header = read_header(folder)
    problems = [f"features: {folder}: {line}" for line in header.tower.differences(tower)]
    if header.pooled and temporal != "v1":
        problems.append(f"features: {folder} is pooled: it holds means of frames, of which {temporal} can make nothing")
    if header.pooled and standardise:
        problems.append(f"features: {folder} is pooled: model.vision.standardise cannot be measured on means of frames")
    if problems:
        raise SettingsError(problems)
