"""The router's state as messages of the feed. Read-only."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from typing import cast

import msgspec

from vllm_router import __version__
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.observability.model_rows import AVAILABLE, ModelCount, ModelRow
from vllm_router.observability.process import rss_bytes
from vllm_router.observability.router_state import MEMORY, wall_offset
from vllm_router.observability.tally import Tallies, Tally
from vllm_router.routing.sharing.status import SharedStatus
from vllm_router.web import schema
from vllm_router.web.outages import Outages
from vllm_router.web.reasons import reason_fields
from vllm_router.web.router import Router
from vllm_router.web.shown_states import Shown, ShownStates
from vllm_router.web.turned_away import TurnedAway

_encode = msgspec.json.Encoder().encode


class Reading:
    """The fleet as one pass over its servers found it.

    Each server is read once, so that totals, models and views of servers agree, though other tasks
    run between two of them. `servers` are encoded views, if the pass makes them; `loads` are by
    name and without leaving servers.
    """

    def __init__(
        self, fleet: Fleet, shown: ShownStates, started: float, now: float, wall: float
    ) -> None:
        """`started` is the start of the router; `wall` the offset to Unix time."""
        self.now = now
        self.wall = wall
        self.states: dict[str, int] = {}
        self.running = self.waiting = 0.0
        self.leases = self.capacity = 0
        """Capacity and load are of available servers only."""
        self.tokens_per_s: float | None = None
        """None if no engine exports the counter."""
        self.loads: dict[str, float] = {}
        self.servers: list[schema.ServerView] = []
        self.models = ModelCount(fleet)
        self._shown = shown
        self._started = started
        self._there = 0.0
        self._members = fleet.servers

    def add(self, server: Server, tally: Tally, *, with_view: bool) -> None:
        """Read one server, of which `tally` has the rates."""
        state, reason = server.current_state(self.now)
        since = server.state_since or self._started
        if state is State.FULL or self._shown.full:
            state, reason, since = self._shown.of(server, state, reason, since, self.now)
        leaving = self._members.get(server.name) is not server
        tokens, load = tally.tokens_per_s, server.load_estimate
        value = load.value
        self.running += load.running
        self.waiting += load.waiting
        self.leases += server.in_flight
        if server.usable:
            self.capacity += server.capacity
            self._there += value * server.capacity
        if tokens is not None:
            self.tokens_per_s = round((self.tokens_per_s or 0.0) + tokens, 1)
        if not leaving:
            self.states[state] = self.states.get(state, 0) + 1
            self.loads[server.name] = round(value, 3) if value else 0.0
            self.models.add(server, state, tokens)
        if with_view:
            view = self._view(server, tally, Shown(state, reason, since), leaving=leaving)
            # Raw is encoded unchanged; its type is the type of its content.
            self.servers.append(cast("schema.ServerView", msgspec.Raw(_encode(view))))

    @property
    def available(self) -> int:
        """Number of servers of the configuration that get requests."""
        return sum(self.states.get(one, 0) for one in AVAILABLE)

    @property
    def load(self) -> float:
        return round(self._there / self.capacity, 4) if self.capacity else 0.0

    def _view(
        self, server: Server, tally: Tally, shown: Shown, *, leaving: bool
    ) -> schema.ServerView:
        now = self.now
        metrics, load = server.metrics, server.load_estimate
        kv_usage = metrics.kv_usage if metrics is not None else None
        age = load.age(now) if load.scraped_at is not None else None
        return schema.ServerView(
            name=server.name,
            url=server.url,
            models=server.models,
            state=shown.state,
            **reason_fields(shown.reason),
            since=round(shown.since + self.wall, 3),
            leaving=leaving,
            running=round(load.running, 1),
            waiting=round(load.waiting, 1),
            leases=server.in_flight,
            elsewhere=server.elsewhere,
            capacity=server.capacity,
            capacity_source=server.capacity_estimate.source,
            proposed_capacity=server.capacity_estimate.proposed,
            max_in_flight=server.config.max_in_flight,
            load=round(load.value, 4),
            kv_usage=round(kv_usage, 4) if kv_usage is not None else None,
            prefix_hit_rate=tally.prefix_hit_rate,
            expected_hit_rate=tally.expected_hit_rate,
            requests_per_s=tally.requests_per_s,
            errors_per_s=tally.errors_per_s,
            chunks_per_s=tally.chunks_per_s,
            tokens_per_s=tally.tokens_per_s,
            ttft=tally.ttft(now),
            duration=tally.duration(now),
            metrics_age=round(max(age, 0.0), 2) if age is not None else None,
            stale=not load.fresh,
        )


def fleet_view(
    reading: Reading, total: Tally, turned_away: TurnedAway, queued: int
) -> schema.FleetView:
    now = reading.now
    return schema.FleetView(
        servers=len(reading.loads),
        available=reading.available,
        states=reading.states,
        running=round(reading.running, 1),
        waiting=round(reading.waiting, 1),
        leases=reading.leases,
        queued=queued,
        capacity=reading.capacity,
        load=reading.load,
        requests_per_s=total.requests_per_s,
        errors_per_s=total.errors_per_s,
        chunks_per_s=total.chunks_per_s,
        tokens_per_s=reading.tokens_per_s,
        refused_per_s=turned_away.per_second,
        refused=turned_away.recent,
        saved_per_s=turned_away.saved_per_second,
        saved=turned_away.saved,
        ttft=total.ttft(now),
        duration=total.duration(now),
    )


def model_views(
    rows: list[ModelRow],
    tallies: Tallies,
    without_since: Mapping[str, float],
    queues: list[schema.QueueView],
    budgets: Mapping[str, float | None],
    now: float,
) -> list[schema.ModelView]:
    """`without_since`: the Unix time since when each model has no available server."""
    queued = {one.model: one.waiting for one in queues}
    return [_model_view(row, tallies, without_since, queued, budgets, now) for row in rows]


def _model_view(
    row: ModelRow,
    tallies: Tallies,
    without_since: Mapping[str, float],
    queued: Mapping[str | None, int],
    budgets: Mapping[str, float | None],
    now: float,
) -> schema.ModelView:
    names = (row.name, *row.names)
    own = tallies.of_models(names)
    budget = budgets.get(row.name)
    return schema.ModelView(
        name=row.name,
        names=row.names,
        adapters=row.adapters,
        aliases=row.aliases,
        fallback=row.fallback,
        servers=row.servers,
        available=row.available,
        draining=row.draining,
        without_server_since=without_since.get(row.name) if not row.available else None,
        running=round(row.running, 1),
        waiting=round(row.waiting, 1),
        queued=sum(queued.get(name, 0) for name in names),
        capacity=row.capacity,
        load=round(row.load, 4),
        requests_per_s=round(sum(one.requests_per_s for one in own), 3),
        errors_per_s=round(sum(one.errors_per_s for one in own), 3),
        refused_per_s=round(sum(one.refused_per_s for one in own), 3),
        tokens_per_s=round(row.tokens_per_s, 1) if row.tokens_per_s is not None else None,
        budget_left=round(budget, 4) if budget is not None else None,
        ttft=Tally.ttft_of(own, now),
        duration=Tally.duration_of(own, now),
    )


def queue_views(router: Router, now: float) -> list[schema.QueueView]:
    """O(waiting requests); empty without `[limits]`."""
    admission = router.proxy.context.admission
    if admission is None:
        return []
    return [
        schema.QueueView(
            model=queue.model,
            waiting=queue.waiting,
            limit=admission.limits.queue_size,
            longest=round(queue.longest, 2),
            freed_per_s=round(queue.freed_per_s, 3) if queue.freed_per_s is not None else None,
        )
        for queue in router.queues(now)
        if queue.waiting
    ]


def router_view(
    router: Router, *, lag: float, cpu: float, feed_clients: int, unused: bool, now: float
) -> schema.RouterView:
    reloader = router.reloader
    return schema.RouterView(
        open_streams=router.in_flight,
        event_loop_lag=round(lag, 5),
        cpu=round(cpu, 4),
        rss_bytes=rss_bytes() + int(router.elsewhere(MEMORY) or 0),
        uptime=round(now - router.started_at, 1),
        ready=router.ready,
        draining=router.draining,
        reload=schema.ReloadView(
            source=str(reloader.source.path) if reloader is not None else None,
            generation=reloader.generation if reloader is not None else 1,
            applied=reloader.applied_total if reloader is not None else 0,
            refused=reloader.refused_total if reloader is not None else 0,
            error=reloader.last_error if reloader is not None else None,
        ),
        feed_clients=feed_clients,
        unused=unused,
        sources=[source_view(status, now) for status in router.source_statuses],
        shared=shared_view(router.shared_status),
    )


def shared_view(status: SharedStatus | None) -> schema.SharedView | None:
    if status is None:
        return None
    return schema.SharedView(
        store=status.store,
        fleet=status.fleet,
        name=status.own.name,
        up=status.up,
        problem=status.problem or None,
        age=round(status.age, 1) if status.age is not None else None,
        in_flight=sum(status.in_flight.values()),
        routers=[
            schema.OtherRouterView(
                name=one.about.name,
                version=one.about.software,
                uptime=round(one.about.age + one.silent, 1),
                silent=round(one.silent, 1),
                live=one.live,
                in_flight=one.in_flight,
                requests_per_s=round(one.rate, 2),
                same_configuration=one.about.configuration == status.own.configuration,
            )
            for one in status.routers
        ],
    )


def source_view(status: SourceStatus, now: float) -> schema.SourceView:
    age = status.age(now)
    return schema.SourceView(
        name=status.name,
        kind=status.kind,
        place=status.place,
        targets={state.value: count for state, count in status.states.items()},
        age=round(age, 1) if age is not None else None,
        problem=status.problem,
        doubt=status.doubt,
        doubt_values=status.doubt_values,
        skipped=list(status.skipped),
    )


def snapshot(
    router: Router,
    reading: Reading,
    tallies: Tallies,
    facts: schema.RouterView,
    turned_away: TurnedAway,
    outages: Outages,
    *,
    seq: int,
) -> schema.Snapshot:
    """The state that was read, with the views of its servers. O(models)."""
    now = reading.now
    queues = queue_views(router, now)
    queued = sum(one.waiting for one in queues)
    return schema.Snapshot(
        seq=seq,
        time=round(now + reading.wall, 3),
        router=facts,
        fleet=fleet_view(reading, tallies.total, turned_away, queued),
        servers=reading.servers,
        queues=queues,
        models=model_views(outages.rows, tallies, outages.since, queues, outages.budgets, now),
    )


def hello(
    router: Router,
    histories: tuple[bytes, bytes],
    events: list[schema.Event],
    *,
    admin: bool,
) -> schema.Hello:
    """The first message to a client; `histories` are encoded: the minutes, then the hour."""
    # Raw is encoded unchanged; its type is the type of its content.
    minutes, hour = (cast("schema.History", msgspec.Raw(encoded)) for encoded in histories)
    settings = router.fleet.settings
    return schema.Hello(
        schema=schema.VERSION,
        version=__version__,
        name=platform.node(),
        time=round(time.time(), 3),
        started=round(router.started_at + wall_offset(), 3),
        admin=admin,
        admin_key=router.guard.keyring.has_admin,
        config=schema.ConfigView(
            policy=settings.policy,
            feed_interval=settings.feed_interval,
            metrics_interval=settings.metrics_interval,
            health_check_interval=settings.health_check_interval,
            request_timeout=settings.request_timeout,
            max_retries=settings.max_retries,
            drain_timeout=settings.drain_timeout,
            allow_engine_control=settings.allow_engine_control,
        ),
        history=minutes,
        hour=hour,
        events=events,
    )
