"""The messages of the feed, `/ws/load`. Source of docs/feed.md and its JSON schema.

Text frames with JSON, distinguished by `type`. Clients must ignore unknown fields; VERSION
increases when a field changes its meaning or is removed.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from vllm_router.observability.sliding import Percentiles as Percentiles
from vllm_router.observability.sliding import Seconds

VERSION = 1

Time: TypeAlias = Annotated[float, Meta(title="Unix time")]
Share: TypeAlias = Annotated[float, Meta(title="0 to 1")]


def _(text: str) -> Meta:
    return Meta(description=text)


class Phrase(msgspec.Struct, frozen=True, gc=False):
    """A text as a code with values, for translations."""

    code: str
    values: Annotated[dict[str, str], _("The values in the text, by name.")]


class ServerView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One server. Rates are over the last five seconds."""

    name: str
    url: str
    models: Annotated[
        tuple[str, ...] | None, _("What it lists; null while its list could not be read.")
    ]
    state: Annotated[
        str,
        _(
            "up, full, refusing (some requests that others take), silent, ejected, asleep, paused, "
            "down, unknown or draining; `reason` says why. A server that was full stays so for "
            "five seconds, as it is full and up again every second or two."
        ),
    ]
    reason: Annotated[str, _("Why it is not up, in words; empty if it is.")]
    reason_code: Annotated[
        str | None, _("A name for the reason, for translations; null if it has none.")
    ] = None
    reason_values: Annotated[
        dict[str, str],
        _(
            "The values in the reason, by name. `in_row`, the number of failed checks in a row, "
            "follows the text."
        ),
    ] = {}
    reason_also: Annotated[list[Phrase], _("Further reasons, in order.")] = []
    since: Annotated[Time, _("When the state began.")]
    leaving: Annotated[
        bool, _("Taken out of the configuration; it vanishes with its last request.")
    ]
    running: Annotated[float, _("Requests the engine works on, as routing sees it.")]
    waiting: Annotated[float, _("Requests in the engine's queue.")]
    leases: Annotated[int, _("Requests that this router has on it.")]
    elsewhere: Annotated[int, _("Requests that other routers have on it (`[shared]`).")] = 0
    capacity: Annotated[int, _("Requests that it runs at once without queueing.")]
    capacity_source: Annotated[
        str,
        _(
            "configured (max_concurrent_requests); learnt, from its gauges when it was full; or "
            "assumed: it was never full, and this is vLLM's default."
        ),
    ] = "configured"
    proposed_capacity: Annotated[
        int | None,
        _("The measured value for max_concurrent_requests; null if the configured one fits."),
    ] = None
    max_in_flight: Annotated[
        int | None, _("How many requests this router has on it at most; null without a cap.")
    ] = None
    load: Annotated[float, _("(running + 0.5 × waiting) / capacity; may exceed 1.")]
    kv_usage: Annotated[Share | None, _("How full the engine's KV cache is.")]
    prefix_hit_rate: Annotated[Share | None, _("Of its prefix cache, over the last minute.")]
    expected_hit_rate: Annotated[
        Share | None,
        _("What the policy expected it to be; null if it does not look at prompts."),
    ] = None
    requests_per_s: Annotated[float, _("Requests finished.")]
    errors_per_s: Annotated[float, _("Attempts that failed by the server's fault.")]
    chunks_per_s: Annotated[float, _("Chunks of responses forwarded, about one per token.")]
    tokens_per_s: Annotated[
        float | None, _("Tokens generated, as the engine counts them, for all its clients.")
    ]
    ttft: Annotated[Percentiles | None, _("Time to first token of streamed requests.")]
    duration: Annotated[Percentiles | None, _("From a request's arrival to its answer's end.")]
    metrics_age: Annotated[Seconds | None, _("Since its /metrics was read.")]
    stale: Annotated[bool, _("Too old to be used: this router's leases count as its load.")]


class FleetView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """All servers together."""

    servers: Annotated[int, _("Servers in the configuration.")]
    available: Annotated[int, _("Of those, the ones that are up or full.")]
    states: Annotated[dict[str, int], _("How many are in each state that occurs.")]
    running: float
    waiting: float
    leases: int
    queued: Annotated[int, _("Requests that wait in this router for a server.")] = 0
    capacity: Annotated[int, _("Of the servers that may be asked.")]
    load: Annotated[float, _("(running + 0.5 × waiting) / capacity of those.")]
    requests_per_s: float
    errors_per_s: Annotated[float, _("Requests that ended in an error which was not the client's.")]
    chunks_per_s: float
    tokens_per_s: float | None
    refused_per_s: Annotated[
        float, _("Requests that the router refused: key, limits, queue, no server.")
    ] = 0.0
    refused: Annotated[
        dict[str, int],
        _(
            "Refused within the last five minutes, by reason: unauthorized (401), forbidden (403), "
            "limited (429, limits of the key), queue (429 and 503), no_server (503), overload."
        ),
    ] = {}
    saved_per_s: Annotated[
        float, _("Requests that one server failed and another one answered, over five seconds.")
    ] = 0.0
    saved: Annotated[
        int,
        _("The same within the last five minutes."),
    ] = 0
    ttft: Percentiles | None
    duration: Percentiles | None


