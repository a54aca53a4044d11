"""The fleet of one of several processes.

Each process has its own servers, whose `in_flight` counts the leases of all processes: its own, and
those read from the shared counters. Policies, load and the control plane need not know of other
processes.

The leader decides the state of each server. Workers report the outcomes of their attempts and take
over the leader's state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

from vllm_router.config.auth import KeyConfig
from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.errors import ConfigError
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.fleet import Fleet, FleetChange
from vllm_router.fleet.refusals import Asked
from vllm_router.fleet.server import Lease, Server
from vllm_router.runtime.workers.messages import ServerState, Verdict
from vllm_router.runtime.workers.shared_counters import CounterView
from vllm_router.runtime.workers.usage import SharedUsage, column_keys

News = TypeVar("News", Server, Verdict)
"""What is sent to the other processes: changed servers by the leader, verdicts by a worker."""


logger = logging.getLogger(__name__)


def counted_of_keys(keys: Iterable[KeyConfig]) -> list[str]:
    """The counter keys of API keys."""
    return [name for key in keys for name in column_keys(key)]


def counted_in(config: Config) -> set[str]:
    """All counter keys: one per server (leases), two per API key."""
    keys = config.auth.keys if config.auth is not None else ()
    return {server.url for server in config.servers}.union(counted_of_keys(keys))


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

    def give_back(self, column: int | None) -> None:
        """Release the counter column unless it is this one, so that it can be reassigned."""
        if self._column is not None and self._column != column:
            self._counters.put(self._column, 0)
            self._column = None
            self.in_flight = len(self.leases)
            self._update_load()

    def stand_in(self, column: int | None) -> None:
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

    def lease(self, now: float) -> Lease:
        lease = super().lease(now)
        if self._column is not None:
            self._counters.put(self._column, len(self.leases))
        return lease

    def end_lease(self, lease: Lease) -> None:
        super().end_lease(lease)
        if self._column is not None:
            self._counters.put(self._column, len(self.leases))


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
        load.fresh = state.metrics is not None and load.age(now) <= load.stale_after
        load.leases_at_scrape, load.stuck = state.leases_at_scrape, state.stuck
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
    )


def _short(lengths: dict[str, int], models: tuple[str, ...] | None) -> dict[str, int] | int:
    """Compact form of the context lengths, which are sent with each scrape: one number if equal."""
    if len(lengths) == len(models or ()) and len(found := set(lengths.values())) == 1:
        return found.pop()
    return lengths


class SharedFleet(Fleet, Generic[News]):
    """Common part of the leader's and the workers' fleets; `usage` counts requests per API key."""

    def __init__(self, config: Config, counters: CounterView, tell: Callable[[News], None]) -> None:
        self._counters = counters
        self._tell: Callable[[News], None] = tell
        self._by_column: dict[int, SharedServer[News]] = {}
        self._known: dict[str, SharedServer[News]] = {}
        self._keys: tuple[KeyConfig, ...] = ()
        self._places: dict[str, int | None] = {}
        self.usage = SharedUsage(counters, self.look)
        super().__init__(config)

    def apply(self, config: Config) -> FleetChange:
        change = super().apply(config)
        self._keys = config.auth.keys if config.auth is not None else ()
        self.look()
        self.take_places()
        return change

    def take_places(self) -> None:
        """Look up the counter columns again: the leader may have assigned new ones."""
        servers = [server for server in self.all_servers() if isinstance(server, SharedServer)]
        self._known = {server.url: server for server in reversed(servers)}
        self._by_column.clear()
        self._places = self._find_places([*self._known, *counted_of_keys(self._keys)])
        places = [(server, self._column_of(url)) for url, server in self._known.items()]
        for server, column in places:
            server.give_back(column)
        self.usage.give_places_back(self._keys, self._column_of)
        for server, column in places:
            server.stand_in(column)
            if column is not None:
                self._by_column[column] = server
        self.usage.take_places(self._keys, self._column_of)

    def _find_places(self, counted: list[str]) -> dict[str, int | None]:
        return self._counters.board.places(counted)

    def _column_of(self, key: str) -> int | None:
        return self._places.get(key)

    def by_url(self, url: str) -> Server | None:
        """The server with a URL, including servers that are being removed."""
        return self._known.get(url)

    # -- leases of other processes ------------------------------------------------------------

    def look(self) -> None:
        for column, difference in self._counters.look():
            server = self._by_column.get(column)
            if server is not None:
                server.changed_elsewhere(difference)
            else:
                self.usage.changed(column, difference)

    def candidates(self, model: str | None, now: float) -> tuple[Server, ...]:
        self.look()
        return super().candidates(model, now)

    def others(
        self, model: str | None, now: float, tried: Collection[Server]
    ) -> tuple[Server, ...]:
        self.look()
        return super().others(model, now, tried)

    def gone(self) -> list[Server]:
        self.look()
        gone = super().gone()
        if gone:
            self.take_places()
        return gone


class LeadingFleet(SharedFleet[Server]):
    """The leader's fleet. `tell` is called with each server whose state the workers need."""

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return LeadingServer(wanted, settings, self._note, self._counters, self._tell)

    def _note(self, server: Server) -> None:
        super()._note(server)
        self._tell(server)

    def check_room(self, config: Config) -> None:
        """Raises ConfigError if there are more servers and keys than counter columns."""
        counted = counted_in(config)
        room = self._counters.board.room_for(counted)
        if len(counted) > room:
            keys = len(counted) - len(config.servers)
            problem = (
                f"{len(config.servers)} servers and {keys} counts of keys (two for each key) are "
                f"more than the {room} that all workers can count together since the start: "
                "restart the router to make room"
            )
            raise ConfigError([problem])

    def _find_places(self, counted: list[str]) -> dict[str, int | None]:
        """Assign columns to keys that have none."""
        board = self._counters.board
        board.keep(set(counted))
        places = board.assign_all(counted)
        without = [key for key, column in places.items() if column is None]
        if without:
            logger.error(
                "shared counters are full: %d servers and keys are counted per worker until "
                "others are "
                "removed: %s",
                len(without),
                ", ".join(without[:3]),
            )
        return places


