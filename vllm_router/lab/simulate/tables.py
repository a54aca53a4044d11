"""Results as tables for people and for documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_router.lab.simulate.report import Cell, Figures, Standing, standings

Row = Sequence[str]


def cell_rows(cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """One row per workload, load and policy; the mean over the seeds."""
    head = (
        "workload", "load", "policy", "TTFT p50", "p99", "TPOT p50", "p99",
        "goodput", "hit rate", "balance", "failed",
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
                _seconds(f.first_p99 for f in them),
                _milliseconds(f.token_p50 for f in them),
                _milliseconds(f.token_p99 for f in them),
                f"{_mean(f.goodput for f in them):.1%}",
                f"{_mean(f.hit_rate for f in them):.1%}",
                f"{_mean(f.balance for f in them):.2f}",
                str(sum(f.failed for f in them)),
            )
        )
    return head, rows


def standing_rows(cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """One row per policy: how far it is from the best of each cell."""
    head = ("policy", "p99 TTFT", "worst", "in", "p50 TTFT", "not good", "hit rate")
    found: list[Standing] = standings(cells)
    return head, [
        (
            row.policy,
            f"{row.first_p99:.2f}",
            f"{row.worst:.3g}",
            row.worst_cell,
            f"{row.first_p50:.2f}",
            f"{row.bad:.2f}",
            f"{row.hit_rate:.1%}",
        )
        for row in found
    ]


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


def _seconds(values: Iterable[float]) -> str:
    return f"{_mean(values):.3f} s"


def _milliseconds(values: Iterable[float]) -> str:
    return f"{1000 * _mean(values):.1f} ms"
