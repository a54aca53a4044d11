"""Tables from results: medians over the repeats, and ratios to one of the contestants."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .contestants import CONTESTANTS, DIRECT
from .workloads import WORKLOADS, Workload

Runs = list[dict[str, Any]]


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values present."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Of fewer, a percentile is only another name for the largest.
_ENOUGH = {"p99": 100, "p99.9": 1000}


def _of(runs: Runs, kind: str, name: str) -> float | None:
    return median(
        run[kind].get(name)
        for run in runs
        if run[kind] and run[kind].get("count", 0) >= _ENOUGH.get(name, 0)
    )


def _per(runs: Runs, unit: str, key: str) -> float | None:
    """Microseconds of CPU per request or chunk."""
    return median(run[key] / run[unit] * 1e6 if run[unit] else None for run in runs)


def _rate(runs: Runs, unit: str) -> float | None:
    return median(run[unit] / run["seconds"] for run in runs)


def _show(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    # Near zero the sign is noise.
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def _sorted_runs(document: dict[str, Any]) -> dict[str, dict[str, Runs]]:
    """Results by workload and contestant, in the order they were taken."""
    found: dict[str, dict[str, Runs]] = {}
    for record in document["records"]:
        by_name = found.setdefault(record["workload"], {})
        by_name.setdefault(record["contestant"], []).append(record["result"])
    return found


def summary(document: dict[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """The medians by workload and contestant, as in the tables, for programs."""
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, by_contestant in _sorted_runs(document).items():
        load = WORKLOADS[name]
        direct = by_contestant.get(DIRECT, [])
        for contestant, runs in by_contestant.items():
            result.setdefault(name, {})[contestant] = _medians(load, runs, direct)
    return result


def _medians(load: Workload, runs: Runs, direct: Runs) -> dict[str, float | None]:
    unit = "chunks" if load.per_chunk else "requests"

    def added(kind: str, which: str) -> float | None:
        mine, base = _of(runs, kind, which), _of(direct, kind, which)
        return None if mine is None or base is None else mine - base

    medians: dict[str, float | None] = {
        "per_s": _rate(runs, unit),
        "cpu_us": _per(runs, unit, "proxy_cpu_s"),
        "load_cpu_us": _per(runs, unit, "load_cpu_s"),
        "server_cpu_us": _per(runs, unit, "server_cpu_s"),
        "cores": median(run["proxy_cpu_s"] / run["seconds"] for run in runs),
        "rss_mb": median(run["rss_mb"] for run in runs),
        "failures": sum(run["failures"] for run in runs),
        "others_cores": median(
            (run["machine_cpu_s"] - run["proxy_cpu_s"] - run["server_cpu_s"] - run["load_cpu_s"])
            / run["seconds"]
            for run in runs
        ),
        "scrape_ms": median(run["scrape_ms"] or None for run in runs),
    }
    # The open loop's latency begins when a request was due, which the load generator's own timer
    # makes late by up to a millisecond, for direct as well.
    for which in ("p50", "p99", "p99.9"):
        medians[f"latency_{which}_ms"] = _of(runs, "latency_ms", which)
        medians[f"transit_{which}_ms"] = _of(runs, "transit_ms", which)
        if load.unloaded:
            medians[f"added_{which}_ms"] = added("latency_ms", which)
            medians[f"added_ttft_{which}_ms"] = added("ttft_ms", which)
            medians[f"added_transit_{which}_ms"] = added("transit_ms", which)
    if load.ladder:
        medians["held"] = float(all(run["held"] for run in runs))
    if load.unloaded:
        medians["added_gap_max_ms"] = added("gap_ms", "max")
    return medians


Column = tuple[str, Callable[[dict[str, float | None], dict[str, float | None]], str]]


def _value(title: str, key: str, digits: int, scale: float = 1.0) -> Column:
    def cell(row: dict[str, float | None], _base: dict[str, float | None]) -> str:
        value = row.get(key)
        return _show(None if value is None else value * scale, digits)

    return title, cell


def _ratio(title: str, key: str) -> Column:
    def cell(row: dict[str, float | None], base: dict[str, float | None]) -> str:
        mine, other = row.get(key), base.get(key)
        return "" if not mine or not other else f"{mine / other:.2f}"

    return title, cell


def _columns(load: Workload, baseline: str) -> list[Column]:
    if not load.connections:
        return [_value("% of a core", "cores", 1, 100), _value("RSS MB", "rss_mb", 0)]
    unit = "chunk" if load.per_chunk else "request"
    columns = [_value(f"{unit}s/s", "per_s", 0)]
    if not load.paced:
        columns += [_ratio(f"× {baseline}", "per_s")]
    columns += [
        _value(f"CPU µs/{unit}", "cpu_us", 1 if load.per_chunk else 0),
        _ratio(f"× {baseline}", "cpu_us"),
    ]
    if load.ladder:
        columns += [
            _value("chunk under way ms p50", "transit_p50_ms", 1),
            _value("p99", "transit_p99_ms", 1),
            _value("held", "held", 0),
        ]
    elif load.unloaded and load.stream:
        columns += [
            _value("chunk late p50 ms", "added_transit_p50_ms", 2),
            _value("p99", "added_transit_p99_ms", 1),
            _value("p99.9", "added_transit_p99.9_ms", 1),
            _value("longest gap +ms", "added_gap_max_ms", 1),
        ]
        if not load.per_chunk:
            columns += [
                _value("TTFT +ms p50", "added_ttft_p50_ms", 2),
                _value("p99", "added_ttft_p99_ms", 1),
            ]
    elif load.unloaded:
        columns += [
            _value("added ms p50", "added_p50_ms", 2),
            _value("p99", "added_p99_ms", 1),
            _value("p99.9", "added_p99.9_ms", 1),
        ]
    else:
        columns += [
            _value("latency ms p50", "latency_p50_ms", 1),
            _value("p99", "latency_p99_ms", 1),
            _value("p99.9", "latency_p99.9_ms", 1),
        ]
    return [*columns, _value("RSS MB", "rss_mb", 0), _value("failed", "failures", 0)]


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ) + " |"
        for row in rows
    ]  # fmt: skip
    rule = "|" + "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def _overview(
    medians: dict[str, dict[str, dict[str, float | None]]], baseline: str, key: str
) -> str:
    """One figure of all contestants and workloads, relative to the baseline's."""
    loads = [
        name
        for name, rows in medians.items()
        if (rows.get(baseline) or {}).get(key)
        and WORKLOADS[name].connections
        and (key != "per_s" or not WORKLOADS[name].paced)
    ]
    contestants = dict.fromkeys(name for load in loads for name in medians[load])
    rows = [["", *(f"`{load}`" for load in loads)]]
    for contestant in contestants:
        if contestant == DIRECT:
            continue
        cells = []
        for load in loads:
            mine, base = medians[load].get(contestant, {}).get(key), medians[load][baseline][key]
            ratio = None if not mine or not base else mine / base
            cells.append(_show(ratio, 2 if ratio is not None and ratio < 10 else 0))
        rows.append([title(contestant), *cells])
    return _table(rows) if loads and len(rows) > 1 else ""


