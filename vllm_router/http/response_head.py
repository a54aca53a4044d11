"""The head of a server's response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_router.http.syntax import Headers


@dataclass(slots=True)
class ResponseHead:
    """Head of a final response. Header names are lower-case; interim (1xx) heads are dropped.

    `memo` caches values derived from the head. All responses whose heads differ in Content-Length
    alone share it.
    """

    status: int
    headers: Headers
    content_length: int | None
    chunked: bool
    memo: dict[object, Any] | None = None
