"""Arguments and options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from vllm_router.cli.common import DEFAULT_CONFIG, DEFAULT_URL

F = TypeVar("F", bound=Callable[..., Any])

config_file = click.option(
    "--config",
    "file",
    envvar="VLLM_ROUTER_CONFIG",
    metavar="FILE",
    help=f"Servers and settings.  [default: {DEFAULT_CONFIG}]",
)
"""Add `file`, the path that was given or None, see `existing_config`."""


def for_router(command: F) -> F:
    """Add `url`, `key` and `ca` of `RouterClient`; the URL is an argument or an option."""

    @wraps(command)
    def with_one_url(
        *args: Any, url: str | None, url_option: str | None, key: str | None, **options: Any
    ) -> Any:
        key = key.strip() if key is not None else None  # a key from a file often ends in a newline
        if key and not (key.isascii() and key.isprintable()):
            # Not shown: it is a secret, perhaps with one wrong character.
            raise click.UsageError("--key: expected a key of visible ASCII characters")
        if url is not None and url_option is not None and url != url_option:
            raise click.UsageError(f"two routers are given: {url} and --url {url_option}")
        found = url or url_option or os.environ.get("VLLM_ROUTER_URL") or DEFAULT_URL
        return command(*args, url=found, key=key, **options)

    wrapped: Any = with_one_url
    for decorate in (
        click.option(
            "--ca",
            envvar="VLLM_ROUTER_CA",
            show_envvar=True,
            metavar="FILE",
            help="PEM file of the authorities that may have signed its certificate.",
        ),
        click.option(
            "--key",
            envvar="VLLM_ROUTER_KEY",
            show_envvar=True,
            help="Its admin or status key. Other users of this machine can see the option.",
        ),
        click.option(
            "--url",
            "url_option",
            allow_from_autoenv=False,
            metavar="URL",
            help=f"The router's URL; the same as the argument.  [env var: VLLM_ROUTER_URL; "
            f"default: {DEFAULT_URL}]",
        ),
        click.argument("url", required=False),
    ):
        wrapped = decorate(wrapped)
    found: F = wrapped
    return found
