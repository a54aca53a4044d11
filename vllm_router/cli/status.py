"""`vllm-router status`: a table of the servers of a running router."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from vllm_router.cli.common import run_client
from vllm_router.cli.options import for_router
from vllm_router.observability.formatting import visible

if TYPE_CHECKING:
    from vllm_router.cli.router_client import ServerStatus, Status
    from vllm_router.cli.tables import Cell


@click.command()
@for_router
@click.option(
    "--json",
    "as_json",
    envvar="VLLM_ROUTER_STATUS_JSON",
    is_flag=True,
    help="Everything the router says, as JSON.",
)
def status(*, url: str, key: str | None, ca: str | None, as_json: bool) -> None:
    """Show the load and state of every server of a running router.

    \b
    vllm-router status
    vllm-router status https://llm.example --key "$KEY"
    """
    from vllm_router.cli.router_client import RouterClient

    async def ask() -> Status:
        async with RouterClient(url, key, ca) as router:
            return await router.status()

    found = run_client(ask)
    if as_json:
        click.echo(json.dumps({"health": found.health, "load": found.load}, indent=2))
    else:
        _print_status(found, shared=isinstance(found.health.get("shared"), dict))
        _print_routers(found)


_FIGURES = ("LOAD", "RUNNING", "WAITING", "IN FLIGHT", "ELSEWHERE", "CAPACITY")
_STYLES = {
    "up": "green",
    **dict.fromkeys(("full", "draining", "asleep", "paused", "silent", "refusing"), "yellow"),
}


def _print_status(found: Status, *, shared: bool) -> None:
    """`shared`: with the requests of the other routers."""
    from vllm_router.cli.tables import Cell, Column, print_table

    figures = [title for title in _FIGURES if shared or title != "ELSEWHERE"]
    titles = ("SERVER", "STATE", *figures, "MODELS", "REASON")
    rows: list[list[Cell | str]] = [
        [
            server.name,
            Cell(server.state, _STYLES.get(server.state, "bold red")),
            _figure(server.load, 2),
            _figure(server.running),
            _figure(server.waiting),
            _figure(server.in_flight),
            *([_figure(server.elsewhere)] if shared else ()),
            _capacity(server),
            ", ".join(server.models),
            server.reason,
        ]
        for server in found.servers
    ]
    print_table([Column(title, right=title in _FIGURES) for title in titles], rows)


def _print_routers(found: Status) -> None:
    """The routers that share state with this one; nothing without `[shared]`."""
    from vllm_router.cli.tables import Cell, Column, print_table

    shared = found.health.get("shared")
    if not isinstance(shared, dict):
        return
    click.echo()
    if not shared.get("up"):
        problem = f"shared state is down: {shared.get('store')}: {shared.get('problem')}"
        click.secho(visible(problem), fg="red")
    version = found.health.get("version")
    rows: list[list[Cell | str]] = []
    routers = shared.get("routers")
    for router in routers if isinstance(routers, list) else ():
        if not isinstance(router, dict):
            continue
        state, style = ("shares", "green") if router.get("live") else ("silent", "bold red")
        notes = [] if router.get("same_configuration") else ["another configuration"]
        notes += [] if router.get("version") == version else ["another version"]
        rows.append(
            [
                str(router.get("name")),
                Cell(state, style),
                str(router.get("version")),
                _figure(_number(router.get("uptime"))) + " s",
                _figure(_number(router.get("in_flight"))),
                ", ".join(notes),
            ]
        )
    if not rows:
        click.echo("no other router shares state with this one")
        return
    titles = ("ROUTER", "STATE", "VERSION", "UP FOR", "IN FLIGHT", "NOTE")
    print_table([Column(title, right=title in ("UP FOR", "IN FLIGHT")) for title in titles], rows)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _capacity(server: ServerStatus) -> str:
    """The capacity; with a mark if it is not configured."""
    mark = {"learnt": " learnt", "assumed": " assumed"}.get(server.capacity_source, "")
    return _figure(server.capacity) + mark


def _figure(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"
