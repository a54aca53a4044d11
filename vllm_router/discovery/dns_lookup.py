"""Lookups through dnspython, which runs on Trio itself. Imported only with a source `dns`."""

from __future__ import annotations

from collections.abc import Sequence

import dns.asyncresolver
import dns.exception
import dns.message
import dns.nameserver
import dns.rdatatype
import dns.resolver

from vllm_router.config.discovery import DnsSource
from vllm_router.discovery.dns_records import Answer, Lookup, Record
from vllm_router.discovery.web_client import NoAnswer

SERVER_TIMEOUT = 2.0
"""Seconds for one nameserver; then the next one is asked."""


def lookup_of(config: DnsSource) -> Lookup:
    """A function that looks up the name of a source."""

    async def lookup() -> Answer:
        try:
            # Made anew each time: /etc/resolv.conf may have changed.
            resolver = _resolver(config)
            found = await resolver.resolve(config.domain, config.type, search=True)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return Answer((), 0.0)
        except (dns.exception.DNSException, OSError) as error:
            raise NoAnswer(_reason(error, config)) from None
        records = [_record(one, config.type) for one in found.rrset or ()]
        records = [one for one in records if one.host not in ("", ".")]
        if config.type == "SRV" and config.nameservers and config.scheme != "https":
            records = await _with_addresses(records, resolver, found.response, config)
        ttl = float(found.chaining_result.minimum_ttl)
        return Answer(records, ttl)

    return lookup


async def _with_addresses(
    records: Sequence[Record],
    resolver: dns.asyncresolver.Resolver,
    response: dns.message.Message,
    config: DnsSource,
) -> list[Record]:
    """Replace the hosts of SRV records by their addresses. Raises NoAnswer.

    The resolver of the system does not know the zone of a nameserver that is configured for this
    source, as Consul's. Consul sends the addresses with the records; others are asked for them.
    A host has one address, the same each time, because it is one server. A host without any
    address is left out. HTTPS needs the names, so they stay there.
    """
    sent: dict[str, list[str]] = {}
    for rrset in response.additional:
        if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
            sent.setdefault(_host_key(rrset.name), []).extend(one.address for one in rrset)
    done = []
    for record in records:
        key = _host_key(record.host)
        if key not in sent:
            sent[key] = await _addresses(record.host, resolver, config)
        if sent[key]:
            done.append(record._replace(host=min(sent[key], key=_address_key)))
    return done


async def _addresses(
    host: str, resolver: dns.asyncresolver.Resolver, config: DnsSource
) -> list[str]:
    """The addresses of a host, IPv6 only if it has no others. Raises NoAnswer."""
    for kind in ("A", "AAAA"):
        try:
            found = await resolver.resolve(host, kind)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            continue
        except (dns.exception.DNSException, OSError) as error:
            raise NoAnswer(f"{host.rstrip('.')}: {_reason(error, config)}") from None
        return [one.address for one in found.rrset or ()]
    return []


def _host_key(name: object) -> str:
    return str(name).lower().rstrip(".")


def _address_key(address: str) -> tuple[bool, str]:
    """IPv4 first."""
    return ":" in address, address


def _resolver(config: DnsSource) -> dns.asyncresolver.Resolver:
    resolver = dns.asyncresolver.Resolver(configure=not config.nameservers)
    if config.nameservers:
        resolver.nameservers = [
            dns.nameserver.Do53Nameserver(host, port) for host, port in config.nameservers
        ]
    resolver.timeout = min(SERVER_TIMEOUT, config.timeout)
    resolver.lifetime = config.timeout
    return resolver


def _record(one: object, kind: str) -> Record:
    if kind == "SRV":
        target = str(getattr(one, "target", "."))
        return Record(target, int(getattr(one, "port", 0)), int(getattr(one, "weight", 0)))
    return Record(str(getattr(one, "address", "")))


def _reason(error: Exception, config: DnsSource) -> str:
    if isinstance(error, dns.exception.Timeout):
        return f"no nameserver answered within {config.timeout:g} s"
    text = " ".join(str(error).split())[:300]
    return f"no usable answer: {text or type(error).__name__}"
