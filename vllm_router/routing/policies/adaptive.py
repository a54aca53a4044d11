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
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.accounts import (
    PHANTOMS,
    Account,
    Booking,
    PrefixStatistics,
    middle_latency,
    middle_load,
    slowness,
)
from vllm_router.routing.hashing import draw, seed_of
from vllm_router.routing.pieces import ENDS, pieces_in
from vllm_router.routing.policies.base import Explained, Knobs, Policy
from vllm_router.routing.prefix_book import PrefixBook

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.facts import Facts

REFRESH = 0.1
MAX_GROUPS = 256
MAX_HOMES = 4096

QUEUED_WEIGHT = 2.0
"""A prompt token in the queue counts so many times: it delays the request that is placed now, and
by the length of the engine's steps everything that is being generated there."""

HOT_SHARE, HOT_ROOM, HOT_REQUESTS = 1.5, 0.25, 2.0
"""What a server has cached does not count while its load is more than 1.5 times the mean of the
candidates plus a quarter of its share, unless it has but two requests."""

NO_CREDIT_PHANTOMS = 2.0
NO_CREDIT_SLOW = 2.0
"""What a server has cached does not count while it fails or is so much slower than the fleet."""

OTHERS_RATIO = 1.3
"""Gauges this much above our own leases mean that other routers send to the same servers."""

HOME_BONUS = 2.0
HOME_TOKENS = 256.0
"""A shared beginning shorter than this is worth no home."""


class _Group:
    """The candidates for a model, with what they have in common."""

    __slots__ = (
        "accounts",
        "candidates",
        "credited",
        "everyone",
        "factors",
        "fresh_until",
        "home",
        "homes",
        "others",
        "slow",
    )

    def __init__(self, candidates: Sequence[Server], accounts: list[Account]) -> None:
        self.candidates = candidates
        self.accounts = accounts
        self.factors: list[float] = []
        self.slow: list[float] = []
        self.credited = 0
        self.everyone = sum(account.bit for account in accounts)
        self.fresh_until = -math.inf
        self.others = 0.0
        """Of what we sent since the scrape, how much more others probably sent."""
        self.home = False
        self.homes: dict[int, Account] = {}


