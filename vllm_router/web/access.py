"""Authorization of administrators. Pure.

With an admin key, its holder is an administrator. Without one, the user who runs the router is,
proven by the Unix socket (`own_machine`) or by a key that the page got through it (`sessions`). An
address proves nothing: behind a proxy or port forward on this machine, every client has a loopback
address. A browser adds none of these proofs by itself, so no other site's page can use them.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from vllm_router.errors import Refused
from vllm_router.proxy.identity import Identity


def is_loopback(client: str | None) -> bool:
    """True for an address of this machine; None is a Unix socket or a test."""
    if client is None:
        return False
    try:
        address = ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def is_local_name(host: str | None, machine: str) -> bool:
    """True if `host` (with or without port) is an address, localhost, or the machine's name."""
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


def check_admin(identity: Identity, *, has_admin_key: bool) -> None:
    """Raise Refused unless the identity is an administrator."""
    if identity.admin:
        return
    if has_admin_key:
        raise unauthorized(identity)
    raise Refused(
        403,
        "admin_local_only",
        "Administration is for the user who runs the router, on the router's own machine: use the "
        "vllm-router command there (vllm-router open signs a browser in), or set auth.admin_key.",
    )


def unauthorized(identity: Identity) -> Refused:
    """401, with the same text for every unsuitable key."""
    if identity.given:
        return Refused(401, "invalid_api_key", "The API key is not valid for this path.")
    return Refused(
        401, "missing_api_key", "An API key is needed: send it as Authorization: Bearer KEY."
    )
