"""A store that is filled on Ray holds what one plain process would have put into it, and is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparison_makers import write_colours
from training_makers import run_settings

from valley.data.collate import frames_tensor
from valley.distributed.encode import encode_on_ray
from valley.features.reading import StoredFeatures
from valley.features.store import FeatureStore
from valley.media.sampling import Sampling
from valley.training.encoding import EncodeSettings, encode_plain

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CLUSTER = {"num_workers": 1, "gpu": False, "cpus_per_worker": 0.5, "max_decoders": 2}


def test_a_store_filled_on_ray_is_that_of_a_plain_process_and_is_gone_on_with(tmp_path: Path) -> None:
    train, questions = write_colours(tmp_path, 40, 4)
    (tmp_path / "train-7.png").write_bytes(b"no picture")
    run = run_settings(tmp_path, [train], cluster=CLUSTER)
    tree = run.model_dump(exclude={"features"}) | {"store": {"clips_per_shard": 8}}
    jobs = {
        name: EncodeSettings.model_validate(tree | {"features": str(tmp_path / name)}) for name in ("plain", "on_ray")
    }
    encode_plain(jobs["plain"])
    encode_on_ray(jobs["on_ray"])
    found = {name: StoredFeatures(FeatureStore(Path(job.features))) for name, job in jobs.items()}
    for number in [*range(7), *range(8, 40)]:
        path = tmp_path / f"train-{number}.png"
        tokens = [
            frames_tensor(features.read(str(path), path, Sampling()).frames.copy()) for features in found.values()
        ]
        assert torch.allclose(tokens[0].float(), tokens[1].float(), atol=2e-2)
    summary = json.loads((tmp_path / "on_ray" / "summary.json").read_text())
    assert (summary["files"], summary["encoded_now"], summary["rejected"]) == (40, 39, 1)

    records = json.loads(train.read_text()) + json.loads(questions.read_text())
    train.write_text(json.dumps(records))
    encode_on_ray(jobs["on_ray"])
    again = json.loads((tmp_path / "on_ray" / "summary.json").read_text())
    assert (again["files"], again["encoded_now"], again["clips"]) == (44, 4, 43)
