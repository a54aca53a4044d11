"""Error responses of the router itself, in the format of the client's API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_router.errors import Refused
from vllm_router.http.error_format import error_response

SHOWN_NAMES, SHOWN_LENGTH = 20, 100
"""Names in a message, and characters of each: servers may list thousands of models."""

MAX_RETRY_AFTER = 86_400.0
"""Seconds in `Retry-After`: a key may be limited to a request in a thousand years."""


def names_shown(names: Sequence[str]) -> str:
    """Names for a message, cut if they are many or long."""
    shown = [
        name if len(name) <= SHOWN_LENGTH else f"{name[:SHOWN_LENGTH]}…"
        for name in names[:SHOWN_NAMES]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def refusal_messages(
    refused: Refused, request_id: bytes, attempts: int = 0, *, path: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of a refusal: head, and whole body.

    `path` is the raw path of the request, which determines the format.
    """
    headers, body = error_response(
        path,
        refused.status,
        refused.code,
        refused.message,
        request_id,
        param=refused.param,
        values=refused.values,
    )
    if attempts:
        headers.append((b"x-vllm-router-attempts", b"%d" % attempts))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.allow:
        headers.append((b"allow", ", ".join(refused.allow).encode()))
    if refused.retry_after is not None:
        headers.append(
            (b"retry-after", b"%d" % math.ceil(min(refused.retry_after, MAX_RETRY_AFTER)))
        )
    return (
        {"type": "http.response.start", "status": refused.status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )
