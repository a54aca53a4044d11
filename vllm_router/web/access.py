"""Who may change something. Pure.

With an admin key, its holder. Without one, the user who runs the router: that is proven by the
Unix socket (`own_machine`), or by a key that the page got from it (`sessions`). An address proves
nothing: a proxy or a port forward on this machine has a loopback address for every client. None of
the proofs is one that a browser adds by itself, so no page of another site can borrow it.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from vllm_router.errors import Refused
from vllm_router.proxy.identity import Identity


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


def check_admin(identity: Identity, *, has_admin_key: bool) -> None:
    """Raises Refused unless this is an administrator."""
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
    """401; the same for every key that does not do, whatever it is."""
    if identity.given:
        return Refused(401, "invalid_api_key", "The API key is not valid for this.")
    return Refused(
        401, "missing_api_key", "An API key is needed: send it as Authorization: Bearer KEY."
    )
