"""Whom a server lets in, and what becomes of the keys."""

from __future__ import annotations

import base64
import logging
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from asking import (
    CHAT,
    HTTP,
    JSON,
    FakeBackend,
    assert_is_error,
    chat,
    connect,
    post,
    read_until,
    two_words,
)
from serving_makers import running, serve_settings

from valley.config import SettingsError
from valley.launch import launch_serving
from valley.serving.api import create_app
from valley.serving.keys import Keys, make_key


def say(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    known = {"model": "valley", "max_tokens": 6, "temperature": 0} | fields
    return client.chat.completions.create(messages=messages, **known)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    make_key(file, "bert")
    return file, make_key(file, "anna")


@pytest.fixture(scope="module")
def locked(keys: tuple[Path, str], clip: Path) -> Iterator[str]:
    settings = serve_settings(f"keys={keys[0]}", f"clips={clip.parent}")
    with running(settings, FakeBackend(two_words)) as address:
        yield address


def basic(name: str, key: str) -> str:
    return f"Basic {base64.b64encode(f'{name}:{key}'.encode()).decode()}"


def all_routes(keys: tuple[Path, str], clip: Path) -> list[tuple[str, str]]:
    app = create_app(FakeBackend(two_words), serve_settings(f"keys={keys[0]}", f"clips={clip.parent}"))
    routes: Any = app._app.routes  # type: ignore[attr-defined]
    return [(method, route.path) for route in routes for method in sorted(route.methods)]


def test_every_route_but_health_needs_a_key(locked: str, keys: tuple[Path, str], clip: Path) -> None:
    routes = all_routes(keys, clip)
    assert {("GET", "/health"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/"), ("GET", "/openapi.json")} <= {
        *routes
    }
    right = {"authorization": f"Bearer {keys[1]}"}
    for method, route in [*routes, ("GET", "/nowhere"), ("POST", "/health"), ("OPTIONS", CHAT), ("HEAD", "/health")]:
        path = re.sub("{name.*}", clip.name if "clips" in route else "valley", route)
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = HTTP.request(method, locked + path, headers=headers, timeout=30)
            if (method, path) == ("GET", "/health"):
                assert answer.status_code == 200
            else:
                assert answer.status_code == 401, (method, path)
                assert "Bearer" in answer.headers["www-authenticate"]
                assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert HTTP.request(method, locked + path, headers=right | JSON, content=b"{}").status_code != 401


def test_a_websocket_is_closed_at_the_door(locked: str) -> None:
    with connect(locked) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 40" in read_until(client, b"\r\n")


def test_a_key_comes_as_a_bearer_token_or_as_basics_password(locked: str, keys: tuple[Path, str]) -> None:
    for authorization in (f"Bearer {keys[1]}", f"bearer  {keys[1]}", basic("anna", keys[1]), basic("", keys[1])):
        assert post(locked, chat(), authorization=authorization).status_code == 200
    client = openai.OpenAI(base_url=f"{locked}/v1", api_key=keys[1], max_retries=0)
    assert say(client, [{"role": "user", "content": "?"}]).choices[0].message.content == "two words"
    with pytest.raises(openai.AuthenticationError) as caught:
        say(client.with_options(api_key="sk-wrong"), [{"role": "user", "content": "?"}])
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "wrong",
    ["", "Bearer", "KEY", "Bearer KEYx", "Bearer xKEY", "Token KEY", "Basic KEY", "Basic !!!!", "Bearer " + "k" * 30000,
     "Basic " + base64.b64encode(b"\xff:\xff").decode(), "Bearer HASH", "Bearer KEY KEY"],
)  # fmt: skip
def test_whatever_is_no_key_is_401(locked: str, keys: tuple[Path, str], wrong: str) -> None:
    digest = keys[0].read_text().split("anna: ")[1].split()[0]
    authorization = wrong.replace("KEY", keys[1]).replace("HASH", digest)
    answer = post(locked, chat(), authorization=authorization)
    said = assert_is_error(answer, 401, "invalid_api_key")
    assert ("is not known" if authorization else "is needed") in said
    assert keys[1] not in answer.text


def test_a_key_elsewhere_than_in_its_header_is_none(locked: str, keys: tuple[Path, str]) -> None:
    for name in ("key", "api_key", "authorization", "access_token"):
        answer = post(locked, chat(), f"{CHAT}?{name}={keys[1]}")
        assert_is_error(answer, 401, "invalid_api_key")
        assert keys[1] not in answer.text
    assert_is_error(post(locked, chat(), **{"x-api-key": keys[1]}), 401)
    assert_is_error(post(locked, chat(), cookie=f"authorization={keys[1]}"), 401)


def test_keys_are_neither_logged_nor_told(
    locked: str, keys: tuple[Path, str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    right = {"authorization": f"Bearer {keys[1]}"}
    answers = [
        post(locked, chat(), **right),
        post(locked, chat(model="x"), **right),
        post(locked, chat(stream=True), **right),
        post(locked, chat(), f"{CHAT}?key={keys[1]}"),
        HTTP.get(f"{locked}/metrics", headers=right),
    ]
    own = [record for record in caplog.records if record.name.startswith("valley")]
    assert [
        record.getMessage().split(" client=")[1].split()[0] for record in own if "client=" in record.getMessage()
    ] == ["anna"] * 3
    output = "".join(capfd.readouterr())
    for secret in (keys[1], keys[0].read_text().split("anna: ")[1].split()[0]):
        assert not any(secret in record.getMessage() for record in own)
        assert not any(secret in answer.text or secret in str(answer.headers) for answer in answers)
        assert secret not in output


def test_a_file_of_keys_holds_hashes_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.yaml"
    file.parent.mkdir()
    left_behind = file.with_name("keys.yaml.part")
    left_behind.touch(mode=0o644)
    keys = [make_key(file, name) for name in ("anna", "bert")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert not any(key in text or key.removeprefix("valley-") in text for key in keys)
    assert all(len(key) > 40 for key in keys)
    assert [Keys(file).name_of(f"Bearer {key}") for key in keys] == ["anna", "bert"]
    assert [path.name for path in file.parent.iterdir()] == ["keys.yaml"]
    for name in ("anna", "", "a b", "a\nb", "x" * 65, "../x"):
        with pytest.raises(SettingsError):
            make_key(file, name)


@pytest.mark.parametrize("text", ["", "[]", "anna: short", "anna: 7", "- x", "{", "\x00"])
def test_what_is_no_file_of_keys_is_no_setting(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError):
        Keys(file)
    with pytest.raises(SettingsError):
        Keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "192.168.1.7", "example.org", "127.0.0.1.example.org"])
def test_others_reach_a_server_with_keys_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(SettingsError, match="keys"):
        serve_settings(f"host={host}")
    assert serve_settings(f"host={host}", f"keys={tmp_path / 'keys'}").host == host.strip("'")


@pytest.mark.parametrize(
    ("name", "made"),
    [("keys", "nothing"), ("keys", "a file"), ("keys", "a folder"), ("clips", "nothing"), ("clips", "a file")],
)
def test_keys_and_clips_that_cannot_be_read_are_told_before_a_model_is_loaded(
    tmp_path: Path, name: str, made: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it"
    if made == "a file":
        path.write_text("anna: short")
    elif made == "a folder":
        path.mkdir()
    monkeypatch.setattr("sys.argv", ["serve.py", f"model={tmp_path / 'no model'}", "plain=true", f"{name}={path}"])
    assert launch_serving("") == 2
    assert capsys.readouterr().err.startswith(f"1 wrong setting(s):\n  {name}: {path} ")
    elsewhere = serve_settings(f"{name}={path}")  # on Ray they may lie on another machine than this
    with pytest.raises(SettingsError, match=f"^{name}: "):
        create_app(FakeBackend(two_words), elsewhere)
