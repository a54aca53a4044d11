"""`vllm-router run`: options, configuration and log output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vllm_router.cli.common import Failure, existing_config, load_config
from vllm_router.cli.options import config_file
from vllm_router.lab.finite_range import FiniteRange
from vllm_router.observability.formatting import FORMATS, LEVELS

if TYPE_CHECKING:
    from vllm_router.config.schema import Config, ServerConfig
    from vllm_router.config.source import ConfigSource


def log_file(environ: Mapping[str, str]) -> Path:
    """The log file while the full-screen monitor uses the terminal.

    In the state directory of the XDG Base Directory Specification, or, without a home directory,
    in one for temporary files.
    """
    state, home = environ.get("XDG_STATE_HOME", ""), environ.get("HOME", "")
    if state.startswith("/"):
        return Path(state, "vllm-router", "vllm-router.log")
    if home.startswith("/") and os.access(home, os.W_OK):
        return Path(home, ".local", "state", "vllm-router", "vllm-router.log")
    return Path(tempfile.gettempdir(), f"vllm-router-{os.getuid()}", "vllm-router.log")


class PortNumber(click.IntRange):
    """A port, 0 for a free one.

    Kubernetes sets VLLM_ROUTER_PORT to `tcp://…` in every pod beside a Service called
    `vllm-router`; such a value is not meant for this program.
    """

    name = "port"

    def __init__(self) -> None:
        super().__init__(0, 65535)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith(("tcp://", "udp://")):
            return None
        return super().convert(value, param, ctx)


class DemoServers(click.IntRange):
    """The number of simulated servers."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(1, 100)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f'expected a number of servers from 1 to 100, got "{value}"', param, ctx)


