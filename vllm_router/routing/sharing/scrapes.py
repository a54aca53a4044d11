"""Divides the scrapes of the servers among the routers of a fleet, and takes over their figures.

Rendezvous hashing over the live routers names one router for each server. It scrapes `/metrics` and
announces the figures; the other routers read them and do not scrape. A router whose figures of
others are older than STALE_INTERVALS of its own intervals scrapes by itself, and announces as well:
so no agreement is needed, a router that ends leaves no gap, and figures are never missing because
the named router lacks the server or cannot reach it.

Figures decide no health. A server that this router has reason to doubt is scraped by this router,
and figures that look like a restart or a sleep only cause a scrape of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import NamedTuple, Protocol

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.fleet.silence import STILL_FOR
from vllm_router.routing.sharing.messages import MAX_FIGURES, Figures

STALE_INTERVALS = 3
"""Intervals of a server's scrapes after which the figures of other routers are too old."""

MOST_LATER = 4
"""Intervals that the routers behind the second one wait longer at most, so that not all of them
scrape at once a server that the first one has lost."""

LATER = 0.4
"""Seconds that the figures of other routers are late at most: two turns of the shared state."""

OLDEST = 5.0
"""Seconds after which figures are not announced, and not taken over."""

ASK_GAP = 0.5
"""Seconds between two checks of one server outside of its intervals."""

LOOKS = 16
"""Times at which the requests in flight are remembered: three seconds."""

BYTES_PER_BATCH = 64 * 1024
"""Size of the figures in a batch; the others follow in the next one."""

BYTES_OF_FIGURES = 160
"""Size of the encoded figures of one server, without names."""


class Probes(Protocol):
    """The probes of this process."""

    def check_soon(self, server: Server) -> None:
        """Check and scrape the server without waiting for its intervals."""

    def read_list_soon(self, server: Server) -> None:
        """Read the server's model list again without waiting for its interval."""


class _Heard(NamedTuple):
    """The newest figures of another router; `at` is the time of its scrape."""

    router: str
    at: float
    models: int


class SharedScrapes:
    """The duties of one router. Times are arguments, in seconds.

    taken: figures that were taken over. doubted: figures that caused a scrape instead.
    """

    def __init__(self, server_at: Callable[[str], Server | None]) -> None:
        """`server_at` finds a server of this router by its URL."""
        self.taken = 0
        self.doubted = 0
        self.probes: Probes | None = None
        self._server_at = server_at
        self._up: Callable[[], bool] = _never
        self._own = ""
        self._others: frozenset[str] = frozenset()
        self._heard: dict[str, _Heard] = {}
        self._ranks: dict[str, int] = {}
        self._spared: set[Server] = set()
        self._wanted: set[Server] = set()
        self._asked_at: dict[Server, float] = {}
        self._waiting: dict[Server, tuple[EngineMetrics, float]] = {}
        self._looks: deque[tuple[float, Mapping[str, int]]] = deque(maxlen=LOOKS)

    def connect(self, router: str, up: Callable[[], bool]) -> None:
        """Take part as this router; `up` says whether it hears the others now."""
        self._own, self._up = router, up
        self._ranks.clear()

    def follow(self, others: frozenset[str]) -> None:
        """These other routers are live."""
        if others == self._others:
            return
        self._others = others
        self._ranks.clear()
        self._forget_removed()

    @property
    def spared(self) -> int:
        """The servers whose figures come from other routers."""
        return len(self._spared) if self._up() else 0

    # -- duties -------------------------------------------------------------------------------

    def spares(self, server: Server, interval: float, now: float) -> bool:
        """Whether a scrape that is due now is left to other routers.

        `interval` is the time between two scrapes of this server. Without reliable figures of
        others this router scrapes.
        """
        if self._left_to_others(server, interval, now):
            self._spared.add(server)
            return True
        self._spared.discard(server)
        self._wanted.discard(server)
        return False

    def _left_to_others(self, server: Server, interval: float, now: float) -> bool:
        heard = self._heard.get(server.url)
        if heard is None or not self._up():
            return False
        if server in self._wanted or in_doubt(server, now):
            return False
        before = self._rank(server.url)
        if not before:
            return False
        patience = STALE_INTERVALS + min(before - 1, MOST_LATER)
        return now - heard.at <= patience * interval

    def _rank(self, url: str) -> int:
        """How many live routers come before this one for the server."""
        rank = self._ranks.get(url)
        if rank is None:
            own = _weight(self._own, url)
            rank = sum(_weight(other, url) > own for other in self._others)
            self._ranks[url] = rank
        return rank

    def failed(self, server: Server, now: float) -> None:
        """A request of this router has failed on the server: look at it now."""
        if server in self._spared:
            self._ask(server, now)

    def forget(self, server: Server) -> None:
        """The server is not probed any more."""
        for known in (self._spared, self._wanted):
            known.discard(server)
        self._asked_at.pop(server, None)
        self._waiting.pop(server, None)

    def _ask(self, server: Server, now: float) -> None:
        if now - self._asked_at.get(server, -math.inf) < ASK_GAP or self.probes is None:
            return
        self._asked_at[server] = now
        self._wanted.add(server)
        self.probes.check_soon(server)

    def _forget_removed(self) -> None:
        self._heard = {url: one for url, one in self._heard.items() if self._server_at(url)}

    # -- figures of this router ---------------------------------------------------------------

    def scraped(self, server: Server, metrics: EngineMetrics, now: float) -> None:
        """The server was scraped by this router."""
        if self._others and metrics.has_load:
            self._waiting[server] = metrics, now

    def take(self, now: float) -> dict[str, Figures]:
        """The figures for the next batch, by URL; figures that wait longest come first."""
        found: dict[str, Figures] = {}
        room = BYTES_PER_BATCH
        while self._waiting and len(found) < MAX_FIGURES:
            server = next(iter(self._waiting))
            metrics, at = self._waiting[server]
            names = ",".join((server.url, *metrics.adapters, *metrics.waiting_adapters))
            room -= BYTES_OF_FIGURES + len(names.encode())
            if found and room < 0:
                break
            del self._waiting[server]
            if now - at <= OLDEST:
                found[server.url] = _figures(server, metrics, max(0.0, now - at))
        return found

    # -- figures of others --------------------------------------------------------------------

    def hear(self, router: str, figures: Mapping[str, Figures], at: float, now: float) -> None:
        """Take over what another router has announced at `at`."""
        for url, one in figures.items():
            server = self._server_at(url)
            # The lists of models and the pages may depend on the API key.
            if server is not None and one.access == access_of(server):
                self._take(router, server, one, at - one.age, now)

    def _take(self, router: str, server: Server, one: Figures, at: float, now: float) -> None:
        before = self._heard.get(server.url)
        if now - at > OLDEST or (before is not None and at < before.at):
            return
        load, metrics = server.load_estimate, one.metrics()
        newer = load.scraped_at is None or at > load.scraped_at
        if newer and load.metrics is not None and _surprising(metrics, load.metrics):
            self.doubted += 1
            self._ask(server, now)
            return
        self._heard[server.url] = _Heard(router, at, one.models)
        changed = before is not None and before.router == router and before.models != one.models
        if changed and self.probes is not None:
            self.probes.read_list_soon(server)
        if newer and not in_doubt(server, now):
            self.taken += 1
            server.scraped(metrics, at, self._leases(server, at, now))

    # -- requests in flight -------------------------------------------------------------------

    def look(self, in_flight: Mapping[str, int], now: float) -> None:
        """Remember this router's requests by URL, to know later how many a scrape has seen."""
        self._looks.append((now, in_flight))

    def _leases(self, server: Server, at: float, now: float) -> int:
        """The requests of this router on the server at `at`, between two looks."""
        later, count_later = now, server.in_flight
        for moment, in_flight in reversed(self._looks):
            count = in_flight.get(server.url, 0)
            if moment <= at:
                share = (at - moment) / (later - moment) if later > moment else 0.0
                return round(count + min(share, 1.0) * (count_later - count))
            later, count_later = moment, count
        return count_later