class ModelView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One model. Rates are over the last five seconds."""

    name: Annotated[str, _("As its servers name it; with several names the first by alphabet.")]
    names: Annotated[list[str], _("Its further names, LoRA adapters included.")]
    adapters: Annotated[int, _("How many of those are LoRA adapters.")]
    aliases: Annotated[list[str], _("Public names of `[models]` that lead to it.")]
    fallback: Annotated[
        str | None, _("The model that answers its requests now, as it has no server; else null.")
    ]
    servers: Annotated[int, _("Servers of the configuration that list it.")]
    available: Annotated[int, _("Of those, the ones that get requests.")]
    draining: Annotated[int, _("Of those, the ones that drain.")]
    without_server_since: Annotated[
        Time | None, _("Since when no server of it is available; null if one is.")
    ]
    running: Annotated[float, _("Requests on its servers, of all their models.")]
    waiting: Annotated[float, _("Requests in its servers' queues.")]
    queued: Annotated[int, _("Requests that wait in this router for a server of it.")]
    capacity: Annotated[int, _("Of its available servers.")]
    load: Annotated[float, _("(running + 0.5 × waiting) / capacity of its available servers.")]
    requests_per_s: Annotated[float, _("Requests finished, refused ones included.")]
    errors_per_s: Annotated[float, _("Requests that ended in an error not the client's.")]
    refused_per_s: Annotated[float, _("Requests that the router refused.")]
    tokens_per_s: Annotated[float | None, _("Tokens that its servers generate.")]
    budget_left: Annotated[
        float | None,
        _(
            "Of the error budget of `[slo]`, since the router's start; below 0 if an objective is "
            "missed, null without one."
        ),
    ] = None
    ttft: Percentiles | None
    duration: Percentiles | None


class QueueView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The requests that wait for one model."""

    model: Annotated[
        str | None,
        _("null: requests that name none; an empty name: models that no server lists."),
    ]
    waiting: int
    limit: Annotated[int, _("How many may wait.")]
    longest: Annotated[Seconds, _("For how long the first of them has waited.")]
    freed_per_s: Annotated[
        float | None, _("Servers that become free for them, recently; null if not known.")
    ]


class ReloadView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The state of the configuration file."""

    source: Annotated[str | None, _("Its path; null if the servers come from the command line.")]
    generation: Annotated[int, _("Configurations that have been in force so far.")]
    applied: Annotated[int, _("Reloads that changed the configuration.")]
    refused: Annotated[int, _("Reloads refused because the file was bad.")]
    error: Annotated[
        str | None, _("What is wrong with the file as it is, one problem a line; null if nothing.")
    ]


class SourceView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One source of `[discovery]`."""

    name: str
    kind: Annotated[str, _("file, http, dns or kubernetes.")]
    place: Annotated[str, _("Where it looks.")]
    targets: Annotated[dict[str, int], _("Its last set, by state: up, drain, wait.")]
    age: Annotated[Seconds | None, _("Since it last confirmed its set; null before its first one.")]
    problem: Annotated[str | None, _("Why it cannot be read; its last set stays in force.")]
    doubt: Annotated[str, _("Why servers stay that its last set lacks; empty if none do.")]
    doubt_values: Annotated[
        dict[str, str], _("How many servers are `named` and how many `kept`, for translations.")
    ] = {}
    skipped: Annotated[list[str], _("Targets that were left out, at most ten, with the reason.")]


class OtherRouterView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Another router of the same fleet (`[shared]`)."""

    name: str
    version: str
    uptime: Seconds
    silent: Annotated[Seconds, _("Since its last message.")]
    live: Annotated[bool, _("false: silent for a second; its requests no longer count.")]
    in_flight: Annotated[int, _("Its requests on servers.")]
    requests_per_s: Annotated[float, _("Its attempts that have ended.")]
    same_configuration: Annotated[
        bool, _("Whether its configuration is this router's; names and secrets do not count.")
    ]


class SharedView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The state of `[shared]`."""

    store: Annotated[str, _("The address of the Redis.")]
    fleet: str
    name: Annotated[str, _("Of this router, as the others see it.")]
    up: Annotated[bool, _("Whether this router exchanges state with the others.")]
    problem: Annotated[str | None, _("Why not; null while it does.")]
    age: Annotated[Seconds | None, _("Since the store has answered; null if it never has.")]
    in_flight: Annotated[int, _("Requests of the other routers on servers.")]
    routers: Annotated[
        list[OtherRouterView], _("The other routers; a silent one is listed for a minute.")
    ]


