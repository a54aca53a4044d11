"""Parts that several commands share: defaults, the one-line failure, loading, running a client."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vllm_router.errors import ConfigError, RouterError
from vllm_router.runtime.early_signals import raise_on_interrupt

if TYPE_CHECKING:
    from vllm_router.config.schema import Config
    from vllm_router.config.source import ConfigSource

DEFAULT_CONFIG = "servers.toml"

NO_CONFIG = f"no {DEFAULT_CONFIG} here: name a file with --config FILE"
DEFAULT_URL = "http://127.0.0.1:8888"

KEY_ADVICE = {
    "missing_api_key": "this router needs a key: give its status or admin key with --key, or in "
    "the variable VLLM_ROUTER_KEY",
    "invalid_api_key": "this router does not accept the key: --key or VLLM_ROUTER_KEY must be its "
    "status key, or the admin key for changes",
}
"""What to do about a refused key, by the error's code."""

T = TypeVar("T")


class Failure(click.ClickException):
    """The command cannot do its work; `message` is one line for stderr."""

    exit_code = 2


def open_closed_streams() -> None:
    """Open /dev/null as stdin, stdout or stderr where the caller has closed it.

    Python has None for a closed one, and the next file or socket would take its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
        stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115  stays open
        setattr(sys, name, stream)


def discard_output() -> None:
    """Lead stdout to /dev/null: what Python flushes at the end would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def say_error(text: str) -> None:
    """One line on stderr. On a terminal its beginning, up to the first colon, is red.

    Not where NO_COLOR is set (https://no-color.org).
    """
    has_colour = _has_colour()
    if has_colour:
        head, colon, rest = text.partition(": ")
        text = click.style(head + colon, fg="red", bold=True) + rest
    with contextlib.suppress(OSError):  # the exit code says it, too
        click.echo(text, err=True, color=has_colour or None)


def _has_colour() -> bool:
    environ = os.environ
    return sys.stderr.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def existing_config(file: str | None, advice: str = "") -> str:
    """The configuration file that was given, or the default one.

    Raises Failure if none was given, and the default one does not exist.
    """
    if file is None and not os.path.lexists(DEFAULT_CONFIG):
        raise Failure(NO_CONFIG + advice)
    return file or DEFAULT_CONFIG


def load_config(source: ConfigSource, exit_code: int) -> Config:
    """Load a configuration file; if it is invalid, print each problem with its line and exit."""
    try:
        return source.load()
    except ConfigError as error:
        for problem in error.problems:
            say_error(problem)
            if problem in error.excerpts:
                click.echo(error.excerpts[problem], err=True)
        raise click.exceptions.Exit(exit_code) from None


def run_client(work: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
    """Run an async client function; raises Failure for a RouterError."""
    import trio

    try:
        raise_on_interrupt()
        return trio.run(work, *args)
    except RouterError as error:
        raise Failure(str(error)) from None
