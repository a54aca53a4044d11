"""Outages: models without an available server, and since when. Pure: times are arguments."""

from __future__ import annotations

from vllm_router.observability.model_rows import ModelRow, without_server


class Outages:
    """The models' rows, and the beginning of each outage in Unix time."""

    def __init__(self) -> None:
        self.rows: list[ModelRow] = []
        self.since: dict[str, float] = {}
        self.budgets: dict[str, float | None] = {}
        """The share of the error budget left by model, as `Metrics.budget_left` has it."""

    def follow(self, rows: list[ModelRow], now: float, wall: float, *, probed: bool) -> None:
        """Take the rows of now. `now` is the event loop's time, `wall` the Unix time.

        Before all servers were `probed` once, a model without a server is no outage. An outage that
        was there at the first look began when the last of its servers changed its state.
        """
        self.rows = rows
        if not probed:
            return
        missing = frozenset(without_server(self.rows))
        self.since = {
            row.name: self.since[row.name]
            if row.name in self.since
            else round(_began(row, now, wall), 3)
            for row in self.rows
            if row.name in missing
        }


def _began(row: ModelRow, now: float, wall: float) -> float:
    ages = [now - server.state_since for server in row.listing if server.state_since]
    return wall - max(0.0, min(ages, default=0.0))
