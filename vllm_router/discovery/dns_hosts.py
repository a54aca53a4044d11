"""The addresses of the hosts of SRV records. Imported only with a source `dns`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import dns.rdatatype
import dns.rrset
import trio

from vllm_router.discovery.dns_records import Record
from vllm_router.discovery.web_client import NoAnswer

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 16
"""Hosts that are looked up at the same time."""

Addresses = Mapping[str, str]
"""The address in use of each host."""

Ask = Callable[[str], Awaitable[Sequence[str]]]
"""Asks the nameservers for all addresses of a host. Raises NoAnswer."""


class Resolved(NamedTuple):
    """Records with addresses, and a line for each host that has none."""

    records: list[Record]
    problems: list[str]
    addresses: Addresses


async def with_addresses(
    records: Sequence[Record],
    ask: Ask,
    additional: Iterable[dns.rrset.RRset],
    known: Addresses,
    timeout: float,
) -> Resolved:
    """Replace the hosts of SRV records by their addresses.

    The resolver of the system does not know the zone of a nameserver that is configured for a
    source, as Consul's. Consul sends the addresses with the records, as `additional`; others are
    asked for them, within `timeout` seconds for all hosts together. A host has one address, the
    same each time, because it is one server. A host whose lookup fails keeps its `known` address
    (RFC 8767); others without an address are left out. Raises NoAnswer if all lookups fail.
    """
    found: dict[str, Sequence[str]] = {}
    for rrset in additional:
        if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
            host = _host_key(rrset.name)
            found[host] = [*found.get(host, ()), *(one.address for one in rrset)]
    hosts = dict.fromkeys(_host_key(record.host) for record in records)
    failed = await _ask_all([host for host in hosts if host not in found], ask, found, timeout)
    addresses = {host: min(found[host], key=_address_key) for host in hosts if found.get(host)}
    for host in failed.keys() & known.keys():
        logger.debug("the last address of a host stays: %s", failed[host])
        addresses[host] = known[host]
    if failed and not addresses:
        raise NoAnswer(next(iter(failed.values())))
    problems = [
        failed.get(host, f"{host}: it has no address") for host in hosts if host not in addresses
    ]
    replaced = [
        record._replace(host=addresses[host])
        for record in records
        if (host := _host_key(record.host)) in addresses
    ]
    return Resolved(replaced, problems, addresses)


async def _ask_all(
    hosts: Collection[str], ask: Ask, found: dict[str, Sequence[str]], timeout: float
) -> dict[str, str]:
    """Put the addresses of the hosts into `found`; returns why the lookups of others failed."""
    failed = dict.fromkeys(hosts, "")
    waiting = iter(hosts)

    async def work() -> None:
        for host in waiting:
            try:
                found[host] = await ask(host + ".")
                del failed[host]
            except NoAnswer as error:
                failed[host] = str(error)

    with trio.move_on_after(timeout):
        async with trio.open_nursery() as nursery:
            for _ in range(min(MOST_AT_ONCE, len(failed))):
                nursery.start_soon(work)
    return {
        host: text or f"{host}: no nameserver answered within {timeout:g} s"
        for host, text in failed.items()
    }


def _host_key(name: object) -> str:
    return str(name).lower().rstrip(".")


def _address_key(address: str) -> tuple[bool, str]:
    """IPv4 first."""
    return ":" in address, address
