"""The decoder process reaches no network and opens nothing but the file it was given."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from io import FileIO
from pathlib import Path

import av
import pytest
from media_clips import encode

from valley.media import sandbox
from valley.media.decoders.bounds import Bounds
from valley.media.decoders.clip import Clip
from valley.media.decoders.containers import Container
from valley.media.decoders.isolation import leave_network
from valley.media.decoders.problems import Problem

needs_namespaces = pytest.mark.skipif(
    sandbox.isolation() != "namespace", reason="this system gives its processes no network namespaces"
)


@needs_namespaces
def test_a_decoder_process_has_a_network_of_its_own_with_nothing_in_it():
    for pid in sandbox.process_ids():
        assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert sandbox.process_ids()


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes someone else, which only root can")
def test_who_is_not_root_leaves_the_network_by_way_of_a_user_namespace():
    """In a fork, for the interpreter may lie where nobody else can read it."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setgid(65534)
        os.setuid(65534)
        found = leave_network()
        names = Path("/proc/self/net/dev").read_text().splitlines()[2:]
        os.write(writing, f"{found} {len(names)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found, num_devices = answer.read().split()

    assert found == "protocols" or num_devices == "1"


SCRIPTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {target}\n",
    "dash": (
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static' mediaPresentationDuration='PT9S'>"
        "<Period><AdaptationSet mimeType='video/mp2t'><Representation id='1' bandwidth='1'>"
        "<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    ),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


FORMS = [
    "{path}",
    "file:{path}",
    "file://{path}",
    "subfile,,start,0,end,99999,,:{path}",
    "http://127.0.0.1:{port}/x.ts",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("demuxer", SCRIPTS)
def test_a_demuxer_of_scripts_opens_nothing_even_when_it_is_forced(demuxer, form, tmp_path):
    """In a process that has the network: without namespaces, this is what stands between a script and the machine."""
    secret = encode(tmp_path / "secret.ts", num_frames=5)
    os.utime(secret, (1, secret.stat().st_mtime))
    script = tmp_path / "script.mp4"
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = form.format(path=secret, port=server.getsockname()[1])
        script.write_text(SCRIPTS[demuxer].format(target=target))

        with FileIO(script) as file, pytest.raises(Problem):
            read_to_the_end(file, Container("mp4", demuxer))

        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.stat().st_atime == 1
    secret.read_bytes()
    if secret.stat().st_atime == 1:
        pytest.skip("this file system does not tell who has read")


def test_what_is_forbidden_would_otherwise_happen(tmp_path):
    """FFmpeg that may use its protocols does call the host that a playlist names."""
    script = tmp_path / "script.m3u8"
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        script.write_text(SCRIPTS["hls"].format(target=target))
        server.settimeout(30)
        caller = threading.Thread(target=open_freely, args=(script,), daemon=True)
        caller.start()
        connection, _ = server.accept()
        connection.close()
    caller.join(30)


def open_freely(script: Path) -> None:
    with contextlib.suppress(av.FFmpegError):
        av.open(str(script), format="hls", options={"protocol_whitelist": "file,http,tcp"}).close()


def read_to_the_end(file: FileIO, container: Container) -> None:
    with contextlib.closing(Clip(file, container, bounds=Bounds(1 << 24))) as clip:
        clip.scan()
