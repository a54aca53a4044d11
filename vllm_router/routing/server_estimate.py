"""The adaptive policy's estimate of one server: prompts under way, speed, errors, cache hits.

A prompt is reserved when its request is leased, and settled when its first token comes; the rest
is derived from scrapes. Time is an argument, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from vllm_router.routing.adapters import AdapterServers, LoadedAdapters
from vllm_router.routing.hashing import seed_of

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.blocks import Prompt

ERROR_PENALTY = 8.0
"""Requests added to a server's load by an error, so that failing fast is no attraction."""

ERROR_PENALTY_HALF_LIFE = 5.0

LATENCY_HALF_LIFE = 10.0
DEAD_BAND = 2.0
"""A server up to twice as slow or fast as the median counts as equal: prefills between its steps
alone can make that difference."""

SLOWEST, FASTEST = 8.0, 0.5
LASTING_HALF_LIFE = 20.0
"""Long prompts make any server slow for a while. Lasting slowness is learnt with this half-life
and counts squared: a lastingly slow server gets less than one request in a hundred."""

IDLE_LASTING_HALF_LIFE = 60.0
IDLE_FRACTION = 0.5
"""Below this fraction of the others' load a slow server's steps are as short as theirs, which does
not show that it has become fast: what was learnt fades with IDLE_LASTING_HALF_LIFE."""

_PRIOR_TOKENS, _PRIOR_STEPS = 50.0, 10.0
"""Weight of the fleet's latency in the estimate of a server's own: so many tokens, or a token of
every running request in so many engine steps. A scrape interval in which a busy server computed
prompts has a few long steps, though hundreds of tokens. Older tokens fade, so a server that gets no
requests returns to the fleet's latency and is tried again."""

_BAND_PRIOR_TOKENS = 2000.0
BAND_MARGIN = 0.1
"""Within the dead band the ratio counts beyond this margin, with a prior of so many tokens: faster
and slower servers of a fleet without weights show after some seconds, a single prefill does not."""

LONG_PROMPTS = 16_000.0
"""Prompt tokens under way, two engine steps, with which the time per token says nothing of a
server's speed: the steps that compute them are many times as long. Else the conversations of a
server that computes a new agent's context would be computed anew elsewhere."""

LONGEST_COMPUTING = 30.0
SLOW_COMPUTING = 0.5
"""After so many seconds it counts all the same if the server has computed fewer prompt tokens than
this share of what the fleet's servers compute in that time: then it is slow. If it has computed
more, it only has much to do, such as the contexts of many new agents."""

HITS_HALF_LIFE = 60.0
MIN_EXPECTED_TOKENS = 20_000.0
MIN_HIT_SHARE = 0.1
"""With at least MIN_EXPECTED_TOKENS expected in its cache, a server that has found less than this
share is taken to have prefix caching off."""

ARRIVALS_HALF_LIFE = 10.0
LN2 = 0.6931471805599453

NEGLIGIBLE = 0.001
"""Arrivals per second, tokens and differences of ratios that change no decision."""

FIRST_TOKEN = 0.5
"""Seconds to the first token of a server that does not export it."""

LONGEST_FIRST_TOKEN = 300.0
"""A longer mean counts as this. An engine measures by its machine's clock: when that is set, times
of years would keep the prompts of all later requests."""


class PrefixStatistics(NamedTuple):
    """The prefix cache of one server as the policy estimates it; tokens are totals since the start.

    prompt_tokens: of all prompts sent to the server.
    expected_tokens: of these, expected in its cache.
    reported_tokens: cached tokens according to responses, where they report them.
    recorded_bytes: bytes of prompts in the prefix index now.
    """

    prompt_tokens: int
    expected_tokens: int
    reported_tokens: int
    recorded_bytes: int


