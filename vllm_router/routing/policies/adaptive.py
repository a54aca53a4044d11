"""Load, prompt tokens to be computed, and what each server has cached, in one score.

    score = slow × (1 + load + (2 × queued + waste × (1 + K × load)) / T) / share

The lowest wins, equals at random. docs/routing.md explains every term with an example; with
nothing cached, nothing queued and equal speed it is the order of `least_load`. What changes with
each request is kept up to date as it happens; what changes with time (slowness, phantoms, slow
start) is brought up to date at most every REFRESH seconds, so that a pick costs 0.5 µs per
server and 0.1 µs per piece of the prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from random import Random
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from vllm_router.routing.hashing import draw, seed_of
from vllm_router.routing.pieces import ENDS, pieces_in
from vllm_router.routing.policies.base import Explained, Knobs, Policy
from vllm_router.routing.prefix_book import PrefixBook

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.facts import Facts

REFRESH = 0.1
QUEUED_WEIGHT = 2.0
"""A prompt token in the queue counts so many times: it delays the request that is placed now, and
by the length of the engine's steps everything that is being generated there."""

HOT_SHARE, HOT_ROOM, HOT_REQUESTS = 1.5, 0.25, 2.0
"""What a server has cached does not count while its load is more than 1.5 times the mean of the
candidates plus a quarter of its share, unless it has but two requests."""
MAX_GROUPS = 256

PHANTOMS = 8.0
"""Requests that an error makes a server look busier by, so that failing fast is no attraction."""

PHANTOMS_HALVE = 5.0

SLOW_HALF_LIFE = 10.0
DEAD_BAND = 2.0
SLOWEST, FASTEST = 8.0, 0.5
_PRIOR_TOKENS = 50.0
"""A server's latency counts as the fleet's until it has made up for so many tokens; as old
tokens fade, a server that is left alone is tried again."""

NO_CREDIT_PHANTOMS = 2.0
NO_CREDIT_SLOW = 2.0
"""What a server has cached does not count while it fails or is so much slower than the fleet."""

TRUST_HALF_LIFE = 60.0
TRUST_FROM = 20_000.0
TRUST_SHARE = 0.1
"""Nor does it if, of at least so many tokens expected in its cache, it has found less than this
share: prefix caching is off there."""

FIRST_TOKEN = 0.5
"""Seconds to the first token where the server does not say."""

OTHERS_RATIO = 1.3
"""Gauges this much above our own leases mean that other routers send to the same servers."""

HOME_BONUS = 2.0
HOME_TOKENS = 256.0
"""A shared beginning shorter than this is worth no home."""

FULL_SHARE = 0.1
"""What slow start begins with, of a server's share."""


class PrefixStatistics(NamedTuple):
    """Since the start: tokens sent as prompts, and how many of them were expected in the cache;
    and the bytes of prompts that are on record now."""

    prompt_tokens: int
    expected_tokens: int
    recorded_bytes: int


class _Account:
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
    )

    def __init__(self, server: Server, bit: int) -> None:
        self.server = server
        self.bit = bit
        self.seed = seed_of(server.url)
        self.queued = 0.0
        """Prompt tokens sent to it and not yet answered with a first token."""
        self.due: deque[tuple[float, _Booking]] = deque()
        self.extra = 0.0
        """Added to the load: phantoms, and what other routers probably sent."""
        self.phantoms = 0.0
        self.phantoms_at = 0.0
        self.sent = 0
        self.scraped_at: float | None = None
        self.seen = _Counters()
        self.latency_sum = self.latency_count = 0.0
        self.first_token = FIRST_TOKEN
        self.gauge = self.mine = 0.0
        self.expected = self.hits = self.due_hits = self.begun_hits = 0.0
        """Tokens in its prefix cache: that should have been found, were found, should be seen with
        the next scrape, and belong to prompts computed since the last."""
        self.expected_total = self.prompt_total = 0.0

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
            self.due_hits = self.begun_hits = 0.0
        keep = 0.5 ** (elapsed / SLOW_HALF_LIFE) if self.scraped_at is not None else 0.0
        gauge = (metrics.running or 0.0) + (metrics.waiting or 0.0)
        self.gauge = self.gauge * keep + gauge * (1.0 - keep)
        self.mine = self.mine * keep + server.leases_at_scrape * (1.0 - keep)
        self.seen, self.scraped_at, self.sent = new, at, 0

    def phantoms_now(self, now: float) -> float:
        """Requests it looks busier by, because of errors."""
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