@click.command()
@config_file
@click.option(
    "--server",
    "urls",
    envvar="VLLM_ROUTER_SERVER",
    multiple=True,
    metavar="URL[=N]",
    help="A vLLM server, instead of a file; repeatable. N: requests that it runs at once without "
    "queueing.",
)
@click.option(
    "--demo",
    envvar="VLLM_ROUTER_DEMO",
    is_flag=False,
    flag_value=3,
    type=DemoServers(),
    metavar="[N]",
    help="Start N simulated vLLM servers (3 by default) and route to them.",
)
@click.option(
    "--demo-load",
    envvar="VLLM_ROUTER_DEMO_LOAD",
    default=1.0,
    show_default=True,
    type=FiniteRange(0, 20),
    metavar="X",
    help="The demo's own traffic: this many times four requests per second; 0 for none.",
)
@click.option(
    "--host",
    envvar="VLLM_ROUTER_HOST",
    help="Address to listen on.  [default: from the file, or 0.0.0.0]",
)
@click.option(
    "-p",
    "--port",
    envvar="VLLM_ROUTER_PORT",
    type=PortNumber(),
    help="0 takes a free one.  [default: from the file, or 8888]",
)
@click.option(
    "-c",
    "--console",
    envvar="VLLM_ROUTER_CONSOLE",
    is_flag=True,
    help="Log lines even on a terminal, no full-screen monitor.",
)
@click.option(
    "--log-level",
    envvar="VLLM_ROUTER_LOG_LEVEL",
    type=click.Choice(LEVELS),
    help="[default: from the file, or info]",
)
@click.option(
    "--log-format",
    envvar="VLLM_ROUTER_LOG_FORMAT",
    type=click.Choice(FORMATS),
    help="[default: from the file, or text]",
)
@click.option(
    "--access-log",
    envvar="VLLM_ROUTER_ACCESS_LOG",
    metavar="PATH|-|off",
    help="Where a line per request goes: a file, stdout (-), nowhere.  [default: the file's, or "
    "among the log lines]",
)
@click.option(
    "--front",
    envvar="VLLM_ROUTER_FRONT",
    type=click.Choice(["lane", "hypercorn"]),
    help="The HTTP server for inference requests: the router's own (lane) or Hypercorn.  [default: "
    "from the file, or lane]",
)
@click.option(
    "--reuse-port",
    envvar="VLLM_ROUTER_REUSE_PORT",
    is_flag=True,
    help="Share the port with other routers that say so: a new one takes over from an old one.",
)
@click.option(
    "--workers",
    envvar="VLLM_ROUTER_WORKERS",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Processes that serve inference requests, on one port and with one view of the fleet.  "
    "[default: from the file, or 1]",
)
@click.pass_context
def run(
    context: click.Context,
    *,
    file: str | None,
    urls: tuple[str, ...],
    demo: int | None,
    demo_load: float,
    host: str | None,
    port: int | None,
    reuse_port: bool,
    console: bool,
    log_level: str | None,
    log_format: str | None,
    access_log: str | None,
    front: str | None,
    workers: int | None,
) -> None:
    """Start the router.

    Reads servers.toml and follows it while running, unless servers are given here. SIGTERM and
    SIGINT drain and stop, a second one stops at once; SIGHUP reads the configuration again, SIGUSR1
    reopens the log files. Listening sockets that systemd passes are used instead of --host and
    --port.

    On a terminal it shows the full-screen monitor, whose Ctrl-C stops the router (q asks first),
    and logs to ~/.local/state/vllm-router/vllm-router.log; with --console, or elsewhere, it logs to
    stderr.

    Every option can be given by an environment variable, too: VLLM_ROUTER_PORT for --port. An
    option goes before its variable, and both before [run] in the file.

    \b
    vllm-router run --demo
    vllm-router run --demo 5 --demo-load 0
    vllm-router run --server http://gpu-1:8000=64 --server http://gpu-2:8000=64
    vllm-router run --config servers.toml --port 80
    """
    from vllm_router.cli.monitor.terminal import on_terminal
    from vllm_router.cli.start import start
    from vllm_router.observability.log_output import LogOutput, Overrides

    given = {
        name
        for name, value in (("file", file), ("urls", urls), ("demo", demo))
        if value and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if given:  # an option wins over the environment
        file, urls, demo = (
            file if "file" in given else None,
            urls if "urls" in given else (),
            demo if "demo" in given else None,
        )
    if (file is not None) + bool(urls) + bool(demo) > 1:
        raise click.UsageError("--config, --server and --demo exclude each other")
    config, source = _configuration(file, urls, demo, workers)
    run = config.run
    host = run.host if host is None else host
    port = run.port if port is None else port
    front = run.front if front is None else front
    workers = run.workers if workers is None else workers
    if workers > 1 and front != "lane":
        raise click.UsageError("--workers needs --front lane: Hypercorn serves in one process only")
    log = log_file(os.environ) if not console and on_terminal() else None
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
            demo_load,
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
    file: str | None, urls: Sequence[str], demo: int | None, workers: int | None
) -> tuple[Config, ConfigSource | None]:
    """The configuration given by the options, and its file source, if it has one.

    `workers` is None if the file gives their number.
    """
    from vllm_router.config.memory import Memory
    from vllm_router.config.parser import default_settings
    from vllm_router.config.schema import Config
    from vllm_router.config.source import ConfigSource
    from vllm_router.routing.policies import POLICY_NAMES
    from vllm_router.runtime.memory_limit import memory_limit_mb

    memory = Memory(memory_limit_mb(), workers or 1)
    if demo:
        return Config(servers=(), settings=default_settings(memory)), None
    if urls:
        return Config(servers=_servers(urls), settings=default_settings(memory)), None
    path = existing_config(file, ", servers with --server URL, or try --demo")
    source = ConfigSource(path, memory=memory, policies=POLICY_NAMES)
    config = load_config(source, 2)
    if workers is None and config.run.workers > 1:
        # Each process needs memory, so other defaults may fit.
        source.memory = memory._replace(workers=config.run.workers)
        config = load_config(source, 2)
    return config, source


def _servers(urls: Sequence[str]) -> tuple[ServerConfig, ...]:
    import msgspec

    from vllm_router.config.schema import ServerConfig
    from vllm_router.config.server_url import normalise_url, server_name

    servers: dict[str, ServerConfig] = {}
    for given in urls:
        address, capacity = _capacity(given)
        try:
            url = normalise_url(address)
        except ValueError as error:
            raise Failure(f"--server: {error}") from None
        if url in servers:
            raise Failure(f"--server: {url} is given twice")
        server = ServerConfig(url=url, name=server_name(url))
        if capacity is not None:
            server = msgspec.structs.replace(server, max_concurrent_requests=capacity)
        servers[url] = server
    return tuple(servers.values())


def _capacity(given: str) -> tuple[str, int | None]:
    """Split `URL=N`."""
    url, equals, number = given.rpartition("=")
    if not equals:
        return given, None
    if not (number.isascii() and number.isdigit() and 0 < len(number) < 7 and int(number)):
        raise Failure(
            f"--server: expected a whole number of requests from 1 to 999999 after =, "
            f"got {number!r}"
        )
    return url, int(number)
