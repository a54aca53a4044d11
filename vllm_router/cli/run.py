"""`vllm-router run`: options, configuration and log output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_router.cli.common import DEFAULT_CONFIG, Failure, load_config
from vllm_router.observability.formatting import FORMATS, LEVELS

if TYPE_CHECKING:
    from vllm_router.config.schema import Config, ServerConfig
    from vllm_router.config.source import ConfigSource

LOG_FILE = Path("logs/vllm-router.log")
"""Log file while the full-screen monitor uses the terminal."""


@click.command()
@click.option(
    "--config", "file", metavar="FILE", help=f"Servers and settings.  [default: {DEFAULT_CONFIG}]"
)
@click.option(
    "--server",
    "urls",
    multiple=True,
    metavar="URL",
    help="A vLLM server, instead of a file; repeatable.",
)
@click.option(
    "--demo",
    is_flag=False,
    flag_value=3,
    type=click.IntRange(1, 100),
    metavar="[N]",
    help="Start N simulated vLLM servers (3 if not said) and route to them.",
)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option(
    "-p",
    "--port",
    default=8888,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one.",
)
@click.option(
    "-c", "--console", is_flag=True, help="Log lines even on a terminal, no full-screen monitor."
)
@click.option("--log-level", type=click.Choice(LEVELS), help="[default: from the file, or info]")
@click.option("--log-format", type=click.Choice(FORMATS), help="[default: from the file, or text]")
@click.option(
    "--access-log",
    metavar="PATH|-|off",
    help="Where a line per request goes: a file, stdout (-), nowhere.  [default: the file's, or "
    "among the log lines]",
)
@click.option(
    "--front",
    type=click.Choice(["lane", "hypercorn"]),
    default="lane",
    show_default=True,
    help="The HTTP server for inference requests: the router's own (lane) or Hypercorn.",
)
@click.option(
    "--reuse-port",
    is_flag=True,
    help="Share the port with other routers that say so: a new one takes over from an old one.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1, 64),
    metavar="N",
    help="Processes that serve inference requests, on one port and with one view of the fleet.",
)
def run(
    *,
    file: str | None,
    urls: tuple[str, ...],
    demo: int | None,
    host: str,
    port: int,
    reuse_port: bool,
    console: bool,
    log_level: str | None,
    log_format: str | None,
    access_log: str | None,
    front: str,
    workers: int,
) -> None:
    """Start the router.

    Reads servers.toml and follows it while running, unless servers are given here. SIGTERM and
    SIGINT drain and stop, a second one stops at once; SIGHUP reads the configuration again, SIGUSR1
    opens the log files anew. Listening sockets that systemd passes are used instead of --host and
    --port.

    On a terminal it shows the full-screen monitor, whose Ctrl-C stops the router (q asks first),
    and logs to logs/vllm-router.log; with --console, or elsewhere, it logs to stderr.
    """
    from vllm_router.cli.monitor.terminal import on_terminal
    from vllm_router.cli.start import start
    from vllm_router.observability.log_output import LogOutput, Overrides

    if (file is not None) + bool(urls) + bool(demo) > 1:
        raise click.UsageError("--config, --server and --demo exclude each other")
    if workers > 1 and front != "lane":
        raise click.UsageError("--workers needs --front lane: Hypercorn serves in one process only")
    config, source = _configuration(file, urls, demo, workers)
    log = LOG_FILE if not console and on_terminal() else None
    access = {"on": True, "off": False}.get(access_log, access_log) if access_log else None
    try:
        output = LogOutput(Overrides(level=log_level, form=log_format, access=access), file=log)
    except OSError as error:
        raise Failure(f"cannot write {log}: {error.strerror}; --console logs here") from None
    try:
        try:
            output.apply(config.log)
        except OSError as error:
            raise Failure(f"cannot write the access log: {error}") from None
        start(
            config,
            source,
            output,
            demo or 0,
            host,
            port,
            log,
            workers,
            lane=front == "lane",
            reuse_port=reuse_port,
        )
    finally:
        output.close()


def _configuration(
    file: str | None, urls: Sequence[str], demo: int | None, workers: int
) -> tuple[Config, ConfigSource | None]:
    """The configuration given by the options, and its file source, if it has one."""
    from vllm_router.config.memory import Memory
    from vllm_router.config.parser import default_settings
    from vllm_router.config.schema import Config
    from vllm_router.config.source import ConfigSource
    from vllm_router.routing.policies import POLICY_NAMES
    from vllm_router.runtime.memory_limit import memory_limit_mb

    memory = Memory(memory_limit_mb(), workers)
    if demo:
        return Config(servers=(), settings=default_settings(memory)), None
    if urls:
        return Config(servers=_servers(urls), settings=default_settings(memory)), None
    if file is None and not os.path.lexists(DEFAULT_CONFIG):
        raise Failure(
            f"no {DEFAULT_CONFIG} here: name a file with --config FILE, servers with --server URL, "
            "or try --demo"
        )
    source = ConfigSource(file or DEFAULT_CONFIG, memory=memory, policies=POLICY_NAMES)
    return load_config(source, 2), source


def _servers(urls: Sequence[str]) -> tuple[ServerConfig, ...]:
    from vllm_router.config.schema import ServerConfig
    from vllm_router.config.server_url import normalise_url, server_name

    servers: dict[str, ServerConfig] = {}
    for given in urls:
        try:
            url = normalise_url(given)
        except ValueError as error:
            raise Failure(f"--server: {error}") from None
        if url in servers:
            raise Failure(f"--server: {url} is given twice")
        servers[url] = ServerConfig(url=url, name=server_name(url))
    return tuple(servers.values())