def markdown(document: dict[str, Any], baseline: str) -> str:
    """One table for each workload, with notes on reading them."""
    parts = []
    medians = summary(document)
    if len(medians) > 1 and baseline != DIRECT:
        for key, what in (("cpu_us", "CPU per request or chunk"), ("per_s", "Throughput")):
            if table := _overview(medians, baseline, key):
                parts.append(f"### {what}, {baseline} = 1\n\n{table}")
    for name, by_contestant in medians.items():
        load = WORKLOADS[name]
        columns = _columns(load, baseline)
        base = by_contestant.get(baseline, {})
        rows = [["", *(title for title, _ in columns)]]
        for contestant, row in by_contestant.items():
            shown = dict(row, failures=row["failures"] or None)
            if contestant == DIRECT:
                shown |= dict.fromkeys(("cpu_us", "rss_mb"))
                shown |= {key: None for key in shown if key.startswith("added_")}
            rows.append([title(contestant), *(cell(shown, base) for _, cell in columns)])
        parts.append(f"### {load.title} (`{name}`)\n\n{_table(rows)}")
        if headroom := _headroom(load, by_contestant):
            parts.append(headroom)
    if document["start_s"]:
        rows = [["", "start to first answer, s"]]
        rows += [[title(name), f"{seconds:.1f}"] for name, seconds in document["start_s"].items()]
        parts.append(f"### Start\n\n{_table(rows)}")
    parts += [f"Skipped: {title(name)}: {why}" for name, why in document["skipped"].items()]
    return "\n\n".join(parts)


def _headroom(load: Workload, by_contestant: dict[str, dict[str, float | None]]) -> str:
    """Whether the load generator was not the bottleneck."""
    direct = (by_contestant.get(DIRECT) or {}).get("per_s")
    rates = {
        name: row["per_s"] for name, row in by_contestant.items() if name != DIRECT and row["per_s"]
    }
    if load.paced or load.ladder or not direct or not rates:
        return ""
    fastest = max(rates, key=lambda name: rates[name] or 0)
    shown = [fastest, *(name for name in ("rust", "lane") if name in rates and name != fastest)]
    times = (f"{direct / (rates[name] or 1):.1f} × as fast as {title(name)}" for name in shown)
    return f"Direct is {', '.join(times)}."


def title(name: str) -> str:
    """The name of a contestant in tables."""
    base, at, revision = name.partition("@")
    if base == DIRECT:
        return "direct"
    return f"{CONTESTANTS[base].title}{f' at {revision}' if at else ''}"
