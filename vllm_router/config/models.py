"""The `[models]` table: aliases, fallbacks and policies per model. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_router.config.model_aliases import ModelRule, Models
from vllm_router.config.server_url import escaped, joined
from vllm_router.config.toml_reader import Reader, shown_value
from vllm_router.config.types import Bool, Model, PolicyName

MODEL_KEYS: dict[str, Any] = {
    "serves": Model,
    "fallback": Model,
    "hidden": Bool,
    "policy": PolicyName,
}


Rules = tuple[tuple[str, ModelRule], ...]


def read_models(reader: Reader, table: object) -> Rules:
    """Read the table; problems go to `reader`. A string is short for `{ serves = "…" }`."""
    if not isinstance(table, dict):
        reader.table("models", table, {})
        return ()
    rules: dict[str, ModelRule] = {}
    for name, entry in table.items():
        path = joined("models", name)
        if isinstance(entry, str):
            entry = {"serves": entry}
        if not name:
            reader.problem(path, "expected the name of a model, got an empty one")
        elif isinstance(entry, dict):
            rules[name] = ModelRule(**reader.table(path, entry, MODEL_KEYS))
        else:
            reader.problem(
                path,
                f"expected the servers' name of the model or a table, got {shown_value(entry)}",
            )
    for name, key, text in Models(rules).problems():
        reader.problem(f"{joined('models', name)}.{key}", "".join(map(escaped, text)))
    return tuple(rules.items())


def unserved_models(rules: Rules, served: Collection[str]) -> list[str]:
    """Models that the table names and no server has, one line each, for the log.

    `served` are the model names of all servers.
    """
    models = Models(rules)
    lines = []
    for name, rule in rules:
        if models.served(name) not in served:
            lines.append(f"models.{name}: no server has {models.served(name)!r}")
        fallback = rule.fallback
        if fallback is not None and fallback not in models.rules and fallback not in served:
            lines.append(f"models.{name}.fallback: no server has {fallback!r}")
    return lines


def changed_models(before: Rules, after: Rules) -> list[str]:
    """The changes of a reload, for the log."""
    old, new = dict(before), dict(after)
    parts = [f"model +{name}" for name in new if name not in old]
    parts += [f"model -{name}" for name in old if name not in new]
    parts += [f"model {name}" for name, rule in new.items() if old.get(name, rule) != rule]
    return ["".join(map(escaped, part)) for part in parts]
