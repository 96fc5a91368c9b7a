"""What a URL in a request stands for: exactly the bytes meant, or an error that names the place in the request."""

from __future__ import annotations

import ast
import asyncio
import base64
import io
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from abuse import HOST, SECRET, Canary, Host, Names, local_fetcher, response, serving
from PIL import Image

import valley.serving
from valley.config import SettingsError, validate
from valley.errors import (
    EmptyMediaError,
    MediaError,
    MediaLimitError,
    MissingMediaError,
    RefusedMediaError,
    UnsupportedMediaError,
)
from valley.media.fetch import Fetcher, FetchSettings
from valley.serving.sources import Kind, Source, SourceSettings, read_source

LABEL = "messages[0].content[1]"


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


PNG, JPEG, GIF = picture(), picture("JPEG"), picture("GIF")
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(64)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(url: str, kind: Kind = "image", fetcher: Fetcher | None = None, **settings: object) -> Source:
    async def run() -> Source:
        own = fetcher or Fetcher(FetchSettings(), Names({}))
        return await read_source(url, kind, validate(SourceSettings, settings), own, LABEL)

    return asyncio.run(run())


def refusal(error_type: type[MediaError], url: str, kind: Kind = "image", **settings: object) -> str:
    """The reason for which a URL is refused; the error names the place in the request and nothing of this machine."""
    with pytest.raises(MediaError) as caught:
        read(url, kind, **settings)
    assert type(caught.value) is error_type, caught.value
    assert caught.value.path == LABEL
    for text in ("/etc", "/tmp", "secret", "Errno", "object at"):
        assert text not in caught.value.reason
    return caught.value.reason


OTHER_URLS = {
    "24 bare path": "/etc/passwd",
    "24 relative path": "../x.jpg",
    "24 path of a home": "~/x.jpg",
    "24 Windows path": "C:\\x.jpg",
    "an empty URL": "",
    "a scheme alone": "https",
    "an S3 URL": "s3://bucket/x.jpg",
    "an FTP URL": "ftp://host.example/x.jpg",
    "a blob URL": "blob:https://host.example/1",
    "FFmpeg's concat": "concat:/etc/passwd|/etc/hosts",
    "FFmpeg's subfile": "subfile,,start,0,end,9,,:/etc/passwd",
    "FFmpeg's pipe": "pipe:0",
    "bare base64": b64(PNG),
    "blank before the scheme": f" data:image/png;base64,{b64(PNG)}",
}


@pytest.mark.parametrize("url", OTHER_URLS.values(), ids=OTHER_URLS)
def test_other_urls_are_refused(url):
    refusal(RefusedMediaError, url)


