"""`vllm-router monitor`."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import click
import trio

from vllm_router.cli.common import discard_output
from vllm_router.cli.monitor.link import Feed, NoFeed
from vllm_router.cli.monitor.log_file import last_lines
from vllm_router.cli.monitor.plain import print_lines
from vllm_router.cli.monitor.screen import End, Screen
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.terminal import on_terminal
from vllm_router.cli.monitor.texts import LANGUAGES, Texts, language_of
from vllm_router.cli.options import for_router
from vllm_router.lab.finite_range import FiniteRange
from vllm_router.runtime.early_signals import raise_on_interrupt

LAST_LINES = 10
"""Lines of a dead router's log that are shown."""


class NoRouterThere(click.ClickException):
    """Nothing to watch."""

    exit_code = 2


@click.command()
@for_router
@click.option("--models", is_flag=True, help="Show the models of each server; key m.")
@click.option(
    "--interval",
    default=5.0,
    show_default=True,
    type=FiniteRange(0.1, 3600),
    help="Seconds between two lines, if the output is no terminal.",
)
@click.option(
    "--lang",
    type=click.Choice(LANGUAGES),
    help="Language on a terminal.  [default: by LC_ALL, LC_MESSAGES, LANG]",
)
@click.option("--of-router", "log", metavar="LOG", hidden=True, type=click.Path(path_type=Path))
def monitor(
    *,
    url: str,
    key: str | None,
    ca: str | None,
    models: bool,
    interval: float,
    lang: str | None,
    log: Path | None,
) -> None:
    """Watch a running router: servers, load, requests, events; drain, undrain, reload.

    Full screen on a terminal (? shows the keys), else a line every few seconds.

    \b
    vllm-router monitor
    vllm-router monitor https://llm.example --models
    vllm-router monitor --lang zh
    vllm-router monitor --interval 60 >> load.log
    """
    feed = Feed(url, key, ca)
    raise_on_interrupt()
    try:
        if on_terminal():
            if isinstance(sys.stdout, io.TextIOWrapper):
                # A character that the terminal's encoding lacks is no reason to end.
                sys.stdout.reconfigure(errors="replace")
            texts = Texts(lang or language_of(os.environ))
            view = View(feed.url, log is not None, models, texts=texts)
            end = trio.run(Screen(feed, view, log).run)
        else:
            end = trio.run(_plain, feed, interval)
    except NoFeed as error:
        raise NoRouterThere(f"no router answers at {feed.url}: {error}") from None
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe.
        discard_output()
        return
    if end is End.HANGUP:
        # What the closed terminal did not take would change the exit code.
        discard_output()
    if end is End.ROUTER_DIED and log is not None:
        click.echo(f"\nthe router has died; the last lines of its log {log}:", err=True)
        for line in last_lines(log, LAST_LINES):
            click.echo(line, err=True)
    if log is not None:
        raise click.exceptions.Exit(end)


async def _plain(feed: Feed, interval: float) -> End:
    problem: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def until_signal(*, task_status: trio.TaskStatus[None]) -> None:
            numbers = (signal.SIGTERM, signal.SIGINT)
            with trio.open_signal_receiver(*numbers) as received:
                task_status.started()
                async for _ in received:
                    nursery.cancel_scope.cancel(reason="signal")

        await nursery.start(until_signal)
        try:
            await print_lines(feed, interval)
        except (NoFeed, OSError) as error:  # OSError: stdout cannot be written
            # Raised outside of the nursery, which would wrap it.
            problem = error
            nursery.cancel_scope.cancel(reason="no feed")
    if problem is not None:
        raise problem
    return End.USER
