"""One vLLM server: identity, configuration, leases, and the parts that judge it.

All state changes go through methods of `Server`: they update the load and notify the fleet when
the candidates may have changed. So a pick reads plain attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.fleet.active_health import ActiveHealth, Check
from vllm_router.fleet.capacity import EQUAL_SHARE, CapacityEstimate
from vllm_router.fleet.engine_activity import EngineActivity
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.health_rules import health_rules
from vllm_router.fleet.load import LoadEstimate
from vllm_router.fleet.model_catalog import ModelCatalog
from vllm_router.fleet.passive_health import PassiveHealth
from vllm_router.fleet.reason import NONE, Reason, because
from vllm_router.fleet.refusals import Refusals, RequestKind
from vllm_router.fleet.silence import (
    LEFT_AFTER,
    LEFT_TIMES,
    STILL_FOR,
    TRIAL_PATIENCE,
    Silence,
)
from vllm_router.fleet.state import State, Transition

DEFAULT_BACKOFF = 1.0
"""Seconds of backoff after a refusal without `Retry-After`."""

MAX_BACKOFF = 300.0

CHECK_BACKOFF = 2.0
"""Seconds of backoff after a check answered with 503."""

FLOW_SECONDS, MAX_FLOW_SECONDS = 6.0, 60.0
"""A server that answers checks with 503 is full, not unhealthy, if its last bytes are at most
FLOW_SECONDS old, or twice its response time up to MAX_FLOW_SECONDS."""

_ASLEEP, _PAUSED, _FULL = because("asleep"), because("paused"), because("full")


class Lease(msgspec.Struct, eq=False):
    """The in-flight unit that an attempt holds on a server, from the pick to its end.

    last_byte_at: time of the last byte from the server.
    trial: whether the attempt is a trial request.
    committed: whether the client has got a part of the response.
    interrupt: ends the attempt from outside with a reason; False if it cannot.
    reservation: belongs to the policy.
    """

    server: Server
    taken_at: float
    last_byte_at: float
    trial: bool = False
    committed: bool = False
    interrupt: Callable[[str], bool] | None = None
    reservation: object = None

    def release(self) -> None:
        """Give the unit back. Call exactly once, in the attempt's `finally`."""
        self.server.end_lease(self)


class ChangeLog:
    """The servers whose load has changed, in order, for readers that cache figures.

    A reader remembers the list and how much of it it has read. When the list is long, a new one is
    begun, and the old one is kept as `earlier`: a reader that holds an older list has missed
    changes and must read all servers.
    """

    MAX_LENGTH = 4096

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.earlier: list[Server] = []

    def begin(self) -> None:
        """Begin a new list."""
        self.earlier, self.servers = self.servers, []


