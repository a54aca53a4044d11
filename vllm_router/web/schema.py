"""The messages of the feed, `/ws/load`. docs/feed.md is written from these types.

Text frames of JSON, told apart by `type`. Times are Unix time and durations seconds; shares are 0
to 1; `null` means that it is not known. New fields may come at any time and are to be ignored;
VERSION rises when one changes its meaning or goes.
"""

from __future__ import annotations

import msgspec

VERSION = 1


class Percentiles(msgspec.Struct, frozen=True, gc=False):
    """Over the last minute, each exact to 2.5 %. `count` requests are in it."""

    p50: float
    p95: float
    p99: float
    count: int


class ServerView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One server.

    models: what it lists; null while its list could not be read.
    state: `up`, `full`, `ejected`, `asleep`, `down`, `unknown` or `draining`; `reason` says in
        words why it is not up, `since` when the state began.
    leaving: taken out of the configuration; it vanishes with its last request.
    running, waiting: requests on the engine, as routing sees them; `leases` are this router's.
    capacity: what it takes at once, as configured; load: (running + 0.5 waiting) / capacity.
    kv_usage, prefix_hit_rate: of the engine's cache; the hit rate is that of the last minute.
    requests_per_s: finished; errors_per_s: attempts that failed by the server's fault;
        chunks_per_s: pieces of answers passed on; tokens_per_s: generated, as the engine counts,
        for whomever. All over the last five seconds.
    ttft: from arrival to the first data of streamed requests; duration: of complete answers.
    metrics_age: since its `/metrics` was read; stale: too old, our own leases are its load.
    """

    name: str
    url: str
    models: tuple[str, ...] | None
    state: str
    reason: str
    since: float
    leaving: bool
    running: float
    waiting: float
    leases: int
    capacity: int
    load: float
    kv_usage: float | None
    prefix_hit_rate: float | None
    requests_per_s: float
    errors_per_s: float
    chunks_per_s: float
    tokens_per_s: float | None
    ttft: Percentiles | None
    duration: Percentiles | None
    metrics_age: float | None
    stale: bool


class FleetView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """All servers together.

    servers: in the configuration; available: of those, how many are `up` or `full`.
    states: how many are in each state that occurs.
    load: (running + 0.5 waiting) / capacity over the available servers.
    errors_per_s: requests that ended in an error which was not the client's.
    """

    servers: int
    available: int
    states: dict[str, int]
    running: float
    waiting: float
    leases: int
    capacity: int
    load: float
    requests_per_s: float
    errors_per_s: float
    chunks_per_s: float
    tokens_per_s: float | None
    ttft: Percentiles | None
    duration: Percentiles | None


class ReloadView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """`source` is null if the servers came from the command line; `error` holds what is wrong
    with the file as it is now, one problem a line, and is null while it is good.
    """

    source: str | None
    generation: int
    applied: int
    refused: int
    error: str | None


class RouterView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The router's process.

    open_streams: requests being served; cpu: share of one core over the last seconds;
    event_loop_lag: the longest delay of a timer within the last ten seconds.
    """

    open_streams: int
    event_loop_lag: float
    cpu: float
    rss_bytes: int
    uptime: float
    ready: bool
    draining: bool
    reload: ReloadView
    feed_clients: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """The whole state, every `feed_interval`. A slow client misses some; `seq` tells."""

    seq: int
    time: float
    router: RouterView
    fleet: FleetView
    servers: list[ServerView]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag="event"):
    """Something happened.

    kind: `state` (a server changed it), `drained` (a draining server has nothing in flight any
    more), `reload`, `reload_refused`, `retries_exhausted`, or `missed` (this client was too slow,
    so many events were lost for it: `text` says how many, `id` is 0).
    id: counts up by one from the start of the router. server: whom it is about, if one.
    """

    id: int
    time: float
    kind: str
    text: str
    server: str | None = None
    old: str | None = None
    new: str | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What of the configuration a display needs."""

    policy: str
    feed_interval: float
    metrics_interval: float
    health_check_interval: float
    request_timeout: float
    max_retries: int
    drain_timeout: float
    allow_engine_control: bool


class History(msgspec.Struct, frozen=True, kw_only=True):
    """One value per `interval` seconds, oldest first, the newest at `end`.

    `fleet` has a series for each figure; `servers` the load of each server of the present, null
    where it was not there.
    """

    interval: float
    end: float
    fleet: dict[str, list[float | None]]
    servers: dict[str, list[float | None]]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message.

    schema: VERSION of these messages. name: of the router's machine. admin: whether this client
    may use `/admin`. history: the last five minutes; hour: the last hour, coarser, without
    servers. events: the last ones before this.
    """

    schema: int
    version: str
    name: str
    time: float
    started: float
    admin: bool
    config: Facts
    history: msgspec.Raw
    hour: msgspec.Raw
    events: list[Event]


Message = Hello | Snapshot | Event
