"""The types of configuration values.

Each type has msgspec constraints and a description for error messages; a function `read` checks
what constraints cannot express, and returns the value to keep.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import sys
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from vllm_router.config.origins import read_origin
from vllm_router.config.server_url import normalise_url, quoted
from vllm_router.config.session_sources import read_session_source

_MAX_INT = 2**63 - 1  # TOML integers have 64 bits
_FINITE = sys.float_info.max


def _reads(expected: str, read: Callable[[str], object]) -> Meta:
    """A type that is read by the function `read`, which raises ValueError with the problem."""
    return Meta(description=expected, extra={"read": read})


def _read_network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise ValueError(
            f"expected an IP address or a network like 10.0.0.0/8, got {quoted(text)}"
        ) from None


_HOST = re.compile(r"[a-z0-9._-]{1,253}")
_LISTEN_HOST = re.compile(r"[0-9a-z:._%-]{1,253}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _read_origin(text: str) -> str:
    try:
        return read_origin(text)
    except ValueError as error:
        raise ValueError(f"{error}, got {quoted(text)}") from None


def _read_host(text: str) -> str:
    host = text.lower().rstrip(".")
    if not _HOST.fullmatch(host):
        raise ValueError(f'expected a host name like "router.example", got {quoted(text)}')
    return host


def split_address(text: str) -> tuple[str, int]:
    """Split `host:port` (IPv6 in brackets). Raises ValueError."""
    parts = urlsplit(f"//{text}")
    host, port = parts.hostname, parts.port
    if not host or port is None or parts.path or parts.query or "@" in text:
        raise ValueError("no host and port")
    if not (_LISTEN_HOST.fullmatch(host) and text.isprintable()):
        raise ValueError("no host and port")
    return host, port


def _read_address(text: str) -> str:
    try:
        split_address(text)
    except ValueError:
        raise ValueError(
            f'expected an address and a port like "127.0.0.1:8889", got {quoted(text)}'
        ) from None
    return text


def _read_path(text: str) -> str:
    """Only printable paths: they appear in log lines."""
    if not (text and text.isprintable() and len(text) <= 1000):
        raise ValueError(f"expected the path of a file, got {quoted(text)}")
    return text


def digest_of(key: str) -> Secret:
    """The SHA-256 of a client key, in hexadecimal digits."""
    return Secret(hashlib.sha256(key.encode("latin-1", "replace")).hexdigest())


def _read_digest(key: str) -> Secret:
    """Read a key, or `sha256:` and its digest, so that a file need not contain the key."""
    if not key.startswith("sha256:"):
        return digest_of(key)
    digest = key.removeprefix("sha256:").lower()
    if not _DIGEST.fullmatch(digest):
        raise ValueError('expected 64 hexadecimal digits after "sha256:", got something else')
    return Secret(digest)


def _one_of(*names: str) -> Meta:
    return Meta(description=f"one of {', '.join(names)} (string)", extra={"one_of": names})


def _read_access(value: bool | str) -> bool | str:
    if isinstance(value, str) and not (value and value.isprintable()):  # it appears in log lines
        raise ValueError(f"expected true, false or the path of a file, got {quoted(value)}")
    return value


class Secret(str):
    """A string with a masked repr, so that no log line, diff or traceback shows it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


