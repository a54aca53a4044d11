"""The source `http`: a document in the format of Prometheus' http_sd.

https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx
import trio

from vllm_router.config.discovery import HttpSource
from vllm_router.discovery.file_sd import MAX_BYTES, BadDocument, Groups, read_json
from vllm_router.discovery.source import Again, Sink
from vllm_router.discovery.web_client import NoAnswer, decoded, get, web_transport
from vllm_router.errors import UnusablePage
from vllm_router.http.client.error_text import describe
from vllm_router.http.client.page import read_whole

Connect = Callable[[HttpSource], Awaitable[httpx.AsyncBaseTransport]]

RETRY_PAUSE = 5.0
"""Seconds between two requests after a failure."""


class WebDocument:
    """Fetches the document every `interval` seconds; with an ETag only if it has changed."""

    def __init__(self, config: HttpSource, connect: Connect = web_transport) -> None:
        """`connect` makes the transport."""
        self._config = config
        self._connect = connect
        self._etag = ""

    async def run(self, sink: Sink, again: Again) -> None:
        """Fetch until cancelled. A transport lives as long as its requests succeed."""
        while True:
            try:
                async with await self._connect(self._config) as transport:
                    while True:
                        await self._look(transport, sink)
                        await again.wait(self._config.interval)
            except NoAnswer as error:
                sink.failed(str(error))
            await again.wait(min(RETRY_PAUSE, self._config.interval))

    async def _look(self, transport: httpx.AsyncBaseTransport, sink: Sink) -> None:
        """Raises NoAnswer."""
        try:
            with trio.fail_after(self._config.timeout):
                groups = await self._fetch(transport)
        except trio.TooSlowError:
            raise NoAnswer(f"no whole answer within {self._config.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise NoAnswer(describe(error)) from None
        except (UnusablePage, BadDocument) as error:
            raise NoAnswer(f"its document cannot be used: {error}") from None
        if groups is None:
            sink.confirmed()
        else:
            sink.found(*groups)

    async def _fetch(self, transport: httpx.AsyncBaseTransport) -> Groups | None:
        """The document; None if it has not changed."""
        headers = {name.lower(): str.__str__(value) for name, value in self._config.headers}
        headers = {"accept": "application/json", "accept-encoding": "gzip", **headers}
        if self._config.api_key is not None:
            headers["authorization"] = f"Bearer {str.__str__(self._config.api_key)}"
        if self._etag:
            headers["if-none-match"] = self._etag
        response = await get(transport, self._config.url, headers)
        try:
            if response.status_code == 304 and self._etag:
                return None
            if response.status_code != 200:
                raise NoAnswer(_status_text(response))
            data = await read_whole(response, MAX_BYTES)
            etag = response.headers.get("etag", "")
            if not etag.isascii():
                etag = ""  # httpx could not send it back
        finally:
            await response.aclose()
        groups = await decoded(read_json, data)
        self._etag = etag
        return groups


def _status_text(response: httpx.Response) -> str:
    status = response.status_code
    if response.has_redirect_location:
        return f"it answered {status}, a redirect: set `url` to where it leads"
    if status in (401, 403):
        return f"it answered {status}: check its api_key or headers"
    return f"it answered {status}"