class RouterView(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The router's own process."""

    open_streams: Annotated[int, _("Requests being served now, streamed or not.")]
    event_loop_lag: Annotated[Seconds, _("The longest delay of a timer in the last ten seconds.")]
    cpu: Annotated[float, _("Cores in use, over the last five seconds.")]
    rss_bytes: int
    uptime: Seconds
    ready: Annotated[bool, _("What /readyz says.")]
    draining: Annotated[bool, _("The router is about to stop.")]
    reload: ReloadView
    feed_clients: int
    unused: Annotated[
        bool,
        _("No client has sent a request for inference yet; the demo's own traffic does not count."),
    ] = False
    sources: Annotated[list[SourceView], _("In the order of `[discovery]`.")] = []
    shared: Annotated[SharedView | None, _("null without `[shared]`.")] = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """The whole state, every `feed_interval`. Each snapshot is complete: slow clients skip some."""

    seq: Annotated[
        int, _("Increases by one with each snapshot; a gap means that some were skipped.")
    ]
    time: Time
    router: RouterView
    fleet: FleetView
    servers: Annotated[list[ServerView], _("In the order of the configuration.")]
    queues: Annotated[list[QueueView], _("The models for which requests wait.")] = []
    models: Annotated[
        list[ModelView], _("The models that servers list or the configuration names, by name.")
    ] = []


class Event(msgspec.Struct, frozen=True, kw_only=True, tag="event"):
    """An event, sent at once and in order."""

    id: Annotated[int, _("Counts up by one from the router's start; 0 if `missed`.")]
    time: Time
    kind: Annotated[
        str,
        _(
            "state: a server changed it, except between up and full; states: further servers "
            "with the same change within a second; full: how often a server was full within a "
            "minute, or several servers were; drained: a draining server has nothing in flight "
            "any more; reload; reload_refused; discovery: sources have found or lost servers; "
            "source: what is wrong with a source, or right again; retries_exhausted; missed: "
            "this client read too slowly and lost events."
        ),
    ]
    text: Annotated[str, _("What happened, for people.")]
    text_code: Annotated[
        str | None,
        _(
            "A name for the text, for translations: changes (kinds reload and discovery), "
            "source_… (kind source), request_failed or requests_failed (kind retries_exhausted), "
            "key_refused or file_refused, with _more for several problems (kind reload_refused, "
            "whose `text` has all of them, one a line); null if the kind says it all."
        ),
    ] = None
    text_values: Annotated[
        dict[str, str],
        _(
            "The values in the text, by name. Of changes: added and removed servers, `details`, "
            "and how many `more` there are."
        ),
    ] = {}
    server: Annotated[str | None, _("The server it is about, if any.")] = None
    old: Annotated[str | None, _("The state before (kinds state, states).")] = None
    new: Annotated[str | None, _("The state now (kinds state, states).")] = None
    reason: Annotated[str, _("Why, in words (kind state).")] = ""
    reason_code: Annotated[str | None, _("As of a server.")] = None
    reason_values: Annotated[dict[str, str], _("As of a server.")] = {}
    reason_also: Annotated[list[Phrase], _("As of a server.")] = []
    count: Annotated[
        int | None, _("How often (kinds full, missed); how many servers (kind states).")
    ] = None
    servers: Annotated[
        list[str], _("Their names (kind states, and kind full without a `server`).")
    ] = []


class ConfigView(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration, as far as a display needs it."""

    policy: str
    feed_interval: Seconds
    metrics_interval: Seconds
    health_check_interval: Seconds
    request_timeout: Seconds
    max_retries: int
    drain_timeout: Seconds
    allow_engine_control: bool


class History(msgspec.Struct, frozen=True, kw_only=True):
    """Series of figures, oldest first."""

    interval: Annotated[Seconds, _("Between two values.")]
    end: Annotated[Time, _("Of the last value; 0 while there is none.")]
    fleet: Annotated[
        dict[str, list[float | None]],
        _(
            "By figure: requests_per_s, errors_per_s, refused_per_s, saved_per_s, chunks_per_s, "
            "tokens_per_s, running, waiting, queued, capacity, load, open_streams, available, and "
            "ttft and duration with _p50, _p95, _p99."
        ),
    ]
    servers: Annotated[
        dict[str, list[float | None]],
        _("The load of each current server; null for times before it was added."),
    ]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message."""

    schema: Annotated[int, _("Version of these messages.")]
    version: Annotated[str, _("Of the router.")]
    name: Annotated[str, _("Of the router's machine.")]
    time: Time
    started: Annotated[Time, _("When the router started.")]
    admin: Annotated[bool, _("Whether this client may use /admin.")]
    admin_key: Annotated[
        bool,
        _("Whether an admin key is set."),
    ] = False
    config: ConfigView
    history: Annotated[History, _("The last five minutes, second by second.")]
    hour: Annotated[History, _("The last hour in steps of ten seconds, without servers.")]
    events: Annotated[list[Event], _("The last ones before this message, at most 100.")]


Message: TypeAlias = Hello | Snapshot | Event
