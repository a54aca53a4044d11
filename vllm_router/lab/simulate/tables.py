"""Results as tables for people and for documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_router.lab.simulate.report import Cell, Figures
from vllm_router.lab.simulate.standings import (
    BAD_OFFSET,
    FIRST_TOKEN_OFFSET,
    MEASURES,
    Loss,
    losses,
    margin,
    standings,
)

Row = Sequence[str]


def cell_rows(cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """One row per workload, load and policy: the mean over the seeds.

    The p99 time to first token and the goodput of several seeds have a 95 % confidence interval.
    """
    head = (
        "workload", "load", "policy", "TTFT p50", "p99", "TPOT p50", "p99",
        "goodput", "good/s", "hit rate", "balance", "failed",
    )  # fmt: skip
    pooled: dict[tuple[str, float, str], list[Figures]] = {}
    for cell in cells:
        pooled.setdefault((cell.workload, cell.load, cell.policy), []).append(cell.figures)
    rows: list[Row] = []
    for (workload, load, policy), them in pooled.items():
        rows.append(
            (
                workload,
                f"{load:.0%}" if load else "",
                policy,
                _seconds(f.first_p50 for f in them),
                _with_margin([f.first_p99 for f in them], "{:.3f}", " s"),
                _milliseconds(f.token_p50 for f in them),
                _milliseconds(f.token_p99 for f in them),
                _with_margin([100 * f.goodput for f in them], "{:.1f}", "%"),
                f"{_mean(f.good_per_second for f in them):.4g}",
                f"{_mean(f.hit_rate for f in them):.1%}",
                f"{_mean(f.balance for f in them):.2f}",
                str(sum(f.failed for f in them)),
            )
        )
    return head, rows


def standing_rows(cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """One row per policy: how far it is from the best of each cell."""
    head = ["policy", "all three"]
    for name in MEASURES:
        head += [name, "worst", "in"]
    rows: list[Row] = []
    for found in standings(cells):
        row = [found.policy, str(found.overall)]
        for name in MEASURES:
            worst, place = found.worst[name]
            row += [f"{found.by_measure[name]:.2f}", f"{worst:.3g}", place]
        oracle = "" if found.to_oracle is None else f"{found.to_oracle:.2f}"
        rows.append([*row, f"{found.first_p50:.2f}", oracle, f"{found.hit_rate:.1%}"])
    return [*head, "p50 TTFT", "to oracle", "hit rate"], rows


def loss_rows(cells: Sequence[Cell], policy: str) -> tuple[Row, list[Row]]:
    """Where a policy is more than 5 % behind the best, the worst first; see `losses`."""
    head = ("workload", "load", "measure", policy, "best", "of", "behind by")
    return head, [
        (
            loss.workload,
            f"{loss.load:.0%}" if loss.load else "",
            loss.measure,
            _measured(loss, loss.value),
            _measured(loss, loss.best),
            loss.winner,
            str(loss.ratio),
        )
        for loss in losses(cells, policy)
    ]


def _measured(loss: Loss, value: float) -> str:
    """The value of a measure without its offset."""
    if loss.measure == "p99 TTFT":
        return f"{value - FIRST_TOKEN_OFFSET:.3f} s"
    if loss.measure == "TPOT p99":
        return f"{1000 * value:.1f} ms"
    return f"{value - BAD_OFFSET:.1%}"


def share_rows(cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """Which part of the requests was sent to each server, per policy."""
    servers = max(len(cell.figures.shares) for cell in cells)
    head = ("workload", "load", "policy", *(f"server-{n}" for n in range(servers)))
    return head, [
        (
            cell.workload,
            f"{cell.load:.0%}" if cell.load else "",
            cell.policy,
            *(f"{share:.1%}" for share in cell.figures.shares),
        )
        for cell in cells
        if cell.seed == min(other.seed for other in cells)
    ]


def markdown(head: Row, rows: Iterable[Row]) -> str:
    """As a table of a document, with the columns in line."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _with_margin(values: Sequence[float], form: str, unit: str) -> str:
    half = margin(values)
    confidence = "" if half is None else f" ± {form.format(half)}"
    return f"{form.format(_mean(values))}{confidence}{unit}"


def _seconds(values: Iterable[float]) -> str:
    return f"{_mean(values):.3f} s"


def _milliseconds(values: Iterable[float]) -> str:
    return f"{1000 * _mean(values):.1f} ms"
