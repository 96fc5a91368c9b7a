"""What can be known before a model is loaded is told before."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from serving_makers import new_assistant

from valley.launch import launch_serving


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assistant = new_assistant()
    assistant.model.save_pretrained(tmp_path / "model")
    assistant.processor.save_pretrained(tmp_path / "model")
    return tmp_path


def launched(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["serve.py", *words])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return launch_serving("")


@pytest.mark.parametrize("where", ["plain=true", "plain=false"])
def test_a_port_that_another_server_has_is_refused(
    model: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        assert launched(monkeypatch, f"model={model}", f"port={port}", where) == 2
    assert f"port: {port} on 127.0.0.1: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["plain=true", "plain=false", "--dry-run"])
@pytest.mark.parametrize(("folder", "said"), [("nowhere", "there is no"), ("empty", "there is no model in")])
def test_a_folder_without_a_model_is_refused(
    tmp_path: Path,
    folder: str,
    said: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    assert launched(monkeypatch, f"model={tmp_path / folder}", words) == 2
    assert f"{said} {tmp_path / folder}" in capsys.readouterr().err


def test_a_plan_names_what_would_be_served(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(monkeypatch, f"model={model}", "port=8123", "--dry-run") == 0
    assert f"{model} as valley on http://127.0.0.1:8123" in capsys.readouterr().out
