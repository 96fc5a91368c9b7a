"""Hostile images and videos, decoded within the limits of serving: frames or an error of ours, and the next one works."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from abuse import Canary
from PIL import ExifTags, Image, PngImagePlugin

from valley.errors import (
    DamagedMediaError,
    EmptyMediaError,
    MediaError,
    MediaLimitError,
    UnsupportedMediaError,
)
from valley.media import sandbox
from valley.media.decode import Frames, sample_clip
from valley.media.sampling import Sampling
from valley.serving.sources import SourceSettings

EIGHT = Sampling(mode="fixed", num_frames=8)
ADDRESS = re.compile(r"0x[0-9a-f]{6,}|object at|<_io|<PIL|b'|b\"|/tmp|/proc|\n")
"""What no error may tell."""


def sample(data: bytes, sampling: Sampling = EIGHT) -> Frames:
    return sample_clip(data, sampling, size_px=32, limits=SourceSettings().limits)


def outcome(data: bytes) -> Frames | MediaError:
    """Frames, or an error whose text is fit for strangers; anything else is raised."""
    try:
        return sample(data)
    except MediaError as error:
        found = error
    assert not ADDRESS.search(str(found)), found
    return found


def image(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def blank_png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", optimize=True)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(name: bytes, data: bytes) -> bytes:
    """A PNG with a chunk behind its header."""
    png = image()
    return png[:33] + chunk(name, data) + png[33:]


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def exif_of_many_tags() -> bytes:
    entries = b"".join(struct.pack("<HHII", tag % 65536, 3, 1, 1) for tag in range(5400))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 65535) + entries


def clip(
    num_frames: int = 10,
    codec: str = "libx264",
    container: str = "mp4",
    *,
    size: tuple[int, int] = (64, 48),
    step_s: Fraction = Fraction(1, 25),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> bytes:
    """A clip of frames that get lighter, `step_s` apart."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        (stream.width, stream.height), stream.pix_fmt = size, pix_fmt
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            level = np.full((size[1], size[0], 3), 8 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(level, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = int(number * step_s * 25), Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def sound(container: str = "mp4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    start = data.index(mark) + offset
    return data[:start] + value + data[start + len(value) :]


def vp9(size: tuple[int, int] = (320, 320)) -> bytes:
    return clip(3, "libvpx-vp9", "webm", size=size, options={"deadline": "realtime", "cpu-used": "8"})


def vp8() -> bytes:
    return clip(1, "libvpx", "webm", options={"deadline": "realtime"})


def avi_with_playlist(playlist: bytes) -> bytes:
    """An AVI with a subtitle that is a playlist (GAB2), which FFmpeg would open within the file."""
    data = clip(codec="mpeg4", container="avi")
    header = b"GAB2\0\x02\0" + struct.pack("<I", 0) + b"\x04\0" + struct.pack("<I", len(playlist))
    text = (header + playlist).ljust(128, b"\n")
    movi = data.index(b"movi") + 4
    return data[:movi] + b"01tx" + struct.pack("<I", len(text)) + text + data[movi:]


REFUSED: dict[str, tuple[type[MediaError], Callable[[], bytes]]] = {
    "54 11,000x11,000 1-bit PNG": (MediaLimitError, lambda: blank_png(11_000)),
    "55 14,000x14,000 PNG": (MediaLimitError, lambda: blank_png(14_000)),
    "55 header of 2^31-1 squared": (
        MediaLimitError,
        lambda: (
            image()[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + image()[33:]
        ),
    ),
    "56 0-byte": (EmptyMediaError, lambda: b""),
    "56 1x10000": (MediaLimitError, lambda: image(size=(1, 10_000))),
    "56 10000x1": (MediaLimitError, lambda: image(size=(10_000, 1))),
    "56 header of 0x0": (
        DamagedMediaError,
        lambda: image()[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)) + image()[33:],
    ),
    "57 truncated PNG": (DamagedMediaError, lambda: image()[:-400]),
    "57 truncated JPEG": (DamagedMediaError, lambda: image("JPEG")[:-200]),
    "57 PNG signature alone": (DamagedMediaError, lambda: image()[:8]),
    "57 JPEG signature alone": (DamagedMediaError, lambda: image("JPEG")[:3]),
    "57 WebP header alone": (DamagedMediaError, lambda: image("WEBP")[:16]),
    "57 BMP of rubbish": (DamagedMediaError, lambda: image("BMP")[:20] + b"\xff" * 40),
    "57 bad CRC of the header": (DamagedMediaError, lambda: flipped(image(), 30)),
    "57 bad compressed data": (DamagedMediaError, lambda: flipped(image(), 43)),
    "59 TIFF": (UnsupportedMediaError, lambda: image("TIFF")),
    "59 JPEG2000": (UnsupportedMediaError, lambda: image("JPEG2000")),
    "59 AVIF": (UnsupportedMediaError, lambda: image("AVIF")),
    "59 EPS": (UnsupportedMediaError, lambda: image("EPS")),
    "59 ICO": (UnsupportedMediaError, lambda: image("ICO")),
    "59 PPM": (UnsupportedMediaError, lambda: image("PPM")),
    "59 TGA": (UnsupportedMediaError, lambda: image("TGA")),
    "59 PSD": (UnsupportedMediaError, lambda: b"8BPS\0\x01" + bytes(40)),
    "59 FITS": (UnsupportedMediaError, lambda: b"SIMPLE  =                    T".ljust(2880)),
    "59 SVG": (UnsupportedMediaError, lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "59 PDF": (UnsupportedMediaError, lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    "63 ffconcat": (UnsupportedMediaError, lambda: b"ffconcat version 1.0\nfile /etc/passwd\n"),
    "63 .sdp": (UnsupportedMediaError, lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"),
    "63 FFmetadata": (UnsupportedMediaError, lambda: b";FFMETADATA1\ntitle=x\n"),
    "64 truncated mp4": (DamagedMediaError, lambda: clip()[:-150]),
    "64 truncated webm": (DamagedMediaError, lambda: vp9()[:-60]),
    "64 moov missing": (DamagedMediaError, lambda: clip().split(b"moov")[0][:-4]),
    "64 ftyp alone": (DamagedMediaError, lambda: clip()[:32]),
    "65 header that claims 10^9 frames": (
        DamagedMediaError,
        lambda: patched(clip(), b"stsz", 12, struct.pack(">I", 10**9)),
    ),
    "65 pictures that claim 16,383x16,383": (
        DamagedMediaError,
        lambda: patched(vp8(), b"\x9d\x01\x2a", 3, b"\xff\x3f" * 2),
    ),
    "66 24 h, black": (MediaLimitError, lambda: clip(25, step_s=Fraction(3600))),
    "66 24 h, black, Matroska": (MediaLimitError, lambda: clip(25, container="matroska", step_s=Fraction(3600))),
    "68 audio only": (UnsupportedMediaError, sound),
    "68 audio only, Matroska": (UnsupportedMediaError, lambda: sound("matroska")),
    "68 subtitle only": (UnsupportedMediaError, lambda: b"1\n00:00:00,000 --> 00:00:01,000\nHello\n"),
    "70 codec that is not read": (UnsupportedMediaError, lambda: clip(2, "huffyuv", "avi", pix_fmt="yuv422p")),
}


@pytest.mark.parametrize(("error", "make"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_file_is_refused_for_the_right_reason(error, make):
    assert type(found := outcome(make())) is error, found


def test_70_the_codec_is_named():
    with pytest.raises(UnsupportedMediaError, match="huffyuv"):
        sample(clip(2, "huffyuv", "avi", pix_fmt="yuv422p"))


USED: dict[str, tuple[int, Callable[[], bytes]]] = {
    "56 1x1": (1, lambda: image(size=(1, 1))),
    "56 2x2 palette": (1, lambda: image(mode="P", size=(2, 2))),
    "57 bad ICC": (1, lambda: image("JPEG", icc_profile=b"\xff" * 500)),
    "58 CMYK": (1, lambda: image("JPEG", "CMYK")),
    "58 16-bit": (1, lambda: image(mode="I;16")),
    "58 LA": (1, lambda: image(mode="LA")),
    "58 P with alpha": (1, lambda: image(mode="P", transparency=0)),
    "58 animated WebP: the first picture": (
        1,
        lambda: image("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    ),
    "58 APNG: the first picture": (1, lambda: image(save_all=True, append_images=[Image.new("RGB", (40, 30))])),
    "58 animated GIF: a video": (2, lambda: image("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))])),
    "60 text chunk of 900 KB": (1, lambda: with_chunk(b"tEXt", b"key\0" + b"x" * 900_000)),
    "65 sample entry that claims 65,535x65,535": (8, lambda: patched(clip(), b"avc1\0", 28, b"\xff" * 4)),
    "65 time table that claims 10^9 frames": (8, lambda: patched(clip(), b"stts", 12, struct.pack(">I", 10**9))),
    "65 header that claims 65,535x65,535": (
        3,
        lambda: patched(patched(vp9(), b"\xb0\x82\x01\x40", 2, b"\xff\xff"), b"\xba\x82\x01\x40", 2, b"\xff\xff"),
    ),
    "68 one frame": (1, lambda: clip(1)),
    "68 2 frames but 8 asked": (2, lambda: clip(2)),
    "69 odd width": (3, lambda: vp9((321, 239))),
    "69 10 bits": (8, lambda: clip(pix_fmt="yuv420p10le")),
}


@pytest.mark.parametrize(("num_frames", "make"), USED.values(), ids=USED)
def test_an_odd_file_has_a_defined_result(num_frames, make):
    found = outcome(make())

    assert isinstance(found, Frames), found
    assert found.pixels.shape == (num_frames, 32, 32, 3)


def many_texts() -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(100):
        info.add_text(f"key{number}", "x" * (1 << 20), zip=True)
    return image(pnginfo=info)


EITHER: dict[str, Callable[[], bytes]] = {
    "57 bad CRC of the picture": lambda: flipped(image(), len(image()) - 14),
    "57 bad EXIF": lambda: image("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "57 EXIF orientation that is no number": lambda: image(
        "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0"
    ),
    "60 text chunk of 5 MB": lambda: with_chunk(b"tEXt", b"key\0" + b"x" * 5_000_000),
    "60 text chunk that unpacks to 100 MB": lambda: with_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100 << 20))),
    "60 colour profile that unpacks to 100 MB": lambda: with_chunk(
        b"iCCP", b"key\0\0" + zlib.compress(bytes(100 << 20))
    ),
    "60 100 text chunks that unpack to 1 MB each": many_texts,
    "60 65,535 tags": lambda: image("JPEG", exif=exif_of_many_tags()),
    "63 AVI with embedded playlist subtitle": lambda: avi_with_playlist(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"),
    "65 header that claims 10^9 bytes a frame": lambda: patched(clip(), b"stsz", 8, struct.pack(">I", 10**9)),
    "65 length that claims 10^9 s": lambda: patched(clip(), b"mvhd", 20, b"\x7f\xff\xff\xff"),
    "68 negative times": lambda: patched(clip(), b"elst", 16, struct.pack(">i", -5000)),
}


@pytest.mark.parametrize("make", EITHER.values(), ids=EITHER)
def test_a_file_that_is_half_right_gives_frames_or_an_error_of_ours(make):
    outcome(make())


def test_71_random_damage_ends_in_frames_or_an_error_of_ours():
    """Of every container: bytes changed, cut out and put in at random, by a fixed seed."""
    dice = np.random.default_rng(7)
    files = [image(), image("JPEG"), image("WEBP"), image("GIF"), clip(), clip(codec="mpeg4", container="avi"), vp9()]
    for data in files * 8:
        damaged = bytearray(data)
        for _ in range(int(dice.integers(1, 12))):
            position = int(dice.integers(4, len(damaged)))
            damaged[position : position + int(dice.integers(0, 3))] = dice.bytes(int(dice.integers(0, 3)))
        outcome(bytes(damaged))

    assert isinstance(outcome(clip()), Frames)


CALLS_HOME = {
    "62 HLS playlist that references http://internal/": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "62 HLS master playlist": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
    "62 HLS key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:9,\nx.ts\n',
    "62 HLS behind a byte order mark": "\ufeff#EXTM3U\n#EXTINF:9,\n{url}\n",
    "63 ffconcat": "ffconcat version 1.0\nfile {url}\n",
    "63 DASH": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period><BaseURL>{url}</BaseURL></Period></MPD>",
    "63 SDP": "v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
    "63 SMIL": "<smil><body><video src='{url}'/></body></smil>",
    "63 PLS": "[playlist]\nFile1={url}\n",
    "63 ASX": "<asx version='3.0'><entry><ref href='{url}'/></entry></asx>",
    "63 RTSP text": "RTSPtext\nrtsp://127.0.0.1:{port}/\n",
    "59 SVG with an image": "<svg xmlns:x='http://www.w3.org/1999/xlink'><image x:href='{url}'/></svg>",
}


@pytest.mark.parametrize("text", CALLS_HOME.values(), ids=CALLS_HOME)
def test_what_a_script_names_is_not_called(text, bird: Canary):
    data = text.replace("{url}", f"http://127.0.0.1:{bird.port}/x.ts").replace("{port}", str(bird.port)).encode()

    assert isinstance(outcome(data), UnsupportedMediaError)
    assert bird.connections() == 0


def test_63_what_a_playlist_within_a_container_names_is_not_called(bird: Canary):
    playlist = f"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:{bird.port}/x.ts\n".encode()

    for data in (avi_with_playlist(playlist), clip()[:32] + playlist, b"\x1a\x45\xdf\xa3" + playlist):
        outcome(data)
    assert bird.connections() == 0


def test_58_the_camera_s_orientation_is_honoured():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = image("JPEG", size=(40, 20), exif=exif, quality=95)

    assert sample_clip(data, EIGHT, limits=SourceSettings().limits).pixels.shape == (1, 40, 20, 3)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_72_the_memory_of_a_decoder_stays_flat():
    files = [clip(), image(), image("JPEG"), clip()[:-150]]

    def resident_bytes_after(rounds: int) -> int:
        for data in files * rounds:
            outcome(data)
        with sandbox.reading(files[0], SourceSettings().limits, decoder="auto", frames=False) as reading:
            pages = Path(f"/proc/{reading.process_id}/statm").read_text().split()[1]
        return int(pages) * 4096

    warm = resident_bytes_after(20)
    assert resident_bytes_after(100) < warm + (24 << 20)