def _never() -> bool:
    return False


def in_doubt(server: Server, now: float) -> bool:
    """Whether this router has a reason of its own to look at the server."""
    health, passive, activity = server.active_health, server.passive_health, server.activity
    still_since = activity.still_since
    return (
        health.up is not True
        or health.failures_in_row > 0
        or passive.failures_in_row > 0
        or passive.ejected
        or activity.silence.since is not None
        or activity.paused_at is not None
        or (still_since is not None and now - still_since > STILL_FOR / 3)
    )


def access_of(server: Server) -> int:
    """16 bits that differ for routers with different API keys for the server; 0 without one."""
    key = server.config.api_key
    if key is None:
        return 0
    digest = blake2b(f"{server.url}\n{key}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big")


def _surprising(metrics: EngineMetrics, known: EngineMetrics) -> bool:
    """Whether the figures look like another process, or like one that was put to sleep."""
    return metrics.began_after(known) or metrics.asleep is not known.asleep


def _weight(router: str, url: str) -> bytes:
    return blake2b(f"{router} {url}".encode(), digest_size=8).digest()


def _models_digest(server: Server) -> int:
    names = "\n".join(sorted(server.catalog.cards))
    return int.from_bytes(blake2b(names.encode("utf-8", "replace"), digest_size=7).digest(), "big")


def _figures(server: Server, metrics: EngineMetrics, age: float) -> Figures:
    return Figures(
        age=age,
        access=access_of(server),
        models=_models_digest(server),
        running=metrics.running or 0.0,
        waiting=metrics.waiting,
        kv_usage=metrics.kv_usage,
        prefix_queries=metrics.prefix_queries,
        prefix_hits=metrics.prefix_hits,
        prompt_tokens=metrics.prompt_tokens,
        generation_tokens=metrics.generation_tokens,
        token_latency_sum=metrics.token_latency_sum,
        token_latency_count=metrics.token_latency_count,
        first_token_sum=metrics.first_token_sum,
        first_token_count=metrics.first_token_count,
        asleep=metrics.asleep,
        kv_tokens=metrics.kv_tokens,
        max_adapters=metrics.max_adapters,
        adapters=metrics.adapters,
        waiting_adapters=metrics.waiting_adapters,
    )
