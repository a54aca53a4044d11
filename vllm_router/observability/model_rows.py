"""The servers of each model: how many, how many are available, and their load. Read-only.

Models are named as the servers name them. Several names that one engine has for the same model are
one row; LoRA adapters belong to the row of their model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.model_catalog import parent_of
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State

AVAILABLE = frozenset({State.UP, State.FULL, State.REFUSING})
"""States in which a server gets requests."""

MAX_ROWS = 100


class ModelRow(msgspec.Struct):
    """One model.

    names: further names of the model, its LoRA adapters included: requests for them count here.
    adapters: how many of these are adapters.
    aliases: public names of `[models]` that lead here.
    fallback: the public name that serves the model's requests now because no server has it.
    servers, available: how many servers of the configuration list it, and get requests.
    tokens_per_s: tokens that its servers generate; None if no engine exports the counter.
    listing: the servers that list it.
    """

    name: str
    names: list[str] = []
    adapters: int = 0
    aliases: list[str] = []
    fallback: str | None = None
    servers: int = 0
    available: int = 0
    draining: int = 0
    running: float = 0.0
    waiting: float = 0.0
    capacity: int = 0
    active: float = 0.0
    tokens_per_s: float | None = None
    listing: list[Server] = []

    @property
    def load(self) -> float:
        """(running + 0.5 × waiting) / capacity of the available servers."""
        return self.active / self.capacity if self.capacity else 0.0


class ModelCount:
    """Counts servers by model, one after the other."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._first_names = _first_names(fleet.servers.values())
        self._rows: dict[str, ModelRow] = {}
        self._row_of: dict[str, ModelRow] = {}
        self._counting: dict[tuple[str, ...], list[ModelRow]] = {}
        """The rows in which a server with these models counts: in most fleets all have the same."""
        for name in sorted(fleet.expected):
            _row(name, self._rows, self._row_of, self._first_names)

    def add(self, server: Server, state: State, tokens_per_s: float | None = None) -> None:
        """Count a server of the configuration, which is in this state now."""
        catalog = server.catalog
        rows = self._counting.get(catalog.own)
        if rows is None:
            found = [
                _row(name, self._rows, self._row_of, self._first_names) for name in catalog.own
            ]
            # A server counts once per model.
            rows = self._counting[catalog.own] = list({id(row): row for row in found}.values())
        for row in rows:
            _count(server, row, state, tokens_per_s)
        if catalog.adapters:
            _count_adapters(server, self._row_of)

    def rows(self, now: float) -> list[ModelRow]:
        """The rows of all models that are expected or listed, by name; at most MAX_ROWS."""
        _name_publicly(self._fleet, self._rows, self._row_of, now)
        return [self._rows[name] for name in sorted(self._rows)[:MAX_ROWS]]


def _first_names(servers: Iterable[Server]) -> dict[str, str]:
    """For each name of a model with several names on any server, one that is smaller, or itself."""
    found: dict[str, str] = {}
    for server in servers:
        for name, first in server.catalog.twins.items():
            found[name] = min(found.get(name, first), first)
    return found


def _row(
    name: str, rows: dict[str, ModelRow], row_of: dict[str, ModelRow], first_names: dict[str, str]
) -> ModelRow:
    """The row of a name, which is new if neither the name nor the model has one."""
    known = row_of.get(name)
    if known is not None:
        return known
    first = name
    while (smaller := first_names.get(first, first)) != first:
        first = smaller
    row = rows.get(first)
    if row is None:
        row = rows[first] = row_of[first] = ModelRow(first)
    if name != first:
        row.names.append(name)
        row_of[name] = row
    return row


def _count(server: Server, row: ModelRow, state: State, tokens_per_s: float | None) -> None:
    load = server.load_estimate
    row.listing.append(server)
    row.servers += 1
    row.running += load.running
    row.waiting += load.waiting
    if tokens_per_s is not None:
        row.tokens_per_s = (row.tokens_per_s or 0.0) + tokens_per_s
    if state in AVAILABLE:
        row.available += 1
        row.capacity += server.capacity
        row.active += load.running + 0.5 * load.waiting
    elif state is State.DRAINING:
        row.draining += 1


def _count_adapters(server: Server, row_of: dict[str, ModelRow]) -> None:
    cards = server.catalog.cards
    for name in server.catalog.adapters:
        parent = row_of.get(parent_of(cards.get(name, {})))
        if parent is not None and name not in parent.names:
            parent.names.append(name)
            parent.adapters += 1


def _name_publicly(
    fleet: Fleet, rows: dict[str, ModelRow], row_of: dict[str, ModelRow], now: float
) -> None:
    """Add aliases and fallbacks, and the models of `[models]` that no server lists."""
    names = fleet.names
    for public in names.rules:
        served = names.served(public)
        row = row_of.get(served)
        if row is None:
            row = rows[served] = row_of[served] = ModelRow(served)
        if public not in (row.name, *row.names):
            row.aliases.append(public)
        if not row.available and row.fallback is None:
            found = names.first_available(public, lambda one: fleet.available(one, now))
            if found is not None and found != public:
                row.fallback = found


def without_server(rows: Sequence[ModelRow]) -> list[str]:
    """The models without an available server."""
    return [row.name for row in rows if not row.available]
