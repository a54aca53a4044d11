"""What both listening sides say and check in HTTP/1.1 heads: constants and pure functions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

from vllm_router.http.error_format import error_answer
from vllm_router.http.request_ids import request_id

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}

# Of final answers; interim ones are the server's own affair.
STATUS_LINES = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, reason)
    for status, reason in REASONS.items()
    if status >= 200
}

# RFC 9110 5.6.2; methods and field names are tokens.
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

# RFC 9110 7.2: uri-host [":" port]. Registered names are taken as DNS labels, `_` and `%` allowed;
# user information and empty hosts are not (RFC 9110 4.2.1, 4.2.4).
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::[0-9]*)?")

# RFC 9112 3.2.2; only what an HTTP client can mean.
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)

# Visible ASCII; a fragment is the client's own affair and never sent (RFC 9112 3.2).
_TARGET = re.compile(rb"[!\"$-~]+")

NO_BODY = frozenset({204, 304})


class Refusal(Exception):
    """The request must not be served: answered with `status`, then the connection is closed.

    `code` goes into the error body and the `x-vllm-router-error` header. `path` and `request_id`
    are set as soon as the request is known that far: the path decides about the body's dialect.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.path = b""
        self.request_id: bytes | None = None

    def headers_and_body(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """In the client's dialect, so that clients show the message."""
        if self.status == 204:
            return [(b"allow", b"GET, HEAD, POST, OPTIONS")], b""
        headers, body = error_answer(
            self.path, self.status, self.code, self.message, request_id(self.request_id)
        )
        return headers, body

    def encode(self) -> bytes:
        """The whole answer, ready to send."""
        headers, body = self.headers_and_body()
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return b"%bdate: %b\r\nconnection: close\r\n%b\r\n%b" % (
            STATUS_LINES[self.status],
            http_date(),
            lines,
            body,
        )


RefusalTold = Callable[[Refusal, tuple[str, int] | None, bytes], None]
"""Called with a refusal, the client's address, and the request's first line as far as it came."""


def malformed(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)


MAX_REQUEST_FIELDS = 1000
"""Fields of a request head. They fit into its bytes many times over, and each costs far more time
than its bytes do."""


def too_many_fields(head: bytes) -> bool:
    """Whether a whole head has more than MAX_REQUEST_FIELDS."""
    return head.count(b"\n") > MAX_REQUEST_FIELDS + 2


def too_large() -> Refusal:
    return Refusal(431, "request_header_fields_too_large", "the request head is too large")


class _Date:
    """The Date value of the current second, made once in it."""

    second = -1
    value = b""


def http_date() -> bytes:
    """Now, as RFC 9110 5.6.7 wants it."""
    second = int(time.time())
    if second != _Date.second:
        _Date.second = second
        _Date.value = formatdate(second, usegmt=True).encode()
    return _Date.value


def valid_host(value: bytes) -> bool:
    """Whether `value` can be a Host field or an authority. Raises nothing."""
    return _HOST.fullmatch(value) is not None


def request_line(line: bytes) -> tuple[str, bytes, str]:
    """Method, target and version (`1.0`, `1.1`) of a request's first line. Raises Refusal."""
    parts = line.split(b" ")
    if len(parts) != 3:
        raise malformed("malformed request line")
    method, target, version = parts
    if version != b"HTTP/1.1" and version != b"HTTP/1.0":
        if re.fullmatch(rb"HTTP/[0-9]\.[0-9]", version):
            raise Refusal(505, "http_version_not_supported", "only HTTP/1.1 is spoken here")
        raise malformed("malformed request line")
    if TOKEN.fullmatch(method) is None:
        raise malformed("malformed method")
    if _TARGET.fullmatch(target) is None:
        raise malformed("malformed request target")
    return method.decode("ascii"), target, version[5:].decode("ascii")


def check_method(method: str) -> None:
    """Raises Refusal for the two methods that no part of the router serves.

    501 and not 405, as they are for no resource (RFC 9110 9.3.6, 9.3.8, 15.6.2); a 405 would have
    to list the methods of the path.
    """
    if method in ("CONNECT", "TRACE"):
        raise Refusal(501, "method_not_implemented", f"{method} is not allowed")


def split_target(method: str, target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request target in any form of RFC 9112 3.2. Raises Refusal.

    The authority of an absolute form is validated and then ignored: the router is one site
    under whatever name it is reached. `OPTIONS *` comes as a Refusal of status 204.
    """
    if not target.startswith(b"/"):
        if target == b"*":
            if method == "OPTIONS":
                raise Refusal(204, "options", "")
            raise malformed("asterisk target with a method other than OPTIONS")
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or not valid_host(absolute[1]):
            raise malformed("malformed request target")
        target = absolute[2]
        if not target.startswith(b"/"):
            target = b"/" + target
    path, _, query = target.partition(b"?")
    return path, query
