"""What the README says of serving is true: its examples run as they stand, and the cluster's file is one that Ray takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from valley.config import describe, validate
from valley.serving.schema import ChatRequest
from valley.serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("\n## Serve it\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
OTHERS = {"video_url", "image_url", "http_options", "namespace", "protocols", "valley_time_to_first_token_seconds"}
"""Words in backticks that are neither settings nor fields of a request."""


def test_the_examples_of_the_readme_run(
    server: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question, examples = EXAMPLES
    (tmp_path / "samples" / "clips").mkdir(parents=True)
    for name in re.findall(r"samples/clips/\w+\.mp4", "".join(EXAMPLES)):
        shutil.copy(clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(compile(question.replace("http://127.0.0.1:8000", server), "README.md", "exec"), names)

    said = capsys.readouterr().out
    assert "completion_tokens=" in said
    first, _, second = said.partition("\n")
    assert len(first) > 100
    assert len(second) > 20
    seen = names["answer"].usage.prompt_tokens_details.visual_tokens

    exec(compile(examples, "README.md", "exec"), names)

    assert len(capsys.readouterr().out) > 20
    assert names["answer"].usage.prompt_tokens_details.visual_tokens == 2 * seen > 0
    assert names["messages"][0]["role"] == "system"
    assert "you need to think step by step" in names["messages"][0]["content"].lower()


def test_commands_and_settings_of_the_readme_exist() -> None:
    settings = {path for path, *_ in describe(ServeSettings)}
    groups = {path.rpartition(".")[0] for path in settings}
    prose = re.sub(r"```python.*?```", "", SECTION, flags=re.DOTALL)
    assert set(re.findall(r"[\s`']([a-z_.]+)=", prose)) <= settings
    words = set(re.findall(r"`([a-z_.0-9]+)`", prose))
    assert words <= settings | groups | set(ChatRequest.model_fields) | OTHERS
    assert {"limits.max_videos", "engine.chunk_tokens", "keys"} <= words
    for path in re.findall(r"(?:jobs|cluster)/\w+\.\w+", prose):
        assert (ROOT / path).exists()
    targets = re.findall(r"^make ([\w-]+)", prose, re.MULTILINE)
    assert targets
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


def test_the_file_for_a_cluster_is_one_that_ray_and_we_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / "cluster" / "serve.yaml").read_text()
    tree = yaml.safe_load(text)
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    import importlib

    assert callable(getattr(importlib.import_module(module), name))
    assert validate(ServeSettings, application.args).ray.max_replicas == 8
    opened = yaml.safe_load(text.replace("# keys:", "keys:"))["applications"][0]["args"]
    assert validate(ServeSettings, opened | {"host": "0.0.0.0"}).keys
