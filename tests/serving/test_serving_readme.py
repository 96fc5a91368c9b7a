"""What the README says of serving is true: its example runs as it stands, and the cluster's file is one that Ray takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_readme_runs(
    server: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "from openai import" in block]
    (tmp_path / "samples" / "clips").mkdir(parents=True)
    shutil.copy(clip, tmp_path / "samples" / "clips" / "bikes.mp4")
    monkeypatch.chdir(tmp_path)

    exec(compile(example.replace("http://127.0.0.1:8000", server), "README.md", "exec"), {})

    said = capsys.readouterr().out
    assert "completion_tokens=" in said
    first, _, second = said.partition("\n")
    assert len(first) > 100
    assert len(second) > 20


def test_the_file_for_a_cluster_is_one_that_ray_and_we_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    from valley.config import validate
    from valley.serving.settings import ServeSettings

    tree = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    import importlib

    assert callable(getattr(importlib.import_module(module), name))
    assert validate(ServeSettings, application.args).ray.max_replicas == 8
