"""Parts that several commands share: defaults, the one-line failure, loading, running a client."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vllm_router.errors import ConfigError, RouterError

if TYPE_CHECKING:
    from vllm_router.config.schema import Config
    from vllm_router.config.source import ConfigSource

DEFAULT_CONFIG = "servers.toml"
DEFAULT_URL = "http://127.0.0.1:8888"

T = TypeVar("T")


class Failure(click.ClickException):
    """The command cannot do its work; `message` is one line for stderr."""

    exit_code = 2


def load_config(source: ConfigSource, exit_code: int) -> Config:
    """Load a configuration file; if it is invalid, print each problem with its line and exit."""
    try:
        return source.load()
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
            if problem in error.excerpts:
                click.echo(error.excerpts[problem], err=True)
        raise click.exceptions.Exit(exit_code) from None


def run_client(work: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
    """Run an async client function; raises Failure for a RouterError."""
    import trio

    try:
        return trio.run(work, *args)
    except RouterError as error:
        raise Failure(str(error)) from None
