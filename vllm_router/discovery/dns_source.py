"""The source `dns`: addresses (A, AAAA) or services (SRV) of a name.

A name that does not exist, or has no records, is an empty set: a service that was scaled to zero
and a DNS server that lost its zone look the same, so `Intake` decides when to believe it. A server
that leaves DNS is drained, for a headless Service of Kubernetes lists only pods that are ready.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from vllm_router.config.discovery import DnsSource, Found
from vllm_router.discovery.dns_records import Lookup, Record
from vllm_router.discovery.source import Again, Sink
from vllm_router.discovery.web_client import NoAnswer

MIN_PAUSE = 1.0
"""Seconds between two lookups, however short the time to live."""

RETRY_PAUSE = 5.0
"""Longest time in seconds until the next lookup after a failure or an empty answer."""


class DnsNames:
    """Looks a name up when its records expire, at least every `interval` seconds."""

    def __init__(self, config: DnsSource, lookup: Lookup | None = None) -> None:
        """`lookup` replaces the network."""
        self._config = config
        self._lookup = lookup

    async def run(self, sink: Sink, again: Again) -> None:
        """Look up until cancelled."""
        lookup = self._lookup or await _make_lookup(self._config)
        while True:
            pause = RETRY_PAUSE
            try:
                answer = await lookup()
            except NoAnswer as error:
                sink.failed(str(error))
            else:
                sink.found(targets_of(answer.records, self._config.port), answer.problems)
                if answer.records:
                    pause = max(MIN_PAUSE, answer.ttl)
            await again.wait(min(pause, self._config.interval))


async def _make_lookup(config: DnsSource) -> Lookup:
    def load() -> Lookup:
        from vllm_router.discovery.dns_lookup import lookup_of

        return lookup_of(config)

    # Importing dnspython takes 0.1 s.
    return await trio.to_thread.run_sync(load)


def targets_of(records: Sequence[Record], port: int | None) -> list[Found]:
    """The targets of the records. `port` is for addresses; SRV records have their own.

    Weights of SRV records count relative to the mean of their priority, and only if they differ.
    """
    records = list(dict.fromkeys(records))
    weights: dict[int, list[int]] = {}
    for record in records:
        weights.setdefault(record.priority, []).append(record.weight)
    found = []
    for record in records:
        host = f"[{record.host}]" if ":" in record.host else record.host.rstrip(".")
        labels = {}
        others = weights[record.priority]
        if len(set(others)) > 1:
            share = record.weight * len(others) / sum(others)
            labels["weight"] = f"{min(max(share, 0.01), 1000.0):.2f}"
        address = f"{host}:{record.port or port}"
        found.append(Found(address, labels=labels, priority=record.priority))
    return found
