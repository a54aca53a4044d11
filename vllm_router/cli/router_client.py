"""HTTP client of a running router, used by the commands.

It ignores proxy settings of the environment and follows no redirects.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx
import trio

from vllm_router.cli.common import KEY_ADVICE
from vllm_router.errors import NO_VALUES, RouterError
from vllm_router.http.client.error_text import describe
from vllm_router.http.client.tls_context import verifying_context
from vllm_router.runtime.own_machine import find_socket, short_path

TIMEOUT = 5.0
"""Seconds for a response of the router."""

POLL_INTERVAL = 0.5
"""Seconds between two requests while waiting for a drain."""


class NoRouter(RouterError):
    """Nothing answers at the URL, or a server that is not a vLLM Router."""


class ErrorResponse(RouterError):
    """The router answered with an error; `code` is its error code.

    `values` are the values in the message by name, for translations.
    """

    def __init__(self, code: str, message: str, values: Mapping[str, str] = NO_VALUES) -> None:
        super().__init__(message)
        self.code = code
        self.values = values


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server from `/load-stats`; None for fields that this router's version does not send."""

    name: str
    state: str
    reason: str
    load: float | None
    running: float | None
    waiting: float | None
    in_flight: float | None
    elsewhere: float | None
    capacity: float | None
    capacity_source: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """The router's state, decoded from JSON; `load` has a list of `servers`."""

    health: dict[str, Any]
    load: dict[str, Any]

    @property
    def servers(self) -> list[ServerStatus]:
        """In the order of the configuration."""
        return [_server_status(entry) for entry in self.load["servers"] if isinstance(entry, dict)]


def _server_status(entry: dict[str, Any]) -> ServerStatus:
    metrics = entry.get("detailed_metrics")
    metrics = metrics if isinstance(metrics, dict) else {}

    def figure(value: object) -> float | None:
        return float(value) if isinstance(value, int | float) else None

    return ServerStatus(
        name=str(entry.get("name", "")),
        state=str(entry.get("state", "")),
        reason=str(entry.get("reason", "")),
        load=figure(entry.get("load")),
        running=figure(metrics.get("num_requests_running")),
        waiting=figure(metrics.get("num_requests_waiting")),
        in_flight=figure(entry.get("in_flight")),
        elsewhere=figure(entry.get("in_flight_elsewhere")),
        capacity=figure(entry.get("max_capacity")),
        capacity_source=str(entry.get("capacity_source", "")),
        models=tuple(map(str, entry.get("models") or ())),
    )


def client_context(url: str, ca: str | None) -> ssl.SSLContext:
    """A context that verifies the router's certificate, by the system's or the given authorities.

    `ca` is a PEM file. Raises NoRouter if it cannot be read.
    """
    if not url.startswith(("https:", "wss:")):
        return ssl.SSLContext(
            ssl.PROTOCOL_TLS_CLIENT
        )  # not used; trusts no authority, and is cheap
    try:
        return verifying_context(ca)
    except OSError as error:
        raise NoRouter(f"{ca}: cannot read the CA file: {error.strerror or error}") from None


class RouterClient:
    """A client of one running router; an async context manager.

    A router of the same user on this machine is reached through its Unix socket, which proves the
    user. Every method raises NoRouter or ErrorResponse.
    """

    def __init__(self, url: str, key: str | None = None, ca: str | None = None) -> None:
        """`url` may lack the scheme and end in a slash.

        `key` is the router's admin or status key. `ca` is a PEM file with the authorities that may
        have signed its certificate.
        """
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._asked = self.url
        self._ending = contextlib.ExitStack()
        transport: httpx.AsyncHTTPTransport | None = None
        path = find_socket(self.url)
        if path is not None:
            with contextlib.suppress(OSError):  # the router ends at this moment
                short = self._ending.enter_context(short_path(path))
                transport = httpx.AsyncHTTPTransport(uds=short)
                self._asked = "http://" + self.url.partition("://")[2]
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT,
            trust_env=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
            transport=transport,
            verify=client_context(self._asked, ca),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._ending.close()

    async def status(self) -> Status:
        """The current state of the router and its servers."""
        load = await self._ask("GET", "/load-stats")
        if not isinstance(load.get("servers"), list):
            raise NoRouter(f"{self.url} answers, but is not a vLLM Router")
        return Status(health=await self._ask("GET", "/health"), load=load)

    async def explain(self, model: str | None, body: bytes | None) -> dict[str, Any]:
        """The decision for a request with this body, or for this model."""
        if body is not None:
            return await self._ask("POST", "/explain", body)
        return await self._ask("GET", f"/explain?model={quote(model or '', safe='')}")

    async def decisions(self, limit: int) -> list[dict[str, Any]]:
        """The last routing decisions, newest first."""
        found = (await self._ask("GET", f"/decisions?limit={limit}")).get("decisions")
        return [row for row in found or () if isinstance(row, dict)]

    async def drain(self, server: str, *, on: bool) -> None:
        """Drain a server, or take it back."""
        await self._ask("POST", f"{_admin(server)}/{'drain' if on else 'undrain'}")

    async def reload(self) -> str:
        """Read the configuration file now: `applied` or `unchanged`."""
        return str((await self._ask("POST", "/admin/reload")).get("result", ""))

    async def sign_in(self) -> str:
        """Create a single-use code that signs a page in."""
        return str((await self._ask("POST", "/admin/sign-in")).get("code", ""))

    async def watch_drain(self, server: str) -> AsyncIterator[int]:
        """Yield the number of all routers' requests on a server on every change, down to 0."""
        last = -1
        while True:
            number = await self._in_flight(server)
            if number != last:
                yield number
            if number == 0:
                return
            last = number
            await trio.sleep(POLL_INTERVAL)

    async def _in_flight(self, server: str) -> int:
        try:
            found = await self._ask("GET", _admin(server))
            return int(found.get("in_flight", 0)) + int(found.get("in_flight_elsewhere", 0))
        except ErrorResponse as error:
            if error.code == "server_not_found":
                return 0  # removed from the configuration meanwhile
            raise

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Send a request; returns the JSON object of the response."""
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            response = await self._client.request(
                method, self._asked + path, content=body, headers=headers
            )
        except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: of the host's name
            raise NoRouter(f"{self.url} is not a valid URL: {error}") from None
        except httpx.HTTPError as error:
            raise NoRouter(f"no router answers at {self.url}: {describe(error)}") from None
        page = _object(response)
        code = response.headers.get("x-vllm-router-error")
        if code is not None:
            said = _dictionary(page.get("error"))
            message = str(said.get("message") or f"{self.url} answered {code}")
            values = {name: str(value) for name, value in _dictionary(said.get("values")).items()}
            raise ErrorResponse(code, KEY_ADVICE.get(code, message), values)
        if not response.is_success or not page:
            status = response.status_code
            raise NoRouter(f"{self.url} is not a vLLM Router: {path} answered {status}")
        return page


def _admin(server: str) -> str:
    return f"/admin/servers/{quote(server, safe='')}"


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a router's answer, empty if it is none."""
    try:
        return _dictionary(response.json())
    except ValueError:
        return {}


def _dictionary(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
