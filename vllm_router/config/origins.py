"""Origins of pages: which of them `cors_origins` lists, and which is the router's own. Pure.

A browser names a page's origin in `Origin` (RFC 6454 7): `https://app.example`, for an app or an
extension `app://obsidian.md` or `chrome-extension://<id>`, for a page without one `null`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

EXPECTED = (
    'an origin like "https://app.example", "https://*.example.com", "http://localhost:*", '
    '"vscode-webview://*", "null" or "*"'
)

_DEFAULT_PORTS = {"http": "80", "https": "443"}
_LABELS = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"
_ORIGIN = re.compile(
    rf"([a-z][a-z0-9+.-]*)://(\*|(?:\*\.)?{_LABELS}|\[[0-9a-f:.]+\]|)(?::([0-9]{{1,5}}|\*))?/?"
)
_ANY_HOST = r"[^/?#@\s]*"


def read_origin(text: str) -> str:
    """A listed origin as browsers write it: lower case, no default port, no slash at the end.

    Raises ValueError that says what is wrong.
    """
    origin = text.lower()
    if origin in ("*", "null"):
        return origin
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        raise ValueError(f"expected {EXPECTED}{_hint(text)}")
    scheme, host, port = found.groups()
    if scheme in _DEFAULT_PORTS:
        if not host:
            raise ValueError(f"expected {EXPECTED}; this has no host")
        if host == "*":
            raise ValueError(f'expected {EXPECTED}; every host of {scheme} is "*"')
    if port is not None and port != "*":
        if int(port) > 65535:
            raise ValueError(f"expected {EXPECTED}; a port is at most 65535")
        if port == _DEFAULT_PORTS.get(scheme):
            port = None
    return f"{scheme}://{host}" + (f":{port}" if port is not None else "")


def _hint(text: str) -> str:
    if "://" not in text:
        return "; the scheme is missing"
    if not text.isascii():
        return "; browsers send the name in its ASCII form, xn--…"
    if text.partition("://")[2].partition("/")[2]:
        return "; an origin has no path"
    return ""


class Origins:
    """The origins that are listed. `everyone` if `*` is among them."""

    def __init__(self, listed: Iterable[str]) -> None:
        """`listed` as `read_origin` writes them."""
        origins = frozenset(listed)
        self.everyone = "*" in origins
        self._exact = frozenset(origin for origin in origins if "*" not in origin)
        patterns = [_pattern(origin) for origin in sorted(origins - self._exact - {"*"})]
        self._patterns = re.compile("|".join(patterns)) if patterns else None

    def __bool__(self) -> bool:
        return self.everyone or bool(self._exact) or self._patterns is not None

    def __contains__(self, origin: str) -> bool:
        """Whether the page of a request with this `Origin` is listed."""
        if self.everyone:
            return True
        lower = origin.lower()
        return lower in self._exact or (
            self._patterns is not None and self._patterns.fullmatch(lower) is not None
        )


def _pattern(origin: str) -> str:
    """A regular expression for an origin with wildcards, which stand for whole labels."""
    scheme, _, rest = origin.partition("://")
    any_port = rest.endswith(":*")
    host = rest.removesuffix(":*") if any_port else rest
    if host == "*":
        shown = _ANY_HOST
    elif host.startswith("*."):
        shown = r"(?:[a-z0-9_-]+\.)+" + re.escape(host[2:])
    else:
        shown = re.escape(host)
    return f"{re.escape(scheme)}://{shown}" + (r"(?::[0-9]{1,5})?" if any_port else "")


def is_own(origin: str, hosts: Iterable[str]) -> bool:
    """Whether a page of this origin has come from here: from one of the `hosts`.

    These are values of `Host` and `X-Forwarded-Host`; a default port makes no difference.
    """
    try:
        parts = urlsplit(origin)
    except ValueError:  # a bracket that is not closed
        return False
    port = _DEFAULT_PORTS.get(parts.scheme, "")
    name = _without_port(parts.netloc, port)
    return bool(name) and any(_without_port(host, port) == name for host in hosts)


def _without_port(host: str, port: str) -> str:
    return host.strip().lower().removesuffix(f":{port}") if port else host.strip().lower()


def forwarded_hosts(x_forwarded_host: str, forwarded: str) -> list[str]:
    """The hosts that proxies say the client has asked for.

    The arguments are the values of `X-Forwarded-Host` and `Forwarded` (RFC 7239 5.3).
    """
    hosts = [host.strip() for host in x_forwarded_host.split(",")]
    for pair in re.split(r"[;,]", forwarded):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "host":
            hosts.append(value.strip().strip('"'))
    return [host for host in hosts if host]


def refusal_text(origin: str, host: str, peer: str | None) -> str:
    """What a page of an origin that may not ask is told: exactly what to add, and where.

    `host` is the request's `Host`, `peer` the address that it came from.
    """
    shown = origin[:200]
    try:
        listed = read_origin(shown)
    except ValueError:
        return f'The request has the Origin "{shown}", which is none: no page may use that.'
    text = (
        f"Pages of {shown} may not use this router: "
        f'cors_origins = ["{listed}"] in [config] allows them.'
    )
    if listed != "null" and peer is not None:
        text += (
            " If this is the router's own page behind a proxy that changes Host "
            f"(here {host[:200] or 'none'}): let the proxy pass Host on, or set "
            f'trusted_proxies = ["{peer}"] and let it send X-Forwarded-Host.'
        )
    return text
