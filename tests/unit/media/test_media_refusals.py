"""Files that are no media, or too much of it, are refused with the right reason, and nothing they name is opened."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading

import av
import numpy as np
import pytest
from media_clips import encode
from PIL import Image

from valley.errors import (
    EmptyMediaError,
    MediaError,
    MediaLimitError,
    MissingMediaError,
    UnsupportedMediaError,
)
from valley.media.decode import Limits, read_frames, sample_clip
from valley.media.probe import probe
from valley.media.sampling import Sampling

DECODERS = ["auto", "decord"]

TEXTS = {
    "web page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "text": (b"not a video at all\n" * 10, "text"),
    "script": (b"#!/bin/sh\nrm -rf /\n", "text"),
    "play list": (b"[playlist]\nFile1=/etc/passwd\n", "playlist"),
    "DASH": (b'<?xml version="1.0"?>\n<MPD><BaseURL>/etc/passwd</BaseURL></MPD>', "playlist"),
    "storage error": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "an XML document",
    ),
    "subtitles": (b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n", "text"),
    "zip": (b"PK\x03\x04" + bytes(100), "no container that is read"),
    "executable": (b"\x7fELF" + bytes(100), "no container that is read"),
    "zeros": (bytes(4096), "no container that is read"),
    "HEIC": (b"\x00\x00\x00\x18ftypheic" + bytes(100), "heic image"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_media_is_refused_by_its_first_bytes(name, tmp_path):
    data, reason = TEXTS[name]
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)

    for read in (lambda: probe(path), lambda: sample_clip(data, Sampling())):
        with pytest.raises(UnsupportedMediaError, match=reason):
            read()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n"),
        (".m3u8", "#EXTM3U\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n"),
        (".mp4", "ffconcat version 1.0\nfile {path}\n"),
    ],
)
def test_a_playlist_has_no_local_file_opened(decoder, suffix, text, tmp_path):
    if decoder == "decord":
        pytest.importorskip("decord")
    secret = tmp_path / "secret.ts"
    os.mkfifo(secret)  # whoever opens it for reading lets the writer below through
    opened = threading.Event()
    writer = threading.Thread(target=lambda: (os.close(os.open(secret, os.O_WRONLY)), opened.set()))
    writer.start()
    path = tmp_path / f"clip{suffix}"
    path.write_text(text.format(path=secret))

    for source in (path, path.read_bytes()):
        with pytest.raises(UnsupportedMediaError, match=r"playlist|concat script"):
            read_frames(source, [0.0], decoder=decoder)

    assert not opened.is_set()
    os.close(os.open(secret, os.O_RDONLY | os.O_NONBLOCK))
    writer.join(10)
    assert opened.is_set()


def test_a_playlist_has_no_server_asked():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        playlist = f"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:{server.getsockname()[1]}/clip.ts\n".encode()

        with pytest.raises(UnsupportedMediaError, match="playlist"):
            sample_clip(playlist, Sampling(), decoder="auto")

        with pytest.raises(TimeoutError):
            server.accept()


def test_a_missing_file_is_missing(tmp_path):
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "file").write_bytes(b"x")

    for path in ("none.mp4", "dangling.mp4", "file/inside.mp4", "x" * 300, "nul\0.mp4"):
        with pytest.raises(MissingMediaError):
            read_frames(str(tmp_path / path), [0.0])


@pytest.mark.parametrize("empty", [True, False], ids=["bytes", "file"])
def test_an_empty_file_is_empty(empty, tmp_path):
    (tmp_path / "empty.mp4").touch()

    with pytest.raises(EmptyMediaError, match="zero bytes"):
        read_frames(b"" if empty else tmp_path / "empty.mp4", [0.0])


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")

    for path in (tmp_path, tmp_path / "pipe.mp4"):
        with pytest.raises(UnsupportedMediaError, match="not a regular file"):
            read_frames(path, [0.0])


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    with pytest.raises(UnsupportedMediaError, match="no video"):
        sample_clip(path, Sampling())


def test_a_codec_that_is_not_listed_is_refused(tmp_path):
    path = encode(tmp_path / "clip.avi", "huffyuv", pix_fmt="yuv422p", num_frames=2)

    with pytest.raises(UnsupportedMediaError, match="huffyuv"):
        sample_clip(path, Sampling())


def test_limits_are_kept(clips, tmp_path):
    path = clips("long GOP")
    Image.new("RGB", (300, 200)).save(tmp_path / "image.png")

    for limits, reason in (
        (Limits(max_bytes=1000), "bytes"),
        (Limits(max_pixels=192 * 128 - 1), "192x128"),
        (Limits(max_duration_s=2.3), "the most being 2.3 s"),
    ):
        with pytest.raises(MediaLimitError, match=reason):
            probe(path, limits)
        with pytest.raises(MediaLimitError, match=reason):
            read_frames(path, [0.0], limits=limits)
    with pytest.raises(MediaLimitError, match="more than 59 pictures"):
        sample_clip(path, Sampling(), limits=Limits(max_pictures=59))
    assert len(sample_clip(path, Sampling(), limits=Limits(max_pictures=60)).pixels) == 2
    with pytest.raises(MediaLimitError, match="300x200"):
        read_frames(tmp_path / "image.png", [0.0], limits=Limits(max_pixels=59999))
    assert len(read_frames(path, [0.0], limits=Limits(max_pixels=192 * 128, max_duration_s=2.5)).pixels) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds the memory of a process")
def test_a_picture_that_takes_more_memory_than_allowed_is_refused(clips, tmp_path):
    """Decoded, it takes 256 MB."""
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png", compress_level=1)

    with pytest.raises(MediaLimitError, match="more memory needed than 150000000 bytes"):
        read_frames(
            tmp_path / "large.png", [0.0], size_px=24, limits=Limits(max_pixels=1 << 26, max_memory_bytes=150_000_000)
        )

    assert len(read_frames(clips("long GOP"), [0.0]).pixels) == 1


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_a_strip_is_refused(shape, tmp_path):
    Image.new("RGB", shape).save(tmp_path / "strip.png")

    for read in (lambda: probe(tmp_path / "strip.png"), lambda: sample_clip(tmp_path / "strip.png", Sampling())):
        with pytest.raises(MediaLimitError, match=f"strips of {shape[0]}x{shape[1]} pixels, longer than 1:100"):
            read()
    frames = read_frames(tmp_path / "strip.png", [0.0], size_px=24, limits=Limits(max_aspect_ratio=20000))
    assert frames.pixels.shape == (1, 24, 24, 3)


def test_a_clip_of_strips_is_refused(clips):
    with pytest.raises(MediaLimitError, match="strips of 192x128"):
        probe(clips("long GOP"), Limits(max_aspect_ratio=1.49))
    assert probe(clips("long GOP"), Limits(max_aspect_ratio=1.51)).width == 192


def test_an_error_names_its_file_and_survives_pickling(tmp_path):
    with pytest.raises(MediaError) as caught:
        probe(tmp_path / "none.mp4")

    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is MissingMediaError
    assert (copy.path, copy.reason) == (str(tmp_path / "none.mp4"), "no such file")