FILE_URLS = {
    "25 ..": "file://{root}/../secret.png",
    "25 %2e%2e": "file://{root}/%2e%2e/secret.png",
    "25 encoded slash": "file://{root}/..%2fsecret.png",
    "25 .": "file://{root}/./in.png",
    "25 root itself": "file://{root}",
    "25 root with a slash": "file://{root}/",
    "25 two slashes": "file://{root}//in.png",
    "25 above the root": "file:///",
    "23 outside": "file:///etc/passwd",
    "28 prefix confusion": "file://{root}2/secret.png",
    "host": "file://localhost{root}/in.png",
    "host that is a folder": "file://root/in.png",
    "one slash": "file:{root}/in.png",
    "four slashes": "file:///{root}/in.png",
    "query": "file://{root}/in.png?x",
    "fragment": "file://{root}/in.png#x",
    "NUL": "file://{root}/in.png%00.txt",
    "not UTF-8": "file://{root}/%ff.png",
    "26 link out of the root": "file://{root}/out.png",
    "26 link inside the root": "file://{root}/inside.png",
    "26 folder that is a link out": "file://{root}/up/secret.png",
    "27 folder": "file://{root}/folder",
    "27 FIFO": "file://{root}/fifo",
    "27 link to /dev/zero": "file://{root}/zero",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that files may be read from, with traps in it and a secret beside it."""
    folder = tmp_path / "root"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "root2" / "secret.png", folder / "in.png"):
        path.write_bytes(PNG)
    (folder / "a b%2e.png").write_bytes(PNG)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("a secret\n")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to("in.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("url", FILE_URLS.values(), ids=FILE_URLS)
def test_a_file_url_that_leads_elsewhere_is_refused(url, root):
    refusal(RefusedMediaError, url.replace("{root}", str(root)), media_root=str(root))


@pytest.mark.parametrize("name", ["in.png", "etc/passwd", "%2e%2e/secret.png"])
def test_23_without_a_root_no_file_is_read(name, root):
    assert "servers that have a media.media_root" in refusal(RefusedMediaError, f"file://{root}/{name}")


def test_a_file_below_the_root_is_read(root):
    for name in ("in.png", "a%20b%252e.png"):
        assert read(f"file://{root}/{name}", media_root=str(root)).data == PNG
    linked = root.parent / "linked"
    linked.symlink_to(root)
    assert read(f"file://{linked}/in.png", media_root=str(linked)).data == PNG


MISSING = {
    "nothing there": "nothing.png",
    "25 double-encoded ..": "%252e%252e/secret.png",
    "below a file": "in.png/x",
    "below a FIFO": "fifo/x",
    "too long a name": "x" * 300,
}


@pytest.mark.parametrize("name", MISSING.values(), ids=MISSING)
def test_a_file_that_is_not_there_is_missing(name, root):
    refusal(MissingMediaError, f"file://{root}/{name}", media_root=str(root))


def test_27_a_device_is_no_regular_file(tmp_path):
    refusal(RefusedMediaError, "file:///dev/zero", media_root="/dev")
    refusal(EmptyMediaError, "file:///proc/self/maps", media_root="/proc/self")


def test_a_file_is_bounded_by_its_size_before_it_is_read(root):
    os.truncate(root / "in.png", 1 << 40)

    assert "1099511627776 bytes" in refusal(MediaLimitError, f"file://{root}/in.png", media_root=str(root))
    refusal(EmptyMediaError, f"file://{root}/empty.png", media_root=str(root))
    assert "text" in refusal(UnsupportedMediaError, f"file://{root}/text.png", media_root=str(root))


def test_26_a_folder_that_becomes_a_link_meanwhile_is_not_followed(root):
    """Whoever swaps it between check and opening finds that the opening is the check: here it is a link already."""
    for _ in range(20):
        (root / "folder").rmdir()
        (root / "folder").symlink_to(root.parent)
        refusal(RefusedMediaError, f"file://{root}/folder/secret.png", media_root=str(root))
        (root / "folder").unlink()
        (root / "folder").mkdir()


def test_the_root_is_a_folder_of_this_machine():
    with pytest.raises(SettingsError, match="media_root"):
        validate(SourceSettings, {"media_root": "s3://bucket/videos"})


DATA_URLS = {
    "42 no comma": "data:image/png;base64",
    "42 nothing but the scheme": "data:",
    "42 empty payload": "data:image/png;base64,",
    "42 no type and empty payload": "data:;base64,",
    "42 no type": f"data:;base64,{b64(PNG)}",
    "42 type without a subtype": f"data:image;base64,{b64(PNG)}",
    "43 not base64": "data:text/plain,hi",
    "43 an image that is not base64": "data:image/svg+xml,<svg/>",
    "43 ;BASE64": f"data:image/png;BASE64,{b64(PNG)}",
    "43 space before the data": f"data:image/png;base64, {b64(PNG)}",
    "43 space in the head": f"data:image/png; base64,{b64(PNG)}",
    "43 base64 not last": f"data:image/png;base64;charset=utf-8,{b64(PNG)}",
    "43 type of text": f"data:text/plain;base64,{b64(PNG)}",
    "43 type of HTML": f"data:text/html;base64,{b64(PNG)}",
    "43 a very long head": f"data:image/png;x={'a' * 300};base64,{b64(PNG)}",
    "45 illegal alphabet": f"data:image/png;base64,{b64(PNG)[:-4]}****",
    "45 URL-safe alphabet": "data:image/png;base64,_-_-",
    "45 newline": f"data:image/png;base64,{b64(PNG)[:40]}\n{b64(PNG)[40:]}",
    "45 newline at the end": f"data:image/png;base64,{b64(PNG)}\n",
    "45 no padding": "data:image/png;base64,QUI",
    "45 too much padding": "data:image/png;base64,QUJD====",
    "45 padding in the middle": "data:image/png;base64,QQ==QUJD",
    "45 padding first": "data:image/png;base64,=QUJ",
    "45 percent-encoded": "data:image/png;base64,QUJD%3D",
    "45 characters beyond ASCII": "data:image/png;base64,ＱＵＪＤ",
    "two payloads of an image": f"data:image/png;base64,{b64(PNG)},{b64(PNG)}",
    "a frame list in place of an image": f"data:video/jpeg;base64,{b64(JPEG)}",
}


@pytest.mark.parametrize("url", DATA_URLS.values(), ids=DATA_URLS)
def test_a_malformed_data_url_is_refused(url):
    refusal(RefusedMediaError, url)


@pytest.mark.parametrize(
    "head",
    [
        "image/png",
        "image/png;charset=utf-8",
        "image/png;charset=utf-8;name=a.png",
        "image/jpeg",
        "video/mp4",
        "application/octet-stream",
    ],
)
def test_44_parameters_and_wrong_types_do_no_harm(head):
    assert read(f"data:{head};base64,{b64(PNG)}").data == PNG


NO_IMAGES = {
    "mp4": MP4,
    "zip": b"PK\x03\x04" + bytes(40),
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(40),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "SVG with a head": b"<?xml version='1.0'?><svg/>",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "HTML": b"<!doctype html><title>Log in</title>",
    "pickle": b"\x80\x05\x95\x10\0\0\0\0\0\0\0\x8c\x05posix",
    "playlist": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
    "NULs": bytes(100),
}


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES)
def test_46_the_type_says_png_and_the_bytes_are_something_else(data):
    refusal(UnsupportedMediaError, f"data:image/png;base64,{b64(data)}")


def test_a_video_may_be_a_video_or_an_image_and_an_image_a_gif():
    assert read(f"data:video/mp4;base64,{b64(MP4)}", "video").data == MP4
    assert read(f"data:video/mp4;base64,{b64(PNG)}", "video").data == PNG
    assert read(f"data:image/gif;base64,{b64(GIF)}").data == GIF


SLICE = 1 << 20
"""Characters that are decoded at once."""


@pytest.mark.parametrize("num_characters", [SLICE - 4, SLICE, SLICE + 4, 2 * SLICE, 2 * SLICE + 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_what_is_decoded_in_slices_is_whole(num_characters, padding):
    data = MP4 + bytes(number % 251 for number in range(num_characters // 4 * 3 - padding - len(MP4)))
    assert len(b64(data)) == num_characters
    assert read(f"data:video/mp4;base64,{b64(data)}", "video").data == data


@pytest.mark.parametrize("end", ["QQ==", "QUI=", "===="])
def test_padding_at_the_end_of_a_slice_is_padding_in_the_middle(end):
    for slices in (1, 2):
        refusal(RefusedMediaError, f"data:video/mp4;base64,{'A' * (slices * SLICE - 4)}{end}QUJD", "video")


def test_others_are_served_while_a_large_file_is_decoded():
    """Its last characters are wrong, so that nothing but decoding is done with it."""
    url = "data:video/mp4;base64," + "QUJD" * (12 << 20) + "****"

    async def turns() -> int:
        fetcher = Fetcher(FetchSettings(), Names({}))
        reading = asyncio.create_task(read_source(url, "video", SourceSettings(), fetcher, LABEL))
        count = 0
        while not reading.done():
            await asyncio.sleep(1e-3)
            count += 1
        assert isinstance(reading.exception(), RefusedMediaError)
        return count

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        assert asyncio.run(turns()) > 20  # of 48 slices
    finally:
        sys.setswitchinterval(interval_s)


def test_47_the_size_is_known_before_anything_is_decoded():
    url = f"data:image/png;base64,{b64(bytes(3 << 20))}"
    tracemalloc.start()
    try:
        assert "more than 1000" in refusal(MediaLimitError, url, max_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert read(f"data:image/png;base64,{b64(PNG)}", max_bytes=len(PNG)).data == PNG
    refusal(MediaLimitError, f"data:image/png;base64,{b64(PNG)}", max_bytes=len(PNG) - 1)


def frames(*parts: str) -> str:
    return f"data:video/jpeg;base64,{','.join(parts)}"


def test_a_list_of_frames_is_read():
    other = picture("JPEG", (16, 8))

    assert read(frames(b64(JPEG), b64(other)), "video").data == (JPEG, other)
    assert read(frames(b64(JPEG)), "video").data == (JPEG,)


@pytest.mark.parametrize("part", ["", "A", "****", b64(JPEG)], ids=["empty", "one letter", "rubbish", "frames"])
def test_48_too_many_frames_are_refused_before_any_is_decoded(part):
    """Decoding would find the first three malformed."""
    assert "100000 frames, more than 128" in refusal(MediaLimitError, frames(*[part] * 100_000), "video")


def test_frames_are_bounded_together():
    refusal(MediaLimitError, frames(*[b64(JPEG)] * 100), "video", max_bytes=50 * len(JPEG))


@pytest.mark.parametrize("part", ["", "QQ=", "*", f" {b64(JPEG)}"])
def test_a_malformed_frame_is_refused(part):
    refusal(RefusedMediaError, frames(b64(JPEG), part), "video")


@pytest.mark.parametrize("data", [PNG, MP4, b"x", b"\xff\xd8"])
def test_a_frame_that_is_no_jpeg_is_not_supported(data):
    assert "frame 1 " in refusal(UnsupportedMediaError, frames(b64(JPEG), b64(data)), "video")


def test_41_the_digest_is_of_the_content_and_its_use():
    one, two = picture("JPEG", (8, 6)), picture("JPEG", (6, 8))
    sources = [
        read(f"data:image/jpeg;base64,{b64(one)}"),
        read(f"data:image/jpeg;base64,{b64(two)}"),
        read(f"data:image/jpeg;base64,{b64(one)}", "video"),
        read(f"data:image/jpeg;base64,{b64(one + two)}", "video"),
        read(frames(b64(one)), "video"),
        read(frames(b64(one), b64(two)), "video"),
        read(frames(b64(two), b64(one)), "video"),
        read(frames(b64(one + two)), "video"),
        read(frames(b64(one + two[:2]), b64(b"\xff\xd8" + two[2:])), "video"),
    ]

    assert len({source.digest for source in sources}) == len(sources)
    assert all(len(source.digest) == 64 for source in sources)
    assert read(f"data:video/mp4;x=y;base64,{b64(one)}").digest == sources[0].digest


def read_from(host: Host, times: int = 1, **settings: object) -> list[Source]:
    async def run() -> list[Source]:
        async with serving(host) as port:
            fetcher = local_fetcher(port)
            url = f"http://{HOST}:{port}/clip?{SECRET}"
            own = validate(SourceSettings, settings)
            return [await read_source(url, "image", own, fetcher, LABEL) for _ in range(times)]

    return asyncio.run(run())


def test_40_what_a_url_leads_to_is_known_by_its_bytes():
    first, changed, again = read_from(Host(response(PNG), response(JPEG), response(PNG)), 3)

    assert (first.data, changed.data, again.data) == (PNG, JPEG, PNG)
    assert first.digest == again.digest != changed.digest


@pytest.mark.parametrize("stated", ["text/html", "image/png", ""])
def test_37_a_page_to_log_in_is_not_supported_whatever_type_its_host_states(stated):
    host = Host(response(b"<!DOCTYPE html><title>Log in</title>", Content_Type=stated))

    with pytest.raises(UnsupportedMediaError, match="a web page") as caught:
        read_from(host)
    assert caught.value.path == LABEL


def test_an_image_is_an_image_whatever_type_its_host_states():
    assert read_from(Host(response(PNG, Content_Type="text/html")))[0].data == PNG
    with pytest.raises(EmptyMediaError):
        read_from(Host(response(b"")))
    with pytest.raises(MediaLimitError):
        read_from(Host(response(PNG)), max_bytes=10)


def test_a_url_of_this_machine_is_refused_under_the_place_in_the_request(bird: Canary):
    fetcher = Fetcher(FetchSettings(schemes=("http",), ports=(bird.port,)))

    for url in (f"http://127.0.0.1:{bird.port}/", f"HTTP://[::1]:{bird.port}/"):
        with pytest.raises(RefusedMediaError) as caught:
            read(url, fetcher=fetcher)
        assert caught.value.path == LABEL
    assert bird.connections() == 0


FETCHING = {"requests", "httpx", "aiohttp", "urllib3", "urllib.request", "http.client", "ftplib", "socket", "fsspec"}
OPENING = {"PIL", "av", "decord", "torchcodec", "torchvision.io", "cv2", "imageio"}
CALLS = {"open", "urlopen", "isfile", "load_image", "load_video", "read_video", "fetch_images", "fetch_videos"}


def test_21_only_the_fetcher_fetches_and_only_the_sandbox_opens_media():
    folder = Path(valley.serving.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            forbidden = {name for name in modules for top in FETCHING | OPENING if f"{name}.".startswith(f"{top}.")}
            assert not forbidden, f"{path.name}: {forbidden}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if path.name == "sources.py" and called == "os.open":
                    continue
                assert called.rpartition(".")[2] not in CALLS, f"{path.name}, line {node.lineno}: {called}"
