"""State cut by any number of ranks reads back for any other; generators go on where they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from valley.checkpoints.fragments import MASTER, MOMENTUM, Fragment, FragmentReader, copy_fragments, write_fragments
from valley.checkpoints.frozen import name_frozen
from valley.checkpoints.rng import restore_rng, rng_state
from valley.errors import CheckpointError


def cut(values: torch.Tensor, at: int, folder: Path) -> list[Path]:
    """Writes `values` as the parameter `a/b` from two ranks, cut at `at`."""
    paths = []
    for rank, (begin, end) in enumerate([(0, at), (at, len(values))]):
        fragment = Fragment("a/b", begin, {MASTER: values[begin:end], MOMENTUM: -values[begin:end]})
        paths.append(folder / f"{rank}.safetensors")
        write_fragments(paths[-1], copy_fragments([fragment]), optimizer_steps=12)
    return paths


def test_a_range_over_a_cut_comes_back_whole(tmp_path: Path) -> None:
    values = torch.randn(100)

    reader = FragmentReader(cut(values, 37, tmp_path))

    assert reader.optimizer_steps == 12
    assert torch.equal(reader.read("a/b", MASTER, 0, 100), values)
    assert torch.equal(reader.read("a/b", MOMENTUM, 30, 20), -values[30:50])


def test_a_range_that_nobody_wrote_is_an_error_that_names_it(tmp_path: Path) -> None:
    reader = FragmentReader(cut(torch.randn(100), 37, tmp_path)[1:])

    with pytest.raises(CheckpointError, match="a/b: master: 7 of 20 values from 30 on"):
        reader.read("a/b", MASTER, 30, 20)


def test_generators_repeat_what_followed_the_checkpoint(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # leaves a second normal cached
    save_file(rng_state(), tmp_path / "rng.safetensors")

    def draw() -> list[float]:
        numbers = [random.gauss(0, 1), random.random(), float(np.random.standard_normal()), np.random.rand()]
        return [*numbers, torch.rand(()).item()]

    first = draw()
    restore_rng(tmp_path / "rng.safetensors")

    assert draw() == first


def test_a_frozen_part_is_named_by_its_content() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    part = name_frozen("somewhere", weights.items())
    changed = {**weights, "a": weights["a"].clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(5.5))}

    assert part.num_parameters == 10
    assert name_frozen("elsewhere", reversed(weights.items())).sha256 == part.sha256
    assert name_frozen("somewhere", changed.items()).sha256 != part.sha256
    assert name_frozen("somewhere", {**weights, "a": weights["a"].view(3, 2)}.items()).sha256 != part.sha256
