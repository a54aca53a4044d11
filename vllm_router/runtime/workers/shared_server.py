"""Servers leased by several processes: the leader's, and the workers' that follow it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Generic, TypeVar

import trio

from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Lease, Server
from vllm_router.runtime.workers.messages import ServerState, Verdict
from vllm_router.runtime.workers.queue_board import mark
from vllm_router.runtime.workers.shared_counters import CounterView

News = TypeVar("News", Server, Verdict)
"""News for the other processes: changed servers from the leader, verdicts from a worker."""


class SharedServer(Server, Generic[News]):
    """A server leased by several processes. `tell` sends news to the others."""

    def __init__(
        self,
        config: ServerConfig,
        settings: Settings,
        on_change: Callable[[Server], None],
        counters: CounterView,
        tell: Callable[[News], None],
    ) -> None:
        self._counters = counters
        self._tell: Callable[[News], None] = tell
        self._column: int | None = None
        super().__init__(config, settings, on_change)

    def release_column(self, column: int | None) -> None:
        """Release the counter column for another key, unless it is `column`."""
        if self._column is not None and self._column != column:
            self._counters.put(self._column, 0)
            self._column = None
            self.in_flight = len(self.leases)
            self._update_load()

    def use_column(self, column: int | None) -> None:
        """Use a counter column.

        With None (no column left) only this process's leases are counted.
        """
        if column == self._column:
            return
        self._column = column
        self.in_flight = len(self.leases)
        if column is not None:
            self._counters.watch(column)
            self._counters.put(column, self.in_flight)
            self.in_flight += self._counters.elsewhere[column]
        self._update_load()

    def changed_elsewhere(self, difference: int) -> None:
        """Other processes have acquired or released leases; `difference` is the net change."""
        self.in_flight += difference
        self._update_load()
        if difference > 0 and self.on_chosen is not None:
            self.on_chosen(self, trio.current_time())

    def lease(self, now: float) -> Lease:
        lease = super().lease(now)
        if self._column is not None:
            self._counters.put(self._column, len(self.leases))
        return lease

    def end_lease(self, lease: Lease) -> None:
        super().end_lease(lease)
        if self._column is None:
            return
        page = self._counters.queue_page
        if page is None:
            self._counters.put(self._column, len(self.leases))
            return
        # No other process may see the server free, and the note of its previous release.
        server = mark(self.url)
        page.begin_release(server)
        self._counters.put(self._column, len(self.leases))
        page.release(server, int(perf_counter() * 1e6))


class LeadingServer(SharedServer[Server]):
    """The leader's server: announces every scrape; its fleet announces changes of state."""

    def scraped(self, metrics: EngineMetrics, now: float, leases: int) -> None:
        super().scraped(metrics, now, leases)
        self._tell(self)


class FollowingServer(SharedServer[Verdict]):
    """A worker's server: follows the leader's decisions."""

    _decides: tuple[object, ...] = ()

    def apply(self, config: ServerConfig, settings: Settings) -> None:
        super().apply(config, settings)
        self._decides = ()  # apply the next state even if it is equal

    def answered(self, now: float, *, trial: bool) -> None:
        self.last_byte_at = max(self.last_byte_at, now)
        self._tell(Verdict("answered", self.url, now, trial))

    def refused(self, now: float, retry_after: float | None) -> None:
        super().refused(now, retry_after)
        self._tell(Verdict("refused", self.url, now, retry_after=retry_after))

    def look_for_silence(self, now: float) -> None:
        """Only the leader detects silence, because it sees the traffic of all processes."""

    def follow(self, state: ServerState, now: float) -> bool:
        """Take over the leader's state. Returns True if the server has just gone down."""
        probe, traffic = self.active_health, self.passive_health
        went_down = bool(probe.up) and not state.up
        probe.up, probe.reason = state.up, state.reason
        probe.goods_in_row = probe.rules.rise if state.damped else 0
        came_back = state.recovered_at > self.recovered_at
        until = state.backoff_until
        self.backoff_until = until if came_back else max(self.backoff_until, until)
        self.recovered_at, self.went_down_at = state.recovered_at, state.went_down_at
        self.restarts = state.restarts
        load = self.load_estimate
        was_asleep = load.asleep
        load.metrics, load.scraped_at = state.metrics, state.scraped_at
        load.stale_after = state.stale_after
        load.fresh = state.metrics is not None and load.age(now) <= load.stale_after
        load.leases_at_scrape, load.stuck = state.leases_at_scrape, state.stuck
        self.capacity_estimate.follow(state.capacity)
        self._follow_capacity()
        self._update_load()
        asleep = state.metrics is not None and state.metrics.asleep
        decides = (
            *(state.up, state.damped, state.ejected, state.ejected_until, self.backoff_until),
            *(state.recovered_at, state.models, state.draining, asleep),
            *(state.lengths, state.refusals, state.paused_at),
            *(state.silent_since, state.silent_until),
        )
        if decides != self._decides or asleep is not was_asleep:
            self._decides = decides
            traffic.ejected, traffic.until = state.ejected, state.ejected_until
            traffic.reason = state.ejected_for
            self.catalog.names, self.draining = state.models, state.draining
            self.refusals.replace(state.refusals)
            silence = self.silence
            silence.since, silence.until = state.silent_since, state.silent_until
            silence.reason, self.activity.paused_at = state.silent_for, state.paused_at
            silence.trial = silence.trial and silence.since is not None
            lengths = state.lengths
            if isinstance(lengths, int):
                lengths = dict.fromkeys(state.models or (), lengths)
            if lengths != self.lengths:
                self.catalog.lengths = lengths
            self._on_change(self)
        return went_down


def state_of(server: Server) -> ServerState:
    """The state that the leader sends. Probation requests are counted by each process itself."""
    return ServerState(
        url=server.url,
        up=server.active_health.up,
        reason=server.active_health.reason,
        damped=server.active_health.damped,
        ejected=server.passive_health.ejected,
        ejected_until=server.passive_health.until,
        ejected_for=server.passive_health.reason,
        backoff_until=server.backoff_until,
        recovered_at=server.recovered_at,
        went_down_at=server.went_down_at,
        restarts=server.restarts,
        metrics=server.metrics,
        scraped_at=server.load_estimate.scraped_at,
        leases_at_scrape=server.load_estimate.leases_at_scrape,
        models=server.models,
        draining=server.draining,
        lengths=_short(server.lengths, server.models),
        refusals=server.refusals.all(),
        silent_since=server.silence.since,
        silent_until=server.silence.until,
        silent_for=server.silence.reason,
        stuck=server.load_estimate.stuck,
        paused_at=server.paused_at,
        capacity=server.capacity_estimate.share,
        stale_after=server.load_estimate.stale_after,
    )


def _short(lengths: dict[str, int], models: tuple[str, ...] | None) -> dict[str, int] | int:
    """Compact form of the context lengths, which are sent with each scrape: one number if equal."""
    if len(lengths) == len(models or ()) and len(found := set(lengths.values())) == 1:
        return found.pop()
    return lengths
