"""The `[slo]` table: service level objectives per model. Pure."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_router.config.server_url import joined
from vllm_router.config.toml_reader import Reader
from vllm_router.config.types import Seconds

FIRST_TOKEN_BOUNDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Buckets of the histogram of first tokens, in seconds. An objective is one of them, so that
Prometheus counts exactly what the objective says."""

FirstToken = Annotated[
    Seconds | None,
    Meta(
        description="number of seconds > 0",
        extra_json_schema={"enum": list(FIRST_TOKEN_BOUNDS)},
    ),
]
GoodShare = Annotated[float, Meta(ge=0.5, lt=1, description="number from 0.5 to below 1")]


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of a model should get.

    first_token: seconds in which the first token of a stream must come; None for no objective.
    first_token_share: the share of streams for which it must.
    success_share: the share of requests that must not end in an error of the servers or the router.
    """

    first_token: FirstToken = None
    first_token_share: GoodShare = 0.95
    success_share: GoodShare = 0.999


class SloConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`default` is for all models without an objective of their own."""

    default: Objective = Objective()
    models: tuple[tuple[str, Objective], ...] = ()

    def of(self, model: str) -> Objective:
        """The objective of a model by its public name."""
        return dict(self.models).get(model, self.default)


OBJECTIVE_KEYS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(Objective)
}
SLO_KEYS: dict[str, Any] = {**OBJECTIVE_KEYS, "models": None}


def read_slo(reader: Reader, table: object) -> SloConfig:
    """Read the table; problems go to `reader`. A model's keys override the table's."""
    if not isinstance(table, dict):
        reader.table("slo", table, {})
        return SloConfig()
    listed = table.get("models", {})
    common = {key: value for key, value in table.items() if key != "models"}
    values = reader.table("slo", common, OBJECTIVE_KEYS)
    _check(reader, "slo", values)
    models: dict[str, Objective] = {}
    if not isinstance(listed, dict):
        reader.table("slo.models", listed, {})
        listed = {}
    for name, entry in listed.items():
        path = joined("slo.models", name)
        own = reader.table(path, entry, OBJECTIVE_KEYS)
        _check(reader, path, own)
        models[name] = Objective(**{**values, **own})
    return SloConfig(default=Objective(**values), models=tuple(models.items()))


def _check(reader: Reader, path: str, values: dict[str, Any]) -> None:
    seconds = values.get("first_token")
    if seconds is not None and seconds not in FIRST_TOKEN_BOUNDS:
        del values["first_token"]
        bounds = ", ".join(f"{bound:g}" for bound in FIRST_TOKEN_BOUNDS)
        reader.problem(f"{path}.first_token", f"expected one of {bounds} seconds, got {seconds:g}")
