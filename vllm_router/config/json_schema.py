"""A JSON Schema of servers.toml, for completion and checks in editors. Pure.

It describes the values that `parser.parse` accepts one by one, and texts with `${NAME}`, whose
value only the environment knows. Conditions between keys, such as two servers with one name, are
the parser's alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

import msgspec

from vllm_router.config.auth import AuthConfig
from vllm_router.config.discovery import (
    DiscoveryConfig,
    DnsSource,
    FileSource,
    HttpSource,
    KubernetesSource,
)
from vllm_router.config.limits import LimitsConfig
from vllm_router.config.log import LogSettings
from vllm_router.config.model_aliases import ModelRule
from vllm_router.config.parser import TABLES
from vllm_router.config.run_options import RunOptions
from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.config.shared import SharedConfig
from vllm_router.config.slo import Objective
from vllm_router.config.tls import SERVER_TLS_KEYS, TlsConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"

VARIABLE = r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"
"""The pattern of a text with the value of an environment variable."""

Schema = dict[str, Any]

_DEFAULTS: dict[str, type[msgspec.Struct]] = {
    "config": Settings,
    "run": RunOptions,
    "servers.servers": ServerConfig,
    "models.<name>": ModelRule,
    "auth": AuthConfig,
    "limits": LimitsConfig,
    "tls": TlsConfig,
    "log": LogSettings,
    "slo": Objective,
    "shared": SharedConfig,
    "discovery": DiscoveryConfig,
    "discovery.file": FileSource,
    "discovery.http": HttpSource,
    "discovery.dns": DnsSource,
    "discovery.kubernetes": KubernetesSource,
}
"""The structs that have the defaults of the tables."""

_REQUIRED = {
    "servers.servers": ["url"],
    "auth.keys": ["name"],
    "shared": ["url"],
    "discovery.file": ["path"],
    "discovery.http": ["url"],
    "discovery.dns": ["name"],
}


def json_schema(policies: Collection[str]) -> Schema:
    """The schema as JSON-compatible values. `policies` are the accepted policy names."""

    def table(path: str) -> Schema:
        schema = table_of(TABLES[path], _defaults_of(_DEFAULTS[path]) if path in _DEFAULTS else {})
        if path in _REQUIRED:
            schema["required"] = _REQUIRED[path]
        return schema

    def table_of(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> Schema:
        properties = {}
        for key, kind in keys.items():
            schema = _of_type(kind, policies) if kind is not None else {"type": "object"}
            default = defaults.get(key)
            if default is not None and (default != () or _may_be_empty(schema)):
                schema["default"] = default
            properties[key] = schema
        return {"type": "object", "additionalProperties": False, "properties": properties}

    servers = {"type": "array", "items": table("servers.servers")}
    auth = table("auth")
    auth["properties"]["keys"] = {"type": "array", "items": table("auth.keys")}
    tls = table("tls")
    tls["properties"]["servers"] = table_of(SERVER_TLS_KEYS, {})
    discovery = table("discovery")
    found_server = table("discovery.defaults")
    discovery["properties"]["defaults"] = found_server
    slo = table("slo")
    slo["properties"]["models"] = {
        "type": "object",
        "additionalProperties": table("slo.models.<name>"),
    }
    for path in TABLES:
        kind = path.removeprefix("discovery.")
        if kind not in (path, "defaults"):
            source = table(path)
            source["properties"]["defaults"] = found_server
            discovery["properties"][kind] = {
                "anyOf": [source, {"type": "array", "items": source}],
            }
    properties = {
        "servers": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"servers": servers},
        },
        "discovery": discovery,
        "config": table("config"),
        "models": {
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "string"}, table("models.<name>")]},
        },
        "auth": auth,
        "limits": table("limits"),
        "tls": tls,
        "log": table("log"),
        "run": table("run"),
        "slo": slo,
        "shared": table("shared"),
    }
    return {
        "$schema": DRAFT,
        "title": "servers.toml of vLLM Router",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _defaults_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    fields = msgspec.structs.fields(struct)
    return {one.name: one.default for one in fields if one.default is not msgspec.NODEFAULT}


def _may_be_empty(schema: Schema) -> bool:
    """Whether an empty array is a value; elsewhere `()` stands for a key that is left out."""
    return schema.get("type") == "array" and not schema.get("minItems")


def _of_type(wanted: Any, policies: Collection[str]) -> Schema:
    """The schema of one annotated type. TOML has no null, so None is left out."""
    _, meta = get_args(wanted)
    (found,), definitions = msgspec.json.schema_components([wanted])
    assert not definitions
    schema = _without_null(found)
    names = (meta.extra or {}).get("one_of")
    if names is not None:
        known = list(policies if names == "policies" else names)
        schema["anyOf"] = [{"enum": known}, {"pattern": VARIABLE}]
    _adapt_patterns(schema)
    return schema


def _adapt_patterns(schema: Any) -> None:
    """Let all patterns match texts with variables, and end with `$`: only Python knows `\\Z`."""
    if isinstance(schema, dict):
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and pattern != VARIABLE:
            schema["pattern"] = pattern.replace(r"\Z", "$") + "|" + VARIABLE
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            _adapt_patterns(inner)


def _without_null(schema: Schema) -> Schema:
    options = schema.pop("anyOf", None)
    if options is None:
        return schema
    rest = [_without_null(option) for option in options if option.get("type") != "null"]
    return {**rest[0], **schema} if len(rest) == 1 else {**schema, "anyOf": rest}
