"""Lookups through dnspython, which runs on Trio itself. Imported only with a source `dns`."""

from __future__ import annotations

import dns.asyncresolver
import dns.exception
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
        rrset = found.rrset
        records = [_record(one, config.type) for one in rrset or ()]
        ttl = float(found.chaining_result.minimum_ttl)
        return Answer([one for one in records if one.host not in ("", ".")], ttl)

    return lookup


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
