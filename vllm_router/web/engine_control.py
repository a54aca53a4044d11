"""Engine control paths (`/sleep`, `/v1/load_lora_adapter`, …), forwarded to the servers.

The dispatcher rejects them unless `allow_engine_control` is enabled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx
import msgspec
import trio

from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.errors import UnusablePage
from vllm_router.fleet.server import Server
from vllm_router.http.client.control_client import control_client, control_transport
from vllm_router.http.client.page import read_whole
from vllm_router.http.client.resolver import Resolver
from vllm_router.web.admin import find
from vllm_router.web.router import Router

PASSED_ON = ("content-type", "accept", "authorization")
MAX_ANSWER = 1024 * 1024
"""Largest response in bytes."""

MAX_VALUES = 60_000
"""JSON values of a response that is decoded; a larger one is returned as text."""

MAX_DEPTH = 64
"""Deepest nesting of a response that is decoded."""


async def control(
    router: Router, method: str, path: str, query: bytes, headers: Mapping[str, str], body: bytes
) -> tuple[int, dict[str, Any]]:
    """Send the request to all servers at once, or to the one that `server=NAME` in the query names.

    Returns the status, 200 or 502 if any server failed, and the responses by server. Raises Refused
    for an unknown server. The timeout is `request_timeout`, because waking an engine may take
    minutes.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    names = [value for key, value in pairs if key == "server"]
    rest = urlencode([pair for pair in pairs if pair[0] != "server"])
    servers = [find(router, name) for name in names] or list(router.fleet.servers.values())
    request = _Request(
        method,
        f"{path}?{rest}" if rest else path,
        # As bytes: httpx encodes texts as ASCII alone.
        {name.encode(): headers[name].encode("latin-1") for name in PASSED_ON if name in headers},
        body,
        router.config.settings.request_timeout,
        router.tls,
        router.resolver,
    )
    results: dict[str, dict[str, Any]] = {}
    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(request.ask, server, results)
    _note_pauses(router, method, path, results)
    status = 200 if all(result["ok"] for result in results.values()) else 502
    return status, {"results": {server.name: results[server.name] for server in servers}}


def _note_pauses(
    router: Router, method: str, path: str, results: Mapping[str, Mapping[str, Any]]
) -> None:
    """Note from the responses which engines are paused: they get requests only as a last resort."""
    now = trio.current_time()
    for name, result in results.items():
        server = router.fleet.servers.get(name)
        if server is None or not result["ok"]:
            continue
        if method == "POST" and path in ("/pause", "/resume"):
            server.pause(on=path == "/pause", now=now)
        elif path == "/is_paused":
            said = result.get("body")
            paused = said.get("is_paused") if isinstance(said, dict) else None
            if isinstance(paused, bool):
                server.pause(on=paused, now=now)
    router.fleet.settle(now)


class _Request:
    """The request that each server gets."""

    def __init__(
        self,
        method: str,
        target: str,
        headers: dict[bytes, bytes],
        body: bytes,
        timeout: float,
        tls: ServerContexts,
        resolver: Resolver,
    ) -> None:
        self._method, self._target, self._headers = method, target, headers
        self._body, self._timeout, self._tls, self._resolver = body, timeout, tls, resolver

    async def ask(self, server: Server, results: dict[str, dict[str, Any]]) -> None:
        """Store one server's response, or its error, under the server's name."""
        headers = dict(self._headers)
        if server.config.api_key:
            headers.pop(b"authorization", None)  # the router's key is not valid there
        result: dict[str, Any] = {"ok": False, "error": f"no answer in {self._timeout:g} s"}
        with trio.move_on_after(self._timeout):
            try:
                result = await self._ask(server, headers)
            except httpx.HTTPError as error:
                result["error"] = str(error) or type(error).__name__
            except UnusablePage as problem:
                result["error"] = f"its answer cannot be used: {problem}"
        results[server.name] = result

    async def _ask(self, server: Server, headers: dict[bytes, bytes]) -> dict[str, Any]:
        transport = control_transport(server.url, self._tls.of(server.config), self._resolver)
        async with control_client(
            server.url, server.config.api_key, None, self._tls.of(server.config), transport
        ) as client:
            request = client.build_request(
                self._method, self._target, headers=headers, content=self._body
            )
            answer = await transport.handle_async_request(request)
            try:
                content = await read_whole(answer, MAX_ANSWER)
            finally:
                await answer.aclose()
        ok = answer.status_code < 400
        return {"ok": ok, "status": answer.status_code, "body": _decoded(content)}


def _decoded(content: bytes) -> Any:
    """The body as JSON if it can be decoded and encoded again, else as text; None if empty.

    Decoding takes 5 ms at most.
    """
    if not content:
        return None
    try:
        if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
            raise ValueError("too many values")
        value = msgspec.json.decode(content)
        if _depth(value) > MAX_DEPTH:
            raise ValueError("nested too deeply")
        msgspec.json.encode(value)
    except (ValueError, RecursionError, OverflowError):
        return content.decode("utf-8", "replace")
    return value


def _depth(value: object) -> int:
    """The nesting depth of lists and objects; at most one more than allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth
