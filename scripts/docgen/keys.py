"""docs/reference/keys.md: every key of servers.toml, from the types that the parser reads by.

The meanings and units are the ones of docs/configuration.md and docs/discovery.md, so that each key
is described once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

from vllm_router.config.json_schema import json_schema
from vllm_router.config.parser import TABLES

HEAD = """\
# Every key

Every key of `servers.toml`, written from the code by `scripts/gen-docs`.
[Configuration](../configuration.md) explains them in their context,
[servers.example.toml](../../servers.example.toml) is a file to start from, and
[servers.schema.json](../servers.schema.json) checks and completes them in editors.
"""

TITLES = {
    "servers.servers": "A server: `[[servers.servers]]`",
    "config": "`[config]`",
    "run": "`[run]`",
    "models.<name>": "A model: `[models.NAME]`",
    "auth": "`[auth]`",
    "auth.keys": "A client's key: `[[auth.keys]]`",
    "limits": "`[limits]`",
    "tls": "`[tls]`",
    "log": "`[log]`",
    "slo": "`[slo]`",
    "slo.models.<name>": "Objectives of a model: `[slo.models.NAME]`",
    "shared": "`[shared]`",
    "discovery": "`[discovery]`",
    "discovery.file": "`[discovery.file]`",
    "discovery.http": "`[discovery.http]`",
    "discovery.dns": "`[discovery.dns]`",
    "discovery.kubernetes": "`[discovery.kubernetes]`",
}
"""Path in the parser's tables, and the heading."""

EXAMPLES = {
    "servers.servers.url": '"http://gpu-1:8000"',
    "servers.servers.name": '"gpu-1"',
    "servers.servers.max_in_flight": "96",
    "servers.servers.weight": "2",
    "api_key": '"${GPU_KEY}"',
    "api_key_env": '"GPU_KEY"',
    "models": '["qwen3-8b"]',
    "ca": '"gpu-ca.pem"',
    "client_certificate": '"router.pem"',
    "client_key": '"router.key"',
    "auth.admin_key": '"${ADMIN_KEY}"',
    "auth.admin_key_env": '"ADMIN_KEY"',
    "auth.status_key": '"${STATUS_KEY}"',
    "auth.status_key_env": '"STATUS_KEY"',
    "auth.protect_status": "true",
    "auth.keys_file": '"keys.toml"',
    "auth.keys.name": '"team-a"',
    "auth.keys.key": '"${TEAM_A_KEY}"',
    "auth.keys.key_env": '"TEAM_A_KEY"',
    "requests_per_minute": "600",
    "max_concurrent_requests": "64",
    "models.<name>.serves": '"Qwen/Qwen3-8B"',
    "models.<name>.fallback": '"qwen3-4b"',
    "models.<name>.hidden": "true",
    "models.<name>.policy": '"least_load"',
    "limits.max_in_flight": "96",
    "limits.key_requests_per_minute": "600",
    "limits.key_max_concurrent_requests": "20",
    "first_token": "2.5",
    "first_token_share": "0.9",
    "success_share": "0.99",
    "tls.certificate": '"router.pem"',
    "tls.key": '"router.key"',
    "tls.client_ca": '"clients-ca.pem"',
    "tls.min_version": '"1.3"',
    "tls.servers": '{ ca = "gpu-ca.pem" }',
    "shared.url": '"redis://redis.example:6379"',
    "shared.password_env": '"REDIS_PASSWORD"',
    "shared.fleet": '"prod"',
    "shared.name": '"router-1"',
    "shared.ca": '"redis-ca.pem"',
    "config.total_timeout": "900",
    "config.trusted_proxies": '["10.0.0.0/8"]',
    "config.admin_listen": '"127.0.0.1:8889"',
    "config.cors_origins": '["https://chat.example"]',
    "config.allowed_hosts": '["llm.example"]',
}
"""For keys whose default is no example, by path or by name."""


def keys_page(root: Path, policies: list[str]) -> str:
    """The whole page."""
    unnamed = set(TABLES) - set(TITLES) - {"discovery.defaults"}
    if unnamed:
        raise SystemExit(f"scripts/docgen/keys.py has no title for {', '.join(unnamed)}")
    meanings = _meanings(root)
    schema = json_schema(policies)
    parts = [HEAD]
    for path, title in TITLES.items():
        parts.append(f"\n## {title}\n\n| Key | Type | Default | Unit | Example | Meaning |\n")
        parts.append("|---|---|---|---|---|---|\n")
        properties = _properties(schema, path)
        for key, kind in TABLES[path].items():
            described = properties.get(key, {})
            unit, meaning = _meaning(meanings, path, key)
            cells = (
                f"`{key}`",
                _type(kind),
                _toml(described["default"]) if "default" in described else "",
                unit or _unit(kind),
                _example(path, key, described),
                meaning,
            )
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def _properties(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The properties of a table in the schema."""
    found = schema
    for part in path.split("."):
        found = found["properties"].get(part) or {} if "properties" in found else found
        if part == "<name>":
            return {}
        for option in found.get("anyOf", [found]):
            if option.get("type") == "object":
                found = option
        found = found.get("items", found)
    properties: dict[str, Any] = found.get("properties", {})
    return properties


def _meanings(root: Path) -> dict[str, tuple[str, str]]:
    """Unit and meaning of the rows of the tables of keys, by the key as it is written there."""
    found: dict[str, tuple[str, str]] = {}
    for page in ("configuration", "discovery"):
        section = ""
        for line in (root / f"docs/{page}.md").read_text().splitlines():
            if line.startswith("## "):
                section = line[3:].strip("`")
            row = re.match(r"\| `([\w.]+)` \| (.*) \|$", line)
            if row is None:
                continue
            cells = re.split(r" \| |\| ", row[2])
            unit = cells[1].strip() if len(cells) > 2 else ""
            name = row[1] if page == "configuration" else f"{section}.{row[1]}"
            found.setdefault(name, (unit, _from_reference(cells[-1], page)))
    return found


def _from_reference(text: str, page: str) -> str:
    """The text with its links as they are from the folder of the reference."""
    return re.sub(
        r"\]\(([^)]+)\)",
        lambda link: f"](../{page}.md{link[1]})" if link[1][0] == "#" else f"](../{link[1]})",
        text,
    )


def _meaning(meanings: dict[str, tuple[str, str]], path: str, key: str) -> tuple[str, str]:
    written = {
        "config": key,
        "servers.servers": key,
        "models.<name>": f"models.NAME.{key}",
    }.get(path, f"{path}.{key}")
    kind = path.removeprefix("discovery.")
    for name in (written, f"{kind}.{key}", f"Sources.{key}", f"discovery.{key}"):
        if name in meanings:
            return meanings[name]
    common = [meaning for name, meaning in meanings.items() if name.rpartition(".")[2] == key]
    if common:
        return common[0]
    raise SystemExit(f"{path}.{key} has no row in docs/configuration.md or docs/discovery.md")


def _type(kind: Any) -> str:
    if kind is None:
        return "table"
    base, meta = get_args(kind)
    text = str(meta.description or getattr(base, "__name__", base))
    names = (meta.extra or {}).get("one_of")
    if isinstance(names, tuple):
        text = "one of " + ", ".join(f'`"{name}"`' for name in names)
    return text.replace("|", "or").removesuffix(" (string)")


def _unit(kind: Any) -> str:
    description = str(get_args(kind)[1].description) if kind is not None else ""
    for words, unit in (("seconds", "s"), ("megabytes", "MB"), ("tokens", "tokens")):
        if f"number of {words}" in description:
            return unit
    return ""


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"`{value:g}`"
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) < 60 else "see the example file"


def _example(path: str, key: str, described: dict[str, Any]) -> str:
    value = EXAMPLES.get(f"{path}.{key}") or EXAMPLES.get(key)
    if value is None and described.get("type") in ("integer", "number", "boolean", "string"):
        default = described.get("default")
        if isinstance(default, bool):
            value = str(not default).lower()
        elif isinstance(default, int | float):
            value = f"{_near(default, described):g}"
        elif names := [name for one in described.get("anyOf", ()) for name in one.get("enum", ())]:
            value = json.dumps(next(name for name in names if name != default))
        elif default is not None:
            value = json.dumps(default)
    return f"`{key} = {value}`" if value is not None else ""


def _near(default: float, described: dict[str, Any]) -> float:
    """A value like the default that the schema accepts, too."""
    for value in (2 * default, default / 2, 1):
        most = described.get("maximum", described.get("exclusiveMaximum", value + 1e-9) - 1e-9)
        least = described.get("minimum", described.get("exclusiveMinimum", -1) + 1e-9)
        if value != default and least <= value <= most:
            return int(value) if described["type"] == "integer" else value
    return default