class ServerEstimate:
    """The estimate of one server. `bit` stands for it in the prefix index and in `slots`."""

    __slots__ = (
        "adapters",
        "arrivals",
        "arrived_at",
        "bit",
        "computed_before",
        "computing_since",
        "due",
        "due_hits",
        "error_at",
        "error_penalty",
        "expected",
        "expected_total",
        "extra",
        "first_token",
        "footprint",
        "gauge",
        "hits",
        "lasting",
        "latency_count",
        "latency_sum",
        "own",
        "prompt_total",
        "queued",
        "queued_elsewhere",
        "reported_total",
        "restarts",
        "scraped_at",
        "seed",
        "seen",
        "sent",
        "server",
        "slowness_at",
        "started_hits",
    )

    def __init__(self, server: Server, bit: int, slots: AdapterServers | None = None) -> None:
        self.server = server
        self.bit = bit
        self.seed = seed_of(server.url)
        self.queued = 0.0
        """Uncached prompt tokens sent to the server and not yet followed by a first token, in all
        processes."""
        self.queued_elsewhere = 0.0
        """The part of `queued` that other processes have sent, as far as they have announced."""
        self.due: deque[tuple[float, Reservation]] = deque()
        self.extra = 0.0
        """Requests added to the load: error penalty, and estimated requests of other routers."""
        self.error_penalty = 0.0
        self.error_at = 0.0
        self.sent = 0
        self.scraped_at: float | None = None
        self.seen = _Counters()
        self.latency_sum = self.latency_count = 0.0
        self.computing_since: float | None = None
        """Time of the first scrape with more than LONG_PROMPTS under way; None without them."""
        self.computed_before = 0.0
        """Prompt tokens of ours that it had computed then."""
        self.lasting = 1.0
        """Lasting ratio of its token latency to the fleet's median."""
        self.slowness_at: float | None = None
        self.first_token = FIRST_TOKEN
        self.gauge = self.own = 0.0
        self.expected = self.hits = self.due_hits = self.started_hits = 0.0
        """Prefix cache hits in tokens: expected so far, counted by the engine so far, due with the
        next scrape, and of prompts started since the last scrape."""
        self.expected_total = self.prompt_total = 0.0
        self.reported_total = 0
        self.footprint = 0.0
        """Tokens of conversations that will probably come back, see `working_sets.py`."""
        self.arrivals = 0.0
        """Requests per second that are sent to the server, with ARRIVALS_HALF_LIFE."""
        self.arrived_at = 0.0
        self.adapters = LoadedAdapters(bit, slots)
        self.restarts = server.restarts

    def follow_scrape(self, per_token: float) -> None:
        """Update from the last scrape, if it is new.

        `per_token`: seconds in which a server of the fleet computes a prompt token.
        """
        server, load = self.server, self.server.load_estimate
        metrics, at = load.metrics, load.scraped_at
        if at is None or metrics is None or at == self.scraped_at:
            return
        elapsed = at - self.scraped_at if self.scraped_at is not None else 0.0
        old, new = self.seen, _Counters()
        new.latency_sum = metrics.token_latency_sum or 0.0
        new.latency_count = metrics.token_latency_count or 0.0
        new.first_sum = metrics.first_token_sum or 0.0
        new.first_count = metrics.first_token_count or 0.0
        new.hits = metrics.prefix_hits or 0.0
        restarted = new.latency_count < old.latency_count or new.first_count < old.first_count
        if self.scraped_at is not None and self.scraped_at < server.recovered_at:
            restarted = True  # the figures from before its absence do not apply
        if self.scraped_at is not None and not restarted:
            fade = 0.5 ** (elapsed / LATENCY_HALF_LIFE)
            if self._shows_speed(at, per_token):
                self.latency_sum = self.latency_sum * fade + new.latency_sum - old.latency_sum
                count = new.latency_count - old.latency_count
                self.latency_count = self.latency_count * fade + count
            firsts = new.first_count - old.first_count
            if firsts > 0:
                weight = 1.0 - 0.5**firsts
                mean = (new.first_sum - old.first_sum) / firsts
                mean = min(max(mean, 0.0), LONGEST_FIRST_TOKEN)
                self.first_token += weight * (mean - self.first_token)
            if metrics.prefix_hits is not None:
                fade = 0.5 ** (elapsed / HITS_HALF_LIFE)
                self.hits = self.hits * fade + new.hits - old.hits
                # The engine counts a prompt after computing it, so compare with the due hits.
                self.expected = self.expected * fade + self.due_hits
                self.due_hits, self.started_hits = self.started_hits, 0.0
        elif restarted:
            self.latency_sum = self.latency_count = self.hits = self.expected = 0.0
            self.lasting = 1.0
            self.due_hits = self.started_hits = 0.0
        keep = 0.5 ** (elapsed / LATENCY_HALF_LIFE) if self.scraped_at is not None else 0.0
        gauge = max(0.0, (metrics.running or 0.0) + (metrics.waiting or 0.0) - load.stuck)
        self.gauge = self.gauge * keep + gauge * (1.0 - keep)
        self.own = self.own * keep + load.leases_at_scrape * (1.0 - keep)
        self.seen, self.scraped_at, self.sent = new, at, 0
        if metrics.max_adapters:
            self.adapters.slots = metrics.max_adapters
        if load.stuck and not gauge:  # what names requests that do not exist is stuck as well
            self.adapters.report(())
        else:
            self.adapters.report(metrics.adapters, metrics.waiting_adapters)

    def _shows_speed(self, at: float, per_token: float) -> bool:
        """Whether the last time per token is the server's own, see LONG_PROMPTS."""
        computing, since = self.queued > LONG_PROMPTS, self.computing_since
        computed = self.prompt_total - self.expected_total - self.queued + self.queued_elsewhere
        if computing and since is None:
            since, self.computed_before = at, computed
        self.computing_since = since if computing else None
        if since is None:
            return True
        seconds = (computed - self.computed_before) * per_token
        return at - since > LONGEST_COMPUTING and seconds < SLOW_COMPUTING * (at - since)

    def error_penalty_now(self, now: float) -> float:
        """Requests added to its load for errors since it last came back.

        0 while it is ejected: the penalty must not keep its probation request away.
        """
        server = self.server
        if server.passive_health.ejected or self.error_at < server.recovered_at:
            self.error_penalty = 0.0
        if not self.error_penalty:
            return 0.0
        left: float = self.error_penalty * 0.5 ** ((now - self.error_at) / ERROR_PENALTY_HALF_LIFE)
        if left < 0.05:
            self.error_penalty = left = 0.0
        return left

    @property
    def trusted(self) -> bool:
        """Whether the engine's cache hits match the expected ones."""
        return self.expected < MIN_EXPECTED_TOKENS or self.hits >= MIN_HIT_SHARE * self.expected

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has happened on the server that an update of its terms would show."""
        load = self.server.load_estimate
        return (
            load.scraped_at == self.scraped_at
            and self.arrivals < NEGLIGIBLE
            and self.latency_count < NEGLIGIBLE
            and abs(self.lasting - 1.0) < NEGLIGIBLE
            and not (self.sent or self.due or self.error_penalty or load.advancing)
            and self.restarts == self.server.restarts
        )

    def count_arrival(self, now: float, requests: float = 1.0) -> None:
        """Requests were sent to the server; none to let the rate fade."""
        fade = 0.5 ** ((now - self.arrived_at) / ARRIVALS_HALF_LIFE)
        self.arrivals = self.arrivals * fade + requests * LN2 / ARRIVALS_HALF_LIFE
        self.arrived_at = now

    def set_queued_elsewhere(self, tokens: float) -> None:
        """Replace the queued tokens of other processes."""
        if tokens != self.queued_elsewhere:
            self.queued = max(0.0, self.queued - self.queued_elsewhere) + tokens
            self.queued_elsewhere = tokens
            self.server.mark_changed()

    def settle(self, now: float) -> None:
        """Start reservations whose estimated first token is due: plain responses do not show it."""
        while self.due and self.due[0][0] <= now:
            self.due.popleft()[1].start()


class _Counters:
    """Totals of a scrape, to be compared with the next one."""

    __slots__ = ("first_count", "first_sum", "hits", "latency_count", "latency_sum")

    def __init__(self) -> None:
        self.latency_sum = self.latency_count = 0.0
        self.first_sum = self.first_count = 0.0
        self.hits = 0.0


class Reservation:
    """The prompt tokens that one lease adds to its server's queue, until its first token."""

    __slots__ = (
        "ahead", "cached", "estimate", "is_adapter", "known", "model", "prompt",
        "slot_wait", "swapped", "uncached", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        estimate: ServerEstimate,
        model: str | None,
        prompt: Prompt,
        uncached: float,
        cached: float,
        known: int = 0,
    ) -> None:
        self.estimate = estimate
        self.model = model
        self.prompt = prompt
        self.known = known
        """Leading blocks of the prompt that were in the index for the server before."""
        self.cached = cached
        self.uncached = uncached
        self.ahead = estimate.queued + uncached
        """Uncached tokens that are computed before its first token, its own included."""
        self.is_adapter = self.swapped = self.slot_wait = False
        """The request is for an adapter; it had to be loaded; it had to wait for a slot."""
        self.waiting = True
        estimate.queued += uncached  # the lease in this step has marked the server as changed

    def start(self) -> None:
        """The first token has come: the prompt is computed. Idempotent."""
        if self.waiting:
            self.waiting = False
            estimate = self.estimate
            estimate.queued = max(0.0, estimate.queued - self.uncached)
            estimate.server.mark_changed()
            estimate.started_hits += self.cached


