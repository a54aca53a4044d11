"""What the commands ask: a running router about its fleet, or the servers themselves.

Everything here is a client: it opens its own connections and closes them, ignores the proxies of
the environment and follows no redirect.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote

import httpx
import msgspec
import trio

from vllm_router.config.models import nowhere
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.errors import RouterError, UnusablePage
from vllm_router.fleet.model_list import read_model_list
from vllm_router.http.client.client import Pool
from vllm_router.http.client.httpx_transport import Carrier
from vllm_router.http.client.page import read_whole
from vllm_router.http.client.transport import tls_words
from vllm_router.runtime.own_machine import find_socket, short_path
from vllm_router.runtime.probe import MAX_METRICS_BYTES

TIMEOUT = 5.0
"""Seconds a router may take for an answer."""

POLL_INTERVAL = 0.5
"""Seconds between two looks at a draining server."""


class NoRouter(RouterError):
    """Nothing answers at the URL, or something that is not a vLLM Router."""


class Refusal(RouterError):
    """The router answered with an error; `code` is its name for it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# -- a running router -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server, as `/load-stats` tells; None is what an older or newer router does not tell."""

    name: str
    state: str
    reason: str
    load: float | None
    running: float | None
    waiting: float | None
    in_flight: float | None
    capacity: float | None
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """What a router says of itself, decoded from JSON; `load` has a list of `servers`."""

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
        capacity=figure(entry.get("max_capacity")),
        models=tuple(map(str, entry.get("models") or ())),
    )


def client_context(url: str, ca: str | None) -> ssl.SSLContext:
    """To verify a router's certificate: by the system's authorities, or those in a PEM file.

    Raises NoRouter if the file cannot be used.
    """
    if not url.startswith(("https:", "wss:")):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and takes no time to make
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise NoRouter(f"{ca}: cannot be used: {error.strerror or error}") from None


class Router:
    """A client of one running router; an async context manager.

    A router of the same user on this machine is asked by its Unix socket, which proves who asks.
    Every method raises NoRouter or Refusal.
    """

    def __init__(self, url: str, key: str | None = None, ca: str | None = None) -> None:
        """`url` may lack the scheme and end in a slash. `key` is the router's admin or status
        key. `ca` is a PEM file with the authorities that may have signed its certificate.
        """
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._asked = self.url
        self._ending = contextlib.ExitStack()
        transport: httpx.AsyncHTTPTransport | None = None
        path = find_socket(self.url)
        if path is not None:
            with contextlib.suppress(OSError):  # the router ends just now
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
        """The router and its servers, as of now."""
        load = await self._ask("GET", "/load-stats")
        if not isinstance(load.get("servers"), list):
            raise NoRouter(f"{self.url} answers, but is no vLLM Router")
        return Status(health=await self._ask("GET", "/health"), load=load)

    async def explain(self, model: str | None, body: bytes | None) -> dict[str, Any]:
        """Where a request would go: one with this body, or else one for this model."""
        if body is not None:
            return await self._ask("POST", "/explain", body)
        return await self._ask("GET", f"/explain?model={quote(model or '', safe='')}")

    async def decisions(self, limit: int) -> list[dict[str, Any]]:
        """The last picks, newest first."""
        found = (await self._ask("GET", f"/decisions?limit={limit}")).get("decisions")
        return [row for row in found or () if isinstance(row, dict)]

    async def drain(self, server: str, *, on: bool) -> None:
        """Take a server out of the rotation, or back in."""
        await self._ask("POST", f"{_admin(server)}/{'drain' if on else 'undrain'}")

    async def sign_in(self) -> str:
        """A code that signs a page in, once."""
        return str((await self._ask("POST", "/admin/sign-in")).get("code", ""))

    async def watch_drain(self, server: str) -> AsyncIterator[int]:
        """The requests in flight on a server, whenever their number has changed, down to 0."""
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
            return int((await self._ask("GET", _admin(server))).get("in_flight", 0))
        except Refusal as refusal:
            if refusal.code == "server_not_found":
                return 0  # taken out of the configuration meanwhile, and its last request ended
            raise

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """A JSON object from the router."""
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            response = await self._client.request(
                method, self._asked + path, content=body, headers=headers
            )
        except httpx.InvalidURL as error:
            raise NoRouter(f"{self.url} is no URL: {error}") from None
        except httpx.HTTPError as error:
            raise NoRouter(f"no router answers at {self.url}: {words(error)}") from None
        page = _object(response)
        code = response.headers.get("x-vllm-router-error")
        if code is not None:
            said = page.get("error")
            message = said.get("message") if isinstance(said, dict) else None
            raise Refusal(code, str(message or f"{self.url} answered {code}"))
        if not response.is_success or not page:
            raise NoRouter(f"{self.url} is no vLLM Router: {path} answered {response.status_code}")
        return page