class Server:
    """A server of the fleet.

    config, name, url: the configuration; the URL is the identity across reloads.
    machine: the host of the URL.
    capacity: concurrent requests without queueing, as operators see it; see `CapacityEstimate`.
    weighted_capacity: capacity × weight, the unit of its load for policies.
    key_share: its share of sessions and prompts by hashing. It follows from the configuration
        alone, so that all routers agree.
    cap: limit of our requests at the same time; infinite without `[limits]`.
    leases, in_flight: our running attempts; with worker processes `in_flight` includes theirs.
    elsewhere: the running attempts of other routers (`[shared]`), for display only.
    load_estimate, active_health, passive_health, catalog, refusals, activity: the parts.
    state: as operators see it; updated by the fleet.
    """

    # Slots, as a request among a thousand servers finds none of this in the processor's cache: an
    # instance with so many attributes would have a dictionary of its own, three times as large.
    __slots__ = (
        "_check_began",
        "_on_change",
        "_was_damped",
        "active_health",
        "activity",
        "backoff_until",
        "cap",
        "capacity",
        "capacity_estimate",
        "catalog",
        "change_log",
        "checked_at",
        "config",
        "draining",
        "elsewhere",
        "in_flight",
        "joined",
        "key_share",
        "last_byte_at",
        "leases",
        "load_estimate",
        "machine",
        "name",
        "on_chosen",
        "passive_health",
        "recovered_at",
        "refusals",
        "restarts",
        "served",
        "state",
        "state_reason",
        "state_since",
        "url",
        "weighted_capacity",
        "went_down_at",
    )  # fmt: skip

    def __init__(
        self,
        config: ServerConfig,
        settings: Settings,
        on_change: Callable[[Server], None],
    ) -> None:
        """`on_change` is called when the candidates for a request may have changed."""
        self.config = config
        self.name = config.name
        self.url = config.url
        self.machine = urlsplit(config.url).hostname
        self.capacity_estimate = CapacityEstimate(config.max_concurrent_requests)
        self.cap = _cap_of(config)
        self._on_change = on_change
        self.on_chosen: Callable[[Server, float], None] | None = None
        """Called with the time when a request is sent to it, while it is probed seldom."""
        self.change_log = ChangeLog()
        """The fleet's; one of its own outside a fleet."""
        rules = health_rules(settings)
        self.active_health = ActiveHealth(rules)
        self.passive_health = PassiveHealth(rules)
        self.load_estimate = LoadEstimate()
        self.key_share = _key_share(config)
        self._configure_load(settings)
        self.catalog = ModelCatalog(config.models)
        self.refusals = Refusals()
        """Requests that it refuses although other servers accept them."""

        self.leases: set[Lease] = set()
        self.in_flight = 0
        self.elsewhere = 0
        self.served = 0
        self.joined = False
        """Whether it was added to an existing fleet."""

        self.activity = EngineActivity()
        self.last_byte_at = -math.inf

        self.restarts = 0
        """Process restarts seen; the prefix cache is empty after each."""
        self.recovered_at = -math.inf
        """When it last came back from being down, ejected, asleep or restarted, or was added."""
        self.went_down_at = -math.inf
        """When it last went down or was found to be a new process."""

        self.draining = False
        self.backoff_until = 0.0
        """It refused a request as busy and is avoided until this time."""
        self.checked_at: float | None = None
        self._check_began = -math.inf
        self._was_damped = False
        self.state = State.UNKNOWN
        self.state_since = 0.0
        self.state_reason = self.active_health.reason
        self._trust_unprobed(settings)

    def __repr__(self) -> str:
        return f"<Server {self.name} {self.state} {self.in_flight}/{self.capacity}>"

    # -- configuration ------------------------------------------------------------------------

    def apply(self, config: ServerConfig, settings: Settings) -> None:
        """Apply a new configuration for the same URL; the live state stays."""
        self.catalog.configure(config.models)
        if config.api_key != self.config.api_key or config.models != self.config.models:
            self.refusals.clear()
        if config != self.config:  # an unchanged object keeps caches by identity valid
            self.config = config
        self.name = config.name
        self.capacity_estimate.configured = config.max_concurrent_requests
        self.key_share = _key_share(config)
        self.cap = _cap_of(config)
        rules = health_rules(settings)
        self.active_health.apply(rules)
        self.passive_health.apply(rules)
        self._configure_load(settings)
        self._trust_unprobed(settings)
        self._update_load()
        self._on_change(self)

    def _configure_load(self, settings: Settings) -> None:
        self.load_estimate.configure(1.0, settings.slow_start, settings.metrics_interval)
        self._follow_capacity()

    def follow_capacity(self) -> None:
        """The capacities that others have configured have changed."""
        self._follow_capacity()
        self._update_load()

    def _follow_capacity(self) -> None:
        """Use the current estimate of the capacity; call `_update_load` afterwards."""
        estimate, weight = self.capacity_estimate, self.config.weight
        self.capacity = estimate.shown
        self.weighted_capacity = estimate.share * weight
        self.load_estimate.set_capacity(self.weighted_capacity, self.capacity * weight)

    def _trust_unprobed(self, settings: Settings) -> None:
        """Without active checks a server is up until its traffic shows otherwise."""
        if not settings.enable_active_health_check:
            self.active_health.up, self.active_health.reason = True, NONE

    # -- leases -------------------------------------------------------------------------------

    def lease(self, now: float) -> Lease:
        """Take one unit; the caller releases it in a `finally`."""
        lease = Lease(self, now, now)
        if self.passive_health.ejected:
            lease.trial = self.passive_health.start_trial(now)
            self._on_change(self)
        elif self.activity.silence.since is not None and self.silence.start_trial(now):
            lease.trial = True
            self._on_change(self)
        self.leases.add(lease)
        self.in_flight += 1
        self._update_load()
        if self.on_chosen is not None:
            self.on_chosen(self, now)
        return lease

    def end_lease(self, lease: Lease) -> None:
        """Called by `Lease.release`."""
        self.leases.remove(lease)
        self.in_flight -= 1
        self.served += 1
        if lease.committed and lease.last_byte_at > self.activity.output_at:
            self.activity.output_at = lease.last_byte_at
        if lease.trial:
            self._trial_ended()
        self._update_load()

    def _trial_ended(self) -> None:
        """A trial without a result: another one may follow."""
        if self.passive_health.trial:
            self.passive_health.trial_ended()
            self._on_change(self)
        if self.silence.trial:
            self.silence.trial = False
            self._on_change(self)

    # -- load ---------------------------------------------------------------------------------

    @property
    def load(self) -> float:
        """The load that operators see; policies read `load_estimate`."""
        return self.load_estimate.value

    @property
    def running(self) -> float:
        return self.load_estimate.running

    @property
    def waiting(self) -> float:
        return self.load_estimate.waiting

    @property
    def metrics(self) -> EngineMetrics | None:
        return self.load_estimate.metrics

    def _update_load(self) -> None:
        self.load_estimate.update(self.in_flight)
        # As `mark_changed`, inlined: this runs twice per request.
        log = self.change_log
        log.servers.append(self)
        if len(log.servers) > ChangeLog.MAX_LENGTH:
            log.begin()

    def mark_changed(self) -> None:
        """Note in the change log that the load, or a policy's addition to it, has changed."""
        log = self.change_log
        log.servers.append(self)
        if len(log.servers) > ChangeLog.MAX_LENGTH:
            log.begin()

    def advance(self, now: float) -> bool:
        """Update the parts of the load that change with time; False once none does any more."""
        advancing = self.load_estimate.advance(now, self.recovered_at)
        self._update_load()
        return advancing

    def record_fast_error(self, now: float, seconds: float, fleet_mean: float) -> None:
        """See `LoadEstimate.record_fast_error`; the caller takes care of `advance`."""
        if self.load_estimate.record_fast_error(now, seconds, fleet_mean, self.recovered_at):
            self._update_load()

    def scraped(self, metrics: EngineMetrics, now: float, leases: int) -> None:
        """A metrics page was read; `leases` were held when it was requested."""
        load = self.load_estimate
        was_asleep = load.asleep
        if load.metrics is not None and metrics.began_after(load.metrics):
            self.restarts += 1
            self.recovered_at = self.went_down_at = now
            self._new_process()
        if self.activity.note_progress(metrics, load):
            self.pause(on=False, now=now)
        if load.metrics is not None:
            elapsed = load.age(now)
            self.capacity_estimate.speed.observe(load.metrics, metrics, elapsed)
        load.take_scrape(metrics, now, leases)
        if metrics.running is not None and not metrics.asleep:
            self.capacity_estimate.observe(
                metrics.running, metrics.waiting or 0.0, metrics.kv_usage, now
            )
        self._follow_capacity()
        self._update_load()
        if load.asleep is not was_asleep:
            self._on_change(self)

    def expire(self, now: float) -> None:
        """Expire old metrics (our leases remain the load) and refusals. Call periodically."""
        if self.refusals.known and self.refusals.expire(now):
            self._on_change(self)
        load = self.load_estimate
        if load.fresh and load.age(now) > load.stale_after:
            load.fresh = False
            self._update_load()

    # -- models -------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...] | None:
        """The models in force; None until the server's list was read."""
        return self.catalog.names

    @property
    def lengths(self) -> dict[str, int]:
        """The longest context of each model in tokens, where known."""
        return self.catalog.lengths

    def serves(self, model: str) -> bool:
        """Whether it has the model, or may have it because its list is unknown."""
        return self.catalog.has(model)

    def listed(self, cards: dict[str, dict[str, Any]], now: float) -> None:
        """Its `/v1/models` was read."""
        changed, before, listed = self.catalog.take_list(cards, now)
        if self.refusals.known and self.refusals.relisted(before, listed):
            changed = True
        if changed:
            self._on_change(self)

    def unlist(self, model: str) -> bool:
        """The server said that it has no such model; True if its list had it."""
        removed = self.catalog.remove(model)
        if removed:
            self._on_change(self)
        return removed

    # -- refusals -----------------------------------------------------------------------------

    def accepted_elsewhere(
        self, name: str, size: int, words: str, now: float, *, body: int, sure: bool
    ) -> None:
        """Another server has accepted what this one refused; see `Refusals.refused`."""
        hold = self.passive_health.rules.ejection_time
        if self.refusals.refused(name, size, words, now, hold=hold, body=body, sure=sure):
            self._on_change(self)

    def refused_again(self, name: str, now: float) -> None:
        """It has refused a trial; see `Refusals.refused_again`."""
        if self.refusals.refused_again(name, now, hold=self.passive_health.rules.ejection_time):
            self._on_change(self)

    def accepted(self, asked: RequestKind) -> None:
        """It has accepted such a request."""
        if self.refusals.answered(asked):
            self._on_change(self)

    def fits(self, asked: RequestKind, now: float, tokens: int, longer_than: int) -> bool:
        """Whether a request may be sent to it, given its refusals and context lengths.

        `tokens` is the context that the request needs at least, `longer_than` the context of
        another server that proved too short; 0 for none.
        """
        length = self.lengths.get(asked.model, 0) if asked.model is not None else 0
        if longer_than and length <= longer_than:
            return False
        if length and length < tokens:
            return False
        return not self.refusals.refuses(asked, now)

    # -- health -------------------------------------------------------------------------------

    def checked(self, check: Check, elapsed: float, now: float, detail: Reason = NONE) -> bool:
        """A `/health` check has finished. True if the server has just gone down.

        A timeout does not count if the server has sent bytes since the previous check began: an
        API process that streams at full speed, or gets little CPU, may be slow to answer. A 503
        while responses flow means full.
        """
        since, self._check_began = self._check_began, now - elapsed
        self.checked_at = now
        if check is Check.BUSY:
            check = Check.UNHEALTHY
            if self._responses_flow(now):
                check = Check.GOOD
                self.refused(now, CHECK_BACKOFF)
        if check is Check.TIMEOUT and self.last_byte_at >= since > -math.inf:
            check = Check.GOOD
        return self._health_judged(self.active_health.observe(check, elapsed, now, detail), now)

    def _responses_flow(self, now: float) -> bool:
        """Whether it has recently sent bytes of a response, or worked, and not failed since."""
        life = max(self.last_byte_at, self.activity.progress_at)
        patience = max(FLOW_SECONDS, 2.0 * self.load_estimate.response_seconds)
        recent = now - life <= min(patience, MAX_FLOW_SECONDS)
        return recent and self.passive_health.failures_in_row == 0

    def scrape_reached(self, reachable: bool, now: float, detail: Reason = NONE) -> bool:
        """A scrape found the port open or closed. True if the server has just gone down."""
        return self._health_judged(self.active_health.observe_scrape(reachable, now, detail), now)

    def _health_judged(self, flipped: bool, now: float) -> bool:
        damped = self.active_health.damped
        if damped or self._was_damped:
            self._was_damped = damped
            self._on_change(self)  # a damped server is a last resort, and its reason changes
        if flipped:
            if self.active_health.up:
                self.passive_health.restarted(now)
                self._new_process()
                self.backoff_until = 0.0
                if self.state is not State.UNKNOWN:
                    self.recovered_at = now
                    if self.metrics is None:
                        self.restarts += 1  # without counters every return may be a restart
            else:
                self.went_down_at = now
            self._on_change(self)
        return flipped and not self.active_health.up

    def answered(self, now: float, *, trial: bool) -> None:
        """A request got a response, whatever its status: the server is alive."""
        self.last_byte_at = max(self.last_byte_at, now)
        if self.passive_health.succeeded(now, trial=trial):
            self.recovered_at = now
            self._on_change(self)
        if self.activity.silence.since is not None:
            self._end_silence(now)

    def failed(
        self,
        now: float,
        *,
        trial: bool,
        jitter: float,
        body: int | None = None,
        odd: bool = False,
        allowed: bool = True,
    ) -> None:
        """A request failed by the server's fault; see `PassiveHealth.failed`."""
        if self.passive_health.failed(
            now, trial=trial, jitter=jitter, body=body, odd=odd, allowed=allowed
        ):
            self._on_change(self)

    def answered_elsewhere(self, body: int, now: float, *, jitter: float, allowed: bool) -> None:
        """Another server has answered the request with this body that failed here."""
        if self.passive_health.answered_elsewhere(body, now, jitter=jitter, allowed=allowed):
            self._on_change(self)

    def eject(self, now: float, jitter: float, reason: Reason) -> None:
        self.passive_health.eject(now, jitter, reason)
        self._on_change(self)

    def refused(self, now: float, retry_after: float | None) -> None:
        """A 429 or 503 with a body: alive but busy. Avoided for a while, never ejected."""
        if retry_after is None:
            wait = DEFAULT_BACKOFF
        else:
            wait = min(max(retry_after, DEFAULT_BACKOFF), MAX_BACKOFF)
        self.backoff_until = max(self.backoff_until, now + wait)
        if not self.load_estimate.fresh:  # else its gauges say more
            self.capacity_estimate.refused(self.in_flight, now)
        self._on_change(self)

    def drain(self, on: bool) -> None:
        """Stop (or resume) taking new requests; running ones finish."""
        self.draining = on
        self._on_change(self)

    # -- silence ------------------------------------------------------------------------------

    @property
    def silence(self) -> Silence:
        return self.activity.silence

    @property
    def paused_at(self) -> float | None:
        """When its engine was paused through this router; None if it runs."""
        return self.activity.paused_at

    def last_output(self) -> float:
        """Time of the last output of its engine for any request. O(leases)."""
        running = [lease.last_byte_at for lease in self.leases if lease.committed]
        return max(running, default=self.activity.output_at)

    def output_since(self, moment: float) -> bool:
        """Whether any request had output, or the engine has worked, since then."""
        return self.activity.life_at > moment or self.last_output() > moment

    def request_starved(self, since: float, now: float, reason: Reason) -> None:
        """A request sent at `since` has had no output; suspect silence if no other had any."""
        if not self.output_since(since):
            hold = self.passive_health.rules.ejection_time
            if self.silence.suspect(since, now, reason, hold):
                self._on_change(self)

    def is_evidence(self, waited: float, *, stream: bool) -> bool:
        """Whether a client that leaves without a byte has waited long enough to count."""
        load = self.load_estimate
        usual = LEFT_TIMES * load.first_token_seconds if stream else load.response_seconds
        return waited >= max(LEFT_AFTER, usual)

    def look_for_silence(self, now: float) -> None:
        """End a silence, or detect one. Call on every scrape interval.

        With requests of ours, counters that stand still for STILL_FOR seconds mean silence.
        Without any, the gauges are stuck or the engine hangs: they are subtracted from the load,
        and a trial request shows which of the two it is.
        """
        self._end_silence(now)
        load, metrics = self.load_estimate, self.metrics
        gauges = 0.0
        if metrics is not None and load.fresh and metrics.counts:
            gauges = (metrics.running or 0.0) + (metrics.waiting or 0.0)
            if gauges < load.stuck:
                load.stuck = gauges
                self._update_load()
        own = self.in_flight > 0
        if not self.activity.stands_still(load, now, own=own):
            return
        since = now - STILL_FOR
        if own:
            reason = because("no_token", seconds=f"{STILL_FOR:g}", n=self.in_flight)
            self.request_starved(since, now, reason)
        elif self.silence.suspect(since, now, because("stands_still", n=f"{gauges:g}"), 0.0):
            load.stuck = gauges
            self._update_load()
            self._on_change(self)

    def _end_silence(self, now: float) -> None:
        since = self.silence.since
        if since is not None and self.output_since(since):
            self.silence.clear()
            self.recovered_at = now
            self._on_change(self)

    def trial_patience(self) -> float:
        """Seconds that a trial on a silent server may stay silent."""
        return max(TRIAL_PATIENCE, 2.0 * self.load_estimate.response_seconds)

    def pause(self, *, on: bool, now: float) -> None:
        """Its engine was paused or resumed through this router."""
        if self.activity.pause(on=on, now=now):
            if not on:
                self.recovered_at = now
            self._on_change(self)

    def _new_process(self) -> None:
        """Discard what was learnt about the old process."""
        self.refusals.clear()
        self.activity.reset()
        self.capacity_estimate.forget()
        self.capacity_estimate.speed.forget()
        self.load_estimate.stuck = 0.0
        self._on_change(self)

    # -- availability and state ---------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Up, awake and not draining."""
        return bool(self.active_health.up) and not self.draining and not self.asleep

    @property
    def at_cap(self) -> bool:
        """Has as many of our requests as allowed, and gets no other until one has ended."""
        return self.in_flight >= self.cap

    @property
    def asleep(self) -> bool:
        """Its engine sleeps: requests would wait until it is woken up."""
        return self.load_estimate.asleep

    @property
    def damped(self) -> bool:
        """A last resort: its checks are good, but it has gone down too often."""
        return self.active_health.damped and not self.draining and not self.asleep

    def current_state(self, now: float) -> tuple[State, Reason]:
        """The state, and its reason; the first one of `State` that applies."""
        if self.draining:
            return State.DRAINING, because("draining", n=self.in_flight)
        if self.active_health.up is None:
            return State.UNKNOWN, self.active_health.reason
        if not self.active_health.up:
            return State.DOWN, self.active_health.reason
        if self.asleep:
            return State.ASLEEP, _ASLEEP
        if self.paused_at is not None:
            return State.PAUSED, _PAUSED
        if self.passive_health.ejected:
            return State.EJECTED, self.passive_health.reason
        if self.silence.since is not None:
            return State.SILENT, self.silence.reason
        if self.refusals.known and (reason := self.refusals.reason()):
            return State.REFUSING, reason
        if now < self.backoff_until:
            return State.FULL, _FULL
        return State.UP, NONE

    def update_state(self, now: float) -> Transition | None:
        """Recompute `state`; the transition if it has changed."""
        state, reason = self.current_state(now)
        old = self.state
        self.state_reason = reason
        if state is old:
            return None
        if old is State.ASLEEP or (old is State.UNKNOWN and self.joined):
            self.recovered_at = now
        self.state, self.state_since = state, now
        return Transition(self.name, old, state, reason)


def _key_share(config: ServerConfig) -> float:
    return (config.max_concurrent_requests or EQUAL_SHARE) * config.weight


def _cap_of(config: ServerConfig) -> float:
    return math.inf if config.max_in_flight is None else config.max_in_flight
