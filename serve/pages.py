"""The pages for people: search at `/`, the server's own metrics at `/status`.

They are static files in `web/`, plain modules without a build step, and ask nothing of any other host: a content
security policy holds them to that.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "web"
PAGES = {"/": "index.html", "/status": "status.html"}
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Adds the pages, and their scripts and styles under `/web`."""
    for path, file in PAGES.items():
        _add_page(app, path, FOLDER / file)
    app.mount("/web", _WebFiles(directory=FOLDER), name="web")


class _WebFiles(StaticFiles):
    """With the pages' headers: after an upgrade no browser mixes old scripts with new pages."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response


def _add_page(app: FastAPI, path: str, file: Path) -> None:
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(file, headers=HEADERS)
