"""Reads the `[discovery]` table. Pure."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from vllm_router.config.discovery import DiscoveryConfig, FileSource, Options, SourceConfig
from vllm_router.config.servers import SERVER_KEYS, read_values
from vllm_router.config.tls import ReadFile, check_client_certificate
from vllm_router.config.toml_reader import Reader, shown_value
from vllm_router.config.types import ApiKey, Interval, Name, Seconds, Secret, Variable

DEFAULT_KEYS: dict[str, Any] = {
    key: kind for key, kind in SERVER_KEYS.items() if key not in ("url", "name")
}
"""The keys of `defaults`."""

_Scheme = Annotated[str, Meta(description='"http" or "https"', extra={"one_of": ("http", "https")})]
_Text = Annotated[str, Meta(min_length=1, max_length=1000)]
_Paths = Annotated[
    _Text | Annotated[tuple[_Text, ...], Meta(min_length=1)],
    Meta(description="the path of a file or an array of paths (strings)"),
]
_Variables = Annotated[
    tuple[Variable, ...],
    Meta(min_length=1, description="array of names of environment variables"),
]

COMMON_KEYS: dict[str, Any] = {"name": Name, "scheme": _Scheme, "defaults": None}
"""The keys of every source; `defaults` is a table."""

FILE_KEYS: dict[str, Any] = {"path": _Paths, "interval": Interval, **COMMON_KEYS}

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
        values = reader.table(where, rest, keys)
        values.setdefault("name", kind if number == 1 else f"{kind}-{number}")
        defaults: Options = tuple({**shared, **own}.items())
        source = make(reader, where, {**values, "defaults": defaults}, around)
        if source is not None:
            sources.append(source)
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
                f'expected every source to have its own name, got "{source.name}" twice',
            )
        names.add(source.name)


def _make_file(
    reader: Reader, where: str, values: dict[str, Any], around: Surroundings
) -> SourceConfig | None:
    if "path" not in values:
        reader.problem(f"{where}.path", "expected the path of a file or a pattern, got none")
        return None
    given = values.pop("path")
    paths = (given,) if isinstance(given, str) else given
    base = os.path.dirname(around.source)
    return FileSource(paths=tuple([os.path.join(base, path) for path in paths]), **values)


_Make = Callable[[Reader, str, dict[str, Any], Surroundings], SourceConfig | None]

KINDS: dict[str, tuple[dict[str, Any], _Make]] = {
    "file": (FILE_KEYS, _make_file),
}
"""The kinds of sources: their keys, and the function that makes one of the values."""
