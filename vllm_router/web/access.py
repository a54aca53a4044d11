"""Who may change something. Pure.

With an admin key, whoever has it. Without one, whoever sits on the router's own machine: a request
counts as such if it comes from a loopback address, no proxy has forwarded it, and no page of
another site is behind it (a browser names the site in `Origin`; a name that an attacker's DNS
points at 127.0.0.1 is no name of this machine).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from vllm_router.errors import Refused

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


def is_loopback(client: str | None) -> bool:
    """Whether an address is one of this machine's own; None is a Unix socket or a test."""
    if client is None:
        return False
    try:
        address = ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def same_origin(origin: str | None, host: str | None, allowed: Collection[str] = ()) -> bool:
    """Whether a page of that origin may talk to us: our own, a listed one, or no page at all."""
    if origin is None or origin in allowed or "*" in allowed:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == str(host).lower()
    except ValueError:  # a bracket that is not closed
        return False


def is_local_name(host: str | None, machine: str) -> bool:
    """Whether `host` (with or without a port) is an address, localhost, or the machine's name."""
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return False
    try:
        ip_address(name)
    except ValueError:
        local = name == "localhost" or name.endswith(".localhost")
        return local or name == machine.lower()
    return True


def check_local(client: str | None, headers: Mapping[str, str], machine: str) -> None:
    """Raises Refused unless the request comes from here. `headers` is case-insensitive."""
    if not is_loopback(client) or any(name in headers for name in FORWARDED):
        raise Refused(
            403,
            "admin_local_only",
            "Administration is allowed only from the router's own machine (loopback), or by "
            "anybody with the admin key if there is one.",
        )
    origin, host = headers.get("origin"), headers.get("host")
    if origin is not None and not (same_origin(origin, host) and is_local_name(host, machine)):
        raise Refused(403, "cross_origin", f"Pages of {origin} may not administrate this router.")


def check_origin(headers: Mapping[str, str], allowed: Collection[str]) -> None:
    """Raises Refused if a page of another site asks that is not one of the `allowed` origins."""
    if not same_origin(headers.get("origin"), headers.get("host"), allowed):
        raise Refused(403, "cross_origin", "Pages of other sites may not read the feed.")
