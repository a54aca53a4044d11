"""`Host`: the server as its connections see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vllm_router.http.asgi_types import App
from vllm_router.http.head_cache import FirstHeads
from vllm_router.http.http_error import OnRejected
from vllm_router.http.request_head import Head
from vllm_router.http.server.limits import Limits


class Host(Protocol):
    """State that all connections of a server share."""

    app: App
    limits: Limits
    on_rejected: OnRejected | None
    now: Callable[[], float]
    """Trio's clock."""
    draining: bool
    closing: bool
    """Whether every response is the last one of its connection."""
    requests: int
    refused: int
    first_heads: FirstHeads

    def parse_head(self, data: bytes, end: int) -> Head | None:
        """Parse the head `data[:end]`; None for a request of another server. Raises HttpError."""
        ...

    def add(self, connection: Any) -> None: ...

    def discard(self, connection: Any) -> None: ...