def keep_queued(reservation: Reservation, usual: float, now: float, since: float) -> None:
    """Keep counting the prompt of a request that the server refused without computing it.

    It counts for as long as a first token takes: `usual` in the fleet, or on this server if that
    is longer. Else the server that refuses fastest would look least busy. `since` is the time of
    the lease.
    """
    estimate = reservation.estimate
    until = since + max(usual, estimate.first_token)
    if reservation.uncached and until > now:
        kept = Reservation(
            estimate, reservation.model, reservation.prompt, reservation.uncached, 0.0
        )
        estimate.due.append((until, kept))


def median_latency(estimates: Sequence[ServerEstimate]) -> float:
    """The median inter-token latency, in seconds; 0 where fewer than two servers have one."""
    latencies = [
        estimate.latency_sum / estimate.latency_count
        for estimate in estimates
        if estimate.latency_count >= 10.0
    ]
    return median_low(latencies) if len(latencies) > 1 else 0.0


def median_load(estimates: Sequence[ServerEstimate]) -> float:
    """The median load of the servers, per unit of their capacity."""
    return median_low(
        [estimate.gauge / estimate.server.weighted_capacity for estimate in estimates]
    )


def slowness(estimate: ServerEstimate, latency: float, load: float, now: float) -> float:
    """The factor on the server's score for being slower than the fleet; 1 in the dead band.

    `latency` and `load` are the fleet's medians. See LASTING_HALF_LIFE.
    """
    ratio = 1.0
    if latency:
        # Limit the weight of a single pause, as in a first request.
        limit = estimate.latency_count * SLOWEST * latency
        estimate.latency_sum = min(estimate.latency_sum, limit)
        prior = max(_PRIOR_TOKENS, _PRIOR_STEPS * estimate.server.load_estimate.running)
        count = estimate.latency_count + prior
        ratio = (estimate.latency_sum + prior * latency) / count / latency
        ratio = min(max(ratio, FASTEST), SLOWEST)
    idle = estimate.gauge / estimate.server.weighted_capacity < IDLE_FRACTION * load
    half_life = IDLE_LASTING_HALF_LIFE if idle and ratio < estimate.lasting else LASTING_HALF_LIFE
    age = now - estimate.slowness_at if estimate.slowness_at is not None else 0.0
    fade: float = 0.5 ** (age / half_life)
    estimate.lasting = lasting = ratio + fade * (estimate.lasting - ratio)
    estimate.slowness_at = now
    if lasting > DEAD_BAND:
        return max(ratio, lasting * lasting)
    if not 1.0 / DEAD_BAND <= ratio <= DEAD_BAND:
        return ratio
    return _steady_ratio(estimate, latency) if latency else 1.0


def _steady_ratio(estimate: ServerEstimate, latency: float) -> float:
    """The ratio within the dead band; 1 within BAND_MARGIN."""
    count = estimate.latency_count + _BAND_PRIOR_TOKENS
    ratio = (estimate.latency_sum / latency + _BAND_PRIOR_TOKENS) / count
    return ratio if abs(ratio - 1.0) > BAND_MARGIN else 1.0
