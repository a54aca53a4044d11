"""What is known of one server that only a policy wants to know: prompts under way, speed, errors.

Requests are booked when they are leased and settled when their first token comes; what the server
says of itself is taken from its scrapes. Time is an argument, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from vllm_router.routing.hashing import seed_of

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.pieces import Prompt

PHANTOMS = 8.0
"""Requests that an error makes a server look busier by, so that failing fast is no attraction."""

PHANTOMS_HALVE = 5.0

SLOW_HALF_LIFE = 10.0
DEAD_BAND = 2.0
"""Prefills between its steps alone make one server's tokens twice as slow as another's."""

SLOWEST, FASTEST = 8.0, 0.5
LEARN_SLOW = 20.0
"""Long prompts between its steps make any server slow for a while. What lasts is learnt, by half
within so many seconds, and counts squared: so few requests that they are no hundredth of all."""

FORGET_SLOW = 60.0
IDLE_SHARE = 0.5
"""With less than this part of the others' load, a slow server's steps are as short as theirs. That
does not show that it has become fast, so what was learnt fades with FORGET_SLOW only."""

_PRIOR_TOKENS = 50.0
"""A server's latency counts as the fleet's until it has made up for so many tokens; as old
tokens fade, a server that is left alone is tried again."""

TRUST_HALF_LIFE = 60.0
TRUST_FROM = 20_000.0
TRUST_SHARE = 0.1
"""Of at least so many tokens expected in its cache it must have found this share: less, and prefix
caching is off there."""

FIRST_TOKEN = 0.5
"""Seconds to the first token where the server does not say."""


class PrefixStatistics(NamedTuple):
    """Of one server, since the start, by the policy's estimate: tokens sent as prompts, and how
    many of them were expected in its cache. What answers said: cached tokens, where they tell.
    And the bytes of prompts that are on record now."""

    prompt_tokens: int
    expected_tokens: int
    told_tokens: int
    recorded_bytes: int


class Account:
    """What the policy knows of one server."""

    __slots__ = (
        "begun_hits",
        "bit",
        "due",
        "due_hits",
        "expected",
        "expected_total",
        "extra",
        "first_token",
        "gauge",
        "hits",
        "judged_at",
        "lasting",
        "latency_count",
        "latency_sum",
        "mine",
        "phantoms",
        "phantoms_at",
        "prompt_total",
        "queued",
        "scraped_at",
        "seed",
        "seen",
        "sent",
        "server",
        "told_total",
    )

    def __init__(self, server: Server, bit: int) -> None:
        self.server = server
        self.bit = bit
        self.seed = seed_of(server.url)
        self.queued = 0.0
        """Prompt tokens sent to it and not yet answered with a first token."""
        self.due: deque[tuple[float, Booking]] = deque()
        self.extra = 0.0
        """Added to the load: phantoms, and what other routers probably sent."""
        self.phantoms = 0.0
        self.phantoms_at = 0.0
        self.sent = 0
        self.scraped_at: float | None = None
        self.seen = _Counters()
        self.latency_sum = self.latency_count = 0.0
        self.lasting = 1.0
        """How much slower than the middle of the fleet it has been for some time."""
        self.judged_at: float | None = None
        self.first_token = FIRST_TOKEN
        self.gauge = self.mine = 0.0
        self.expected = self.hits = self.due_hits = self.begun_hits = 0.0
        """Tokens in its prefix cache: that should have been found, were found, should be seen with
        the next scrape, and belong to prompts computed since the last."""
        self.expected_total = self.prompt_total = 0.0
        self.told_total = 0

    def follow_scrape(self) -> None:
        """Take in what the last scrape says, if it is new."""
        server = self.server
        metrics, at = server.metrics, server.scraped_at
        if at is None or metrics is None or at == self.scraped_at:
            return
        elapsed = at - self.scraped_at if self.scraped_at is not None else 0.0
        old, new = self.seen, _Counters()
        new.latency_sum = metrics.token_latency_sum or 0.0
        new.latency_count = metrics.token_latency_count or 0.0
        new.first_sum = metrics.first_token_sum or 0.0
        new.first_count = metrics.first_token_count or 0.0
        new.hits = metrics.prefix_hits or 0.0
        began_anew = new.latency_count < old.latency_count or new.first_count < old.first_count
        if self.scraped_at is not None and self.scraped_at < server.back_at:
            began_anew = True  # how slow it was while it was gone is not how slow it is
        if self.scraped_at is not None and not began_anew:
            fade = 0.5 ** (elapsed / SLOW_HALF_LIFE)
            self.latency_sum = self.latency_sum * fade + new.latency_sum - old.latency_sum
            self.latency_count = self.latency_count * fade + new.latency_count - old.latency_count
            firsts = new.first_count - old.first_count
            if firsts > 0:
                weight = 1.0 - 0.5**firsts
                mean = (new.first_sum - old.first_sum) / firsts
                self.first_token += weight * (mean - self.first_token)
            if metrics.prefix_hits is not None:
                fade = 0.5 ** (elapsed / TRUST_HALF_LIFE)
                self.hits = self.hits * fade + new.hits - old.hits
                # The engine counts a prompt when it has computed it: compare what is due.
                self.expected = self.expected * fade + self.due_hits
                self.due_hits, self.begun_hits = self.begun_hits, 0.0
        elif began_anew:
            self.latency_sum = self.latency_count = self.hits = self.expected = 0.0
            self.lasting = 1.0
            self.due_hits = self.begun_hits = 0.0
        keep = 0.5 ** (elapsed / SLOW_HALF_LIFE) if self.scraped_at is not None else 0.0
        gauge = max(0.0, (metrics.running or 0.0) + (metrics.waiting or 0.0) - server.stuck)
        self.gauge = self.gauge * keep + gauge * (1.0 - keep)
        self.mine = self.mine * keep + server.leases_at_scrape * (1.0 - keep)
        self.seen, self.scraped_at, self.sent = new, at, 0

    def phantoms_now(self, now: float) -> float:
        """Requests it looks busier by, because of errors since it last came back.

        None once it is ejected: then its trial decides, and that must come.
        """
        server = self.server
        if server.traffic_health.ejected or self.phantoms_at < server.back_at:
            self.phantoms = 0.0
        if not self.phantoms:
            return 0.0
        left: float = self.phantoms * 0.5 ** ((now - self.phantoms_at) / PHANTOMS_HALVE)
        if left < 0.05:
            self.phantoms = left = 0.0
        return left

    @property
    def trusted(self) -> bool:
        """Whether its engine finds in its cache what we expect there."""
        return self.expected < TRUST_FROM or self.hits >= TRUST_SHARE * self.expected

    def settle(self, now: float) -> None:
        """Plain answers do not show their first token: it is taken to have come by now."""
        while self.due and self.due[0][0] <= now:
            self.due.popleft()[1].begun()


class _Counters:
    """A scrape's totals that are compared with the next one's."""

    __slots__ = ("first_count", "first_sum", "hits", "latency_count", "latency_sum")

    def __init__(self) -> None:
        self.latency_sum = self.latency_count = 0.0
        self.first_sum = self.first_count = 0.0
        self.hits = 0.0


class Booking:
    """What one lease has on the account of its server."""

    __slots__ = ("account", "cached", "known", "model", "prompt", "uncached", "waiting")

    def __init__(
        self,
        account: Account,
        model: str | None,
        prompt: Prompt,
        uncached: float,
        cached: float,
        known: int = 0,
    ) -> None:
        self.account = account
        self.model = model
        self.prompt = prompt
        self.known = known
        """Leading pieces of the prompt that were on record for the server before."""
        self.cached = cached
        self.uncached = uncached
        self.waiting = True
        account.queued += uncached  # the server has noted a change: it was leased in this step

    def begun(self) -> None:
        """The first token has come; any number of times."""
        if self.waiting:
            self.waiting = False
            account = self.account
            account.queued = max(0.0, account.queued - self.uncached)
            account.server.touch()
            account.begun_hits += self.cached


def keep_queued(booking: Booking, usual: float, now: float, since: float) -> None:
    """A server has refused the request of this booking, leased at `since`, without computing it.

    Its prompt goes on to count for as long as a first token takes: `usual` in the fleet, or on this
    server if that is longer. Else the server that refuses fastest would look least busy.
    """
    account = booking.account
    until = since + max(usual, account.first_token)
    if booking.uncached and until > now:
        kept = Booking(account, booking.model, booking.prompt, booking.uncached, 0.0)
        account.due.append((until, kept))


def middle_latency(accounts: Sequence[Account]) -> float:
    """The median inter-token latency, in seconds; 0 where fewer than two servers have one."""
    latencies = [
        account.latency_sum / account.latency_count
        for account in accounts
        if account.latency_count >= 10.0
    ]
    return median_low(latencies) if len(latencies) > 1 else 0.0


def middle_load(accounts: Sequence[Account]) -> float:
    """The median of what is on the servers, by their shares."""
    return median_low([account.gauge / account.server.share for account in accounts])


def slowness(account: Account, middle: float, load: float, now: float) -> float:
    """What it counts for being slower than the middle of the fleet; 1 within the dead band.

    `middle` and `load` are those of the fleet. What lasts counts squared; see LEARN_SLOW.
    """
    ratio = 1.0
    if middle:
        # One pause, as in a first request, is no speed: it is not to outweigh a hundred tokens.
        limit = account.latency_count * SLOWEST * middle
        account.latency_sum = min(account.latency_sum, limit)
        count = account.latency_count + _PRIOR_TOKENS
        ratio = (account.latency_sum + _PRIOR_TOKENS * middle) / count / middle
        ratio = min(max(ratio, FASTEST), SLOWEST)
    idle = account.gauge / account.server.share < IDLE_SHARE * load
    half_life = FORGET_SLOW if idle and ratio < account.lasting else LEARN_SLOW
    age = now - account.judged_at if account.judged_at is not None else 0.0
    fade: float = 0.5 ** (age / half_life)
    account.lasting = lasting = ratio + fade * (account.lasting - ratio)
    account.judged_at = now
    if lasting > DEAD_BAND:
        return max(ratio, lasting * lasting)
    return 1.0 if 1.0 / DEAD_BAND <= ratio <= DEAD_BAND else ratio
