"""The chat page: three files without any outside asset, and the clips it offers."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from valley.serving.clips import find_clips
from valley.serving.settings import ServeSettings

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def add_page(app: FastAPI, settings: ServeSettings) -> None:
    """Serves the page at `/`, and the clips of `settings.clips` below `/clips`.

    Raises:
        SettingsError: the clips cannot be read.
    """
    for path, (name, kind) in _FILES.items():
        _add_file(app, path, (_FOLDER / name).read_bytes(), kind)
    clips = find_clips(settings.clips)

    async def names() -> dict[str, list[str]]:
        return {"clips": list(clips)}

    async def clip(name: str) -> Response:
        if name not in clips:
            raise HTTPException(404)
        return FileResponse(clips[name])

    app.add_api_route("/clips", names, methods=["GET"])
    app.add_api_route("/clips/{name}", clip, methods=["GET"], response_model=None)


def _add_file(app: FastAPI, path: str, data: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(data, media_type=kind)

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)
