"""Short descriptions of connection errors, for operators."""

from __future__ import annotations

import os
import socket
import ssl

import httpx

from vllm_router.http.client.tls_transport import describe_tls_error


def describe(error: httpx.HTTPError) -> str:
    """The operating system's message for an error of httpx, if there is one."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            # One error per address of the host; the last address was tried last.
            cause = cause.exceptions[-1]
        elif isinstance(cause, ssl.SSLError):
            return describe_tls_error(cause)  # has its own numbers
        elif isinstance(cause, OSError) and cause.errno is not None:
            # Name resolution has its own numbers; Trio's messages for other errors are long.
            gai = isinstance(cause, socket.gaierror)
            return str(cause.strerror) if gai else os.strerror(cause.errno)
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
