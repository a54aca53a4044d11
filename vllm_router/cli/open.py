"""`vllm-router open`: open the page in a browser, signed in."""

from __future__ import annotations

import os
import webbrowser

import click

from vllm_router.cli.common import run_client
from vllm_router.cli.options import for_router


@click.command("open")
@for_router
@click.option("--page", metavar="URL", help="Where the browser finds the page, if not at URL.")
@click.option(
    "--print",
    "only_print",
    envvar="VLLM_ROUTER_OPEN_PRINT",
    is_flag=True,
    help="Do not start a browser.",
)
def open_page(
    *, url: str, key: str | None, ca: str | None, page: str | None, only_print: bool
) -> None:
    """Sign a browser in to a router's page, so that it may drain servers.

    On the router's machine its user (and root) needs no key; elsewhere --key
    is the admin key. Prints a link that works once, within five minutes, and opens it where there
    is a desktop.

    \b
    vllm-router open
    vllm-router open --print --page https://llm.example
    """
    from vllm_router.cli.router_client import RouterClient

    async def ask() -> tuple[str, str]:
        async with RouterClient(url, key, ca) as router:
            return router.url, await router.sign_in()

    base, code = run_client(ask)
    link = f"{_reachable(page or base)}/#sign-in={code}"
    click.echo(link)
    if not only_print and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(link)


def _reachable(url: str) -> str:
    """Replace a wildcard address, which a browser cannot open."""
    near = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    return near.rstrip("/")