class _Booking:
    """What one lease has on the account of its server."""

    __slots__ = ("account", "cached", "model", "prompt", "uncached", "waiting")

    def __init__(self, account: _Account, facts: Facts, uncached: float, cached: float) -> None:
        self.account = account
        self.model = facts.model
        self.prompt = facts.prompt
        self.cached = cached
        self.uncached = uncached
        self.waiting = True
        account.queued += uncached

    def begun(self) -> None:
        """The first token has come; any number of times."""
        if self.waiting:
            self.waiting = False
            account = self.account
            account.queued = max(0.0, account.queued - self.uncached)
            account.begun_hits += self.cached


class _Group:
    """The candidates for a model, with what they have in common."""

    __slots__ = (
        "accounts",
        "candidates",
        "credited",
        "factors",
        "fresh_until",
        "home",
        "others",
        "slow",
    )

    def __init__(self, candidates: Sequence[Server], accounts: list[_Account]) -> None:
        self.candidates = candidates
        self.accounts = accounts
        self.factors: list[float] = []
        self.slow: list[float] = []
        self.credited = 0
        self.fresh_until = -math.inf
        self.others = 0.0
        """Of what we sent since the scrape, how much more others probably sent."""
        self.home = False


class Adaptive(Policy):
    """The recommended policy; the text at the top of its module says what it does."""

    name = "adaptive"
    needs_prompt = True
    needs_session = True

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self.book = PrefixBook(knobs)
        self._accounts: dict[Server, _Account] = {}
        self._groups: dict[str | None, _Group] = {}

    # -- the decision -------------------------------------------------------------------------

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        group = self._group(candidates, facts.model, now)
        scores = self._scores(group, facts)
        lowest = min(scores)
        if scores.count(lowest) == 1:
            return candidates[scores.index(lowest)]
        return self.rng.choice(
            [server for server, score in zip(candidates, scores, strict=True) if score == lowest]
        )

    def _scores(self, group: _Group, facts: Facts) -> list[float]:
        """One score per candidate, in their order."""
        prompt = facts.prompt
        per_request = 1.0 / self.knobs.tokens_per_request
        levels = self._levels(group, facts)
        bonus = 0
        if group.home and prompt.size:
            bonus = self._credit_homes(group, facts, levels)
        scores: list[float] = []
        per_queued = QUEUED_WEIGHT * per_request
        if levels:
            levels = self._not_overloaded(group, levels)
        if not levels:
            for account, factor in zip(group.accounts, group.factors, strict=True):
                server = account.server
                load = server.running + 0.5 * server.waiting + account.extra
                scores.append(factor * (1.0 + load + account.queued * per_queued))
        else:
            growth = self.knobs.waste_growth
            best = levels[0][0]
            for account, factor in zip(group.accounts, group.factors, strict=True):
                server = account.server
                load = server.running + 0.5 * server.waiting + account.extra
                waste = best
                bit = account.bit
                for tokens, holders in levels:
                    if holders & bit:
                        waste = best - tokens
                        break
                waste *= (1.0 + growth * load) * per_request
                scores.append(factor * (1.0 + load + account.queued * per_queued + waste))
        if bonus:
            for place, account in enumerate(group.accounts):
                if account.bit == bonus:
                    scores[place] -= group.factors[place] * HOME_BONUS
        return scores

    def _levels(self, group: _Group, facts: Facts) -> list[tuple[float, int]]:
        """Who has how many tokens of the prompt cached, the most first."""
        chain = facts.prompt.chain
        if not chain:
            return []
        found = self.book.table.match(chain, group.credited)
        if not found:
            return []
        per_byte = self.book.tokens_per_byte(facts.model, facts.prompt)
        return [(ENDS[count - 1] * per_byte, holders) for count, holders in found]

    @staticmethod
    def _not_overloaded(group: _Group, levels: list[tuple[float, int]]) -> list[tuple[float, int]]:
        """Without the servers that have much more to do than the mean: a hot prefix spreads."""
        loads = [account.server.load for account in group.accounts]
        limit = HOT_SHARE * sum(loads) / len(loads) + HOT_ROOM
        if max(loads) <= limit:
            return levels
        out = 0
        for account, load in zip(group.accounts, loads, strict=True):
            if load > limit and load * account.server.share > HOT_REQUESTS:
                out |= account.bit
        return [(tokens, holders & ~out) for tokens, holders in levels if holders & ~out]

    # -- several routers before the same servers ----------------------------------------------

    def _credit_homes(self, group: _Group, facts: Facts, levels: list[tuple[float, int]]) -> int:
        """Servers that other routers probably sent this conversation to are taken to have it.

        All routers agree on the home of a conversation and of a shared beginning. Changes
        `levels`; returns the bit of the server on which a new conversation should begin, or 0.
        """
        prompt = facts.prompt
        per_byte = self.book.tokens_per_byte(facts.model, prompt)
        known = levels[0][0] if levels else 0.0
        shared = prompt.shared * per_byte
        bonus = 0
        homes: list[tuple[float, int]] = []
        if known <= shared:
            if facts.session is not None:
                home = self._home(group, seed_of(facts.session))
            else:
                home = self._home(group, prompt.conversation)
            if prompt.earlier:
                homes.append((prompt.earlier * per_byte, home.bit))
            else:
                bonus = home.bit
        pieces = pieces_in(prompt.shared)
        if shared >= HOME_TOKENS and pieces:
            homes.append((shared, self._home(group, prompt.chain[pieces - 1]).bit))
        levels += [credit for credit in homes if credit[1] & group.credited]
        levels.sort(reverse=True)
        return bonus

    @staticmethod
    def _home(group: _Group, key: int) -> _Account:
        """Rendezvous hashing, in proportion to capacity."""
        return min(
            group.accounts,
            key=lambda account: -math.log(draw(key, account.seed)) / account.server.share,
        )

    # -- what is known of the candidates ------------------------------------------------------

    def _group(self, candidates: Sequence[Server], model: str | None, now: float) -> _Group:
        group = self._groups.get(model)
        if group is None or group.candidates is not candidates:
            group = _Group(candidates, [self._account(server) for server in candidates])
            if len(self._groups) >= MAX_GROUPS:
                self._groups.clear()
            self._groups[model] = group
        if now >= group.fresh_until:
            self._refresh(group, now)
        return group

    def _account(self, server: Server) -> _Account:
        account = self._accounts.get(server)
        if account is None:
            account = self._accounts[server] = _Account(server, self.book.bit(server))
        return account

    def _refresh(self, group: _Group, now: float) -> None:
        """Bring up to date what changes with time. O(candidates), at most every REFRESH."""
        accounts = group.accounts
        self.book.follow(group.candidates, now)
        for account in accounts:
            account.follow_scrape()
            account.settle(now)
        self._look_for_others(group)
        middle = _middle(accounts)
        group.credited = 0
        group.factors, group.slow = [], []
        for account in accounts:
            server = account.server
            phantoms = account.phantoms_now(now)
            account.extra = phantoms + group.others * account.sent
            slow = _slowness(account, middle)
            if phantoms < NO_CREDIT_PHANTOMS and slow < NO_CREDIT_SLOW and account.trusted:
                group.credited |= account.bit
            share = server.share * self._ramp(server, now)
            group.slow.append(slow)
            group.factors.append(slow / share)
        group.fresh_until = now + REFRESH

    def _ramp(self, server: Server, now: float) -> float:
        """The part of its share that a server gets which has just come back."""
        age = now - server.back_at
        if age >= self.knobs.slow_start:
            return 1.0
        return max(FULL_SHARE, age / self.knobs.slow_start)

    @staticmethod
    def _look_for_others(group: _Group) -> None:
        accounts = group.accounts
        there = sum(account.gauge for account in accounts)
        mine = sum(account.mine for account in accounts)
        # At least a request per server: a gauge lags, and short requests make much of that.
        group.home = there > OTHERS_RATIO * mine and there - mine >= len(accounts)
        group.others = 0.0
        if group.home:
            group.others = 0.5 * min(max(there / max(mine, 0.1) - 1.0, 0.0), 8.0)

    # -- what happens to requests -------------------------------------------------------------

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        server, prompt = lease.server, facts.prompt
        account = self._account(server)
        per_byte = self.book.tokens_per_byte(facts.model, prompt)
        cached = self.book.matched_bytes(server, prompt) * per_byte
        tokens = max(0.0, prompt.size * per_byte - cached)
        lease.booking = booking = _Booking(account, facts, tokens, cached)
        account.expected_total += cached
        account.prompt_total += tokens + cached
        account.sent += 1
        group = self._groups.get(facts.model)
        if group is not None and group.others:
            account.extra += group.others
        if not facts.stream:
            account.due.append((now + account.first_token, booking))
        self.book.insert(server, prompt, now)

    def first_byte(self, lease: Lease) -> None:
        booking = lease.booking
        if isinstance(booking, _Booking):
            booking.begun()

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        booking = lease.booking
        if not isinstance(booking, _Booking):
            return
        prompt = booking.prompt
        self.book.learn(booking.model, prompt, prompt_tokens)
        if cached_tokens is not None and booking.cached >= HOME_TOKENS:
            self.book.judge(lease.server, booking.cached, cached_tokens)

    def ended(self, lease: Lease, now: float, *, failed: bool) -> None:
        booking = lease.booking
        if not isinstance(booking, _Booking):
            return
        booking.begun()
        lease.booking = None
        if failed:
            account = booking.account
            account.phantoms = account.phantoms_now(now) + PHANTOMS
            account.phantoms_at = now
            account.extra += PHANTOMS
            for group in self._groups.values():
                group.fresh_until = -math.inf

    def forget(self, server: Server) -> None:
        self._accounts.pop(server, None)
        self._groups.clear()
        self.book.forget(server)

    # -- to be seen ---------------------------------------------------------------------------

    def statistics(self, server: Server) -> PrefixStatistics:
        """What was expected of a server's prefix cache; its own counters say what came true."""
        account = self._account(server)
        return PrefixStatistics(
            round(account.prompt_total),
            round(account.expected_total),
            self.book.table.held(account.bit),
        )

    def explain(self, candidates: Sequence[Server], facts: Facts, now: float) -> list[Explained]:
        group = self._group(candidates, facts.model, now)
        levels = self._not_overloaded(group, self._levels(group, facts))
        best = levels[0][0] if levels else 0.0
        rows = []
        for place, (account, score) in enumerate(
            zip(group.accounts, self._scores(group, facts), strict=True)
        ):
            server = account.server
            cached = next((tokens for tokens, bits in levels if bits & account.bit), 0.0)
            phantoms = account.phantoms_now(now)
            parts = {
                "load": server.running + 0.5 * server.waiting + account.extra,
                "phantoms": phantoms,
                "others": account.extra - phantoms,
                "queued_tokens": account.queued,
                "cached_tokens": cached,
                "waste_tokens": best - cached,
                "slow": group.slow[place],
                "slow_start": self._ramp(server, now),
                "share": server.share,
            }
            rows.append(Explained(server, score, parts))
        return sorted(rows, key=lambda row: row.score)


def _middle(accounts: Sequence[_Account]) -> float:
    """The median inter-token latency, in seconds; 0 where fewer than two servers have one."""
    latencies = [
        account.latency_sum / account.latency_count
        for account in accounts
        if account.latency_count >= 10.0
    ]
    return median_low(latencies) if len(latencies) > 1 else 0.0


def _slowness(account: _Account, middle: float) -> float:
    """How much slower than the middle of the fleet; 1 within the dead band."""
    if not middle:
        return 1.0
    count = account.latency_count + _PRIOR_TOKENS
    ratio = (account.latency_sum + _PRIOR_TOKENS * middle) / count / middle
    if 1.0 / DEAD_BAND <= ratio <= DEAD_BAND:
        return 1.0
    return min(max(ratio, FASTEST), SLOWEST)