Bool = Annotated[bool, Meta(description="true or false")]
PositiveInt = Annotated[int, Meta(ge=1, le=_MAX_INT, description="int ≥ 1")]
NonNegativeInt = Annotated[int, Meta(ge=0, le=_MAX_INT, description="int ≥ 0")]
PositiveIntOrNone = Annotated[PositiveInt | None, Meta(description="int ≥ 1")]
Share = Annotated[float, Meta(ge=0, le=1, description="number from 0 to 1")]
Seconds = Annotated[float, Meta(gt=0, le=_FINITE, description="number of seconds > 0")]
SecondsOrZero = Annotated[float, Meta(ge=0, le=_FINITE, description="number of seconds ≥ 0")]
SecondsOrNone = Annotated[Seconds | None, Meta(description="number of seconds > 0")]
# The minimum keeps a typing error from causing a busy loop.
Interval = Annotated[float, Meta(ge=0.01, le=_FINITE, description="number of seconds ≥ 0.01")]
Megabytes = Annotated[
    float, Meta(gt=0, le=1e6, description="number of megabytes > 0 and ≤ 1000000")
]
Weight = Annotated[float, Meta(gt=0, le=1000, description="number > 0 and ≤ 1000")]
Tokens = Annotated[float, Meta(gt=0, le=1e9, description="number of tokens > 0")]
Growth = Annotated[float, Meta(ge=0, le=1000, description="number from 0 to 1000")]
PolicyName = Annotated[
    str, Meta(description="the name of a policy (string)", extra={"one_of": "policies"})
]
Network = Annotated[str, _reads("an IP address or network (string)", _read_network)]
Networks = Annotated[
    tuple[Network, ...], Meta(description="array of IP addresses and networks (strings)")
]

Url = Annotated[str, _reads('a URL like "http://host:8000"', normalise_url)]
Name = Annotated[
    str,
    Meta(pattern=r"^[!-~]{1,100}\Z", description="1 to 100 visible ASCII characters, no spaces"),
]
ApiKey = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]+\Z",
        description="a key of visible ASCII characters, no spaces",
        extra={"secret": True},
    ),
]
Variable = Annotated[
    str,
    Meta(
        # Not shown: a user may have written the key itself instead of the variable's name.
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z",
        description="the name of an environment variable",
        extra={"secret": True},
    ),
]
Model = Annotated[str, Meta(min_length=1, description="the name of a model (string)")]
Models = Annotated[
    tuple[Model, ...],
    Meta(min_length=1, description="array of at least one model name (strings)"),
]

# A key that clients send to the router; only its digest is kept.
ClientKey = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]{1,4096}\Z",
        description="a key of 1 to 4096 visible ASCII characters, no spaces",
        extra={"secret": True, "read": _read_digest},
    ),
]
PerMinute = Annotated[float, Meta(gt=0, le=1e9, description="number of requests > 0")]
PerMinuteOrNone = Annotated[PerMinute | None, Meta(description="number of requests > 0")]
FilePath = Annotated[str, _reads("the path of a file (string)", _read_path)]
TlsVersion = Annotated[str, Meta(pattern=r"^1\.[23]\Z", description='"1.2" or "1.3"')]
AddressOrNone = Annotated[str | None, _reads('"host:port" (string)', _read_address)]
Origins = Annotated[
    tuple[Annotated[str, _reads("an origin (string)", _read_origin)], ...],
    Meta(description="array of origins (strings)"),
]
Hosts = Annotated[
    tuple[Annotated[str, _reads("a host name (string)", _read_host)], ...],
    Meta(description="array of host names (strings)"),
]

SessionSources = Annotated[
    tuple[Annotated[str, _reads("a source of session ids (string)", read_session_source)], ...],
    Meta(description="array of sources of session ids (strings)"),
]

ListenHost = Annotated[
    str,
    Meta(pattern=r"^[0-9A-Za-z:._%-]{1,253}\Z", description='an address like "0.0.0.0" (string)'),
]
ListenPort = Annotated[int, Meta(ge=0, le=65535, description="int from 0 to 65535")]
Workers = Annotated[int, Meta(ge=1, le=64, description="int from 1 to 64")]
Front = Annotated[str, _one_of("lane", "hypercorn")]

SharedUrl = Annotated[
    str, Meta(min_length=1, max_length=4096, description='a URL like "redis://host:6379"')
]
Password = Annotated[
    str, Meta(min_length=1, max_length=4096, description="a password", extra={"secret": True})
]
FleetName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._-]{1,64}\Z",
        description="1 to 64 letters, digits, dots, dashes and underscores",
    ),
]

LogLevel = Annotated[str, _one_of("debug", "info", "warning", "error")]
LogFormat = Annotated[str, _one_of("text", "json")]
AccessLog = Annotated[
    bool | str,
    Meta(description="true, false or the path of a file (string)", extra={"read": _read_access}),
]
