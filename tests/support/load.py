"""Concurrent clients for tests, and the result of each request."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx
import trio

from support.router_process import NO_TLS

SHARING = 10
"""Requests at the same time by one client: the time that httpx needs for one grows with them."""


def _client(url: str, *, http2: bool = False) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(
        base_url=url,
        timeout=60,
        trust_env=False,
        verify=NO_TLS,
        limits=limits,
        http1=not http2,
        http2=http2,
    )


async def _clients(
    ending: contextlib.AsyncExitStack, url: str, count: int, *, http2: bool = False
) -> list[httpx.AsyncClient]:
    """The client of each of `count` requests at the same time; `ending` closes them.

    With `http2` all have the same one, and so one connection.
    """
    each = count if http2 else SHARING
    made = [
        await ending.enter_async_context(_client(url, http2=http2)) for _ in range(0, count, each)
    ]
    return [made[number // each] for number in range(count)]


@dataclass(frozen=True)
class Result:
    """One request as seen by its client. `ended` is "done", "error event", "cut" or "failed".

    `began` is a time of `time.monotonic`.
    """

    status: int
    ended: str
    seconds: float
    server: str
    events: int = 0
    text: str = ""
    began: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.ended == "done"


async def ask(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    *,
    keep: int = 4000,
    on_chunk: Callable[[], None] = lambda: None,
) -> Result:
    """One chat completion, streamed if the body says so, read to its end.

    `text` has the last `keep` bytes of it. `on_chunk` is called for each part of the response.
    """
    began = time.monotonic()
    status, server, events, ended, tail = 0, "", 0, "failed", b""
    try:
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as answer:
            status = answer.status_code
            server = answer.headers.get("x-vllm-router-server", "")
            async for chunk in answer.aiter_raw():
                events += chunk.count(b"\n\n")
                tail = (tail + chunk)[-keep:]
                on_chunk()
        whole = not body.get("stream") or tail.rstrip().endswith(b"[DONE]")
        ended = "done" if whole or status != 200 else "truncated"
    except httpx.TransportError as error:
        ended = "error event" if b'"upstream_error"' in tail else f"cut ({type(error).__name__})"
    text = tail.decode(errors="replace")
    return Result(status, ended, time.monotonic() - began, server, events, text, began)


class Load:
    """Closed-loop clients against a router, running while the context is open."""

    def __init__(
        self,
        url: str,
        body: dict[str, Any],
        clients: int,
        *,
        pause: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.results: list[Result] = []
        self._url, self._body, self._clients, self._pause = url, body, clients, pause
        self._headers = headers
        self._stop = False
        self._manager: Any = None
        self._nursery: trio.Nursery

    async def _work(self, client: httpx.AsyncClient) -> None:
        while not self._stop:
            self.results.append(await ask(client, self._body, self._headers))
            await trio.sleep(self._pause)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with contextlib.AsyncExitStack() as ending, trio.open_nursery() as nursery:
            for client in await _clients(ending, self._url, self._clients):
                nursery.start_soon(self._work, client)
            task_status.started()

    async def __aenter__(self) -> Self:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        await self._nursery.start(self._run)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop = True
        await self._manager.__aexit__(*error)

    async def wait_for(self, count: int) -> None:
        """Wait until `count` further requests have ended."""
        wanted = len(self.results) + count
        with trio.fail_after(150):
            while len(self.results) < wanted:
                await trio.sleep(0.01)

    def kinds(self) -> Counter[tuple[int, str]]:
        return Counter((result.status, result.ended) for result in self.results)

    def bad(self) -> list[Result]:
        return [result for result in self.results if not result.ok]

    def p99(self) -> float:
        times = sorted(result.seconds for result in self.results)
        return times[math.ceil(len(times) * 0.99) - 1]


async def burst(
    url: str,
    body: dict[str, Any],
    count: int,
    headers: dict[str, str] | None = None,
    *,
    keep: int = 4000,
    http2: bool = False,
) -> list[Result]:
    """`count` requests at the same time, on connections of their own; on one with `http2`."""
    results: list[Result] = []

    async def one(client: httpx.AsyncClient) -> None:
        results.append(await ask(client, body, headers, keep=keep))

    async with contextlib.AsyncExitStack() as ending, trio.open_nursery() as nursery:
        for client in await _clients(ending, url, count, http2=http2):
            nursery.start_soon(one, client)
    return results