def _admin(server: str) -> str:
    return f"/admin/servers/{quote(server, safe='')}"


# -- the servers themselves -------------------------------------------------------------------

_LOAD_METRICS = {
    "running": ("num_requests_running",),
    "waiting": ("num_requests_waiting",),
    "kv": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
}
_METRIC = re.compile(rb"^vllm:(\w+)(?=[{ ])", re.MULTILINE)

SHOWN_VERSION = 40
"""Characters of a server's version that are shown."""


@dataclass(slots=True)
class ServerReport:
    """What one server answered. Whatever is in `problems` keeps it from serving."""

    name: str
    url: str
    health: str = "no answer"
    health_seconds: float | None = None
    models: dict[str, int | None] | None = None
    """Each with its max_model_len, if it says one; None if there was no list."""
    metrics: tuple[str, ...] = ()
    """Which of running, waiting and kv (cache usage) `/metrics` tells."""
    version: str = ""
    key: str = "none"
    problems: list[str] = field(default_factory=list)


async def probe_fleet(config: Config) -> list[ServerReport]:
    """Ask every server, all at once, for what the router will need of it."""
    timeout = config.settings.health_check_timeout
    reports = [ServerReport(server.name, server.url) for server in config.servers]
    contexts = ServerContexts()
    async with trio.open_nursery() as nursery:
        for server, report in zip(config.servers, reports, strict=True):
            nursery.start_soon(_probe, server, report, timeout, contexts.of(server))
    return reports


def missing_models(config: Config, reports: list[ServerReport]) -> list[str]:
    """What `[models]` names and no server has; nothing as long as a server's list is not known."""
    served: set[str] = set()
    for server, report in zip(config.servers, reports, strict=True):
        models = server.models if server.models is not None else report.models
        if models is None:
            return []
        served.update(models)
    return nowhere(config.models, served)


def uneven_lengths(reports: list[ServerReport]) -> list[str]:
    """A line for each model whose longest context (`max_model_len`) differs between servers."""
    lengths: dict[str, dict[int, list[str]]] = {}
    for report in reports:
        for model, length in (report.models or {}).items():
            if length is not None:
                lengths.setdefault(model, {}).setdefault(length, []).append(report.name)
    return [
        f"warning: the model {model!r} has contexts of different lengths: "
        + ", ".join(f"{length} on {', '.join(names)}" for length, names in sorted(found.items()))
        + "; /v1/models tells the longest, and prompts too long for one server are sent to a "
        "longer one"
        for model, found in lengths.items()
        if len(found) > 1
    ]


