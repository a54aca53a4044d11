"""The probes of one server: `/health`, `/metrics` and `/v1/models`, each with its own interval.

The intervals grow in a large fleet, most of all while nothing happens on the server, see
`fleet/probe_pace.py`.
Each server has its own task, so that a slow server delays no other. This module decides when to
send which request, and `fleet/` what the responses mean.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections.abc import Callable
from random import Random

import httpx
import trio

from vllm_router.config.schema import Settings
from vllm_router.errors import OwnFault, UnusablePage
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.metrics_page import MetricsPage
from vllm_router.fleet.model_list import ModelList
from vllm_router.fleet.probe_pace import ProbePace
from vllm_router.fleet.reason import NONE, Reason, because
from vllm_router.fleet.server import Server
from vllm_router.http.client.page import read_whole
from vllm_router.http.client.resolver import Resolver
from vllm_router.routing.sharing.scrapes import LATER, SharedScrapes
from vllm_router.runtime.probe_client import ProbeClient
from vllm_router.runtime.probe_results import (
    PageStatus,
    error_reason,
    error_text,
    read_models,
)

logger = logging.getLogger(__name__)

METRICS_PATH, MODELS_PATH = "/metrics", "/v1/models"
PAUSED_PATH = "/is_paused"
CHECK_PATHS = ("/health", MODELS_PATH)
"""The second path is used if the first does not exist: engines other than vLLM lack /health."""

MODELS_EVERY = 5.0
"""Seconds between two reads of the model list of a server that is up (LoRA adapters change)."""

MAX_METRICS_BYTES = 4 * 1024 * 1024
"""Largest metrics page in bytes; vLLM 0.32 writes about 50 000 bytes per engine."""

MAX_ANSWER = 4096
"""Largest response in bytes to a yes/no question."""

_NO_SUCH_PATH = frozenset({404, 405, 501})
_BUSY = frozenset({429, 503})
"""Status codes to a check from saturated servers (llama.cpp#5594, sidecars), and from vLLM with a
dead engine. A server that has just answered requests counts as saturated."""

UNSETTLED_INTERVAL = 0.5
"""Seconds to the next check while the last result contradicts the server's state."""

TOO_LATE = 0.5
"""Seconds past a timeout: if it fires this late, the router was busy itself, and the response of a
server may be waiting unread."""


class Probe:
    """Probes one server until cancelled.

    `went_down` is called when a check has found the server down, `upkeep` after each scrape that
    was due, made or not. `pace` is shared by the probes of a fleet; `scrapes` knows what other
    routers do.
    """

    def __init__(
        self,
        server: Server,
        fleet: Fleet,
        rng: Random,
        tls: ssl.SSLContext,
        went_down: Callable[[Server], None],
        upkeep: Callable[[Server, float], None],
        resolver: Resolver | None = None,
        pace: ProbePace | None = None,
        scrapes: SharedScrapes | None = None,
    ) -> None:
        self._server = server
        self._fleet = fleet
        self._rng = rng
        self._tls = tls
        self._went_down = went_down
        self._upkeep = upkeep
        self._resolver = resolver
        self._pace = pace if pace is not None else ProbePace()
        self._scrapes = scrapes
        self._metrics_page = MetricsPage()
        self._check_now = trio.Event()
        self._scrape_now = trio.Event()
        self._combined = False
        """Whether each scrape is followed by the check and the model list, see `_combine`."""
        self._combined_scrapes = 0
        self._list_is_stale = trio.Event()
        self._pages = {METRICS_PATH: PageStatus(), MODELS_PATH: PageStatus()}
        self._client: ProbeClient

    @property
    def _settings(self) -> Settings:
        return self._fleet.settings

    async def run(self) -> None:
        """Run health checks, scrapes and model list reads until cancelled."""
        async with ProbeClient(self._server, self._tls, self._resolver) as self._client:
            # Read the list first: the router must know a server's models before it is up.
            await self._list_models()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_checking)
                    nursery.start_soon(self._keep_scraping)
                    nursery.start_soon(self._keep_listing)
            finally:
                self._pace.forget(self._server)

    # -- health -------------------------------------------------------------------------------

    async def _keep_checking(self) -> None:
        server = self._server
        while True:
            if self._settings.enable_active_health_check:
                await self._check()
            if server.paused_at is not None:
                await self._detect_resume()
            settled = server.active_health.settled
            usual = self._settings.health_check_interval
            if not settled:
                usual = min(usual, UNSETTLED_INTERVAL)
                if self._pace.is_predicted(server):
                    self._scrape_now.set()  # its figures matter from now on
            interval = self._pace.interval(server, usual) if settled else usual
            interval *= self._jitter(stretched=interval > usual)
            with trio.move_on_after(math.inf if settled and self._combined else interval):
                await self._check_now.wait()
            self._check_now = trio.Event()

    async def _check(self) -> None:
        server, timeout = self._server, self._settings.health_check_timeout
        began = trio.current_time()
        verdict, detail = Check.TIMEOUT, NONE
        with trio.move_on_after(timeout):
            try:
                verdict, detail = await self._get_health()
            except OwnFault as error:
                logger.warning(
                    "server %s: health check skipped, the fault is not the server's: %s",
                    server.name,
                    error,
                )
                return
        if verdict is Check.TIMEOUT:
            detail = self._client.timeout_reason(CHECK_PATHS[0], timeout)
            if server.active_health.up and not self._client.has_address:
                logger.warning(
                    "server %s: health check skipped, the fault is not the server's: %s",
                    server.name,
                    detail.text,
                )
                return
        elapsed = trio.current_time() - began
        if verdict is Check.TIMEOUT and elapsed > timeout + TOO_LATE:
            logger.warning(
                "server %s: health check skipped, the router read the response %.1f s late",
                server.name,
                elapsed - timeout,
            )
            return
        if verdict is Check.GOOD and server.active_health.up is False:
            await self._list_models()  # before it is up: its models may have changed
        now = trio.current_time()
        self._announce(server.checked(verdict, elapsed, now, detail), now)

    def _jitter(self, *, stretched: bool) -> float:
        """A factor around 1, so that the probes of a fleet, which started together, spread out."""
        spread = 0.5 if stretched else 0.1
        return 1.0 + spread * (self._rng.random() - 0.5)

    async def _detect_resume(self) -> None:
        """Detect that a server that was paused through this router has been resumed directly.

        A server without this path is a new process, started without vLLM's dev mode.
        """
        server, paused = self._server, True
        with trio.move_on_after(self._settings.health_check_timeout):
            try:
                response = await self._client.get(PAUSED_PATH)
                try:
                    paused = response.status_code not in _NO_SUCH_PATH
                    if response.is_success:
                        paused = b"false" not in await read_whole(response, MAX_ANSWER)
                finally:
                    await response.aclose()
            except (httpx.HTTPError, UnusablePage) as error:
                logger.debug("server %s: %s: %s", server.name, PAUSED_PATH, error)
        if not paused:
            now = trio.current_time()
            server.pause(on=False, now=now)
            self._fleet.settle(now)

    async def _get_health(self) -> tuple[Check, Reason]:
        detail, status = NONE, 0
        for path in CHECK_PATHS:
            try:
                status = await self._client.status(path)
            except httpx.HTTPError as error:
                if not self._client.blames_server(error):
                    raise OwnFault(error_text(error)) from error
                return Check.UNREACHABLE, error_reason(error)
            if 200 <= status < 300:
                return Check.GOOD, NONE
            detail = because("check_status", path=path, status=status)
            if status not in _NO_SUCH_PATH:
                break
        return Check.BUSY if status in _BUSY else Check.UNHEALTHY, detail

    def _announce(self, down: bool, now: float) -> None:
        self._fleet.settle(now)
        if down:
            self._went_down(self._server)

    # -- metrics ------------------------------------------------------------------------------

    async def _keep_scraping(self) -> None:
        page = self._pages[METRICS_PATH]
        skip = 0  # scrapes to leave out, as the page was unusable
        server, pace = self._server, self._pace
        while True:
            woken, spared = self._scrape_now.is_set(), False
            self._scrape_now = trio.Event()
            began = trio.current_time()
            if skip:
                skip -= 1
            elif self._left_to_another_router(began):
                spared = True
            else:
                await self._scrape()
                skip = page.pause - 1
            if self._combined and not woken:
                await self._check_and_list()
            now = trio.current_time()
            server.expire(now)
            self._fleet.settle(now)
            self._upkeep(server, now)
            was_idle = pace.is_idle(server) or woken
            interval = pace.scraped(server, self._settings, now, self._wake, spared=spared)
            if spared:
                server.load_estimate.expect_scrapes(interval + LATER)
            if was_idle and not pace.is_idle(server):
                self._check_now.set()
            usual = self._settings.metrics_interval
            self._combine(on=interval >= max(self._settings.health_check_interval, MODELS_EVERY))
            if interval > usual * page.pause:
                skip = 0  # an unusable page of an idle server is read seldom anyway
            await self._wait_for_scrape(interval, began, now)

    async def _wait_for_scrape(self, interval: float, began: float, now: float) -> None:
        """Wait until `interval` seconds after the last scrape `began`, or for `_scrape_now`."""
        stretched = interval > self._settings.metrics_interval
        interval *= self._jitter(stretched=stretched)
        pause = max(interval / 4, began + interval - now)
        with trio.move_on_after(pause):
            await self._scrape_now.wait()
        if stretched and trio.current_time() > now + pause + TOO_LATE:
            await self._wait_for_turn(interval)

    async def _wait_for_turn(self, interval: float) -> None:
        """Wait for up to one interval, unless the server gets a request.

        The process was stopped or had no CPU time, so that all probes are due now. A thousand of
        them at once would delay requests for seconds.
        """
        with trio.move_on_after(self._rng.random() * interval):
            await self._scrape_now.wait()

    def _left_to_another_router(self, now: float) -> bool:
        """Whether another router's figures of this server replace a scrape."""
        if self._scrapes is None:
            return False
        interval = self._pace.interval(self._server, self._settings.metrics_interval)
        return self._scrapes.spares(self._server, interval, now)

    def _combine(self, *, on: bool) -> None:
        """Let the scrapes of an idle server do its checks and read its model list as well.

        One connection serves all three then. vLLM closes idle connections after 5 seconds.
        """
        on = on and self._pace.is_idle(self._server)
        if self._combined and not on:
            self._check_now.set()
            self._list_is_stale.set()
        self._combined = on

    async def _check_and_list(self) -> None:
        if self._settings.enable_active_health_check:
            await self._check()
        self._combined_scrapes += 1
        if self._combined_scrapes % self._pages[MODELS_PATH].pause == 0:
            await self.read_list()

    def _wake(self) -> None:
        """Scrape the server now: it was idle and has got a request, or it has failed one.

        A server that was idle is checked, too, if the request still runs then.
        """
        self._scrape_now.set()

    async def _scrape(self) -> None:
        """Read the load metrics. The result also counts as a connection check."""
        server = self._server
        answered = False
        self._fleet.refresh_leases()
        leases = server.in_flight
        with trio.move_on_after(self._settings.health_check_timeout):
            try:
                response = await self._client.get(METRICS_PATH)
                try:
                    await self._read_metrics(response, leases)
                finally:
                    await response.aclose()
            except httpx.HTTPError as error:
                if self._client.blames_server(error):
                    self._reached(reachable=False, detail=error_reason(error))
                return
            answered = True
        if answered:
            self._reached(reachable=True)
        else:
            self._check_now.set()  # slow metrics alone do not make a server unhealthy

    async def _read_metrics(self, response: httpx.Response, leases: int) -> None:
        """Read and parse the page. An unusable page leaves the previous metrics in place."""
        if not response.is_success:
            return
        page, metrics = self._pages[METRICS_PATH], EngineMetrics()
        try:
            text = await read_whole(response, MAX_METRICS_BYTES)
            for read in self._metrics_page.read(text):
                if read is not None:
                    metrics = read
                    break
                await trio.lowlevel.checkpoint()
        except UnusablePage as problem:
            if page.refused(str(problem)):
                logger.warning(
                    "server %s: /metrics cannot be used: %s. Its load is estimated from the "
                    "requests of this router",
                    self._server.name,
                    problem,
                )
            return
        page.accepted()
        now = trio.current_time()
        self._server.scraped(metrics, now, leases)
        if self._scrapes is not None:
            self._scrapes.scraped(self._server, metrics, now)

    def _reached(self, *, reachable: bool, detail: Reason = NONE) -> None:
        if not self._settings.enable_active_health_check:
            return
        now = trio.current_time()
        down = self._server.scrape_reached(reachable, now, detail)
        self._announce(down, now)
        health = self._server.active_health
        # Check a recovering server now, but not twice in a moment: the second result would add
        # nothing.
        recovers = not health.up and reachable and not health.goods_in_row
        if recovers or (health.up and not health.settled):
            self._check_now.set()

    # -- models -------------------------------------------------------------------------------

    async def _keep_listing(self) -> None:
        while True:
            missing = self._server.models is None
            usual = UNSETTLED_INTERVAL if missing else MODELS_EVERY
            usual *= self._pages[MODELS_PATH].pause
            interval = self._pace.interval(self._server, usual)
            if interval > usual:
                interval *= self._jitter(stretched=True)
            with trio.move_on_after(math.inf if self._combined else interval):
                await self._list_is_stale.wait()
            stale = self._list_is_stale.is_set()
            self._list_is_stale = trio.Event()
            await self.read_list()
            if stale:
                await trio.sleep(UNSETTLED_INTERVAL)  # prevents a busy loop if the list stays wrong

    def check_soon(self) -> None:
        """Check and scrape the server now: another router has ejected it, or a request failed."""
        self._check_now.set()
        self._scrape_now.set()

    def read_list_soon(self) -> None:
        """Request an immediate read because a response has contradicted the list.

        Requests coalesce.
        """
        self._list_is_stale.set()

    async def read_list(self) -> None:
        """Read the model list of a server that is up."""
        if self._server.active_health.up:
            await self._list_models()
            self._fleet.settle(trio.current_time())

    async def _list_models(self) -> None:
        """Read `/v1/models`. If the read fails, the previous list stays in use."""
        name = self._server.name
        with trio.move_on_after(self._settings.health_check_timeout):
            try:
                response = await self._client.get(MODELS_PATH)
                try:
                    if response.is_success:
                        self._listed(await read_models(response))
                    else:
                        logger.debug(
                            "server %s: /v1/models answered %d", name, response.status_code
                        )
                finally:
                    await response.aclose()
            except httpx.HTTPError as error:
                logger.debug("server %s: /v1/models: %s", name, error_text(error))
            except UnusablePage as problem:
                if self._pages[MODELS_PATH].refused(str(problem)):
                    logger.warning(
                        "server %s: /v1/models cannot be used: %s. %s; to fix this, list its "
                        "models in servers.toml (models = [...])",
                        name,
                        problem,
                        "It receives requests for models that no other server lists"
                        if self._server.models is None
                        else "Its previous list stays in use",
                    )

    def _listed(self, found: ModelList) -> None:
        page = self._pages[MODELS_PATH]
        if page.accepted(found.problem) and found.problem:
            logger.warning(
                "server %s: /v1/models: ignored %d entries: %s",
                self._server.name,
                found.left_out,
                found.problem,
            )
        self._server.listed(found.cards, trio.current_time())
