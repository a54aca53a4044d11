"""Lookups through dnspython, which runs on Trio itself. Imported only with a source `dns`.

A lookup runs in a Trio of its own in a thread: dnspython reads a record in 0.1 ms, so an answer
with a thousand records would hold up all requests.
"""

from __future__ import annotations

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver
import trio

from vllm_router.config.discovery import DnsSource
from vllm_router.discovery.dns_hosts import Addresses, with_addresses
from vllm_router.discovery.dns_records import Answer, Lookup, Record
from vllm_router.discovery.web_client import NoAnswer

SERVER_TIMEOUT = 2.0
"""Longest time in seconds for one nameserver; then the next one is asked."""

_NOT_THERE = (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer)
_FAILED = (dns.exception.DNSException, OSError)


def lookup_of(config: DnsSource) -> Lookup:
    """A function that looks up the name of a source."""
    known: Addresses = {}

    async def lookup() -> Answer:
        nonlocal known
        answer, known = await trio.to_thread.run_sync(
            trio.run, _look_up, config, known, abandon_on_cancel=True
        )
        return answer

    return lookup


async def _look_up(config: DnsSource, known: Addresses) -> tuple[Answer, Addresses]:
    """The records, and the addresses of their hosts for the next lookup. Raises NoAnswer.

    `known` has the addresses of the last lookup.
    """
    try:
        # Made each time: /etc/resolv.conf may have changed.
        resolver = _resolver(config)
        found = await _resolve(resolver, config)
    except _NOT_THERE:
        return Answer((), 0.0), known
    except _FAILED as error:
        raise NoAnswer(_reason(error, config)) from None
    # Sorted, since dnspython shuffles them.
    records = sorted(_record(one, config.type) for one in found.rrset or ())
    records = [one for one in records if one.host not in ("", ".")]
    problems: list[str] = []
    if config.type == "SRV" and config.nameservers and config.scheme != "https":

        async def ask(host: str) -> list[str]:
            return await _addresses(host, resolver, config)

        sent = found.response.additional
        done = await with_addresses(records, ask, sent, known, config.timeout)
        records, problems, known = done.records, done.problems, done.addresses
    return Answer(records, float(found.chaining_result.minimum_ttl), problems), known


async def _resolve(resolver: dns.asyncresolver.Resolver, config: DnsSource) -> dns.resolver.Answer:
    """The records of the name. Raises what dnspython raises.

    Asked over TCP: some nameservers leave out what does not fit into a datagram and do not set the
    bit that says so, as Consul does by default. A nameserver must answer over TCP (RFC 7766,
    section 5); where none does, they are asked over UDP.
    """
    try:
        return await resolver.resolve(config.domain, config.type, search=True, tcp=True)
    except _NOT_THERE:
        raise
    except _FAILED:
        return await resolver.resolve(config.domain, config.type, search=True)


async def _addresses(
    host: str, resolver: dns.asyncresolver.Resolver, config: DnsSource
) -> list[str]:
    """The addresses of a host, IPv6 only if it has no others. Raises NoAnswer."""
    for kind in ("A", "AAAA"):
        try:
            found = await resolver.resolve(host, kind)
        except _NOT_THERE:
            continue
        except _FAILED as error:
            raise NoAnswer(f"{host.rstrip('.')}: {_reason(error, config)}") from None
        return [one.address for one in found.rrset or ()]
    return []


def _resolver(config: DnsSource) -> dns.asyncresolver.Resolver:
    resolver = dns.asyncresolver.Resolver(configure=not config.nameservers)
    if config.nameservers:
        resolver.nameservers = [
            dns.nameserver.Do53Nameserver(host, port) for host, port in config.nameservers
        ]
    # Each nameserver is asked over TCP and over UDP within the timeout.
    resolver.lifetime = config.timeout / 2
    resolver.timeout = min(SERVER_TIMEOUT, resolver.lifetime / max(len(resolver.nameservers), 1))
    return resolver


def _record(one: object, kind: str) -> Record:
    if kind == "SRV":
        port, weight, priority = (
            int(getattr(one, name, 0)) for name in ("port", "weight", "priority")
        )
        return Record(str(getattr(one, "target", ".")), port, weight, priority)
    return Record(str(getattr(one, "address", "")))


def _reason(error: Exception, config: DnsSource) -> str:
    if isinstance(error, dns.exception.Timeout):
        return f"no nameserver answered within {config.timeout:g} s"
    text = " ".join(str(error).split())[:300]
    return f"no usable answer: {text or type(error).__name__}"
