"""One vLLM server: its configuration, its live state, and the load that routing compares.

Everything that changes the state goes through a method here, which brings `load` up to date and
tells the fleet when the set of candidates may have changed. So a pick reads plain attributes and
costs nothing per server beyond the comparison.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.fleet.engine_metrics import TOO_LARGE, EngineMetrics
from vllm_router.fleet.health import Check, HealthRules, ProbeHealth, TrafficHealth
from vllm_router.fleet.refusals import Asked, Refusals
from vllm_router.fleet.silence import (
    LEFT_AFTER,
    LEFT_TIMES,
    STILL_FOR,
    TRIAL_PATIENCE,
    Silence,
    StandStill,
)

STALE_AFTER_INTERVALS = 3
"""Metrics older than so many scrape intervals are not used for routing."""

BUSY_FOR = 1.0
"""Seconds a server counts as full after a refusal that carried no `Retry-After`."""

MAX_BUSY_FOR = 300.0

BUSY_CHECK = 2.0
"""Seconds a server counts as full after a check that it answered with 503."""

FLOW_SECONDS, MAX_FLOW_SECONDS = 6.0, 60.0
"""A server whose last bytes are no older than the first, or twice what its answers take up to the
second, is alive, though it says 503 to checks."""

SLOW_START_FROM = 0.1
"""What slow start begins with, of a server's share."""

GHOST_SECONDS = 1.0
"""How long a good answer is taken to last on a server that has not yet given one."""

GHOST_GONE = 0.01

PACE = 0.05
"""How fast the mean time of good answers follows."""


class State(enum.StrEnum):
    """What an operator sees, most telling first."""

    DRAINING = "draining"
    UNKNOWN = "unknown"
    DOWN = "down"
    ASLEEP = "asleep"
    PAUSED = "paused"
    EJECTED = "ejected"
    SILENT = "silent"
    REFUSING = "refusing"
    FULL = "full"
    UP = "up"


@dataclass(frozen=True, slots=True)
class Transition:
    """A server changed its state. `reason` is for people."""

    server: str
    old: State
    new: State
    reason: str


class Lease(msgspec.Struct, eq=False):
    """The in-flight unit one attempt holds on a server, from the pick to the end.

    `last_byte_at` is set with every byte from the server, `committed` once the client has got
    some; `interrupt(reason)` ends the attempt from outside, if possible; `reservation` belongs to
    the policy.
    """

    server: Server
    taken_at: float
    last_byte_at: float
    trial: bool = False
    committed: bool = False
    interrupt: Callable[[str], bool] | None = None
    reservation: object = None

    def release(self) -> None:
        """Give the unit back; called exactly once, in the attempt's `finally`."""
        self.server.end_lease(self)


class Journal:
    """`servers` whose load has changed, in order, for those who keep figures made of loads. Once
    it is long another list is begun: who holds the old one has missed something.
    """

    LONGEST = 4096

    def __init__(self) -> None:
        self.servers: list[Server] = []


