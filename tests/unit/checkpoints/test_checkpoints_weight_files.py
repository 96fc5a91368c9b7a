"""Weights are read and written tensor by tensor, whatever files they lie in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from valley.checkpoints.weight_files import WeightFiles, write_weights
from valley.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.ones(5, 2),
}


def test_shards_are_cut_by_size_and_hold_every_tensor_once(tmp_path: Path) -> None:
    read: list[str] = []

    def reader(name: str) -> torch.Tensor:
        read.append(name)
        return TENSORS[name]

    write_weights(tmp_path, {name: t.to("meta") for name, t in TENSORS.items()}, reader, shard_bytes=32)

    # 24 + 8 bytes, then 8, which 40 more do not go with
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 80},
        "weight_map": {
            "a": "model-00001-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00002-of-00003.safetensors",
            "d": "model-00003-of-00003.safetensors",
        },
    }
    assert read == list(TENSORS)
    files = WeightFiles(tmp_path)
    assert {name: (stored.shape, stored.dtype) for name, stored in files.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_shards_of_either_age_are_read(zipped: bool, tmp_path: Path) -> None:
    for number, names in enumerate([["a", "c"], ["b", "d"]], 1):
        path = tmp_path / f"pytorch_model-{number}.bin"
        torch.save({name: TENSORS[name] for name in names}, path, _use_new_zipfile_serialization=zipped)
    files = WeightFiles(tmp_path)
    assert files.tensors["b"].shape == (4,)
    assert files.tensors["b"].dtype == torch.bfloat16
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        WeightFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        WeightFiles(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected named tensors"):
        WeightFiles(tmp_path)


def test_a_shard_that_the_index_names_must_be_there_and_others_do_not_count(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "model-old.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in model-00001-of-00002\.safetensors and in model-old"):
        WeightFiles(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert list(WeightFiles(tmp_path).tensors) == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names files that are not here: model-2\.safetensors"):
        WeightFiles(tmp_path)
