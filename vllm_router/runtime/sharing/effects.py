"""Effects of other routers' batches on this process, apart from its policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import trio

from vllm_router.config.auth import KeyConfig
from vllm_router.fleet.server import Server
from vllm_router.proxy.context import ProxyContext
from vllm_router.proxy.key_limits import Use, new_use
from vllm_router.routing.owners import Entry
from vllm_router.routing.sharing.messages import Figures
from vllm_router.routing.sharing.peers import GONE_AFTER
from vllm_router.routing.sharing.scrapes import SharedScrapes

KeyFinder = Callable[[str], KeyConfig | None]


class ProcessEffects:
    """Implements `Effects` for a process. `key_named` finds an API key of the configuration.

    What keys have spent before this process was listening is added up apart, and taken from their
    buckets by `settle_past`: replayed into a bucket in use, it would meet requests of the present.
    """

    def __init__(self, context: ProxyContext, key_named: KeyFinder) -> None:
        self._context = context
        self._key_named = key_named
        self._past: dict[str, Use] = {}

    def spent(self, key: str, requests: int, at: float) -> None:
        self._spend(key, requests, at, into_debt=True)

    def spent_unheard(self, key: str, requests: int, at: float) -> None:
        # When in the interruption is not known, and the bucket was refilled meanwhile: at most it
        # is empty now.
        self._spend(key, requests, at, into_debt=False)

    def _spend(self, key: str, requests: int, at: float, *, into_debt: bool) -> None:
        found = self._key_named(key)
        if found is None or found.requests_per_minute is None:
            return
        now = trio.current_time()
        if now - at <= GONE_AFTER:
            self._context.key_limits.spend(found, requests, now, into_debt=into_debt)
            return
        use = self._past.get(key)
        if use is None:
            use = self._past[key] = new_use(found, at)
        use.refill(found.requests_per_minute, max(at, use.at))
        use.spend(requests, -math.inf if into_debt else 0.0)

    def settle_past(self) -> None:
        """Take what was spent in the past, less what has been refilled since, from the buckets."""
        past, self._past = self._past, {}
        now = trio.current_time()
        for name, use in past.items():
            key = self._key_named(name)
            if key is not None and key.requests_per_minute is not None:
                use.refill(key.requests_per_minute, now)
                missing = max(key.requests_per_minute, 1.0) - use.tokens
                self._context.key_limits.spend(key, missing, now)

    def running(self, requests: dict[str, int]) -> None:
        self._context.key_limits.run_elsewhere(requests)

    def quarantined(self, digest: bytes, age: float, now: float) -> None:
        self._context.quarantine.take(digest, age, now)

    def owner(self, entry: Entry) -> None:
        self._context.owners.take(entry)

    def ejected(self, server: Server, now: float) -> None:
        """The leader looks after the servers."""

    def scraped(self, router: str, figures: Mapping[str, Figures], at: float, now: float) -> None:
        """The leader looks after the servers."""


class RouterEffects(ProcessEffects):
    """For the process that probes the servers. `check_soon` checks a server's health now."""

    def __init__(
        self,
        context: ProxyContext,
        key_named: KeyFinder,
        check_soon: Callable[[Server], None],
        scrapes: SharedScrapes,
    ) -> None:
        super().__init__(context, key_named)
        self._check_soon = check_soon
        self._scrapes = scrapes

    def ejected(self, server: Server, now: float) -> None:
        server.passive_health.hint()
        self._check_soon(server)

    def scraped(self, router: str, figures: Mapping[str, Figures], at: float, now: float) -> None:
        self._scrapes.hear(router, figures, at, now)
