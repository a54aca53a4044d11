"""HTTP requests of sources, over the router's own HTTP/1.1 client.

Its streams are no async generators, so a stream that is left in the middle leaves nothing behind
for the garbage collector.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import TypeVar

import httpx
import trio

from vllm_router.config.discovery import WebSource
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.errors import ConfigError
from vllm_router.http.client.httpx_transport import HttpxTransport, get_request
from vllm_router.http.client.pool import Pool

USER_AGENT = "vllm-router-discovery"

READ_AT_ONCE = 100_000
"""Bytes of a document that are decoded in the event loop: 1 ms."""

T = TypeVar("T")


class NoAnswer(Exception):
    """The source gave no usable answer; the message is for operators."""


async def web_transport(config: WebSource) -> httpx.AsyncBaseTransport:
    """A transport to the source, which the caller closes. Raises NoAnswer for unusable files."""
    return HttpxTransport(Pool(config.url, await _tls_context(config), spread=False))


async def _tls_context(config: WebSource) -> ssl.SSLContext | None:
    if not config.url.startswith("https:"):
        return None
    try:
        # Loading authorities takes 20 ms and more.
        return await trio.to_thread.run_sync(ServerContexts().of, config, abandon_on_cancel=True)
    except ConfigError as error:
        raise NoAnswer("; ".join(error.problems)) from None


async def get(
    transport: httpx.AsyncBaseTransport, url: str, headers: Mapping[str, str]
) -> httpx.Response:
    """The head of a response; the caller closes it, and bounds the time. Raises httpx.HTTPError.

    Redirects are not followed: they could lead the source's key elsewhere.
    """
    request = get_request(url, {"user-agent": USER_AGENT, **headers})
    return await transport.handle_async_request(request)


async def decoded(read: Callable[[bytes], T], data: bytes) -> T:
    """`read(data)`, in a thread if it would hold up the event loop. Raises what `read` raises."""
    if len(data) > READ_AT_ONCE:
        return await trio.to_thread.run_sync(read, data, abandon_on_cancel=True)
    return read(data)
