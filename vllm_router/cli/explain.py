"""`vllm-router explain`: the reasons of a routing decision, as a table."""

from __future__ import annotations

import json
import time
from typing import IO, Any

import click

from vllm_router.cli.common import Failure, run_client
from vllm_router.cli.monitor.texts import ENGLISH, Texts, reason_of
from vllm_router.cli.options import for_router
from vllm_router.cli.tables import Cell, Column, print_table
from vllm_router.observability.formatting import visible

SHOWN_DECISIONS = 20

_FIGURES = (
    ("LOAD", "load"),
    ("RUNNING", "running"),
    ("WAITING", "waiting"),
    ("IN FLIGHT", "leases"),
)


@click.command()
@for_router
@click.option("--model", metavar="M", help="For a request for this model.")
@click.option(
    "--body",
    type=click.File("rb"),
    metavar="FILE",
    help="For a request with the body in this file; - is stdin.",
)
@click.option(
    "--decisions",
    is_flag=False,
    flag_value=SHOWN_DECISIONS,
    type=click.IntRange(1, 1000),
    metavar="[N]",
    help=f"Show the last N decisions instead ({SHOWN_DECISIONS} by default).",
)
@click.option(
    "--json",
    "as_json",
    envvar="VLLM_ROUTER_EXPLAIN_JSON",
    is_flag=True,
    help="What the router says, as JSON.",
)
def explain(
    *,
    url: str,
    key: str | None,
    ca: str | None,
    model: str | None,
    body: IO[bytes] | None,
    decisions: int | None,
    as_json: bool,
) -> None:
    """Show where a request would go now, and why.

    Every server with its score (the lowest is picked) and what the score is made of, or why it is
    out. Nothing is sent to a server. Exit code 1: the request would be refused.

    \b
    vllm-router explain --model llama-3.1-8b
    vllm-router explain --body request.json
    vllm-router explain --decisions 50
    """
    if (model is not None) + (body is not None) + (decisions is not None) > 1:
        raise click.UsageError("--model, --body and --decisions exclude each other")
    content = _json_body(body) if body is not None else None

    from vllm_router.cli.router_client import RouterClient

    async def ask() -> Any:
        async with RouterClient(url, key, ca) as router:
            if decisions is not None:
                return await router.decisions(decisions)
            return await router.explain(model, content)

    found = run_client(ask)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif decisions is not None:
        _print_decisions(found)
    else:
        _print_explanation(found)
    if decisions is None and not found.get("picked") and not found.get("would_wait"):
        raise click.exceptions.Exit(1)


def _json_body(file: IO[bytes]) -> bytes:
    content = file.read()
    try:
        json.loads(content)
    except ValueError as error:  # UnicodeDecodeError is one
        raise Failure(f"--body: expected JSON, got something else: {error}") from None
    except RecursionError:
        raise Failure("--body: expected JSON, got arrays or tables nested too deeply") from None
    return content


def verdict(found: dict[str, Any], texts: Texts = ENGLISH) -> str:
    """The decision in a sentence, and the note on it."""
    named, picked = found.get("model"), found.get("picked")
    key, because = "explain_waits" if found.get("would_wait") else "explain_refused", ""
    if picked:
        key, reasons = "explain_goes", _reasons_for_pick(found, texts)
        if reasons:
            because = texts("because", reasons=texts("because_and").join(reasons))
    sentence = texts(
        key,
        model=texts("explain_model", model=named) if named else texts("explain_any"),
        server=picked,
        because=because,
        policy=found["policy"],
    )
    note = reason_of(texts, found, "note")
    return texts("sentences", first=sentence, second=note) if note else sentence


