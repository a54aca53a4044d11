"""The current set of servers: configuration changes, candidates, and results of requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_router.config.model_aliases import Models
from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.fleet.candidates import choose, next_rank_change
from vllm_router.fleet.capacity import CapacityPool
from vllm_router.fleet.context_lengths import ContextLengths
from vllm_router.fleet.load import EWMA_WEIGHT
from vllm_router.fleet.model_seeds import ModelSeeds
from vllm_router.fleet.outliers import may_eject, outlier_reason
from vllm_router.fleet.reason import because
from vllm_router.fleet.refusals import RequestKind
from vllm_router.fleet.server import ChangeLog, Server
from vllm_router.fleet.speed import SpeedPool
from vllm_router.fleet.state import State, Transition

ADVANCE_EVERY = 0.01
"""Seconds between two updates of loads that change with time, for up to ADVANCED_OFTEN servers;
longer in proportion for more."""

ADVANCED_OFTEN = 20

SETTLED_AT_ONCE = 100
"""Servers whose state is updated in one call of `settle`: 1000 take 30 ms."""

MAX_DRAINED = 1000
"""Drains remembered of servers that their discovery source does not name at the moment."""


@dataclass(frozen=True, slots=True)
class FleetChange:
    """The changes made by a new configuration."""

    added: tuple[Server, ...]
    removed: tuple[Server, ...]
    kept: tuple[Server, ...]


class Fleet:
    """Servers by name, in the order of the configuration.

    `candidates` is O(1) between changes: the result per model is cached until a server changes or
    a time limit passes. A new tuple means new candidates, so policies cache by its identity.

    Models are named as the servers name them, except in `model_cards` and in methods with `public`
    in their name; `names` converts.

    seeds: of prompts' block hashes by public model name.
    leaving: removed servers with requests in flight.
    frozen: whether leases of other processes are left as they were read last.
    selective: servers that do not accept every request for their models, see `fitting`.
    on_transition: called with changes of state.
    on_settled: called with the time when candidates may have changed.
    on_failed: called with a server, and the time, when a request has failed by its fault.
    on_stale_model_list: called with a server whose model list has proved wrong.
    """

    MAX_CACHED_MODELS = 1024

    def __init__(self, config: Config) -> None:
        self.servers: dict[str, Server] = {}
        self.leaving: list[Server] = []
        self.frozen = False
        self.settings: Settings = config.settings
        self.names = Models(config.models)
        self.seeds = ModelSeeds()
        self.change_log = ChangeLog()
        self.capacities = CapacityPool()
        self.speeds = SpeedPool()
        self.on_transition: list[Callable[[Transition], None]] = []
        self.on_settled: list[Callable[[float], None]] = []
        self.on_failed: list[Callable[[Server, float], None]] = []
        self.on_stale_model_list: list[Callable[[Server], None]] = []
        self._by_url: dict[str, Server] = {}
        self._cached: dict[str | None, tuple[Server, ...]] = {}
        self.selective: frozenset[Server] = frozenset()
        self._context_lengths = ContextLengths()
        self._due: dict[Server, float] = {}
        self._fitting: dict[tuple[object, ...], tuple[Server, ...]] = {}
        self._cached_until = float("inf")
        self._changed: set[Server] = set()
        self._advancing: set[Server] = set()
        self._advance_at = 0.0
        self._response_seconds = 0.0
        self._drained: dict[str, bool] = {}
        """URLs of removed servers that an operator had drained, the oldest first."""
        self._prepared: dict[str, Server] = {}
        self._prepared_for: Settings | None = None
        self.awaited: tuple[str, ...] = ()
        """Discovery sources that have not named their servers yet."""
        self.expected: frozenset[str] = frozenset()
        """Models that are known even if no server lists them, see `Config.expected_models`."""
        self.apply(config)

    # -- configuration ------------------------------------------------------------------------

    def apply(self, config: Config) -> FleetChange:
        """Apply a configuration; servers with an unchanged URL keep their state.

        A removed server gets no new request and stays in `leaving` until its last lease ends.
        """
        settings = config.settings
        same = settings == self.settings
        self.settings = settings
        self.names = Models(config.models)
        self.awaited = config.awaited
        self.expected = config.expected_models
        old = self._by_url
        by_url: dict[str, Server] = {}
        added, kept = [], []
        for wanted in config.servers:
            server = old.get(wanted.url)
            if server is None:
                returning = self._returning(wanted)
                server = returning or self._created(wanted, settings)
                if self._drained.pop(wanted.url, False):
                    server.drain(on=True)
                server.joined = bool(old)
                server.change_log = self.change_log
                server.capacity_estimate.join(self.capacities)
                server.capacity_estimate.speed.join(self.speeds)
                if returning is not None:
                    returning.apply(wanted, settings)
                added.append(server)
            else:
                kept.append(server)
                if not same or server.config != wanted:
                    server.apply(wanted, settings)
            self._mark_changed(server)
            by_url[wanted.url] = server
        removed = [server for url, server in old.items() if url not in by_url]
        for server in removed:
            self._remember_drain(server)
            server.drain(on=True)
            server.capacity_estimate.join(CapacityPool())
            server.capacity_estimate.speed.join(SpeedPool())
        self.leaving.extend(removed)
        self._by_url = by_url
        changed = self.capacities.take_configured(
            [one.max_concurrent_requests for one in config.servers]
        )
        for server in by_url.values() if changed else added:
            if server.config.max_concurrent_requests is None:
                server.follow_capacity()
        self._context_lengths.reset()
        self._prepared.clear()
        self._prepared_for = None
        self.servers = {server.name: server for server in by_url.values()}
        self.seeds.follow(self.names, self.servers)
        self._drop_cached()
        return FleetChange(tuple(added), tuple(removed), tuple(kept))

    def prepare(self, config: Config) -> Iterator[Server]:
        """Create the servers that `apply` will add, one per step: a hundred take 10 ms."""
        self._prepared.clear()
        self._prepared_for = config.settings
        leaving = {server.url for server in self.leaving}
        for wanted in config.servers:
            if wanted.url not in self._by_url and wanted.url not in leaving:
                server = self._prepared[wanted.url] = self._new_server(wanted, config.settings)
                yield server

    def _created(self, wanted: ServerConfig, settings: Settings) -> Server:
        """A new server, from `prepare` if possible."""
        server = self._prepared.pop(wanted.url, None)
        if server is None:
            return self._new_server(wanted, settings)
        if server.config is not wanted or self._prepared_for is not settings:
            server.apply(wanted, settings)
        return server

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return Server(wanted, settings, self._mark_changed)

    def _returning(self, wanted: ServerConfig) -> Server | None:
        """A removed server that was added again before its last request ended keeps its state."""
        for server in self.leaving:
            if server.url == wanted.url:
                self.leaving.remove(server)
                server.drain(on=False)
                return server
        return None

    def _remember_drain(self, server: Server) -> None:
        """An operator's drain outlasts the absence of the server from its discovery source."""
        if server.draining and server.config.source is not None:
            self._drained[server.url] = True
            if len(self._drained) > MAX_DRAINED:
                del self._drained[next(iter(self._drained))]

    def by_url(self, url: str) -> Server | None:
        """The server with a URL."""
        return self._by_url.get(url)

    def refresh_leases(self) -> None:
        """Update `in_flight` by the leases of other processes, if there are any."""

    def gone(self) -> list[Server]:
        """Remove and return the leaving servers whose last request has ended."""
        done = [server for server in self.leaving if server.in_flight == 0]
        self.leaving = [server for server in self.leaving if server.in_flight]
        for server in done:
            self._due.pop(server, None)
        return done

    # -- candidates ---------------------------------------------------------------------------

    def candidates(self, model: str | None, now: float) -> tuple[Server, ...]:
        """The servers that may get a request for `model` now; any model if None. See `choose`."""
        if now >= self._cached_until or self._changed:
            self.settle(now)
        elif self._advancing and now >= self._advance_at:
            self._advance(now)
        ready = self._cached.get(model)
        if ready is None:
            ready = choose(self.servers.values(), model, now, ())
            # Unknown names are not cached: clients may invent any number of them.
            if model is None or self.knows(model):
                if len(self._cached) >= self.MAX_CACHED_MODELS:
                    self._cached.clear()
                self._cached[model] = ready
        return ready

    def others(
        self, model: str | None, now: float, tried: Collection[Server]
    ) -> tuple[Server, ...]:
        """The servers that may get a request after the `tried` ones have failed it. O(servers).

        As for a first attempt, an ejected server is better than none: a good response to this
        request ends the ejection.
        """
        if now >= self._cached_until or self._changed:
            self.settle(now)
        return choose(self.servers.values(), model, now, tried)

    def fitting(
        self,
        model: str | None,
        now: float,
        tried: Collection[Server],
        asked: RequestKind,
        tokens: int = 0,
        longer_than: int = 0,
    ) -> tuple[Server, ...]:
        """`candidates`, or `others`, without the servers known to refuse such a request.

        Without any other server a refusing one is used, so that the client gets its response. Only
        `longer_than` excludes servers for good, as their response would be the same. See
        `Server.fits` for both lengths.
        """
        found = self.others(model, now, tried) if tried else self.candidates(model, now)
        others: Collection[Server] = self.servers.values() if longer_than else self.selective
        if not (tokens or longer_than):
            others = [server for server in others if server.refusals.known]
        unfit = tuple([s for s in others if not s.fits(asked, now, tokens, longer_than)])
        if not unfit:
            return found
        key = (model, longer_than, *unfit)
        fitting = None if tried else self._fitting.get(key)
        if fitting is None:
            fitting = choose(self.servers.values(), model, now, (*tried, *unfit))
            if not tried and len(self._fitting) < self.MAX_CACHED_MODELS:
                self._fitting[key] = fitting
        return fitting if fitting or longer_than else found

    def available(self, model: str, now: float, tried: Collection[Server] = ()) -> bool:
        """Whether a server that is not ejected can take a request for the model."""
        found = self.others(model, now, tried) if tried else self.candidates(model, now)
        return any(server.passive_health.admits(now) for server in found)

    @property
    def cached_models(self) -> int:
        """The number of models with cached candidates."""
        return len(self._cached)

    def knows(self, model: str) -> bool:
        """Whether any server, up or down, lists the model, or the configuration expects it."""
        if model in self.expected:
            return True
        return any(s.models is not None and model in s.models for s in self.servers.values())

    @property
    def probed(self) -> bool:
        """Whether all sources have named their servers, and each has been probed once."""
        if self.awaited:
            return False
        return all(server.active_health.up is not None for server in self.servers.values())

    def answers(self, url: str) -> bool | None:
        """Whether the last checks of the server at this URL were good; None if there were none."""
        server = self._by_url.get(url)
        return server.active_health.up if server is not None else None

    @property
    def without_models(self) -> list[str]:
        """Names of the servers whose model list was never read."""
        return [server.name for server in self.servers.values() if server.models is None]

    def knows_public(self, name: str) -> bool:
        """Whether any server lists the public name, or `[models]` has it."""
        return name in self.names.rules or self.knows(name)

    def public_models(self) -> list[str]:
        """The public names of all listed models, sorted."""
        served = {m for server in self.servers.values() for m in server.models or ()}
        return sorted(self.names.listed(served))

    def model_cards(self) -> list[dict[str, Any]]:
        """The merged `/v1/models` entries of usable servers, by their public names.

        Entries are as the engines gave them, except for the `id` of an alias. Of several entries
        the one with the longest context (`max_model_len`) is used: clients cut their prompts to
        that length, and longer requests go to that server.
        """
        cards: dict[str, dict[str, Any]] = {}
        lengths: dict[str, int] = {}
        for server in self.servers.values():
            if server.usable:
                for model in server.models or ():
                    card = server.catalog.cards.get(model) or {"id": model, "object": "model"}
                    length = server.lengths.get(model, 0)
                    if model not in cards or length > lengths[model]:
                        cards[model], lengths[model] = card, length
        return [
            cards[served] if served == public else {**cards[served], "id": public}
            for public, served in self.names.listed(cards).items()
        ]

    # -- change -------------------------------------------------------------------------------

    def _mark_changed(self, server: Server) -> None:
        self._changed.add(server)

    def _drop_cached(self) -> None:
        self._cached.clear()
        self._cached_until = -float("inf")

    def settle(self, now: float) -> None:
        """Update states, announce transitions, and drop outdated candidates.

        Called by `candidates` after a change or an expiry, and periodically by the probes, so that
        transitions are announced without requests, too. O(changed servers), at most
        SETTLED_AT_ONCE; the rest follows in the next call. Candidates do not depend on states.
        """
        if now < self._cached_until and not self._changed:
            return
        changed = self._changed.union([s for s, moment in self._due.items() if moment <= now])
        self._cached.clear()
        self._fitting.clear()
        self.seeds.follow(self.names, self.servers)
        servers = self._in_order(changed)
        self._update_selective(servers)
        self._changed = set(servers[SETTLED_AT_ONCE:])
        for server in servers[:SETTLED_AT_ONCE]:
            moment = next_rank_change(server, now)
            if moment is None:
                self._due.pop(server, None)
            else:
                self._due[server] = moment
            transition = server.update_state(now)
            if transition is not None:
                for announce in self.on_transition:
                    announce(transition)
            if (
                server in self._advancing
                or now - server.recovered_at < server.load_estimate.slow_start
            ):
                self._advancing.add(server)
                if not server.advance(now):
                    self._advancing.discard(server)
        self._cached_until = min(self._due.values(), default=float("inf"))
        if now >= self._advance_at:
            self._advance(now)
        for follow in self.on_settled:
            follow(now)

    def _in_order(self, changed: set[Server]) -> list[Server]:
        """The changed servers of the fleet in its order, without prepared and removed ones."""
        if len(changed) == 1:
            (server,) = changed
            if self.servers.get(server.name) is server:
                return [server]
        return [server for server in self.all_servers() if server in changed]

    def _update_selective(self, changed: Sequence[Server]) -> None:
        """Find the servers that do not accept every request for their models."""
        lengths = self._context_lengths
        if lengths.update(self.servers.values(), changed):
            changed = list(self.servers.values())
            selective: set[Server] = set()
        else:
            selective = set(self.selective)
        for server in changed:
            if server.refusals.count() or server in lengths.shorter:
                if self.servers.get(server.name) is server:
                    selective.add(server)
            else:
                selective.discard(server)
        if selective != self.selective:
            self.selective = frozenset(selective)

    @property
    def lengths_differ(self) -> bool:
        """Whether a model has a shorter context on one server than on another."""
        return bool(self._context_lengths.shorter)

    def _advance(self, now: float) -> None:
        """Update the loads that change with time."""
        self._advancing = {server for server in self._advancing if server.advance(now)}
        self._advance_at = now + ADVANCE_EVERY * max(1.0, len(self._advancing) / ADVANCED_OFTEN)

    # -- results of requests -----------------------------------------------------------------

    def record_success(self, server: Server, seconds: float) -> None:
        """A request got a good response from the server, after this time."""
        server.load_estimate.record_success(seconds)
        weight = EWMA_WEIGHT if self._response_seconds else 1.0
        self._response_seconds += weight * (seconds - self._response_seconds)

    def record_error(self, server: Server, now: float, seconds: float) -> None:
        """A request got an error from the server, by any party's fault, after this time."""
        server.record_fast_error(now, seconds, self._response_seconds)
        if server.load_estimate.advancing:
            self._advancing.add(server)

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
        """A request failed by the server's fault, which may eject it. See `PassiveHealth.failed`.

        Besides failures in a row, a success rate far below the median of the servers with a common
        model ejects; a problem of the whole fleet ejects none. O(servers).
        """
        allowed = self._may_eject()
        server.failed(now, trial=trial, jitter=jitter, body=body, odd=odd, allowed=allowed)
        if allowed and not server.passive_health.ejected:
            reason = outlier_reason(server, self.servers.values(), now)
            if reason:
                server.eject(now, jitter, reason)
        for tell in self.on_failed:
            tell(server, now)

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
        """A request has got nothing since then, and its timeout has expired.

        That counts against the server only if no other request had output since. A plain response
        shows no byte until it is complete and may take longer: it only raises suspicion.
        """
        if server.output_since(since):
            return
        if stream:
            self.failed(server, now, trial=trial, jitter=jitter)
        reason = because("no_response", seconds=f"{now - since:.0f}")
        server.request_starved(since, now, reason)

    def request_starved(self, server: Server, now: float, since: float) -> None:
        """A request without a byte since then was given up; see `Server.request_starved`."""
        reason = because("starved", seconds=f"{now - since:.1f}")
        server.request_starved(since, now, reason)

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
        """Another server has accepted what this one refused; see `Refusals.refused`."""
        server.accepted_elsewhere(name, size, words, now, body=body, sure=sure)
        self.settle(now)

    def refused_again(self, server: Server, name: str, now: float) -> None:
        """The server has refused a trial again."""
        server.refused_again(name, now)

    def accepted(self, server: Server, asked: RequestKind) -> None:
        """The server has accepted such a request."""
        server.accepted(asked)

    def unlist(self, server: Server, model: str) -> None:
        """The server said that it has no such model: remove it, and request a new list."""
        server.unlist(model)
        for read_list in self.on_stale_model_list:
            read_list(server)

    def answered_elsewhere(self, server: Server, now: float, *, jitter: float, body: int) -> None:
        """Another server has answered the request that failed on this one."""
        server.answered_elsewhere(body, now, jitter=jitter, allowed=self._may_eject())

    def _may_eject(self) -> bool:
        return may_eject(self.servers.values(), self.settings.max_ejected_share)

    # -- totals -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Leases on all servers, including leaving ones."""
        return sum(server.in_flight for server in self.all_servers())

    def all_servers(self) -> Sequence[Server]:
        """The servers of the configuration and those still leaving."""
        return [*self.servers.values(), *self.leaving]

    def retry_after(self, model: str | None, now: float) -> float:
        """Seconds until a server of the model may be available again; at least 1."""
        moments = [
            moment
            for server in self.servers.values()
            if model is None or server.serves(model)
            for moment in (server.backoff_until, server.passive_health.until)
            if moment > now
        ]
        return max(1.0, min(moments) - now) if moments else 1.0

    def count(self, *states: State) -> int:
        return sum(server.state in states for server in self.servers.values())
