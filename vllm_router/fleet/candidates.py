"""The servers that may take a request, by model and rank."""

from __future__ import annotations

from collections.abc import Collection

from vllm_router.fleet.server import Server


def choose(
    servers: Collection[Server], model: str | None, now: float, tried: Collection[Server]
) -> tuple[Server, ...]:
    """The untried servers of the best rank that may serve the model; any model if it is None.

    An ejected server is better than a refused request (Envoy's panic rule).
    """
    serving = [s for s in servers if model is None or s.serves(model)]
    usable = [server for server in serving if server.usable]
    if model is not None:
        # Servers with an unknown list are tried only if no known list has the model.
        usable = [server for server in usable if server.models is not None] or usable
    untried = [s for s in usable if s not in tried and not (tried and s.paused_at is not None)]
    untried += [server for server in serving if server.damped and server not in tried]
    ranks = [rank(server, now) for server in untried]
    best = min(ranks, default=0)
    return tuple([s for s, one in zip(untried, ranks, strict=True) if one == best])


def rank(server: Server, now: float) -> int:
    """The preference among servers; the lowest rank is used, 0 is healthy in every respect.

    1: in backoff after a refusal. 2: silent. 3: ejected. 4: damped. 5: paused; requests wait there
    until it is resumed, as vLLM's clients expect.
    """
    if server.paused_at is not None:
        return 5
    if not server.usable:
        return 4
    if not server.passive_health.admits(now):
        return 3
    if not server.silence.admits(now):
        return 2
    return 1 if now < server.backoff_until else 0


def is_fully_healthy(server: Server, now: float) -> bool:
    """Whether the server has the best rank."""
    return rank(server, now) == 0


def next_rank_change(server: Server, now: float) -> float | None:
    """The next time at which rank or state change without an event; None if there is none."""
    passive = server.passive_health
    moments = [server.backoff_until, passive.until, passive.next_trial_at, server.silence.until]
    if server.refusals.known:
        moments += server.refusals.moments()
    return min([moment for moment in moments if moment > now], default=None)
