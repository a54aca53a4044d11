"""Probe the configured servers as the router would, for `check-config --probe`."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import trio

from vllm_router.config.models import unserved_models
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.errors import UnusablePage
from vllm_router.fleet.engine_metrics import parse_engine_metrics
from vllm_router.fleet.model_list import read_model_list
from vllm_router.http.client.error_text import describe
from vllm_router.http.client.httpx_transport import HttpxTransport, get_request
from vllm_router.http.client.page import read_whole
from vllm_router.http.client.pool import Pool
from vllm_router.runtime.probe import MAX_METRICS_BYTES

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
    """The results for one server. Each entry of `problems` keeps it from serving."""

    name: str
    url: str
    health: str = "no answer"
    health_seconds: float | None = None
    models: dict[str, int | None] | None = None
    """The models with their max_model_len, if known; None without a usable list."""
    metrics: tuple[str, ...] = ()
    """The load figures in `/metrics`: running, waiting, kv (cache usage)."""
    version: str = ""
    key: str = "none"
    problems: list[str] = field(default_factory=list)
    hint: str = ""
    """What its gauges say about `max_concurrent_requests`; empty if it fits."""


async def probe_fleet(config: Config) -> list[ServerReport]:
    """Probe all servers in parallel, with the same requests as the router."""
    timeout = config.settings.health_check_timeout
    reports = [ServerReport(server.name, server.url) for server in config.servers]
    contexts = ServerContexts()
    async with trio.open_nursery() as nursery:
        for server, report in zip(config.servers, reports, strict=True):
            nursery.start_soon(_probe, server, report, timeout, contexts.of(server))
    return reports


def missing_models(config: Config, reports: list[ServerReport]) -> list[str]:
    """Models that `[models]` names and no server has; empty while a server's list is unknown."""
    served: set[str] = set()
    for server, report in zip(config.servers, reports, strict=True):
        models = server.models if server.models is not None else report.models
        if models is None:
            return []
        served.update(models)
    return unserved_models(config.models, served)


def uneven_lengths(reports: list[ServerReport]) -> list[str]:
    """A warning for each model whose context length (`max_model_len`) differs between servers."""
    lengths: dict[str, dict[int, list[str]]] = {}
    for report in reports:
        for model, length in (report.models or {}).items():
            if length is not None:
                lengths.setdefault(model, {}).setdefault(length, []).append(report.name)
    return [
        f"warning: the model {model!r} has contexts of different lengths: "
        + ", ".join(f"{length} on {', '.join(names)}" for length, names in sorted(found.items()))
        + "; /v1/models shows the longest, and prompts too long for one server are sent to a "
        "longer one"
        for model, found in lengths.items()
        if len(found) > 1
    ]


async def _probe(
    server: ServerConfig, report: ServerReport, timeout: float, context: ssl.SSLContext
) -> None:
    """Fill in a report; each request has `timeout` seconds."""
    agent = {"user-agent": "vllm-router-check", "accept-encoding": "identity"}
    keyed = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    async with HttpxTransport(Pool(server.url, context, spread=False)) as carrier:

        async def ask(path: str, *, key: bool = True) -> _Answer | str:
            headers = agent | (keyed if key else {})
            request = get_request(server.url + path, headers)
            with trio.move_on_after(timeout):
                try:
                    return await _answer_to(carrier, request)
                except httpx.HTTPError as error:
                    return describe(error)
            return f"no {carrier.doing or 'answer'} in {timeout:g} s"

        began = trio.current_time()
        health = await ask("/health")
        elapsed = trio.current_time() - began
        models = await ask("/v1/models")
        if isinstance(health, _Answer) and health.status in (404, 405, 501):
            # Other engines have no /health; the router uses their model list instead.
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
            report.hint = capacity_hint(server, metrics.content)
        version = await ask("/version")
        if isinstance(version, _Answer) and version.is_success:
            report.version = _version_in(version.content)


def capacity_hint(server: ServerConfig, page: bytes) -> str:
    """What the page's gauges say about the server's `max_concurrent_requests`.

    One look proves a larger capacity, or shows a queue; only a running router learns the capacity.
    """
    try:
        found = parse_engine_metrics(page.decode("latin-1"))
    except UnusablePage:
        return ""
    running, waiting = found.running or 0.0, found.waiting or 0.0
    said = server.max_concurrent_requests
    if waiting > 0 and running > 0 and (said is None or said > running):
        now = "is not set" if said is None else f"says {said}"
        return (
            f"is full with {running:.0f} running and {waiting:.0f} waiting; "
            f"max_concurrent_requests {now}, {running:.0f} would fit"
        )
    if waiting <= 0 and said is not None and running > said:
        return (
            f"runs {running:.0f} requests without a queue; max_concurrent_requests says {said}: "
            "raise it, or leave it out to have it learnt"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Answer:
    """`problem` is the reason why the content is unusable; the content is empty then."""

    status: int
    content: bytes
    problem: str = ""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


async def _answer_to(carrier: HttpxTransport, request: httpx.Request) -> _Answer:
    response = await carrier.handle_async_request(request)
    try:
        return _Answer(response.status_code, await read_whole(response, MAX_METRICS_BYTES))
    except UnusablePage as problem:
        return _Answer(response.status_code, b"", str(problem))
    finally:
        await response.aclose()


def _judge_models(server: ServerConfig, report: ServerReport, answer: _Answer | str) -> None:
    """Evaluate the model list. Only `/v1` paths check the API key."""
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
    # The router does not read the list of a server whose models are configured.
    if problem and (server.models is None or report.key == "refused"):
        report.problems.append(problem)


def _length_of(card: dict[str, Any]) -> int | None:
    length = card.get("max_model_len")
    return length if isinstance(length, int) else None


def _version_in(page: bytes) -> str:
    """The version on the page; empty if it is missing or not printable."""
    try:
        version = msgspec.json.decode(page, type=_Version).version
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return ""
    return version[:SHOWN_VERSION] if version.isprintable() else ""


class _Version(msgspec.Struct):
    version: str = ""