class FollowingFleet(SharedFleet[Verdict]):
    """A worker's fleet. `tell` is called with the verdict of each attempt."""

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return FollowingServer(wanted, settings, self._note, self._counters, self._tell)

    def failed(
        self,
        server: Server,
        now: float,
        *,
        trial: bool,
        jitter: float,
        body: int | None = None,
        odd: bool = False,
    ) -> None:
        self._tell(Verdict("failed", server.url, now, trial, jitter, body, odd=odd))

    def timed_out(
        self,
        server: Server,
        now: float,
        since: float,
        *,
        trial: bool,
        jitter: float,
        stream: bool,
    ) -> None:
        if not server.output_since(since):
            verdict = Verdict("timed_out", server.url, now, trial, jitter)
            verdict.since, verdict.sure = since, stream
            self._tell(verdict)

    def request_starved(self, server: Server, now: float, since: float) -> None:
        if not server.output_since(since):
            self._tell(Verdict("request_starved", server.url, now, since=since))

    def accepted_elsewhere(
        self,
        server: Server,
        name: str,
        size: int,
        words: str,
        now: float,
        *,
        body: int,
        sure: bool,
    ) -> None:
        verdict = Verdict("accepted_elsewhere", server.url, now, body=body)
        verdict.name, verdict.size, verdict.words, verdict.sure = name, size, words, sure
        self._tell(verdict)

    def refused_again(self, server: Server, name: str, now: float) -> None:
        self._tell(Verdict("refused_again", server.url, now, name=name))

    def accepted(self, server: Server, asked: Asked) -> None:
        self._tell(Verdict("accepted", server.url, 0.0, asked=asked))

    def unlist(self, server: Server, model: str) -> None:
        """Valid until the leader, which reads the list again, sends the new list."""
        server.unlist(model)
        self._tell(Verdict("unlist", server.url, 0.0, name=model))

    def answered_elsewhere(self, server: Server, now: float, *, jitter: float, body: int) -> None:
        self._tell(Verdict("answered_elsewhere", server.url, now, jitter=jitter, body=body))

    def follow(self, state: ServerState, now: float) -> FollowingServer | None:
        """Take over the leader's state of a server; returns the server if it has just gone down."""
        server = self._known.get(state.url)
        if isinstance(server, FollowingServer) and server.follow(state, now):
            return server
        return None
