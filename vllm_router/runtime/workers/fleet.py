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
from typing import Generic

from vllm_router.config.auth import KeyConfig
from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.errors import ConfigError
from vllm_router.fleet.fleet import Fleet, FleetChange
from vllm_router.fleet.refusals import RequestKind
from vllm_router.fleet.server import Server
from vllm_router.runtime.workers.messages import ServerState, Verdict
from vllm_router.runtime.workers.shared_counters import CounterView
from vllm_router.runtime.workers.shared_key_limits import SharedKeyLimits, column_keys
from vllm_router.runtime.workers.shared_server import (
    FollowingServer,
    LeadingServer,
    News,
    SharedServer,
)

logger = logging.getLogger(__name__)


def counted_of_keys(keys: Iterable[KeyConfig]) -> list[str]:
    """The counter keys of API keys."""
    return [name for key in keys for name in column_keys(key)]


def counted_in(config: Config) -> set[str]:
    """All counter keys: one per server (leases), two per API key."""
    keys = config.auth.keys if config.auth is not None else ()
    return {server.url for server in config.servers}.union(counted_of_keys(keys))


class SharedFleet(Fleet, Generic[News]):
    """Common part of the leader's and the workers' fleets; `usage` counts requests per API key."""

    def __init__(self, config: Config, counters: CounterView, tell: Callable[[News], None]) -> None:
        self.counters = counters
        self._tell: Callable[[News], None] = tell
        self._by_column: dict[int, SharedServer[News]] = {}
        self._known: dict[str, SharedServer[News]] = {}
        self._keys: tuple[KeyConfig, ...] = ()
        self._columns: dict[str, int | None] = {}
        self.key_limits = SharedKeyLimits(counters, self.refresh_leases)
        super().__init__(config)

    def apply(self, config: Config) -> FleetChange:
        change = super().apply(config)
        self._keys = config.auth.keys if config.auth is not None else ()
        self.refresh_leases()
        self.use_columns()
        return change

    def use_columns(self) -> None:
        """Look up the counter columns again: the leader may have assigned new ones."""
        servers = [server for server in self.all_servers() if isinstance(server, SharedServer)]
        self._known = {server.url: server for server in reversed(servers)}
        self._by_column.clear()
        self._columns = self._find_columns([*self._known, *counted_of_keys(self._keys)])
        columns = [(server, self._column_of(url)) for url, server in self._known.items()]
        for server, column in columns:
            server.release_column(column)
        self.key_limits.release_columns(self._keys, self._column_of)
        for server, column in columns:
            server.use_column(column)
            if column is not None:
                self._by_column[column] = server
        self.key_limits.use_columns(self._keys, self._column_of)

    def _find_columns(self, counted: list[str]) -> dict[str, int | None]:
        return self.counters.board.columns_of(counted)

    def _column_of(self, key: str) -> int | None:
        return self._columns.get(key)

    def by_url(self, url: str) -> Server | None:
        """The server with a URL, including servers that are being removed."""
        return self._known.get(url)

    # -- leases of other processes ------------------------------------------------------------

    def refresh_leases(self) -> None:
        for column, difference in self.counters.read_changes():
            server = self._by_column.get(column)
            if server is not None:
                server.changed_elsewhere(difference)
            else:
                self.key_limits.changed(column, difference)

    def candidates(self, model: str | None, now: float) -> tuple[Server, ...]:
        if not self.frozen:
            self.refresh_leases()
        return super().candidates(model, now)

    def others(
        self, model: str | None, now: float, tried: Collection[Server]
    ) -> tuple[Server, ...]:
        if not self.frozen:
            self.refresh_leases()
        return super().others(model, now, tried)

    def gone(self) -> list[Server]:
        self.refresh_leases()
        gone = super().gone()
        if gone:
            self.use_columns()
        return gone


class LeadingFleet(SharedFleet[Server]):
    """The leader's fleet. `tell` is called with each server whose state the workers need."""

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return LeadingServer(wanted, settings, self._mark_changed, self.counters, self._tell)

    def _mark_changed(self, server: Server) -> None:
        super()._mark_changed(server)
        self._tell(server)

    def check_room(self, config: Config) -> None:
        """Raises ConfigError if there are more servers and keys than counter columns."""
        counted = counted_in(config)
        room = self.counters.board.room_for(counted)
        if len(counted) > room:
            keys = len(counted) - len(config.servers)
            problem = (
                f"{len(config.servers)} servers and {keys} counts of keys (two for each key) are "
                f"more than the {room} that all workers can count together since the start: "
                "restart the router to make room"
            )
            raise ConfigError([problem])

    def _find_columns(self, counted: list[str]) -> dict[str, int | None]:
        """Assign columns to keys that have none."""
        board = self.counters.board
        board.keep(set(counted))
        columns = board.assign_all(counted)
        without = [key for key, column in columns.items() if column is None]
        if without:
            logger.error(
                "shared counters are full: %d servers and keys are counted per worker until "
                "others are "
                "removed: %s",
                len(without),
                ", ".join(without[:3]),
            )
        return columns


class FollowingFleet(SharedFleet[Verdict]):
    """A worker's fleet. `tell` is called with the verdict of each attempt."""

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return FollowingServer(wanted, settings, self._mark_changed, self.counters, self._tell)

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

    def accepted(self, server: Server, asked: RequestKind) -> None:
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
