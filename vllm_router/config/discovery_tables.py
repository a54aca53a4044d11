"""Reads the `[discovery]` table. Pure."""

from __future__ import annotations

import ipaddress
import os.path
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from vllm_router.config.discovery import (
    DiscoveryConfig,
    DnsSource,
    FileSource,
    HttpSource,
    KubernetesSource,
    Options,
    SourceConfig,
)
from vllm_router.config.server_url import joined, quoted
from vllm_router.config.servers import SERVER_KEYS, read_values
from vllm_router.config.tls import (
    SERVER_TLS_KEYS,
    ReadFile,
    check_client_certificate,
    take_files,
)
from vllm_router.config.toml_reader import Reader, shown_value
from vllm_router.config.types import ApiKey, FilePath, Interval, Name, Seconds, Secret, Variable
from vllm_router.errors import ConfigError

DEFAULT_KEYS: dict[str, Any] = {
    key: kind for key, kind in SERVER_KEYS.items() if key not in ("url", "name")
}
"""The keys of `defaults`."""

_Scheme = Annotated[str, Meta(description='"http" or "https"', extra={"one_of": ("http", "https")})]
_Text = Annotated[
    str, Meta(min_length=1, max_length=1000, description="the path of a file (string)")
]
_Paths = Annotated[
    _Text | Annotated[tuple[_Text, ...], Meta(min_length=1)],
    Meta(description="the path of a file or an array of paths (strings)"),
]
_HeaderName = Annotated[
    str,
    Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}\Z", description="the name of a header"),
]
_HeaderValue = Annotated[
    str,
    Meta(
        pattern=r"^[ -~]{0,4096}\Z",
        description="a string of at most 4096 ASCII characters in one line",
        extra={"secret": True},
    ),
]
_FRAMING = frozenset({"connection", "content-length", "expect", "transfer-encoding", "upgrade"})
"""Headers that the router sets itself where a request needs them."""


def _read_web_url(text: str) -> str:
    """A URL of http or https with a host; path and query stay as they are."""
    good = re.fullmatch(r"[!-~]{1,2000}", text) is not None and "#" not in text
    try:
        parts = urlsplit(text)
        good = good and parts.scheme in ("http", "https") and bool(parts.hostname)
        good = good and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f'expected a URL like "https://host/path" without a password, got {quoted(text)}'
        )
    return text


_WebUrl = Annotated[
    str, Meta(description='a URL like "https://host/path"', extra={"read": _read_web_url})
]
_Label = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z",
        description="a name of Kubernetes: up to 63 lower-case letters, digits and hyphens",
    ),
]
_Selector = Annotated[
    str, Meta(pattern=r"^[ -~]{1,1000}\Z", description='a label selector like "app=vllm,tier=gpu"')
]
_PortOrName = Annotated[
    Annotated[int, Meta(ge=1, le=65535)] | Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,63}\Z")],
    Meta(description="the number or the name of a port"),
]
_Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
_Domain = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63}){0,100}\.?\Z",
        max_length=254,
        description='a name in DNS like "vllm.example"',
    ),
]
_RecordType = Annotated[
    str, Meta(description='"A", "AAAA" or "SRV"', extra={"one_of": ("A", "AAAA", "SRV")})
]


