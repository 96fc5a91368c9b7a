"""The server on Ray: the API in front of replicas, whose errors are ours."""

from __future__ import annotations

import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from ray import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from serving_makers import asked, data_url, new_assistant, serving, write_clip

from valley.distributed.serve import app, drain, http_options
from valley.errors import SettingsError
from valley.performance.soak import replica_processes
from valley.serving.settings import ServeSettings

pytestmark = pytest.mark.ray

PORT = 8019


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    assistant = new_assistant()
    assistant.model.save_pretrained(folder)
    assistant.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(ray_cluster: None, model: Path) -> Iterator[str]:
    """A server on the shared cluster, set up as `serve run` does, behind a proxy that others have told to listen to all."""
    arguments = {
        "model": str(model), "engine.threads": "1", "ray.cpus_per_replica": "0.5", "port": PORT,
        "limits": {"max_videos": 1},
    }  # fmt: skip
    options = http_options(ServeSettings(model=str(model), port=PORT))
    serve.start(http_options=options.model_copy(update={"host": "0.0.0.0"}))
    serve.run(app(arguments), name="valley", route_prefix="/")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()


def test_replicas_answer_what_one_process_answers(address: str, clip: Path) -> None:
    question = asked("What happens?", data_url(clip))
    with serving() as plain:
        answers = []
        for base in (plain, address):
            client = openai.OpenAI(base_url=f"{base}/v1", api_key="-", max_retries=0)
            whole = client.chat.completions.create(model="valley", messages=question, max_tokens=24)
            stream = client.chat.completions.create(model="valley", messages=question, max_tokens=24, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            answers.append((whole.choices[0].message.content, text, whole.usage.prompt_tokens))
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][1]
    assert len(answers[0][0]) > 10


def test_errors_cross_processes_as_they_are(address: str, clip: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
    cut = data_url(clip)[: 4 * 200 + len("data:video/mp4;base64,")]
    for messages, more, status, code in (
        (asked("Hi", cut), {}, 422, "media_damaged"),
        (asked("Hi"), {"max_tokens": 100_000}, 400, "context_length_exceeded"),
        (asked("Hi", data_url(clip), data_url(clip)), {}, 400, "too_many_media"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="valley", messages=messages, **more)
        assert (caught.value.status_code, caught.value.code) == (status, code)
    with urllib.request.urlopen(f"{address}/ready") as ready:
        assert b'"ready"' in ready.read()
        assert len(ready.headers.get_all("x-request-id")) == 1


def test_without_keys_other_machines_are_refused_whoever_listens(address: str) -> None:
    own = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    if not own:
        pytest.skip("this machine has no address but its own")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(
            urllib.request.Request(f"http://{own[0]}:{PORT}/v1/models", headers={"Host": "localhost"})
        )
    assert caught.value.code == 400
    assert b"no_keys" in caught.value.read()


def test_a_replica_that_is_killed_is_replaced(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=20)
    (replica,) = replica_processes("ServeReplica:valley:Model")
    replica.kill()
    answer = client.chat.completions.create(
        model="valley", messages=asked("Hi"), max_tokens=3
    )  # asks again after a 503
    assert answer.usage.completion_tokens > 0


def test_an_answer_that_is_being_written_is_finished_before_the_server_ends(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=20)
    stream = client.chat.completions.create(
        model="valley", messages=asked("Tell a long story."), max_tokens=1500, stream=True
    )
    next(stream)
    ending = threading.Thread(target=drain, args=(120.0,))
    ending.start()
    *_, last = stream
    ending.join()
    assert last.choices[0].finish_reason in ("stop", "length")
    assert not serve.status().applications


def test_wrong_arguments_are_told_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match=r"engine\.slotz.*slots"):
        app({"model": "x", "engine.slotz": "3"})
    with pytest.raises(SettingsError, match="keys"):
        app({"model": "x", "host": "0.0.0.0"})
