"""List the EndpointSlices, watch them, and list again whenever the watch ends.

A watch may end in many ways: the time is over, the connection is cut or silent, the version has
expired (as a status 410 or as an error event). All have one answer: list again. So a missed event
is repaired by the next list, which comes every RELIST seconds at the latest. The pace of lists is
bounded however broken the API is.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlencode

import httpx
import trio

from vllm_router.config.discovery import KubernetesSource
from vllm_router.discovery.kubernetes.messages import (
    MAX_EVENT_BYTES,
    SliceList,
    UnusableMessage,
    read_event,
    read_list,
    status_message,
)
from vllm_router.discovery.kubernetes.slices import EndpointSlice, targets_of
from vllm_router.discovery.source import Again, Sink
from vllm_router.discovery.web_client import NoAnswer, decoded, get, web_transport
from vllm_router.errors import UnusablePage
from vllm_router.http.client.error_text import describe
from vllm_router.http.client.page import read_whole

logger = logging.getLogger(__name__)

RELIST = 300.0
"""Seconds that a watch lasts; then the slices are listed again."""

SILENCE = 75.0
"""Seconds without a line after which a watch ends. The API sends a bookmark about once a minute."""

MIN_PAUSE, MAX_PAUSE = 0.2, 15.0
"""Seconds between two lists: doubled after each that brought nothing new, reset by a watch that
works."""

WORKING_PAUSE = 2.0
"""Longest pause in seconds while lists succeed and only watches fail."""

MAX_RETRY_AFTER = 60.0
"""Longest `Retry-After` that is heeded, in seconds."""

WORKS_AFTER = 10.0
"""A watch that has lasted so many seconds works, even without an event."""

PUBLISH_GAP = 0.1
"""Seconds between two sets in a burst of events."""

MAX_LIST_BYTES = 32_000_000

VERSIONS = ("v1", "v1beta1")
"""Versions of discovery.k8s.io; v1 came with Kubernetes 1.21."""

Connect = Callable[[KubernetesSource], Awaitable[httpx.AsyncBaseTransport]]


class Kubernetes:
    """Follows the slices of one namespace."""

    def __init__(self, config: KubernetesSource, connect: Connect = web_transport) -> None:
        """`connect` makes the transport to the API server."""
        self._config = config
        self._connect = connect
        self._version = VERSIONS[0]
        self._slices: dict[str, EndpointSlice] = {}
        self._problems: list[str] = []
        self._pause = MIN_PAUSE
        self._not_before = -float("inf")
        self._published_at = -float("inf")

    async def run(self, sink: Sink, again: Again) -> None:
        """List and watch until cancelled."""
        while True:
            try:
                async with await self._connect(self._config) as transport:
                    while True:
                        version = await self._list(transport, sink)
                        await self._watch_until_over(transport, version, sink, again)
            except NoAnswer as error:
                sink.failed(str(error))

    # -- list ---------------------------------------------------------------------------------

    async def _list(self, transport: httpx.AsyncBaseTransport, sink: Sink) -> str:
        """List the slices, and return the version of the list. Raises NoAnswer."""
        listed = await self._list_once(transport)
        if listed is None:
            # The first version is unknown to the API: try the other one.
            self._version = next(one for one in VERSIONS if one != self._version)
            listed = await self._list_once(transport)
        if listed is None:
            raise NoAnswer("it answered 404: the API has no EndpointSlices, or the path is wrong")
        self._pause = min(self._pause, WORKING_PAUSE)
        self._slices, self._problems = listed.slices, listed.problems
        self._publish(sink)
        return listed.version

    async def _list_once(self, transport: httpx.AsyncBaseTransport) -> SliceList | None:
        """One list at the allowed pace; None if the API does not know the path."""
        await trio.sleep_until(self._not_before)
        self._not_before = trio.current_time() + self._pause * random.uniform(1.0, 1.2)
        self._pause = min(MAX_PAUSE, self._pause * 2)
        data = b""
        try:
            with trio.fail_after(self._config.timeout):
                response = await get(transport, self._url(), self._headers("gzip"))
                try:
                    data = await read_whole(response, MAX_LIST_BYTES)
                finally:
                    await response.aclose()
            if response.status_code == 404:
                return None
            self._check_status(response, data)
            return await decoded(read_list, data)
        except trio.TooSlowError:
            raise NoAnswer(f"no whole list within {self._config.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise NoAnswer(describe(error)) from None
        except (UnusablePage, UnusableMessage) as error:
            raise NoAnswer(f"its list cannot be used: {error}") from None

    def _check_status(self, response: httpx.Response, data: bytes) -> None:
        """Raises NoAnswer unless the status is 200; heeds `Retry-After`."""
        status = response.status_code
        if status == 200:
            return
        after = response.headers.get("retry-after", "")
        if after.isdecimal():
            wait = min(float(after[:6]), MAX_RETRY_AFTER)
            self._not_before = max(self._not_before, trio.current_time() + wait)
        text = f"it answered {status}"
        message = status_message(data)[:300]
        if message:
            text += f": {message}"
        if status == 401:
            text += "; check the token"
        elif status == 403:
            text += (
                "; the router needs a Role that may list and watch endpointslices.discovery.k8s.io "
                f"in the namespace {self._config.namespace}"
            )
        raise NoAnswer(text)

    def _url(self, **more: str) -> str:
        config = self._config
        path = f"/apis/discovery.k8s.io/{self._version}/namespaces/{config.namespace}"
        query = urlencode({"labelSelector": config.selector, **more})
        return f"{config.url.rstrip('/')}{path}/endpointslices?{query}"

    def _headers(self, coding: str) -> dict[str, str]:
        """The headers of a request; the token file is read each time, because it is rotated."""
        headers = {"accept": "application/json", "accept-encoding": coding}
        token = self._config.api_key
        if self._config.token_file is not None:
            try:
                text = Path(self._config.token_file).read_text().strip()
            except (OSError, ValueError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise NoAnswer(f"{self._config.token_file}: cannot be read: {reason}") from None
            if not text.isprintable() or not text.isascii() or not text:
                raise NoAnswer(f"{self._config.token_file}: expected a token, got something else")
            headers["authorization"] = f"Bearer {text}"
        elif token is not None:
            headers["authorization"] = f"Bearer {str.__str__(token)}"
        return headers

    # -- watch --------------------------------------------------------------------------------

    async def _watch_until_over(
        self, transport: httpx.AsyncBaseTransport, version: str, sink: Sink, again: Again
    ) -> None:
        """Watch until the slices should be listed again, for whatever reason."""
        over = ""
        with trio.move_on_after(RELIST + self._config.timeout):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, again, nursery.cancel_scope)
                try:
                    over = await self._watch(transport, version, sink)
                except httpx.HTTPError as error:
                    over = describe(error)
                except (UnusableMessage, NoAnswer) as error:
                    over = str(error)
                nursery.cancel_scope.cancel(reason="watch is over")
        logger.debug("source %s: listing again, %s", self._config.name, over or "asked to")

    async def _watch(self, transport: httpx.AsyncBaseTransport, version: str, sink: Sink) -> str:
        """Apply events until the watch ends; returns the reason.

        Raises httpx.HTTPError, UnusableMessage and NoAnswer.
        """
        url = self._url(
            watch="1",
            resourceVersion=version,
            allowWatchBookmarks="true",
            timeoutSeconds=f"{RELIST:.0f}",
        )
        with trio.move_on_after(self._config.timeout) as patience:
            response = await get(transport, url, self._headers("identity"))
        if patience.cancelled_caught:
            return f"the watch gave no answer within {self._config.timeout:g} s"
        try:
            if response.status_code != 200:
                self._check_status(response, b"")
            return await self._follow(response, sink)
        finally:
            await response.aclose()

    async def _follow(self, response: httpx.Response, sink: Sink) -> str:
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        pieces = aiter(stream)
        buffer = bytearray()
        changed = False
        heard_at = began = trio.current_time()
        while True:
            deadline = heard_at + SILENCE
            if changed:
                deadline = min(deadline, self._published_at + PUBLISH_GAP)
            piece = None
            with trio.move_on_at(deadline):
                try:
                    piece = await anext(pieces)
                except StopAsyncIteration:
                    if changed:
                        self._publish(sink)
                    return "the watch has ended"
            now = trio.current_time()
            if now - began >= WORKS_AFTER:
                self._pause = MIN_PAUSE
            if piece is not None:
                heard_at = now
                buffer += piece
                lines: list[bytes] = []
                if b"\n" in piece:  # a long event is not searched from its start for each piece
                    *lines, rest = bytes(buffer).split(b"\n")
                    buffer = bytearray(rest)
                if len(buffer) > MAX_EVENT_BYTES:
                    raise UnusableMessage(f"an event is longer than {MAX_EVENT_BYTES} bytes")
                if self._take(lines):
                    changed = True
                elif lines and not changed:
                    sink.confirmed()
            elif now - heard_at >= SILENCE:
                return f"the watch was silent for {SILENCE:g} s"
            if changed and now >= self._published_at + PUBLISH_GAP:
                self._publish(sink)
                changed = False

    def _take(self, lines: list[bytes]) -> bool:
        """Apply events; returns whether any has changed a slice. Raises UnusableMessage."""
        changed = False
        for line in lines:
            if not line.strip():
                continue
            change = read_event(line)
            self._pause = MIN_PAUSE
            if change is None:
                continue
            changed = True
            if change.slice is None:
                self._slices.pop(change.name, None)
            else:
                self._slices[change.name] = change.slice
        return changed

    def _publish(self, sink: Sink) -> None:
        self._published_at = trio.current_time()
        targets = targets_of(self._slices.values(), self._config.port)
        sink.found(targets.found, [*self._problems, *targets.problems])


async def _cancel_on(again: Again, scope: trio.CancelScope) -> None:
    while not await again.wait(float("inf")):
        pass
    scope.cancel(reason="asked to look again")
