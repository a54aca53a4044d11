"""Ejection of servers whose success rate is far below the others', and its limit."""

from __future__ import annotations

from collections.abc import Collection
from statistics import median

from vllm_router.fleet.reason import NONE, Reason, because
from vllm_router.fleet.server import Server

OUTLIER_VOLUME = 10
"""Requests that a success rate needs to be compared."""

OUTLIER_RATE = 0.8
"""A server with a success rate below this part of the others' median is ejected."""


def may_eject(servers: Collection[Server], max_ejected_share: float) -> bool:
    """Whether one more of the servers may be ejected.

    Unusable servers (down, draining, asleep) do not count: without trials they may stay ejected
    for long.
    """
    limit = max(1, int(max_ejected_share * len(servers))) if max_ejected_share else 0
    return sum(server.passive_health.ejected and server.usable for server in servers) < limit


def outlier_reason(server: Server, servers: Collection[Server], now: float) -> Reason:
    """The reason to eject the server for its success rate; NONE without one.

    It is compared with the median of the servers with a common model, so that a problem of the
    whole fleet ejects none.
    """
    rate, count = server.passive_health.success_rate(now)
    if count < OUTLIER_VOLUME:
        return NONE
    others = [
        other.passive_health.success_rate(now)
        for other in servers
        if other is not server and _share_models(server, other)
    ]
    rates = [other for other, requests in others if requests >= OUTLIER_VOLUME]
    if not rates or rate >= OUTLIER_RATE * median(rates):
        return NONE
    other = f"{median(rates):.0%}"
    return because("outlier", share=f"{rate:.0%}", n=count, other=other)


def _share_models(one: Server, other: Server) -> bool:
    """Whether two servers may have a model in common."""
    return (
        one.models is None or other.models is None or not set(one.models).isdisjoint(other.models)
    )
