"""Origins of web pages: matching against `cors_origins` and against the router's own. Pure.

A browser sends a page's origin in `Origin` (RFC 6454 7): `https://app.example`, for an app or an
extension `app://obsidian.md` or `chrome-extension://<id>`, for a page without an origin `null`.
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
    """A configured origin in the form of browsers: lower case, no default port, no final slash.

    Raises ValueError with the problem.
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
            raise ValueError(f"expected {EXPECTED}; the host is missing")
        if host == "*":
            raise ValueError(f'expected {EXPECTED}; for every {scheme} origin write "*"')
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
    """The origins of `cors_origins`. `everyone` is True if `*` is among them."""

    def __init__(self, listed: Iterable[str]) -> None:
        """`listed` are results of `read_origin`."""
        origins = frozenset(listed)
        self.everyone = "*" in origins
        self._exact = frozenset(origin for origin in origins if "*" not in origin)
        patterns = [_pattern(origin) for origin in sorted(origins - self._exact - {"*"})]
        self._patterns = re.compile("|".join(patterns)) if patterns else None

    def __bool__(self) -> bool:
        return self.everyone or bool(self._exact) or self._patterns is not None

    def __contains__(self, origin: str) -> bool:
        """Whether the value of an `Origin` header matches."""
        if self.everyone:
            return True
        lower = origin.lower()
        return lower in self._exact or (
            self._patterns is not None and self._patterns.fullmatch(lower) is not None
        )


def _pattern(origin: str) -> str:
    """A regular expression for an origin with wildcards; a wildcard stands for whole labels."""
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
    """Whether the origin is one of the router's own `hosts`.

    `hosts` are values of `Host` and `X-Forwarded-Host`; a default port makes no difference.
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
    """The hosts requested by the client, according to proxies.

    The arguments are the values of `X-Forwarded-Host` and `Forwarded` (RFC 7239 5.3).
    """
    hosts = [host.strip() for host in x_forwarded_host.split(",")]
    for pair in re.split(r"[;,]", forwarded):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "host":
            hosts.append(value.strip().strip('"'))
    return [host for host in hosts if host]


def refusal_text(origin: str, host: str, peer: str | None) -> str:
    """The error message for a refused origin, with the setting that allows it.

    `host` is the request's `Host`, `peer` its remote address.
    """
    shown = origin[:200]
    try:
        listed = read_origin(shown)
    except ValueError:
        return f'The Origin header "{shown}" is not a valid origin.'
    text = (
        f"Pages of {shown} may not use this router; to allow them, set "
        f'cors_origins = ["{listed}"] in [config].'
    )
    if listed != "null" and peer is not None:
        text += (
            " If this is the router's own page behind a proxy that changes the Host header "
            f"(here {host[:200] or 'none'}), let the proxy forward Host unchanged, or set "
            f'trusted_proxies = ["{peer}"] and let the proxy send X-Forwarded-Host.'
        )
    return text