async def _probe(
    server: ServerConfig, report: ServerReport, timeout: float, context: ssl.SSLContext
) -> None:
    """Fill in a report; every question has `timeout` seconds."""
    agent = {"user-agent": "vllm-router-check", "accept-encoding": "identity"}
    keyed = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    async with Carrier(Pool(server.url, context, spread=False)) as carrier:

        async def ask(path: str, *, key: bool = True) -> _Answer | str:
            headers = agent | (keyed if key else {})
            request = httpx.Request("GET", server.url + path, headers=headers)
            with trio.move_on_after(timeout):
                try:
                    return await _answer_to(carrier, request)
                except httpx.HTTPError as error:
                    return words(error)
            return f"no {carrier.doing or 'answer'} in {timeout:g} s"

        began = trio.current_time()
        health = await ask("/health")
        elapsed = trio.current_time() - began
        models = await ask("/v1/models")
        if isinstance(health, _Answer) and health.status in (404, 405, 501):
            # Other engines have no /health; the router asks them for their models instead.
            health = models
        if isinstance(health, str):
            report.health = health
            report.problems.append(f"/health: {health}")
            return
        report.health_seconds = elapsed
        report.health = "ok" if health.is_success else f"answered {health.status}"
        if not health.is_success:
            report.problems.append(f"/health answered {health.status}")
        _judge_models(server, report, models)
        if keyed and report.key == "accepted":
            keyless = await ask("/v1/models", key=False)
            if isinstance(keyless, _Answer) and keyless.is_success:
                report.key = "not needed"
        metrics = await ask("/metrics")
        if isinstance(metrics, _Answer) and metrics.is_success:
            found = {name.decode() for name in _METRIC.findall(metrics.content)}
            report.metrics = tuple(
                short for short, names in _LOAD_METRICS.items() if found.intersection(names)
            )
        version = await ask("/version")
        if isinstance(version, _Answer) and version.is_success:
            report.version = _version_in(version.content)


@dataclass(frozen=True, slots=True)
class _Answer:
    """`problem` says why the content cannot be used; the content is empty then."""

    status: int
    content: bytes
    problem: str = ""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


async def _answer_to(carrier: Carrier, request: httpx.Request) -> _Answer:
    response = await carrier.handle_async_request(request)
    try:
        return _Answer(response.status_code, await read_whole(response, MAX_METRICS_BYTES))
    except UnusablePage as problem:
        return _Answer(response.status_code, b"", str(problem))
    finally:
        await response.aclose()


def _judge_models(server: ServerConfig, report: ServerReport, answer: _Answer | str) -> None:
    """What the model list, or the lack of one, says. Only `/v1` paths look at the key."""
    problem = ""
    if isinstance(answer, str):
        problem = f"/v1/models: {answer}"
    elif answer.status in (401, 403):
        report.key = "refused" if server.api_key else "missing"
        problem = f"/v1/models answered {answer.status}: key {report.key}"
    elif not answer.is_success:
        problem = f"/v1/models answered {answer.status}"
    else:
        report.key = "accepted" if server.api_key else "none"
        try:
            if answer.problem:
                raise UnusablePage(answer.problem)
            *_, found = read_model_list(answer.content)
            report.models = {name: _length_of(card) for name, card in found.cards.items()}
            problem = f"/v1/models: {found.problem}" if found.left_out else ""
        except UnusablePage as unusable:
            problem = f"/v1/models cannot be used: {unusable}"
    # The router does not ask a server whose models the configuration names.
    if problem and (server.models is None or report.key == "refused"):
        report.problems.append(problem)


def _length_of(card: dict[str, Any]) -> int | None:
    length = card.get("max_model_len")
    return length if isinstance(length, int) else None


def _version_in(page: bytes) -> str:
    """The version that a page tells; empty if it tells none that can be shown."""
    try:
        version = msgspec.json.decode(page, type=_Version).version
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return ""
    return version[:SHOWN_VERSION] if version.isprintable() else ""


class _Version(msgspec.Struct):
    version: str = ""


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a router's answer, empty if it is none."""
    try:
        page = response.json()
    except ValueError:
        return {}
    return page if isinstance(page, dict) else {}


def words(error: httpx.HTTPError) -> str:
    """What went wrong, for people: the operating system's word for it, if it had one."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            # One for each address of the host; the last was tried last.
            cause = cause.exceptions[-1]
        elif isinstance(cause, ssl.SSLError):
            return tls_words(cause)  # its number is not the operating system's
        elif isinstance(cause, OSError) and cause.errno is not None:
            # Name resolution has numbers of its own; Trio words the others at length.
            gai = isinstance(cause, socket.gaierror)
            return str(cause.strerror) if gai else os.strerror(cause.errno)
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
