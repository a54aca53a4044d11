"""IP addresses of peers, and networks. Pure.

On a socket that listens on `::`, an IPv4 peer has an IPv4-mapped address such as
`::ffff:192.0.2.1` (RFC 4291 2.5.5.2), which means `192.0.2.1`.
"""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Network = IPv4Network | IPv6Network

_MAPPED = IPv6Network("::ffff:0:0/96")


def plain_host(host: str) -> str:
    """Convert an IPv4-mapped address to IPv4; return any other text unchanged."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return host if mapped is None else str(mapped)


def plain_peer(address: tuple[str, int]) -> tuple[str, int]:
    """`plain_host` for a socket's `(host, port)`; drops further members."""
    host, port = address[:2]
    return plain_host(host) if host.startswith("::") else host, port


def parse_networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Parse networks such as `10.0.0.0/8`; IPv4-mapped networks become IPv4 networks.

    Raises ValueError.
    """
    return tuple(map(_parse_network, texts))


def _parse_network(text: str) -> Network:
    network = ip_network(text, strict=False)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        low = int(network.network_address) & 0xFFFFFFFF
        return IPv4Network((IPv4Address(low), network.prefixlen - 96))
    return network


def is_in(host: str | None, networks: tuple[Network, ...]) -> bool:
    """Whether an address is in one of the networks; False for a name, a Unix socket and None."""
    try:
        address = ip_address(plain_host(host or ""))
    except ValueError:
        return False
    return any(address in network for network in networks)
