"""The request line of HTTP/1.1: method, target and version, checked strictly."""

from __future__ import annotations

import re

from vllm_router.http.http_error import HttpError, bad_request
from vllm_router.http.syntax import TOKEN, valid_host

# RFC 9112 3.2.2, restricted to the schemes of HTTP.
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)

# Visible ASCII without `#`: a client never sends the fragment (RFC 9112 3.2).
TARGET = re.compile(rb"[!\"$-~]+")


def request_line(line: bytes) -> tuple[str, bytes, str]:
    """Method, target and version (`1.0`, `1.1`) of a request line. Raises HttpError."""
    parts = line.split(b" ")
    if len(parts) != 3:
        raise bad_request("malformed request line")
    method, target, version = parts
    if version != b"HTTP/1.1" and version != b"HTTP/1.0":
        if re.fullmatch(rb"HTTP/[0-9]\.[0-9]", version):
            raise version_not_supported()
        raise bad_request("malformed request line")
    if TOKEN.fullmatch(method) is None:
        raise bad_request("malformed method")
    if TARGET.fullmatch(target) is None:
        raise bad_request("malformed request target")
    return method.decode("ascii"), target, version[5:].decode("ascii")


def version_not_supported() -> HttpError:
    return HttpError(505, "http_version_not_supported", "only HTTP/1.1 is supported on this port")


def check_method(method: str) -> None:
    """Raise HttpError for CONNECT and TRACE, which the router serves for no resource.

    501 and not 405 (RFC 9110 9.3.6, 9.3.8, 15.6.2): a 405 would have to list the methods that the
    path allows.
    """
    if method in ("CONNECT", "TRACE"):
        raise HttpError(501, "method_not_implemented", f"{method} is not allowed")


def split_target(method: str, target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request target in any form of RFC 9112 3.2. Raises HttpError.

    The authority of an absolute form is validated and then ignored: the router is one site under
    every name. `OPTIONS *` raises an HttpError of status 204, which is its response.
    """
    if not target.startswith(b"/"):
        if target == b"*" and method == "OPTIONS":
            raise HttpError(204, "options", "")
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or not valid_host(absolute[1]):
            raise bad_request("malformed request target")
        target = absolute[2]
        if not target.startswith(b"/"):
            target = b"/" + target
    path, _, query = target.partition(b"?")
    return path, query