class Adaptive(Policy):
    """The recommended policy; the text at the top of its module says what it does."""

    name = "adaptive"
    needs_prompt = True
    needs_session = True

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self.book = PrefixBook(knobs)
        self._accounts: dict[Server, Account] = {}
        self._groups: dict[str | None, _Group] = {}
        self._matched: tuple[tuple[int, ...], list[tuple[int, int]]] = (), []
        """What the last pick has found on record, for the lease that follows it."""

    # -- the decision -------------------------------------------------------------------------

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        group = self._group(candidates, facts.model, now)
        chain = facts.prompt.chain
        found = self.book.table.match(chain, group.everyone) if chain else []
        self._matched = chain, found
        scores = self._scores(group, *self._known(group, facts, found))
        lowest = min(scores)
        if scores.count(lowest) == 1:
            return candidates[scores.index(lowest)]
        return self.rng.choice(
            [server for server, score in zip(candidates, scores, strict=True) if score == lowest]
        )

    def _scores(self, group: _Group, levels: list[tuple[float, int]], bonus: int) -> list[float]:
        """One score per candidate, in their order, by what `_known` has found."""
        per_request = 1.0 / self.knobs.tokens_per_request
        per_queued = QUEUED_WEIGHT * per_request
        if not levels:
            scores = [
                factor * (1.0 + account.server.work + account.extra + account.queued * per_queued)
                for account, factor in zip(group.accounts, group.factors, strict=True)
            ]
        else:
            scores = []
            growth = self.knobs.waste_growth
            best = levels[0][0]
            for account, factor in zip(group.accounts, group.factors, strict=True):
                server = account.server
                load = server.work + account.extra
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

    def _known(
        self, group: _Group, facts: Facts, found: list[tuple[int, int]]
    ) -> tuple[list[tuple[float, int]], int]:
        """Who has how many tokens of the prompt cached, the most first, as far as that counts.

        `found` is what is on record. With it the bit of the server that is home to a conversation
        that begins here, or 0.
        """
        levels: list[tuple[float, int]] = []
        if found:
            per_byte = self.book.tokens_per_byte(facts.model, facts.prompt)
            credited = group.credited
            levels = [
                (ENDS[count - 1] * per_byte, holders & credited)
                for count, holders in found
                if holders & credited
            ]
        bonus = 0
        if group.home and facts.prompt.conversation:
            bonus = self._credit_homes(group, facts, levels)
        return self._not_overloaded(group, levels) if levels else levels, bonus

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
    def _home(group: _Group, key: int) -> Account:
        """Rendezvous hashing, in proportion to capacity. Remembered: it costs 0.6 µs per server."""
        home = group.homes.get(key)
        if home is None:
            if len(group.homes) >= MAX_HOMES:
                group.homes.clear()
            home = group.homes[key] = min(
                group.accounts,
                key=lambda account: -math.log(draw(key, account.seed)) / account.server.share,
            )
        return home

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

    def _account(self, server: Server) -> Account:
        account = self._accounts.get(server)
        if account is None:
            account = self._accounts[server] = Account(server, self.book.bit(server))
        return account

    def _refresh(self, group: _Group, now: float) -> None:
        """Bring up to date what changes with time. O(candidates), at most every REFRESH."""
        accounts = group.accounts
        self.book.follow(group.candidates, now)
        for account in accounts:
            account.follow_scrape()
            account.settle(now)
        self._look_for_others(group)
        middle, usual = middle_latency(accounts), middle_load(accounts)
        group.credited = 0
        group.factors, group.slow = [], []
        for account in accounts:
            server = account.server
            phantoms = account.phantoms_now(now)
            account.extra = phantoms + group.others * account.sent
            slow = slowness(account, middle, usual, now)
            if phantoms < NO_CREDIT_PHANTOMS and slow < NO_CREDIT_SLOW and account.trusted:
                group.credited |= account.bit
            share = server.share * server.ramp
            group.slow.append(slow)
            group.factors.append(slow / share)
        group.fresh_until = now + REFRESH

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
        cached = 0.0
        chain = prompt.chain
        if chain:
            known, found = self._matched
            if known is not chain:
                found = self.book.table.match(chain, account.bit)
            self._matched = (), []
            for count, holders in found:
                if holders & account.bit:
                    cached = ENDS[count - 1] * per_byte
                    break
        tokens = max(0.0, prompt.size * per_byte - cached)
        lease.booking = booking = Booking(account, facts, tokens, cached)
        account.expected_total += cached
        account.prompt_total += tokens + cached
        account.sent += 1
        group = self._groups.get(facts.model)
        if group is not None and group.others:
            account.extra += group.others
        if not facts.stream:
            account.settle(now)  # nobody else may: where there is no choice, no pick looks
            account.due.append((now + account.first_token, booking))
        self.book.insert(server, prompt, now)

    def first_byte(self, lease: Lease) -> None:
        booking = lease.booking
        if isinstance(booking, Booking):
            booking.begun()

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        booking = lease.booking
        if not isinstance(booking, Booking):
            return
        prompt = booking.prompt
        self.book.learn(booking.model, prompt, prompt_tokens)
        if cached_tokens is None:
            return
        booking.account.told_total += cached_tokens
        if booking.cached >= HOME_TOKENS:
            self.book.judge(lease.server, booking.cached, cached_tokens)

    def ended(self, lease: Lease, now: float, *, failed: bool) -> None:
        booking = lease.booking
        if not isinstance(booking, Booking):
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

    def statistics(self, server: Server) -> PrefixStatistics | None:
        account = self._accounts.get(server)
        if account is None:
            return None
        return PrefixStatistics(
            round(account.prompt_total),
            round(account.expected_total),
            account.told_total,
            self.book.table.held(account.bit),
        )

    def explain(self, candidates: Sequence[Server], facts: Facts, now: float) -> list[Explained]:
        group = self._group(candidates, facts.model, now)
        found = self.book.table.match(facts.prompt.chain, group.everyone)
        levels, bonus = self._known(group, facts, found)
        scores = self._scores(group, levels, bonus)
        best = levels[0][0] if levels else 0.0
        rows = []
        for place, (account, score) in enumerate(zip(group.accounts, scores, strict=True)):
            server = account.server
            cached = next((tokens for tokens, bits in levels if bits & account.bit), 0.0)
            phantoms = account.phantoms_now(now)
            parts = {
                "load": server.work + account.extra,
                "phantoms": phantoms,
                "others": account.extra - phantoms,
                "queued_tokens": account.queued,
                "cached_tokens": cached,
                "waste_tokens": best - cached,
                "home": HOME_BONUS if account.bit == bonus else 0.0,
                "slow": group.slow[place],
                "fast_errors": server.ghosts,
                "slow_start": server.ramp,
                "share": server.share,
            }
            rows.append(Explained(server, score, parts))
        return sorted(rows, key=lambda row: row.score)