def _print_explanation(found: dict[str, Any]) -> None:
    picked = found.get("picked")
    click.echo(visible(verdict(found)))
    if found.get("session"):
        click.echo(visible(f"Session {found['session']} (from {found['session_source']})."))
    candidates, out = found.get("candidates") or [], found.get("out") or []
    # Skip parts that are zero for all candidates. Parts have their names from the formula; `LOAD`
    # is relative to capacity, as on all other pages.
    parts = [
        name
        for name in (candidates[0].get("parts") or {} if candidates else {})
        if any(row["parts"].get(name) for row in candidates)
    ]
    columns = [Column(""), Column("SERVER")]
    columns += [Column(title, right=True) for title, _ in _FIGURES]
    columns += [Column("CAPACITY", right=True), Column("SCORE", right=True)]
    columns += [Column(name.replace("_", " "), right=True) for name in parts]
    columns += [Column("WHY OUT")] if out else []
    rows: list[list[Cell | str]] = []
    for row in candidates:
        chosen = row["server"] == picked
        name = Cell(row["server"], "bold green" if chosen else "")
        figures = [_figure(row["parts"].get(part)) for part in parts]
        rows.append(
            ["→" if chosen else " ", name, *_load(row), _figure(row.get("score")), *figures]
            + ([""] if out else [])
        )
    for row in out:
        why = f"{row.get('state', '')}: {row.get('reason', '')}".strip(": ")
        blank = [""] * (len(parts) + 1)
        rows.append([" ", Cell(row["server"], "dim"), *_load(row), *blank, Cell(why, "red")])
    if rows:
        print_table(columns, rows)
    if candidates and found.get("formula"):
        click.echo(visible(found["formula"]).replace("; ", "\n"))


def _reasons_for_pick(found: dict[str, Any], texts: Texts) -> list[str]:
    """The main reasons for the choice; empty where there is no score."""
    candidates = found.get("candidates") or []
    row = next((row for row in candidates if row["server"] == found["picked"]), None)
    if row is None:
        return []
    if found.get("owner") == found["picked"]:
        return [texts("because_owner")]
    if len(candidates) == 1:
        return [texts("because_only")]
    parts = row.get("parts") or {}
    others = [other for other in candidates if other is not row]
    reasons = []
    if row.get("score") is not None:
        load, lowest = row["load"], min(other["load"] for other in others)
        if load < lowest:
            reasons.append(texts("because_lowest_load"))
        elif load == lowest:
            reasons.append(texts("because_no_lower_load"))
        cached = parts.get("cached_tokens", 0)
        if cached >= 1:
            prompt = cached + parts.get("waste_tokens", 0) + parts.get("uncached_tokens", 0)
            figures = {"cached": f"{cached:.0f}", "all": f"{prompt:.0f}"}
            reasons.append(texts("because_cached", **figures))
        if not reasons:
            reasons.append(texts("because_lowest_score"))
    return reasons


def _load(row: dict[str, Any]) -> list[str]:
    return [*(_figure(row.get(key)) for _, key in _FIGURES), _figure(row.get("capacity"))]


def _figure(value: Any) -> str:
    """Four digits are enough to compare scores."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _print_decisions(rows: list[dict[str, Any]]) -> None:
    titles = ("TIME", "SERVER", "MODEL", "PATH", "STATUS", "OUTCOME", "ATTEMPTS", "RETRIED FOR")
    durations = ("FIRST BYTE", "DURATION")
    columns = [Column(title) for title in titles]
    columns[6:6] = [Column(title, right=True) for title in durations]
    print_table(
        columns,
        [
            [
                time.strftime("%H:%M:%S", time.localtime(row.get("time", 0))),
                row.get("server") or "",
                row.get("model") or "",
                row.get("path") or "",
                str(row.get("status") or ""),
                row.get("outcome") or "",
                _seconds(row.get("first_byte_seconds")),
                _seconds(row.get("duration_seconds")),
                str(row.get("attempts", "")),
                ", ".join(row.get("retries") or ()),
            ]
            for row in rows
        ],
    )


def _seconds(value: Any) -> str:
    return f"{value:.3f} s" if isinstance(value, int | float) else ""
