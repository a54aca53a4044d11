"""The files of the dashboard, read from the package and kept until they change."""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

STATIC = Path(__file__).parent / "static"

FOREVER = "public, max-age=31536000, immutable"
"""`cache-control` of a file whose address changes with its content (RFC 8246)."""

VERSION_FOLDER = re.compile(r"^v-[0-9a-f]{16}/")
"""The beginning of such an address, below `/static/`."""

SMALL = 1024
"""Bytes below which a file is not compressed."""

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file; `etag` changes with its content. `packed` is the body in gzip, if that is smaller.

    The tag is weak (RFC 9110, 8.8.1), as both forms have the same.
    """

    body: bytes
    content_type: str
    etag: str
    modified: int
    packed: bytes | None = None


class Pages:
    """The files of one directory, by their relative path."""

    def __init__(self, root: Path = STATIC) -> None:
        self._root = root.resolve()
        self._kept: dict[Path, Page] = {}
        self._times: tuple[int, ...] = ()
        self._version = ""
        self._index: Page | None = None

    def get(self, name: str) -> Page | None:
        """None if the file does not exist, or lies outside of the directory."""
        try:
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root) or not path.is_file():
                return None
            modified = path.stat().st_mtime_ns
            page = self._kept.get(path)
            if page is None or page.modified != modified:
                page = self._kept[path] = _page(path.read_bytes(), _type_of(path), modified)
        except (OSError, ValueError):  # removed between two calls, or a NUL in the name
            return None
        return page

    @property
    def version(self) -> str:
        """The folder below `/static/` that stands for the present content of all files."""
        files = [path for path in sorted(self._root.rglob("*")) if path.is_file()]
        pages = [page for path in files if (page := self.get(str(path.relative_to(self._root))))]
        times = tuple(page.modified for page in pages)
        if times != self._times:
            digest = hashlib.sha256("".join(page.etag for page in pages).encode())
            self._times, self._version = times, f"v-{digest.hexdigest()[:16]}"
        return self._version

    def index(self) -> Page | None:
        """`index.html`, whose files have addresses that change with their content."""
        page = self.get("index.html")
        if page is None:
            return None
        body = page.body.replace(b'"static/', f'"static/{self.version}/'.encode())
        if self._index is None or self._index.body != body:
            self._index = _page(body, page.content_type, page.modified)
        return self._index


def _page(body: bytes, content_type: str, modified: int) -> Page:
    packed = gzip.compress(body, mtime=0) if len(body) >= SMALL else body
    etag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Page(body, content_type, etag, modified, packed if len(packed) < len(body) else None)


def _type_of(path: Path) -> str:
    known = _TYPES.get(path.suffix.lower())
    return known or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
