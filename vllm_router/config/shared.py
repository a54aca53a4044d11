"""The `[shared]` table: the Redis through which the routers of a fleet share state. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from vllm_router.config.tls import File, ReadFile, take_files
from vllm_router.config.toml_reader import Reader
from vllm_router.config.types import (
    FilePath,
    FleetName,
    Name,
    Password,
    Secret,
    SharedUrl,
    Variable,
)

DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379}

_SERVICE = re.compile(r"[!-~]{1,100}")
DEFAULT_FLEET = "default"

MISSING = "needs the package coredis; in a clone, install it with: pip install '.[shared]'"
"""The problem of a `[shared]` table without the library for Redis."""


class StoreAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the Redis is.

    hosts: of the Redis, or of its sentinels.
    service: the name of the Redis at its sentinels; None without sentinels.
    """

    hosts: tuple[tuple[str, int], ...]
    tls: bool = False
    service: str | None = None
    database: int = 0
    user: Secret | None = None
    password: Secret | None = None

    def __str__(self) -> str:
        """For logs and pages: without user and password."""
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        if self.service is not None:
            return f"sentinel://{hosts}/{self.service}"
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{hosts}" + (f"/{self.database}" if self.database else "")


class SharedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shared state of several routers before the same servers.

    address: of the Redis, from `url` and, for the password, `password_env`.
    fleet: routers with the same name share their state; several fleets may use one Redis.
    name: of this router for the others and for people; None for the name of its machine.
    ca: certificate authorities of `rediss://`; None for the system's.
    """

    address: StoreAddress
    fleet: str = DEFAULT_FLEET
    name: str | None = None
    ca: File | None = None


SHARED_KEYS: dict[str, Any] = {
    "url": SharedUrl,
    "password_env": Variable,
    "fleet": FleetName,
    "name": Name,
    "ca": FilePath,
}


def read_shared(
    reader: Reader, table: object, environ: Mapping[str, str], read_file: ReadFile
) -> SharedConfig | None:
    """Read the `[shared]` table; None if it has problems, which go to `reader`."""
    values = reader.table("shared", table, SHARED_KEYS)
    if not isinstance(table, dict):
        return None
    if "url" not in table:
        reader.problem("shared.url", 'expected a URL like "redis://host:6379", got none')
    take_files(reader, "shared", values, read_file)
    url = values.pop("url", None)
    variable = values.pop("password_env", None)
    if url is None:
        return None
    try:
        address = read_address(url)
    except ValueError as error:
        reader.problem("shared.url", str(error))
        return None
    if variable is not None:
        if address.password is not None:
            reader.problem("shared.password_env", "expected a password here or in url, got both")
        password = reader.variable("shared.password_env", variable, environ, Password)
        if password is not None:
            address = msgspec.structs.replace(address, password=Secret(password))
    if "ca" in values and not address.tls:
        reader.problem("shared.ca", "expected a url with rediss:// beside it, got another")
    return SharedConfig(address=address, **values)


def missing_package(shared: SharedConfig | None) -> list[str]:
    """The problem of a `[shared]` table in an installation without the library for Redis."""
    if shared is None or find_spec("coredis") is not None:
        return []
    return [MISSING]


def read_address(url: str) -> StoreAddress:
    """Parse a URL of `[shared]`. Raises ValueError with the problem, without the URL's secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in DEFAULT_PORTS:
        raise ValueError("expected a URL with redis://, rediss:// or sentinel://")
    authority, _, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    if not hosts:
        raise ValueError(f"expected a host after {scheme}://, got none")
    if not hosts.isprintable() or set("?#") & {*hosts, *path}:
        raise ValueError('expected a URL like "redis://host:6379/0", got more after it')
    places = tuple(_host(place, DEFAULT_PORTS[scheme]) for place in hosts.split(","))
    user, password = None, None
    if at:
        name, _, word = credentials.partition(":")
        user = Secret(unquote(name)) if name else None
        password = Secret(unquote(word)) if word else None
    sentinel = scheme == "sentinel"
    if not sentinel and len(places) > 1:
        raise ValueError(f"expected one host after {scheme}://, got {len(places)}")
    if sentinel and not _SERVICE.fullmatch(path):
        raise ValueError('expected the name of the Redis, like "sentinel://a,b,c/mymaster"')
    if not sentinel and path and not (path.isdecimal() and len(path) <= 5):
        raise ValueError("expected the number of a database after the host")
    return StoreAddress(
        hosts=places,
        tls=scheme == "rediss",
        service=path if sentinel else None,
        database=int(path) if path and not sentinel else 0,
        user=user,
        password=password,
    )


def _host(place: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or " " in place or port == 0:
        raise ValueError("expected host:port, IPv6 addresses in brackets")
    return host, port if port is not None else default_port
