"""The routes of the page and its files."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from vllm_router import __version__
from vllm_router.errors import Refused
from vllm_router.web import answers
from vllm_router.web.pages import FOREVER, SECURITY_HEADERS, VERSION_FOLDER, Page, Pages
from vllm_router.web.router import Router


def add_dashboard(app: QuartTrio, router: Router) -> None:
    """Add the page, its files, and the router's name at `/` for other clients."""
    pages = Pages()

    @app.get("/")
    async def root() -> Response:
        page = pages.index() if "text/html" in answers.fields().get("accept", "") else None
        if page is not None:
            response = _page(page)
        else:
            running = "draining" if router.draining else "running"
            named = {"version": __version__} if answers.may_read() else {}
            response = answers.json({"service": "vLLM Router", **named, "status": running})
        response.headers["vary"] = "accept, accept-encoding"
        return response

    @app.get("/static/<name:path>")
    async def static(path: str) -> Response:
        lasting = path.startswith(f"{pages.version}/")
        # A page that was loaded before an update asks by the old version.
        page = pages.get(VERSION_FOLDER.sub("", path))
        if page is None:
            raise Refused(404, "not_found", f"There is nothing at /static/{path}.")
        return _page(page, lasting=lasting)


def _page(page: Page, *, lasting: bool = False) -> Response:
    """`lasting`: its address changes with its content, so that it may be kept for ever."""
    fresh = page.etag in answers.fields().get("if-none-match", "")
    packed = page.packed if _takes_gzip(answers.fields().get("accept-encoding", "")) else None
    body = page.body if packed is None else packed
    response = Response(
        b"" if fresh else body, 304 if fresh else 200, content_type=page.content_type
    )
    response.headers.update(SECURITY_HEADERS)
    response.headers["etag"] = page.etag
    response.headers["cache-control"] = FOREVER if lasting else "no-cache"
    response.headers["vary"] = "accept-encoding"
    if packed is not None and not fresh:
        response.headers["content-encoding"] = "gzip"
    return response


def _takes_gzip(accepted: str) -> bool:
    """Whether `accept-encoding` names gzip, and not only to exclude it (RFC 9110, 12.5.3)."""
    for coding in accepted.lower().split(","):
        name, _, quality = coding.partition(";")
        if name.strip() == "gzip":
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
