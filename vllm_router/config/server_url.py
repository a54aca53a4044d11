"""The canonical form of a server's URL, and the quoting of user input in messages."""

from __future__ import annotations

import ipaddress
import re

SHOWN_CHARS = 80
"""Characters of a value in a message; longer values are cut."""


def escaped(char: str) -> str:
    """One character, escaped for a log line."""
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def quoted(text: str) -> str:
    """`text` in double quotes on one line, cut to a readable length, credentials of URLs masked."""
    head, at, tail = text.rpartition("@")
    if at:
        scheme, separator, _ = head.partition("://")
        text = f"{scheme}://***@{tail}" if separator else f"***@{tail}"
    if "://" in text:
        text = re.sub(r"([?#]).+", r"\1***", text, flags=re.DOTALL)
    shown = "".join(map(escaped, text[:SHOWN_CHARS]))
    return f'"{shown}…"' if len(text) > SHOWN_CHARS else f'"{shown}"'


def joined(path: str, key: str) -> str:
    """The path of a key; a key that TOML cannot write bare is quoted."""
    part = key if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) else quoted(key)
    return f"{path}.{part}" if path else part


MAX_URL_CHARS = 2000
"""Characters of a server's URL: the batches of `[shared]` and httpx have limits, too."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"  # Docker Compose names contain underscores
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_IPV4_LIKE = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
_PORT = re.compile(r"[0-9]{1,5}")
_API_PATHS = (
    *("/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/models"),
    *("/v1/responses", "/health", "/metrics"),
)
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})+")


def normalise_url(url: str) -> str:
    """The canonical form of a server's URL: `scheme://host[:port][/prefix]`.

    Host in lower case, IPv6 compressed and in brackets, the scheme's default port dropped, as are
    trailing slashes and a trailing `/v1`. Applying it twice changes nothing. Raises ValueError
    with the text `expected ..., got "..."`; user names, passwords and queries in it are masked.
    """

    def refuse(expected: str) -> ValueError:
        return ValueError(f"expected {expected}, got {quoted(url)}")

    if len(url) > MAX_URL_CHARS:
        raise refuse(f"a URL of at most {MAX_URL_CHARS} characters")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _DEFAULT_PORTS:
        raise _with_guess(refuse('a URL like "http://host:8000"'), url, separator)
    if "?" in rest or "#" in rest:
        raise refuse("a URL without query and fragment")
    authority, _, path = rest.partition("/")
    # Also in the path: a password that contains a slash would become part of the server's name.
    if "@" in rest:
        raise refuse("a URL without user name and password (api_key sends a key)")
    host, port = _split_port(authority)
    host = _normalise_host(host)
    if not host:
        raise refuse("a URL with a valid host (IPv6 in brackets, international names as xn--)")
    if port and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
        raise refuse("a URL with a port from 1 to 65535")
    path = path.rstrip("/")
    while path == "v1" or path.endswith("/v1"):
        path = path.removesuffix("v1").rstrip("/")
    segments = path.split("/") if path else []
    if f"/{path}".endswith(_API_PATHS):
        raise refuse("the base URL of a server, without the path of its API")
    if not all(_SEGMENT.fullmatch(part) and part not in {".", ".."} for part in segments):
        raise refuse("a URL whose path prefix is plain (no spaces, dot segments or `//`)")
    if port and int(port) != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{int(port)}"
    return "/".join([f"{scheme}://{host}", *segments])


def _with_guess(error: ValueError, url: str, separator: str) -> ValueError:
    """The error, with the URL that was probably meant if only the scheme is missing."""
    if separator or ":" not in url:
        return error
    try:
        guess = normalise_url(f"http://{url}")
    except ValueError:
        return error
    return ValueError(f'{error}, did you mean "{guess}"?')


def _split_port(authority: str) -> tuple[str, str]:
    if authority.startswith("["):
        host, bracket, port = authority.rpartition("]")
        return (host + bracket, port.removeprefix(":")) if port[:1] in {"", ":"} else ("", "")
    host, _, port = authority.partition(":")
    return host, port


def _normalise_host(host: str) -> str:
    """`host` in its canonical form, or "" if it is invalid."""
    if not host.isascii():
        return ""
    host = host.lower()
    try:
        if host.startswith("["):
            address = ipaddress.IPv6Address(host[1:-1])
            # An IPv6 zone is local to this machine and must not appear in a Host header.
            return "" if address.scope_id else f"[{address}]"
        if _IPV4_LIKE.fullmatch(host):
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        return ""
    return host if len(host) <= 253 and _HOST.fullmatch(host) else ""


def server_name(url: str) -> str:
    """The default name of a server: its normalised URL without the scheme.

    An https server on the default port keeps `:443`, so that http and https have different names.
    """
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    if scheme == "https" and not _split_port(authority)[1]:
        authority += ":443"
    return authority + slash + path
