"""Engine control paths (`/sleep`, `/v1/load_lora_adapter`, …) passed on to the servers.

They reach the control plane only if `allow_engine_control` is on; the application refuses them
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx
import trio

from vllm_router.fleet.server import Server
from vllm_router.tasks.probe import control_client
from vllm_router.tls import ServerContexts
from vllm_router.web.admin import find
from vllm_router.web.router import Router

PASSED_ON = ("content-type", "accept", "authorization")
MAX_ANSWER = 1024 * 1024


async def control(
    router: Router, method: str, path: str, query: bytes, headers: Mapping[str, str], body: bytes
) -> tuple[int, dict[str, Any]]:
    """Ask every server, or the one that `server=NAME` in the query names, all at once.

    Returns the status, 200 or 502 if any of them failed, and their answers by name. Raises
    Refused if there is no such server. Waking an engine may take minutes: `request_timeout`.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    names = [value for key, value in pairs if key == "server"]
    rest = urlencode([pair for pair in pairs if pair[0] != "server"])
    servers = [find(router, name) for name in names] or list(router.fleet.servers.values())
    request = _Request(
        method,
        f"{path}?{rest}" if rest else path,
        {name: headers[name] for name in PASSED_ON if name in headers},
        body,
        router.config.settings.request_timeout,
        router.tls,
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
    """What the answers say of paused engines: a paused server gets no request that another can
    take."""
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
    """What every server is asked."""

    def __init__(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        timeout: float,
        tls: ServerContexts,
    ) -> None:
        self._method, self._target, self._headers = method, target, headers
        self._body, self._timeout, self._tls = body, timeout, tls

    async def ask(self, server: Server, results: dict[str, dict[str, Any]]) -> None:
        """One server's answer, or what went wrong, under its name."""
        headers = dict(self._headers)
        if server.config.api_key:
            headers.pop("authorization", None)  # the client's own key is of no use there
        try:
            tls = self._tls.of(server.config)
            async with control_client(server, self._timeout, tls) as client:
                answer = await client.request(
                    self._method, self._target, headers=headers, content=self._body
                )
        except httpx.TimeoutException:
            results[server.name] = {"ok": False, "error": f"no answer in {self._timeout:g} s"}
        except httpx.HTTPError as error:
            results[server.name] = {"ok": False, "error": str(error) or type(error).__name__}
        else:
            results[server.name] = {
                "ok": answer.status_code < 400,
                "status": answer.status_code,
                "body": _decoded(answer),
            }


def _decoded(answer: httpx.Response) -> Any:
    """The body as JSON if it is, else as text; None if there is none."""
    content = answer.content[:MAX_ANSWER]
    if not content:
        return None
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")
