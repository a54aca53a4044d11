"""`HttpError`: a request that is rejected before it reaches the application."""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.http.error_format import error_response
from vllm_router.http.request_ids import request_id
from vllm_router.http.syntax import STATUS_LINES, http_date


class HttpError(Exception):
    """The server answers the request with `status` and then closes the connection.

    `code` goes into the error body and the `x-vllm-router-error` header. `path` and `request_id`
    are set once that much of the request is known; the path decides the format of the body.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.path = b""
        self.request_id: bytes | None = None

    def headers_and_body(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """The response in the format of the client's API (OpenAI or Anthropic)."""
        if self.status == 204:
            return [(b"allow", b"GET, HEAD, POST, OPTIONS")], b""
        headers, body = error_response(
            self.path, self.status, self.code, self.message, request_id(self.request_id)
        )
        return headers, body

    def encode(self) -> bytes:
        """The complete response, ready to send."""
        headers, body = self.headers_and_body()
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return b"%bdate: %b\r\nconnection: close\r\n%b\r\n%b" % (
            STATUS_LINES[self.status],
            http_date(),
            lines,
            body,
        )


OnRejected = Callable[[HttpError, tuple[str, int] | None, bytes], None]
"""Called for each rejected request that the application never sees: the error, the client's
address, and the request line as far as it was received."""


def bad_request(message: str) -> HttpError:
    return HttpError(400, "bad_request", message)


def head_too_large() -> HttpError:
    return HttpError(431, "request_header_fields_too_large", "the request head is too large")