def _read_nameserver(text: str) -> tuple[str, int]:
    """An IP address, perhaps with a port; IPv6 is in brackets then."""
    host, port = text, "53"
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else "53" if bracket and not rest else ""
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address = ipaddress.ip_address(host)
        if not (port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise ValueError
    except ValueError:
        raise ValueError(
            f'expected an IP address like "10.0.0.53" or "127.0.0.1:8600", got {quoted(text)}'
        ) from None
    return str(address), int(port)


_Nameservers = Annotated[
    tuple[
        Annotated[
            str, Meta(description="an IP address (string)", extra={"read": _read_nameserver})
        ],
        ...,
    ],
    Meta(min_length=1, description="array of IP addresses (strings)"),
]
_Variables = Annotated[
    tuple[Variable, ...],
    Meta(min_length=1, description="array of names of environment variables"),
]

COMMON_KEYS: dict[str, Any] = {"id": Name, "scheme": _Scheme, "defaults": None}
"""The keys of every source; `defaults` is a table."""

FILE_KEYS: dict[str, Any] = {"path": _Paths, "interval": Interval, **COMMON_KEYS}

_Headers = Annotated[
    dict[_HeaderName, _HeaderValue],
    Meta(description="table of header names and values (strings)", extra={"secret": True}),
]

WEB_KEYS: dict[str, Any] = {
    "url": _WebUrl,
    "timeout": Seconds,
    "api_key": ApiKey,
    "api_key_env": Variable,
    **SERVER_TLS_KEYS,
}
HTTP_KEYS: dict[str, Any] = {
    **WEB_KEYS,
    "interval": Interval,
    "headers": _Headers,
    **COMMON_KEYS,
}

KUBERNETES_KEYS: dict[str, Any] = {
    "namespace": _Label,
    "service": _Label,
    "selector": _Selector,
    "port": _PortOrName,
    "api": _WebUrl,
    "token_file": FilePath,
    **{key: kind for key, kind in WEB_KEYS.items() if key != "url"},
    **COMMON_KEYS,
}

DNS_KEYS: dict[str, Any] = {
    "name": _Domain,
    "type": _RecordType,
    "port": _Port,
    "nameservers": _Nameservers,
    "interval": Interval,
    "timeout": Seconds,
    **COMMON_KEYS,
}

DISCOVERY_KEYS: dict[str, Any] = {
    "keep_for": Seconds,
    "second_look": Seconds,
    "label_key_envs": _Variables,
}


class Surroundings(NamedTuple):
    """What the tables refer to: environment, other files, and `[tls.servers]`."""

    source: str
    environ: Mapping[str, str]
    read_file: ReadFile
    common: Mapping[str, Any]


def read_discovery(reader: Reader, table: object, around: Surroundings) -> DiscoveryConfig | None:
    """Read the table; problems go to `reader`."""
    if not isinstance(table, dict):
        reader.table("discovery", table, DISCOVERY_KEYS)
        return None
    rest = {key: table[key] for key in table if key not in KINDS and key != "defaults"}
    known = {**DISCOVERY_KEYS, **dict.fromkeys(KINDS), "defaults": None}
    for key in rest.keys() - DISCOVERY_KEYS.keys():
        reader.unknown_key("discovery", key, known)
        del rest[key]
    values = reader.table("discovery", rest, DISCOVERY_KEYS)
    shared = _read_defaults(reader, "discovery.defaults", table.get("defaults", {}), around)
    sources: list[SourceConfig] = []
    for kind in KINDS:
        if kind in table:
            sources += _read_kind(reader, kind, table[kind], {**around.common, **shared}, around)
    if not sources and not any(kind in table for kind in KINDS):
        reader.problem("discovery", f"expected a source ({', '.join(KINDS)}), got none")
    _check_names(reader, sources)
    variables = values.pop("label_key_envs", None) or ()
    keys = [
        (name, reader.variable("discovery.label_key_envs", name, around.environ, ApiKey))
        for name in variables
    ]
    label_keys = tuple([(name, Secret(key)) for name, key in keys if key is not None])
    return DiscoveryConfig(sources=tuple(sources), label_keys=label_keys, **values)


def _read_kind(
    reader: Reader, kind: str, given: object, shared: Mapping[str, Any], around: Surroundings
) -> list[SourceConfig]:
    """The sources of one kind: a table, or an array of tables."""
    path = f"discovery.{kind}"
    entries: list[tuple[str, object]]
    if isinstance(given, dict):
        entries = [(path, given)]
    elif isinstance(given, list) and given:
        entries = [(f"{path}[{number}]", entry) for number, entry in enumerate(given)]
    else:
        reader.problem(path, f"expected table or array of tables, got {shown_value(given)}")
        return []
    keys, make = KINDS[kind]
    sources = []
    for number, (where, entry) in enumerate(entries, 1):
        if not isinstance(entry, dict):
            reader.problem(where, f"expected table, got {shown_value(entry)}")
            continue
        own = _read_defaults(reader, f"{where}.defaults", entry.get("defaults", {}), around)
        rest = {key: value for key, value in entry.items() if key != "defaults"}
        values = read_values(reader, where, rest, keys, around.environ, around.read_file)
        check_client_certificate(reader, where, values)
        source_name = values.pop("id", kind if number == 1 else f"{kind}-{number}")
        defaults: Options = tuple({**shared, **own}.items())
        source = make(reader, where, values, around)
        if source is not None:
            common = {"name": source_name, "defaults": defaults}
            sources.append(msgspec.structs.replace(source, **common))
    return sources


def _read_defaults(
    reader: Reader, path: str, table: object, around: Surroundings
) -> dict[str, Any]:
    if not isinstance(table, dict):
        reader.table(path, table, DEFAULT_KEYS)
        return {}
    values = read_values(reader, path, table, DEFAULT_KEYS, around.environ, around.read_file)
    check_client_certificate(reader, path, values)
    return values


def _check_names(reader: Reader, sources: list[SourceConfig]) -> None:
    names: set[str] = set()
    for source in sources:
        if source.name in names:
            reader.problem(
                "discovery",
                f'expected every source to have its own id, got "{source.name}" twice',
            )
        names.add(source.name)


def _make_file(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> SourceConfig | None:
    if "path" not in values:
        reader.missing(f"{where}.path", "expected the path of a file or a pattern, got none")
        return None
    given = values.pop("path")
    paths = (given,) if isinstance(given, str) else given
    base = os.path.dirname(around.source)
    return FileSource(name="", paths=tuple([os.path.join(base, path) for path in paths]), **values)


def _make_http(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> SourceConfig | None:
    if "url" not in values:
        reader.missing(f"{where}.url", 'expected a URL like "https://host/path", got none')
        return None
    headers = values.pop("headers", {})
    if "api_key" in values and any(name.lower() == "authorization" for name in headers):
        reader.problem(f"{where}.headers", "expected api_key or authorization, got both")
    for header in headers:
        if header.lower() in _FRAMING:
            text = f"expected a header that does not frame the request, got {quoted(header)}"
            reader.problem(joined(f"{where}.headers", header), text, at_key=True)
    secrets = tuple([(name, Secret(value)) for name, value in headers.items()])
    return HttpSource(name="", headers=secrets, **values)


def _make_dns(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> SourceConfig | None:
    domain = values.pop("name", None)
    if domain is None:
        reader.missing(f"{where}.name", "expected a name in DNS, got none")
        return None
    kind = values.setdefault("type", "SRV" if domain.startswith("_") else "A")
    if kind == "SRV" and "port" in values:
        reader.problem(f"{where}.port", "expected none: SRV records have a port of their own")
    if kind != "SRV" and "port" not in values:
        reader.problem(f"{where}.port", f"expected the port of the servers for {kind} records")
    return DnsSource(name="", domain=domain, **values)


ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where a pod finds the token, the authorities of the API server, and its namespace."""


def _make_kubernetes(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> SourceConfig | None:
    service, selector = values.pop("service", None), values.pop("selector", None)
    if (service is None) == (selector is None):
        reader.missing(f"{where}.service", "expected either service or selector")
    if service is not None:
        selector = f"kubernetes.io/service-name={service}"
    if "api_key" in values and "token_file" in values:
        reader.problem(f"{where}.token_file", "expected token_file or api_key, got both")
    api = values.pop("api", None)
    if api is None:
        api = _in_cluster(reader, where, values, around)
    if "namespace" not in values:
        reader.missing(f"{where}.namespace", "expected the name of a namespace, got none")
    if api is None or selector is None or "namespace" not in values:
        return None
    if values.get("token_file") is not None:
        base = os.path.dirname(around.source)
        values["token_file"] = os.path.join(base, values["token_file"])
    return KubernetesSource(name="", url=api, selector=selector, **values)


def _in_cluster(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> str | None:
    """The URL of the API server by a pod's environment; adds what else a pod is given."""
    host, port = (around.environ.get(f"KUBERNETES_SERVICE_{key}", "") for key in ("HOST", "PORT"))
    if not host:
        reader.missing(
            f"{where}.api",
            "expected the URL of the API server, as the router runs in no pod (the environment has "
            "no KUBERNETES_SERVICE_HOST)",
        )
        return None
    if "api_key" not in values:
        values.setdefault("token_file", f"{ACCOUNT}/token")
    if values.get("verify", True) and "ca" not in values:
        values["ca"] = f"{ACCOUNT}/ca.crt"
        take_files(reader, where, values, around.read_file)
    if "namespace" not in values:
        try:
            values["namespace"] = around.read_file(f"{ACCOUNT}/namespace")[1].decode().strip()
        except (ConfigError, UnicodeDecodeError) as error:
            reader.problem(f"{where}.namespace", f"expected a namespace: {error}")
    return f"https://[{host}]:{port or 443}" if ":" in host else f"https://{host}:{port or 443}"


_Make = Callable[[Reader, str, dict[str, Any], Surroundings], SourceConfig | None]

KINDS: dict[str, tuple[dict[str, Any], _Make]] = {
    "file": (FILE_KEYS, _make_file),
    "http": (HTTP_KEYS, _make_http),
    "dns": (DNS_KEYS, _make_dns),
    "kubernetes": (KUBERNETES_KEYS, _make_kubernetes),
}
"""The kinds of sources: their keys, and the function that makes one of the values."""
