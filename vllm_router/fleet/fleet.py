"""The current set of servers, and who of them may take a request for a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_router.config.model_aliases import Models
from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.fleet.refusals import Asked
from vllm_router.fleet.server import PACE, Journal, Server, State, Transition

OUTLIER_VOLUME = 10
"""Of so many requests at least must a success rate be made that is compared with others'."""

OUTLIER_RATE = 0.8
"""A server is ejected whose success rate is less than so much of the median of the others."""

MOVE_EVERY = 0.01
"""Seconds between two looks at servers whose load changes with time alone, if they are no more than
MOVED_OFTEN; longer in proportion if they are more."""

MOVED_OFTEN = 20

SETTLED_AT_ONCE = 100
"""Servers of which changes of state are announced in one call of `settle`: 1000 take 30 ms."""


@dataclass(frozen=True, slots=True)
class FleetChange:
    """What applying a configuration did."""

    added: tuple[Server, ...]
    removed: tuple[Server, ...]
    kept: tuple[Server, ...]


class Fleet:
    """Servers by name, in the order of the configuration.

    `candidates` is O(1) while nothing changes: the answer per model is kept until a server
    changes its state or a time that it depends on has come.

    Models go by the name under which servers have them, but for `model_cards` and those methods
    that say `public`; `names` tells one from the other.
    """

    MAX_REMEMBERED_MODELS = 1024

    def __init__(self, config: Config) -> None:
        self.servers: dict[str, Server] = {}
        self.leaving: list[Server] = []
        self.settings: Settings = config.settings
        self.names = Models(config.models)
        self.journal = Journal()
        self.on_transition: list[Callable[[Transition], None]] = []
        self.on_settled: list[Callable[[float], None]] = []
        """Called with the time when who may be asked may have changed."""
        self.on_stale_list: list[Callable[[Server], None]] = []
        """Called with a server whose list of models has proved wrong."""
        self._by_url: dict[str, Server] = {}
        self._ready: dict[str | None, tuple[Server, ...]] = {}
        self.choosy: frozenset[Server] = frozenset()
        """Servers that do not take every request for their models: see `fitting`."""
        self._shorter: set[Server] = set()
        self._lengths: dict[Server, dict[str, int]] = {}
        self._longest: dict[str, int] = {}
        self._due: dict[Server, float] = {}
        self._fitting: dict[tuple[object, ...], tuple[Server, ...]] = {}
        self._ready_until = float("inf")
        self._changed: set[Server] = set()
        self._moving: set[Server] = set()
        self._move_at = 0.0
        self._typical = 0.0
        self._prepared: dict[str, Server] = {}
        self._prepared_for: Settings | None = None
        self.apply(config)

    # -- configuration ------------------------------------------------------------------------

    def apply(self, config: Config) -> FleetChange:
        """Make the fleet what the configuration says; unchanged servers keep all their state.

        A server is the same as before if its URL is. A removed one takes no new request and
        stays in `leaving` until its last lease is released.
        """
        settings = config.settings
        same = settings == self.settings
        self.settings = settings
        self.names = Models(config.models)
        old = self._by_url
        by_url: dict[str, Server] = {}
        added, kept = [], []
        for wanted in config.servers:
            server = old.get(wanted.url)
            if server is None:
                server = self._returning(wanted) or self._made(wanted, settings)
                server.joined = bool(old)
                server.journal = self.journal
                added.append(server)
            else:
                kept.append(server)
                if not same or server.config != wanted:
                    server.apply(wanted, settings)
            self._note(server)
            by_url[wanted.url] = server
        removed = [server for url, server in old.items() if url not in by_url]
        for server in removed:
            server.drain(on=True)
        self.leaving.extend(removed)
        self._by_url = by_url
        self._lengths = {}
        self._prepared.clear()
        self._prepared_for = None
        self.servers = {server.name: server for server in by_url.values()}
        self._forget_ready()
        return FleetChange(tuple(added), tuple(removed), tuple(kept))

    def prepare(self, config: Config) -> Iterator[Server]:
        """Make the servers that `apply` will add, one after the other: a hundred take 10 ms."""
        self._prepared.clear()
        self._prepared_for = config.settings
        leaving = {server.url for server in self.leaving}
        for wanted in config.servers:
            if wanted.url not in self._by_url and wanted.url not in leaving:
                server = self._prepared[wanted.url] = self._new_server(wanted, config.settings)
                yield server

    def _made(self, wanted: ServerConfig, settings: Settings) -> Server:
        """A new server, made beforehand if it was to be like this."""
        server = self._prepared.pop(wanted.url, None)
        if server is None:
            return self._new_server(wanted, settings)
        if server.config is not wanted or self._prepared_for is not settings:
            server.apply(wanted, settings)
        return server

    def _new_server(self, wanted: ServerConfig, settings: Settings) -> Server:
        return Server(wanted, settings, self._note)

    def _returning(self, wanted: ServerConfig) -> Server | None:
        """A server taken out and put back before its last request ended goes on as it was."""
        for server in self.leaving:
            if server.url == wanted.url:
                self.leaving.remove(server)
                server.drain(on=False)
                return server
        return None

    def look(self) -> None:
        """Bring the servers' leases up to date, where other processes hold some, too."""

    def gone(self) -> list[Server]:
        """Those removed servers whose last request has ended; they are forgotten here."""
        done = [server for server in self.leaving if server.in_flight == 0]
        self.leaving = [server for server in self.leaving if server.in_flight]
        for server in done:
            self._due.pop(server, None)
        return done

    # -- candidates ---------------------------------------------------------------------------

    def candidates(self, model: str | None, now: float) -> tuple[Server, ...]:
        """The servers that may get a request for `model` now; any model if None.

        Only the servers of the best rank that has any, see `_rank`: trying an ejected server is
        better than refusing the request (Envoy's panic rule).
        """
        if now >= self._ready_until or self._changed:
            self.settle(now)
        elif self._moving and now >= self._move_at:
            self._move(now)
        ready = self._ready.get(model)
        if ready is None:
            ready = self._choose(model, now, ())
            # Names that nobody knows come from clients: too many, and too long, to be kept.
            if model is None or self.knows(model):
                if len(self._ready) >= self.MAX_REMEMBERED_MODELS:
                    self._ready.clear()
                self._ready[model] = ready
        return ready

    def others(
        self, model: str | None, now: float, tried: Collection[Server]
    ) -> tuple[Server, ...]:
        """The servers that may still get a request that the `tried` ones have failed; O(servers).

        As for a first attempt, an ejected server is better than none: it may be well again, and
        its answer to this request ends the ejection.
        """
        if now >= self._ready_until or self._changed:
            self.settle(now)
        return self._choose(model, now, tried)

    def fitting(
        self,
        model: str | None,
        now: float,
        tried: Collection[Server],
        asked: Asked,
        tokens: int = 0,
        longer_than: int = 0,
    ) -> tuple[Server, ...]:
        """`candidates`, or `others`, without the servers known to refuse such a request.

        If there is no other server, one that refuses it is asked all the same: the client is to
        get its answer. Only `longer_than` excludes for good: a shorter context would say what has
        been said. See `Server.fits` for both lengths.
        """
        found = self.others(model, now, tried) if tried else self.candidates(model, now)
        others: Collection[Server] = self.servers.values() if longer_than else self.choosy
        if not (tokens or longer_than):
            others = [server for server in others if server.refusals.known]
        unfit = tuple([s for s in others if not s.fits(asked, now, tokens, longer_than)])
        if not unfit:
            return found
        key = (model, longer_than, *unfit)
        fitting = None if tried else self._fitting.get(key)
        if fitting is None:
            fitting = self._choose(model, now, (*tried, *unfit))
            if not tried and len(self._fitting) < self.MAX_REMEMBERED_MODELS:
                self._fitting[key] = fitting
        return fitting if fitting or longer_than else found

    def _choose(
        self, model: str | None, now: float, tried: Collection[Server]
    ) -> tuple[Server, ...]:
        serving = [s for s in self.servers.values() if model is None or s.serves(model)]
        usable = [server for server in serving if server.usable]
        if model is not None and any(server.models is not None for server in usable):
            # A list that could not be read is a reason to try only where no list has the model.
            usable = [s for s in usable if s.models is not None and model in s.models] or usable
        untried = [s for s in usable if s not in tried and not (tried and s.paused_at is not None)]
        untried += [server for server in serving if server.held_back and server not in tried]
        ranks = [_rank(server, now) for server in untried]
        best = min(ranks, default=0)
        return tuple([s for s, rank in zip(untried, ranks, strict=True) if rank == best])

    def available(self, model: str, now: float, tried: Collection[Server] = ()) -> bool:
        """Whether a server that is not ejected can take a request for it."""
        found = self.others(model, now, tried) if tried else self.candidates(model, now)
        return any(server.traffic_health.admits(now) for server in found)

    @property
    def remembered(self) -> int:
        """For how many models the candidates are kept."""
        return len(self._ready)

    def knows(self, model: str) -> bool:
        """Whether any server, up or down, lists the model."""
        return any(s.models is not None and model in s.models for s in self.servers.values())

    @property
    def probed(self) -> bool:
        """Whether every server has been probed at least once."""
        return all(server.probe_health.up is not None for server in self.servers.values())

    @property
    def unheard(self) -> list[str]:
        """The servers that have never yet told their models."""
        return [server.name for server in self.servers.values() if server.models is None]

    def knows_public(self, name: str) -> bool:
        """Whether a client may ask for this: any server lists it, or it is a configured name."""
        return name in self.names.rules or self.knows(name)

    def public_models(self) -> list[str]:
        """What any server lists, by the names that clients are told, sorted."""
        served = {m for server in self.servers.values() for m in server.models or ()}
        return sorted(self.names.listed(served))

    def model_cards(self) -> list[dict[str, Any]]:
        """The merged `/v1/models` entries of usable servers, by their public names.

        They are as the engines gave them, but for the `id` of an alias. Of several the one with
        the longest context counts (`max_model_len`): a request that is too long for the others
        goes to that server, and clients cut their prompts to the length that is told here.
        """
        cards: dict[str, dict[str, Any]] = {}
        lengths: dict[str, int] = {}
        for server in self.servers.values():
            if server.usable:
                for model in server.models or ():
                    card = server.model_cards.get(model) or {"id": model, "object": "model"}
                    length = server.lengths.get(model, 0)
                    if model not in cards or length > lengths[model]:
                        cards[model], lengths[model] = card, length
        return [
            cards[served] if served == public else {**cards[served], "id": public}
            for public, served in self.names.listed(cards).items()
        ]

    # -- change -------------------------------------------------------------------------------

    def _note(self, server: Server) -> None:
        self._changed.add(server)

    def _forget_ready(self) -> None:
        self._ready.clear()
        self._ready_until = -float("inf")

    def settle(self, now: float) -> None:
        """Bring states up to date, announce transitions, forget stale candidate lists.

        Called by `candidates` when something changed or expired, and by the probes on each tick,
        so that an event is announced even when no request comes. O(servers that have changed), and
        no more than SETTLED_AT_ONCE: the rest is left for the next call. Candidates do not depend
        on it.
        """
        if now < self._ready_until and not self._changed:
            return
        changed = self._changed.union([s for s, moment in self._due.items() if moment <= now])
        self._ready.clear()
        self._fitting.clear()
        servers = self._in_order(changed)
        self._update_choosy(servers)
        self._changed = set(servers[SETTLED_AT_ONCE:])
        for server in servers[:SETTLED_AT_ONCE]:
            moment = _next_moment(server, now)
            if moment is None:
                self._due.pop(server, None)
            else:
                self._due[server] = moment
            transition = server.update_state(now)
            if transition is not None:
                for announce in self.on_transition:
                    announce(transition)
            if server in self._moving or now - server.back_at < server.slow_start:
                self._moving.add(server)
                if not server.move(now):
                    self._moving.discard(server)
        self._ready_until = min(self._due.values(), default=float("inf"))
        if now >= self._move_at:
            self._move(now)
        for follow in self.on_settled:
            follow(now)

    def _in_order(self, changed: set[Server]) -> list[Server]:
        """Those of the fleet, in its order; others have been prepared only, or have left."""
        if len(changed) == 1:
            (server,) = changed
            if self.servers.get(server.name) is server:
                return [server]
        return [server for server in self.all_servers() if server in changed]

    def _update_choosy(self, changed: Sequence[Server]) -> None:
        """Find the servers that do not take every request for their models."""
        if self._must_compare_all(changed):
            self._compare_lengths()
            changed = list(self.servers.values())
            choosy: set[Server] = set()
        else:
            choosy = set(self.choosy)
        for server in changed:
            if server.refusals.count() or server in self._shorter:
                if self.servers.get(server.name) is server:
                    choosy.add(server)
            else:
                choosy.discard(server)
        if choosy != self.choosy:
            self.choosy = frozenset(choosy)

    def _must_compare_all(self, changed: Sequence[Server]) -> bool:
        """Whether the longest context of a model may have changed; else compares the changed ones
        with the others."""
        if not self._lengths:
            return True
        longest = self._longest
        for server in changed:
            before, lengths = self._lengths.get(server, {}), server.lengths
            if before is lengths:
                continue
            for model in before.keys() | lengths.keys():
                old, new, top = before.get(model, 0), lengths.get(model, 0), longest.get(model, 0)
                if old != new and (new > top or old == top):
                    return True
            self._lengths[server] = lengths
            if any(length < longest[model] for model, length in lengths.items()):
                self._shorter.add(server)
            else:
                self._shorter.discard(server)
        return False

    def _compare_lengths(self) -> None:
        """Find the servers that have a model with a shorter context than another server has."""
        longest: dict[str, int] = {}
        for server in self.servers.values():
            for model, length in server.lengths.items():
                longest[model] = max(length, longest.get(model, 0))
        self._longest = longest
        self._lengths = {server: server.lengths for server in self.servers.values()}
        self._shorter = {
            server
            for server in self.servers.values()
            if any(length < longest[model] for model, length in server.lengths.items())
        }

    @property
    def lengths_differ(self) -> bool:
        """Whether a model has a shorter context on one server than on another."""
        return bool(self._shorter)

    def _move(self, now: float) -> None:
        """Bring the loads up to date that change with time alone."""
        self._moving = {server for server in self._moving if server.move(now)}
        self._move_at = now + MOVE_EVERY * max(1.0, len(self._moving) / MOVED_OFTEN)

    # -- what requests show -------------------------------------------------------------------

    def took(self, server: Server, seconds: float) -> None:
        """A request got a good answer from the server, in so much time."""
        server.took(seconds)
        self._typical += (PACE if self._typical else 1.0) * (seconds - self._typical)

    def erred(self, server: Server, now: float, seconds: float) -> None:
        """A request got an error from the server, whoever's fault it was, in so much time."""
        server.haunt(now, seconds, self._typical)
        if server.moving:
            self._moving.add(server)

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
        """A request failed by the server's fault: that may eject it. See `TrafficHealth.failed`.

        Besides failures in a row a success rate ejects that is far below that of the others; it
        takes their median, so that a trouble of all is nobody's. Others are those with a model in
        common. O(servers).
        """
        allowed = self._may_eject()
        server.failed(now, trial=trial, jitter=jitter, body=body, odd=odd, allowed=allowed)
        if allowed and not server.traffic_health.ejected:
            reason = self._outlier(server, now)
            if reason:
                server.eject(now, jitter, reason)

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
        """A request has heard nothing since then, for as long as a server may be silent.

        The server is to blame only if it has answered no other since. A plain answer shows nothing
        until it is whole, and may take longer than that: it makes the server suspect, no more.
        """
        if server.output_since(since):
            return
        if stream:
            self.failed(server, now, trial=trial, jitter=jitter)
        server.waited_in_vain(since, now, f"no answer in {now - since:.0f} s, and none to others")

    def waited_in_vain(self, server: Server, now: float, since: float) -> None:
        """A request was given up that had had no byte since then; see `Server.waited_in_vain`."""
        reason = f"a request waited {now - since:.1f} s in vain, and no other has had a token since"
        server.waited_in_vain(since, now, reason)

    def others_take(
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
        """Another server has taken what this one refused; see `Refusals.refused`."""
        server.others_take(name, size, words, now, body=body, sure=sure)
        self.settle(now)

    def refused_again(self, server: Server, name: str, now: float) -> None:
        """It refuses what it was tried with after a time."""
        server.refused_again(name, now)

    def takes_again(self, server: Server, asked: Asked) -> None:
        """It has taken such a request."""
        server.takes_again(asked)

    def unlist(self, server: Server, model: str) -> None:
        """It said that it has no such model, though its list names it; the list is to be read."""
        server.unlist(model)
        for read_list in self.on_stale_list:
            read_list(server)

    def not_its_fault(self, server: Server, now: float, *, jitter: float, body: int) -> None:
        """Another server has answered the request that failed on this."""
        server.not_its_fault(body, now, jitter=jitter, allowed=self._may_eject())

    def _may_eject(self) -> bool:
        """Whether one server more may be ejected.

        Those that would not be asked anyway (down, draining, asleep) do not count: they may stay
        ejected for long, as they get no trial.
        """
        share = self.settings.max_ejected_share
        most = max(1, int(share * len(self.servers))) if share else 0
        ejected = sum(
            server.traffic_health.ejected and server.usable for server in self.servers.values()
        )
        return ejected < most

    def _outlier(self, server: Server, now: float) -> str:
        """Why its success rate is reason enough to eject it; empty if it is not."""
        rate, count = server.traffic_health.success_rate(now)
        if count < OUTLIER_VOLUME:
            return ""
        others = [
            other.traffic_health.success_rate(now)
            for other in self.servers.values()
            if other is not server and _alike(server, other)
        ]
        rates = [other for other, requests in others if requests >= OUTLIER_VOLUME]
        if not rates or rate >= OUTLIER_RATE * median(rates):
            return ""
        return (
            f"only {rate:.0%} of its last {count} requests succeeded, {median(rates):.0%} elsewhere"
        )

    # -- totals -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Leases held on all servers, the leaving ones included."""
        return sum(server.in_flight for server in self.all_servers())

    def all_servers(self) -> Sequence[Server]:
        """The servers of the configuration and those still leaving."""
        return [*self.servers.values(), *self.leaving]

    def retry_after(self, model: str | None, now: float) -> float:
        """Seconds until a server of the model may be worth another try; at least 1."""
        moments = [
            moment
            for server in self.servers.values()
            if model is None or server.serves(model)
            for moment in (server.full_until, server.traffic_health.until)
            if moment > now
        ]
        return max(1.0, min(moments) - now) if moments else 1.0

    def count(self, *states: State) -> int:
        return sum(server.state in states for server in self.servers.values())


def _next_moment(server: Server, now: float) -> float | None:
    """When the server's rank or state changes by time alone; None if it does not."""
    traffic = server.traffic_health
    moments = [server.full_until, traffic.until, traffic.next_trial_at, server.silence.until]
    if server.refusals.known:
        moments += server.refusals.moments()
    return min([moment for moment in moments if moment > now], default=None)


def _rank(server: Server, now: float) -> int:
    """How gladly a server is asked that may be asked at all: 0 is best, and free of doubt.

    1: it has just refused a request as busy. 2: it has fallen silent. 3: traffic has ejected it.
    4: its checks are good, but it keeps going down. 5: it is paused, where requests wait until it
    goes on, as vLLM's clients expect.
    """
    if server.paused_at is not None:
        return 5
    if not server.usable:
        return 4
    if not server.traffic_health.admits(now):
        return 3
    if not server.silence.admits(now):
        return 2
    return 1 if now < server.full_until else 0


def is_surely_well(server: Server, now: float) -> bool:
    """Whether nothing at all speaks against the server."""
    return _rank(server, now) == 0


def _alike(one: Server, other: Server) -> bool:
    """Whether they may have a model in common."""
    return (
        one.models is None or other.models is None or not set(one.models).isdisjoint(other.models)
    )
