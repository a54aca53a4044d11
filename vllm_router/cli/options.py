"""Options of all commands that connect to a router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def for_router(command: F) -> F:
    """Add the options `key` and `ca` of `RouterClient`."""
    command = click.option(
        "--ca",
        envvar="VLLM_ROUTER_CA",
        show_envvar=True,
        metavar="FILE",
        help="PEM file of the authorities that may have signed its certificate.",
    )(command)
    return click.option(
        "--key",
        envvar="VLLM_ROUTER_KEY",
        show_envvar=True,
        help="Its admin or status key. Other users of this machine can see the option.",
    )(command)
