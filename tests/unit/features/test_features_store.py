"""A store gives back what was put in, of the very file that it was made of, and nothing of a shard that was cut off."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_features_packing import DIM, NUM_PATCHES, TOWER, clip

from valley.data.storage import Root, StoredFile
from valley.errors import MissingMediaError, SettingsError
from valley.features.identity import StoreHeader
from valley.features.reading import StoredFeatures, check_features
from valley.features.store import FeatureStore, NewClip, key_of, open_store, stamp_of, write_shard
from valley.media.sampling import Sampling

HEADER = StoreHeader(tower=TOWER)
SAMPLING = Sampling()


def put(folder: Path, *files: Path, seed: int = 0) -> None:
    clips = []
    for index, path in enumerate(files):
        key, stamp = key_of(path, SAMPLING), stamp_of(found(path), SAMPLING)
        clips.append(NewClip(key, stamp, str(path), clip(1 + index + seed).to(torch.bfloat16), ("odd",) * (index == 1)))
    write_shard(folder, HEADER, clips)


def found(path: Path) -> StoredFile:
    return Root(str(path.parent)).find([path.name])


def files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index}.mp4" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(b"content of %d" % index)
    return paths


def tokens(features: StoredFeatures, path: Path) -> torch.Tensor:
    file = found(path)
    read = features.find(file, SAMPLING) or features.read(file.path, path, SAMPLING)
    return torch.from_numpy(read.frames.view(np.int16)).view(torch.bfloat16)


def test_clips_of_several_shards_are_found_by_their_files_and_travel(tmp_path: Path) -> None:
    first, second, third = files(tmp_path / "media", 3)
    store = tmp_path / "store"
    assert len(open_store(store, HEADER)) == 0
    put(store, first, second)
    put(store, third, seed=4)
    features = pickle.loads(pickle.dumps(StoredFeatures(FeatureStore(store))))
    assert len(features.store) == 3
    assert features.frame_shape == (1 + NUM_PATCHES, DIM)
    for path, num_frames in ((first, 1), (second, 2), (third, 5)):
        assert torch.equal(tokens(features, path), clip(num_frames).to(torch.bfloat16))
    odd = features.find(found(second), SAMPLING)
    assert odd is not None
    assert odd.notes == ("odd",)


def test_a_file_that_was_written_to_is_never_served_what_it_held_before(tmp_path: Path) -> None:
    [path] = files(tmp_path / "media", 1)
    open_store(tmp_path / "store", HEADER)
    put(tmp_path / "store", path)
    features = StoredFeatures(FeatureStore(tmp_path / "store"))
    os.utime(path, (1, 1))  # the same content with another stamp is hashed and found
    assert features.find(found(path), SAMPLING) is None
    assert len(features.read(str(path), path, SAMPLING).frames) == 1
    path.write_bytes(b"something else")
    assert features.find(found(path), SAMPLING) is None
    with pytest.raises(MissingMediaError, match="as the file is now"):
        features.read(str(path), path, SAMPLING)


def test_the_same_content_elsewhere_is_found_and_another_sampling_is_not(tmp_path: Path) -> None:
    [path] = files(tmp_path / "media", 1)
    open_store(tmp_path / "store", HEADER)
    put(tmp_path / "store", path)
    features = StoredFeatures(FeatureStore(tmp_path / "store"))
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(path.read_bytes())
    assert len(features.read("copy", copy, SAMPLING).frames) == 1
    assert len(features.read("copy", copy.read_bytes(), SAMPLING).frames) == 1
    other = Sampling(fps=1.0)
    assert features.find(found(path), other) is None
    with pytest.raises(MissingMediaError):
        features.read("copy", copy, other)


def test_a_shard_without_its_index_does_not_count_and_is_cleared_away(tmp_path: Path) -> None:
    first, second = files(tmp_path / "media", 2)
    store = tmp_path / "store"
    open_store(store, HEADER)
    put(store, first)
    put(store, second)
    for index in list(store.glob("*.parquet"))[:1]:  # killed before the rename
        index.rename(index.with_name(f".{index.name}"))
    assert len(FeatureStore(store)) == 1
    assert len(open_store(store, HEADER)) == 1
    assert len(list(store.glob("*.tokens"))) == 2, "somebody may be writing it"
    for path in [*store.glob("*.tokens"), *store.glob(".*.parquet")]:
        os.utime(path, (0, 0))
    assert len(open_store(store, HEADER)) == 1
    assert len(list(store.glob("*.tokens"))) == 1
    assert not list(store.glob(".*.parquet"))


def test_a_store_of_another_tower_or_kind_is_refused_with_every_difference(tmp_path: Path) -> None:
    open_store(tmp_path, HEADER)
    other = TOWER.model_copy(update={"weights": "ff", "layer": -2})
    with pytest.raises(SettingsError) as caught:
        open_store(tmp_path, StoreHeader(tower=other, precision="int8"))
    assert [problem.rsplit(": ", 2)[1:] for problem in caught.value.problems] == [
        ["weights", "00, not ff"],
        ["layer", "-1, not -2"],
        ["precision", "bf16, not int8"],
    ]
    with pytest.raises(SettingsError) as caught:
        check_features(tmp_path, other, temporal="v3", standardise=False)
    assert len(caught.value.problems) == 2


def test_a_pooled_store_serves_v1_alone(tmp_path: Path) -> None:
    open_store(tmp_path, StoreHeader(tower=TOWER, pooled=True))
    check_features(tmp_path, TOWER, temporal="v1", standardise=False)
    with pytest.raises(SettingsError, match="standardise"):
        check_features(tmp_path, TOWER, temporal="v1", standardise=True)
    for temporal in ("v2", "v3"):
        with pytest.raises(SettingsError, match=f"means of frames, of which {temporal}"):
            check_features(tmp_path, TOWER, temporal=temporal, standardise=False)


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no feature store: it has no store\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"holds files, but no store\.json"):
        open_store(tmp_path, HEADER)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(SettingsError, match="not a feature store's header"):
        FeatureStore(tmp_path)
