"""A JSON Schema of servers.toml, for completion and checks in editors. Pure.

It describes the values that `parser.parse` accepts one by one. Conditions between keys, such as
two servers with one name, are the parser's alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

import msgspec

from vllm_router.config.auth import KEY_KEYS
from vllm_router.config.limits import LimitsConfig
from vllm_router.config.log import LogSettings
from vllm_router.config.parser import TABLES
from vllm_router.config.run_options import RunOptions
from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.config.tls import SERVER_TLS_KEYS

DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def json_schema(policies: Collection[str]) -> Schema:
    """The schema as JSON-compatible values. `policies` are the accepted policy names."""

    def table(keys: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> Schema:
        properties = {}
        for key, kind in keys.items():
            properties[key] = _of_type(kind, policies) if kind is not None else {"type": "object"}
            default = (values or {}).get(key)
            if default is not None:
                properties[key]["default"] = default
        return {"type": "object", "additionalProperties": False, "properties": properties}

    server = table(TABLES["servers.servers"], _defaults_of(ServerConfig))
    server["required"] = ["url"]
    servers = {"type": "array", "items": server}
    model = table(TABLES["models.<name>"])
    auth = table(TABLES["auth"])
    auth["properties"]["keys"] = {"type": "array", "items": table(KEY_KEYS)}
    tls = table(TABLES["tls"])
    tls["properties"]["servers"] = table(SERVER_TLS_KEYS)
    discovery = table(TABLES["discovery"])
    found_server = table(TABLES["discovery.defaults"])
    discovery["properties"]["defaults"] = found_server
    slo = table(TABLES["slo"])
    slo["properties"]["models"] = {
        "type": "object",
        "additionalProperties": table(TABLES["slo.models.<name>"]),
    }
    for path, keys in TABLES.items():
        kind = path.removeprefix("discovery.")
        if kind not in (path, "defaults"):
            source = table(keys)
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
        "config": table(TABLES["config"], _defaults_of(Settings)),
        "models": {
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "string"}, model]},
        },
        "auth": auth,
        "limits": table(TABLES["limits"], _defaults_of(LimitsConfig)),
        "tls": tls,
        "log": table(TABLES["log"], _defaults_of(LogSettings)),
        "run": table(TABLES["run"], _defaults_of(RunOptions)),
        "slo": slo,
        "shared": table(TABLES["shared"]),
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


def _of_type(wanted: Any, policies: Collection[str]) -> Schema:
    """The schema of one annotated type. TOML has no null, so None is left out."""
    _, meta = get_args(wanted)
    (found,), definitions = msgspec.json.schema_components([wanted])
    assert not definitions
    schema = _without_null(found)
    names = (meta.extra or {}).get("one_of")
    if names is not None:
        schema["enum"] = list(policies if names == "policies" else names)
    _use_dollar(schema)
    return schema


def _use_dollar(schema: Any) -> None:
    """Write the end of a text as `$` in all patterns; only Python knows `\\Z`."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = schema["pattern"].replace("\\Z", "$")
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            _use_dollar(inner)


def _without_null(schema: Schema) -> Schema:
    options = schema.pop("anyOf", None)
    if options is None:
        return schema
    rest = [_without_null(option) for option in options if option.get("type") != "null"]
    return {**rest[0], **schema} if len(rest) == 1 else {**schema, "anyOf": rest}
