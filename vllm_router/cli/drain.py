"""`vllm-router drain` and `undrain`."""

from __future__ import annotations

import sys

import click

from vllm_router.cli.common import run_client
from vllm_router.cli.options import for_router


def _named(_: click.Context, __: click.Parameter, name: str) -> str:
    """Refuse what a script passes if its variable is empty."""
    if not name.strip():
        raise click.UsageError("SERVER: expected the name of a server, got an empty one")
    return name


@click.command()
@click.argument("server", callback=_named)
@for_router
def drain(*, server: str, url: str, key: str | None, ca: str | None) -> None:
    """Send a server no new requests, and wait until its last one has ended.

    Ctrl-C ends the waiting, not the drain; `undrain` takes the server back.

    \b
    vllm-router drain gpu-1
    vllm-router drain gpu-1 --url https://llm.example
    """
    from vllm_router.cli.router_client import RouterClient

    async def work() -> None:
        async with RouterClient(url, key, ca) as router:
            await router.drain(server, on=True)
            async for number in router.watch_drain(server):
                _progress(f"{server}: {number} in flight", last=number == 0)

    try:
        run_client(work)
    except KeyboardInterrupt:
        click.echo(f"\n{server} keeps draining; vllm-router undrain {server} takes it back")
        raise click.exceptions.Exit(130) from None
    click.echo(f"{server} is drained")


@click.command()
@click.argument("server", callback=_named)
@for_router
def undrain(*, server: str, url: str, key: str | None, ca: str | None) -> None:
    """Take a drained server back.

    \b
    vllm-router undrain gpu-1
    """
    from vllm_router.cli.router_client import RouterClient

    async def work() -> None:
        async with RouterClient(url, key, ca) as router:
            await router.drain(server, on=False)

    run_client(work)
    click.echo(f"{server} takes requests again")


def _progress(text: str, *, last: bool) -> None:
    """One line that changes on a terminal, and a line for each change elsewhere."""
    terminal = sys.stdout.isatty()
    click.echo(f"\r{text}\x1b[K" if terminal else text, nl=last or not terminal)