class Server:
    """A server of the fleet. `load` and `state` are current at any time."""

    def __init__(
        self,
        config: ServerConfig,
        settings: Settings,
        on_change: Callable[[Server], None],
    ) -> None:
        self.config = config
        self.name = config.name
        self.url = config.url
        self.capacity = config.max_concurrent_requests
        self.share = self.capacity * config.weight
        """What its load is measured against."""
        self.cap = _cap_of(config)
        """Requests of ours that it may have at once; infinite unless `[limits]` says so."""
        self._on_change = on_change
        self.journal = Journal()
        """The fleet's, if it is in one."""
        rules = health_rules(settings)
        self.probe_health = ProbeHealth(rules)
        self.traffic_health = TrafficHealth(rules)
        self.stale_after = STALE_AFTER_INTERVALS * settings.metrics_interval

        self.leases: set[Lease] = set()
        self.in_flight = 0
        self.served = 0
        self.load = 0.0
        self.running = 0.0
        self.waiting = 0.0
        self.work = 0.0
        """`running + 0.5 waiting` and the ghosts: what policies count."""
        self.burden = 0.0
        """That, by its share: what policies compare. In slow start the share is a part of it, and
        the next request counts, too; so a server that has nothing yet is no magnet."""
        self.ramp = 1.0
        """The part of its share that it gets: less than 1 in slow start."""
        self.ghosts = 0.0
        """Errors that it gave fast go on to count as requests for as long as good answers take;
        else the server that fails fastest would look least busy."""
        self.moving = False
        """Whether `ramp` or `ghosts` change with time; then the fleet calls `move`."""
        self.slow_start = settings.slow_start
        self.joined = False
        """Whether it was added to a fleet that was there already."""
        self._typical = 0.0
        self._first_token = 0.0
        self._moved_at = 0.0
        self._was_held_back = False

        self.metrics: EngineMetrics | None = None
        self.scraped_at: float | None = None
        self.metrics_fresh = False
        self.leases_at_scrape = 0

        self.models: tuple[str, ...] | None = config.models
        self.model_cards: dict[str, dict[str, Any]] = {}
        self.models_at: float | None = None
        self.lengths: dict[str, int] = {}
        """The longest context of each model in tokens (`max_model_len`), where the server says."""
        self._listed: frozenset[str] = frozenset()
        self.refusals = Refusals()
        """What it refuses that others take."""

        self.silence = Silence()
        self.stuck = 0.0
        """Requests in its gauges that are not there: see `look_for_silence`."""
        self.paused_at: float | None = None
        """When its engine was paused through this router; None if it was not, or has gone on."""
        self.output_at = -math.inf
        """When a request last had output of its engine, comments of a stream not counted."""
        self.progress_at = -math.inf
        """When the engine worked at the earliest, by the last two scrapes that differed: between
        them. What an earlier request had done may show after this one was sent."""
        self._stand_still = StandStill()

        self.restarts = 0
        """How often its process was found to be a new one, with nothing cached."""
        self.back_at = -math.inf
        """When it last came back from being down, ejected, asleep or restarted, or was added."""
        self.fell_at = -math.inf
        """When it was last found to be down, or to be a new process."""

        self.draining = False
        self.full_until = 0.0
        self.last_byte_at = -float("inf")
        self.checked_at: float | None = None
        self._check_began = -math.inf
        self.state = State.UNKNOWN
        self.state_since = 0.0
        self.state_reason = self.probe_health.reason
        self._trust_unprobed(settings)

    def __repr__(self) -> str:
        return f"<Server {self.name} {self.state} {self.in_flight}/{self.capacity}>"

    # -- configuration ------------------------------------------------------------------------

    def apply(self, config: ServerConfig, settings: Settings) -> None:
        """Take a new configuration for the same URL; what is known of the server stays."""
        if config.models is not None or self.config.models is not None:
            self.models = config.models
        if config.api_key != self.config.api_key or config.models != self.config.models:
            self.refusals.clear()
        if config != self.config:  # who keeps what follows from it looks whether it is the same
            self.config = config
        self.name, self.capacity = config.name, config.max_concurrent_requests
        self.share = self.capacity * config.weight
        self.cap = _cap_of(config)
        self.slow_start = settings.slow_start
        rules = health_rules(settings)
        self.probe_health.apply(rules)
        self.traffic_health.apply(rules)
        self.stale_after = STALE_AFTER_INTERVALS * settings.metrics_interval
        self._trust_unprobed(settings)
        self._update_load()
        self._on_change(self)

    def _trust_unprobed(self, settings: Settings) -> None:
        """Without active checks a server is up until its traffic says otherwise."""
        if not settings.enable_active_health_check:
            self.probe_health.up, self.probe_health.reason = True, ""

    # -- leases -------------------------------------------------------------------------------

    def lease(self, now: float) -> Lease:
        """Take one unit; the caller releases it in a `finally`."""
        lease = Lease(self, now, now)
        if self.traffic_health.ejected:
            lease.trial = self.traffic_health.start_trial(now)
            self._on_change(self)
        elif self.silence.since is not None and self.silence.start_trial(now):
            lease.trial = True
            self._on_change(self)
        self.leases.add(lease)
        self.in_flight += 1
        self._update_load()
        return lease

    def end_lease(self, lease: Lease) -> None:
        self.leases.remove(lease)
        self.in_flight -= 1
        self.served += 1
        if lease.committed and lease.last_byte_at > self.output_at:
            self.output_at = lease.last_byte_at
        if lease.trial:
            self._trial_ended()
        self._update_load()

    def _trial_ended(self) -> None:
        """Another trial may follow, if that brought no verdict."""
        if self.traffic_health.trial:
            self.traffic_health.trial_ended()
            self._on_change(self)
        if self.silence.trial:
            self.silence.trial = False
            self._on_change(self)

    # -- load ---------------------------------------------------------------------------------

    def _update_load(self) -> None:
        """Requests on the server now: the last scrape, corrected by what we sent and ended since.

        Never less than our own leases: a gauge lags a new request by up to 41 ms (vLLM 0.32), and
        a scrape may come before the request has reached the engine.
        """
        mine = self.in_flight
        metrics = self.metrics
        if self.metrics_fresh and metrics is not None and metrics.running is not None:
            waiting = metrics.waiting or 0.0
            there = metrics.running + waiting - self.stuck + (mine - self.leases_at_scrape)
            if there < mine:
                there = mine
            if waiting > there:
                waiting = there
            running = there - waiting
        else:
            running, waiting = float(mine), 0.0
        self.running, self.waiting = running, waiting
        self.work = work = running + 0.5 * waiting
        self.load = self.burden = work / self.share
        if self.moving:
            self.work = work = work + self.ghosts
            self.burden = (work + 1.0) / (self.share * self.ramp) - 1.0 / self.share
        self.touch()

    def touch(self) -> None:
        """Its load has changed, or something that a policy adds to it."""
        servers = self.journal.servers
        servers.append(self)
        if len(servers) > Journal.LONGEST:
            self.journal.servers = []

    def move(self, now: float) -> bool:
        """Bring up to date what changes with time alone; False once nothing does any more.

        A time that has passed already counts as the last one.
        """
        now = max(now, self._moved_at)
        age = now - self.back_at
        self.ramp = 1.0
        if age < self.slow_start:
            self.ramp = max(SLOW_START_FROM, age / self.slow_start)
        if self.ghosts:
            left = self.ghosts * math.exp((self._moved_at - now) / (self._typical or GHOST_SECONDS))
            self.ghosts = left if left > GHOST_GONE else 0.0
        self._moved_at = now
        self.moving = self.ramp < 1.0 or self.ghosts > 0.0
        self._update_load()
        return self.moving

    def took(self, seconds: float) -> None:
        """It has given a good answer, in so much time."""
        self._typical += (PACE if self._typical else 1.0) * (seconds - self._typical)

    def began(self, seconds: float) -> None:
        """A stream has begun after so much time."""
        self._first_token += (PACE if self._first_token else 1.0) * (seconds - self._first_token)

    def haunt(self, now: float, seconds: float, typical: float) -> None:
        """It has given an error, in so much time; the caller sees to it that it is moved.

        `typical` is the time that good answers take in the fleet: what it would take itself is
        known the less, the longer it gives none.
        """
        if typical:
            self.took(typical)
        typical = self._typical or GHOST_SECONDS
        if seconds < typical:
            self.move(now)
            # As ghosts fade exponentially, this is in sum what is missing of a good answer's time.
            self.ghosts += 1.0 - seconds / typical
            self.moving = True
            self._update_load()

    def scraped(self, metrics: EngineMetrics, now: float, leases: int) -> None:
        """A metrics page arrived; `leases` were held when it was asked for.

        One without a load (`--disable-log-stats`) takes the figures of earlier ones back.
        """
        was_asleep = self.metrics is not None and self.metrics.asleep
        if self.metrics is not None and metrics.began_after(self.metrics):
            self.restarts += 1
            self.back_at = self.fell_at = now
            self._new_process()
        self._note_progress(metrics, now)
        if metrics.has_load:
            self.metrics, self.scraped_at = metrics, now
        else:
            self.metrics = self.scraped_at = None
        self.metrics_fresh = metrics.has_load
        self.leases_at_scrape = leases
        self._update_load()
        if (metrics.has_load and metrics.asleep) is not was_asleep:
            self._on_change(self)

    def age_metrics(self, now: float) -> None:
        """Called by the probe on each tick: old figures stop counting, our own leases remain."""
        if self.refusals.known and self.refusals.expire(now):
            self._on_change(self)
        if self.metrics_fresh and self.metrics_age(now) > self.stale_after:
            self.metrics_fresh = False
            self._update_load()

    def metrics_age(self, now: float) -> float:
        """Seconds since the last good scrape; infinite before the first."""
        return now - self.scraped_at if self.scraped_at is not None else float("inf")

    # -- models -------------------------------------------------------------------------------

    def serves(self, model: str) -> bool:
        """Whether it lists the model; a server whose list could never be read may serve any."""
        return self.models is None or model in self.models

    def listed(self, cards: dict[str, dict[str, Any]], now: float) -> None:
        """A `/v1/models` answer arrived; LoRA adapters are models in it."""
        before, self._listed = self._listed, frozenset(cards)
        if self.refusals.known and self.refusals.relisted(before, self._listed):
            self._on_change(self)
        self.model_cards, self.models_at = cards, now
        lengths = {name: length for name, card in cards.items() if (length := _length_in(card))}
        if lengths != self.lengths:
            self.lengths = lengths
            self._on_change(self)
        if self.config.models is None and tuple(cards) != self.models:
            self.models = tuple(cards)
            self._on_change(self)

    def unlist(self, model: str) -> bool:
        """The server said that it has no such model; True if its list named it until now."""
        if self.config.models is not None or self.models is None or model not in self.models:
            return False
        self.models = tuple(name for name in self.models if name != model)
        self.model_cards = {name: card for name, card in self.model_cards.items() if name != model}
        self._on_change(self)
        return True

    # -- what it refuses ----------------------------------------------------------------------

    def others_take(
        self, name: str, size: int, words: str, now: float, *, body: int, sure: bool
    ) -> None:
        """Another server has taken what this one refused; see `Refusals.refused`."""
        hold = self.traffic_health.rules.ejection_time
        if self.refusals.refused(name, size, words, now, hold=hold, body=body, sure=sure):
            self._on_change(self)

    def refused_again(self, name: str, now: float) -> None:
        """It refuses what it was tried with; see `Refusals.refused_again`."""
        if self.refusals.refused_again(name, now, hold=self.traffic_health.rules.ejection_time):
            self._on_change(self)

    def takes_again(self, asked: Asked) -> None:
        """It has taken such a request."""
        if self.refusals.answered(asked):
            self._on_change(self)

    def fits(self, asked: Asked, now: float, tokens: int, longer_than: int) -> bool:
        """Whether a request may be sent to it, by what it is known to refuse.

        `tokens` is how long its context must be at least, `longer_than` how long another server's
        was that proved too short; both may be 0.
        """
        length = self.lengths.get(asked.model, 0) if asked.model is not None else 0
        if longer_than and length <= longer_than:
            return False
        if length and length < tokens:
            return False
        return not self.refusals.refuses(asked, now)

    # -- health -------------------------------------------------------------------------------

    def checked(self, check: Check, elapsed: float, now: float, detail: str = "") -> bool:
        """One `/health` check is in. True if the server has just gone down.

        A timeout is no evidence if the server has sent bytes since the check before began: an API
        process that streams at full speed, or gets little CPU, may be slow to answer. One that
        says 503 while its answers flow is full.
        """
        since, self._check_began = self._check_began, now - elapsed
        self.checked_at = now
        if check is Check.BUSY:
            if self._answers_flow(now):
                self.refused(now, BUSY_CHECK)
            check = Check.GOOD if self._answers_flow(now) else Check.UNHEALTHY
        if check is Check.TIMEOUT and self.last_byte_at >= since > -math.inf:
            check = Check.GOOD
        return self._flipped(self.probe_health.observe(check, elapsed, now, detail), now)

    def _answers_flow(self, now: float) -> bool:
        """Whether it has lately given bytes of an answer, or worked, and not failed since."""
        life = max(self.last_byte_at, self.progress_at)
        patience = min(max(FLOW_SECONDS, 2.0 * self._typical), MAX_FLOW_SECONDS)
        return now - life <= patience and self.traffic_health.failures_in_row == 0

    def scrape_reached(self, reachable: bool, now: float, detail: str = "") -> bool:
        """A metrics scrape found the port open or closed. True if the server has just gone down."""
        return self._flipped(self.probe_health.observe_scrape(reachable, now, detail), now)

    def _flipped(self, flipped: bool, now: float) -> bool:
        held_back = self.probe_health.held_back
        if held_back or self._was_held_back:
            self._was_held_back = held_back
            self._on_change(self)  # it may be asked where nobody else can, and its reason changes
        if flipped:
            if self.probe_health.up:
                self.traffic_health.restarted(now)
                self._new_process()
                self.full_until = 0.0
                if self.state is not State.UNKNOWN:
                    self.back_at = now
                    if self.metrics is None:
                        self.restarts += 1  # no counters to tell by
            else:
                self.fell_at = now
            self._on_change(self)
        return flipped and not self.probe_health.up

    def answered(self, now: float, *, trial: bool) -> None:
        """A request was answered by a live server, whatever it said."""
        self.last_byte_at = max(self.last_byte_at, now)
        if self.traffic_health.succeeded(now, trial=trial):
            self.back_at = now
            self._on_change(self)
        if self.silence.since is not None:
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
        """A request failed by the server's fault; see `TrafficHealth.failed`."""
        if self.traffic_health.failed(
            now, trial=trial, jitter=jitter, body=body, odd=odd, allowed=allowed
        ):
            self._on_change(self)

    def not_its_fault(self, body: int, now: float, *, jitter: float, allowed: bool) -> None:
        """Another server has answered the request with this body that failed here."""
        if self.traffic_health.not_its_fault(body, now, jitter=jitter, allowed=allowed):
            self._on_change(self)

    def eject(self, now: float, jitter: float, reason: str) -> None:
        self.traffic_health.eject(now, jitter, reason)
        self._on_change(self)

    def refused(self, now: float, retry_after: float | None) -> None:
        """429 or 503 with a body: alive, but busy. Passed over for a while, never ejected."""
        wait = BUSY_FOR if retry_after is None else min(max(retry_after, BUSY_FOR), MAX_BUSY_FOR)
        self.full_until = max(self.full_until, now + wait)
        self._on_change(self)

    def drain(self, on: bool) -> None:
        """Take no new requests (or take them again); those in flight go on."""
        self.draining = on
        self._on_change(self)

    # -- silence ------------------------------------------------------------------------------

    def last_output(self) -> float:
        """When a request last had output of its engine; O(leases)."""
        running = [lease.last_byte_at for lease in self.leases if lease.committed]
        return max(running, default=self.output_at)

    def output_since(self, moment: float) -> bool:
        """Whether any request has had output since, or the engine has worked, as far as known."""
        known = max(self.output_at, self.progress_at)
        return known > moment or self.last_output() > moment

    def waited_in_vain(self, since: float, now: float, reason: str) -> None:
        """A request sent then has had no output; evidence of silence if no other has had any."""
        if not self.output_since(since):
            hold = self.traffic_health.rules.ejection_time
            if self.silence.suspect(since, now, reason, hold):
                self._on_change(self)

    def is_evidence(self, waited: float, *, stream: bool) -> bool:
        """Whether a client that leaves without a byte has waited long enough to say anything."""
        usual = LEFT_TIMES * self._first_token if stream else self._typical
        return waited >= max(LEFT_AFTER, usual)

    def look_for_silence(self, now: float) -> None:
        """Called on every scrape interval: end a silence, or see that one has begun.

        With requests of ours on it, and counters that stand still for STILL_FOR, it is silent.
        Without any, its gauges are stuck or its engine hangs: what they say is taken off its load,
        and a trial tells which of both it is.
        """
        if self.silence.since is not None:
            self._end_silence(now)
        metrics = self.metrics
        if metrics is None or not (self.metrics_fresh and metrics.counts):
            self._stand_still.over()
            return
        gauges = (metrics.running or 0.0, metrics.waiting or 0.0)
        if sum(gauges) < self.stuck:
            self.stuck = sum(gauges)
            self._update_load()
        mine = self.in_flight > 0
        if not (mine or sum(gauges) > self.stuck) or self.paused_at is not None or self.asleep:
            self._stand_still.over()
            return
        life = max(self.progress_at, self.output_at)
        if self._stand_still.lasts(now, life, gauges, mine=mine) < STILL_FOR:
            return
        since = now - STILL_FOR
        if mine:
            reason = f"no token for {STILL_FOR:g} s while {self.in_flight} requests wait on it"
            self.waited_in_vain(since, now, reason)
        elif self.silence.suspect(since, now, f"its load stands still at {sum(gauges):g}", 0.0):
            self.stuck = sum(gauges)
            self._update_load()
            self._on_change(self)

    def _end_silence(self, now: float) -> None:
        since = self.silence.since
        if since is not None and self.output_since(since):
            self.silence.clear()
            self.back_at = now
            self._on_change(self)

    def trial_patience(self) -> float:
        """Seconds that a trial of a silent server may stay silent."""
        return max(TRIAL_PATIENCE, 2.0 * self._typical)

    def _note_progress(self, metrics: EngineMetrics, now: float) -> None:
        earlier, scraped = self.metrics, self.scraped_at
        if earlier is None or scraped is None:
            return
        if not metrics.has_load or not metrics.progressed(earlier):
            return
        self.progress_at = scraped
        if self.paused_at is not None and scraped > self.paused_at:
            self.pause(on=False, now=now)

    def pause(self, *, on: bool, now: float) -> None:
        """Its engine was paused, or told to go on, through this router."""
        if on is not (self.paused_at is not None):
            self.paused_at = now if on else None
            if not on:
                self.silence.clear()
                self.back_at = now
            self._on_change(self)

    def _new_process(self) -> None:
        """What was learnt of the old one does not hold."""
        self.refusals.clear()
        self.silence.clear()
        self.paused_at, self.stuck = None, 0.0
        self._on_change(self)

    # -- what follows from it -----------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """May be asked: probed good, awake and not draining."""
        return bool(self.probe_health.up) and not self.draining and not self.asleep

    @property
    def at_cap(self) -> bool:
        """Has as many requests of ours as it may, and gets no other until one has ended."""
        return self.in_flight >= self.cap

    @property
    def asleep(self) -> bool:
        """Its engine sleeps: requests would wait until it is woken up."""
        return self.metrics is not None and self.metrics.asleep

    @property
    def held_back(self) -> bool:
        """May be asked where there is no other: its checks are good, but it has kept falling."""
        return self.probe_health.held_back and not self.draining and not self.asleep

    def current_state(self, now: float) -> tuple[State, str]:
        """The state and, in words, why; the most telling one where several hold."""
        if self.draining:
            return State.DRAINING, f"draining, {self.in_flight} in flight"
        if self.probe_health.up is None:
            return State.UNKNOWN, self.probe_health.reason
        if not self.probe_health.up:
            return State.DOWN, self.probe_health.reason
        if self.asleep:
            return State.ASLEEP, "the engine sleeps"
        if self.paused_at is not None:
            return State.PAUSED, "its engine was paused through the router: POST /resume"
        if self.traffic_health.ejected:
            return State.EJECTED, self.traffic_health.reason
        if self.silence.since is not None:
            return State.SILENT, self.silence.reason
        if self.refusals.known and (reason := self.refusals.reason()):
            return State.REFUSING, reason
        if now < self.full_until:
            return State.FULL, "it refused a request as too busy"
        return State.UP, ""

    def update_state(self, now: float) -> Transition | None:
        """Recompute `state`; the transition, if it changed."""
        state, reason = self.current_state(now)
        old = self.state
        self.state_reason = reason
        if state is old:
            return None
        if old is State.ASLEEP or (old is State.UNKNOWN and self.joined):
            self.back_at = now
        self.state, self.state_since = state, now
        return Transition(self.name, old, state, reason)


def _cap_of(config: ServerConfig) -> float:
    return math.inf if config.max_in_flight is None else config.max_in_flight


def _length_in(card: dict[str, Any]) -> int:
    """`max_model_len` of an entry of `/v1/models` (vLLM, SGLang); 0 if there is none."""
    length = card.get("max_model_len")
    return length if type(length) is int and 0 < length < TOO_LARGE else 0


@functools.lru_cache(maxsize=2)  # a reload asks once per server
def health_rules(settings: Settings) -> HealthRules:
    """The part of the settings that both health machines read."""
    return HealthRules(
        rise=settings.health_check_rise,
        fall=settings.health_check_consecutive_failures,
        window=settings.health_check_window_size,
        min_success_rate=settings.health_check_min_success_rate,
        max_response_time=settings.health_check_max_response_time,
        failure_threshold=settings.failure_threshold,
        ejection_time=settings.auto_recovery_threshold,
    )
