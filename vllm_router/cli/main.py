"""The commands. Heavy modules are imported inside them: help and errors come at once.

Exit codes: 0 done, 1 the answer is no (a bad configuration, a server that fails), 2 the command
could not do its work, 130 interrupted. Expected errors are one line on stderr each.
"""

from __future__ import annotations

import sys

from vllm_router.runtime.early_signals import hold

if sys.argv[1:2] == ["run"]:
    hold()

import errno
import importlib
import json
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from vllm_router import __version__
from vllm_router.cli.options import for_router
from vllm_router.errors import ConfigError, RouterError
from vllm_router.observability.formatting import FORMATS, LEVELS, visible

if TYPE_CHECKING:
    from vllm_router.cli.admin_client import ServerReport, Status
    from vllm_router.cli.tables import Cell
    from vllm_router.config.reload import ConfigSource
    from vllm_router.config.schema import Config
    from vllm_router.observability.log_output import LogOutput

DEFAULT_CONFIG = "servers.toml"
DEFAULT_URL = "http://127.0.0.1:8888"
LOG_FILE = Path("logs/vllm-router.log")
"""Where the log goes while the monitor has the terminal."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Failure(click.ClickException):
    """The command cannot do its work; `message` is the one line that says why."""

    exit_code = 2


class Commands(click.Group):
    """The group of all commands: some are loaded when they are asked for, errors are one line."""

    elsewhere = {  # noqa: RUF012  never changed
        "monitor": "vllm_router.cli.monitor.command:monitor",
        "open": "vllm_router.cli.open:open_page",
        "explain": "vllm_router.cli.explain:explain",
        "mock": "vllm_router.lab.mock.cli:mock_command",
        "simulate": "vllm_router.lab.simulate.cli:simulate_command",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.elsewhere]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self.elsewhere.get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            if not standalone_mode:
                raise
            click.echo(_in_one_line(error), err=True)
            code = error.exit_code
        except click.Abort:
            if not standalone_mode:
                raise
            code = 130
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _in_one_line(error: click.ClickException) -> str:
    text = visible(" ".join(error.format_message().split()))
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return f"vllm-router: {text}"
    return f"{context.command_path}: {text} (see {context.command_path} --help)"


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="vLLM Router", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """One OpenAI-compatible entry point for a fleet of vLLM servers."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """The entry point of `vllm-router`."""
    cli(prog_name="vllm-router")
    raise AssertionError("click exits")


# -- run --------------------------------------------------------------------------------------


@cli.command()
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
@click.option("--log-level", type=click.Choice(LEVELS), help="[default: that of the file, or info]")
@click.option("--log-format", type=click.Choice(FORMATS), help="[default: the file's, or text]")
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
    help="Who serves inference requests: our own HTTP/1.1 server or Hypercorn.",
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
    from vllm_router.observability.log_output import LogOutput, Overrides

    if (file is not None) + bool(urls) + bool(demo) > 1:
        raise click.UsageError("--config, --server and --demo exclude each other")
    if workers > 1 and front != "lane":
        raise click.UsageError("--workers needs --front lane: Hypercorn serves in one process only")
    config, source = _fleet(file, urls, demo, workers)
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
        _start(
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


def _start(
    config: Config,
    source: ConfigSource | None,
    output: LogOutput,
    demo: int,
    host: str,
    port: int,
    log: Path | None,
    workers: int,
    *,
    lane: bool,
    reuse_port: bool,
) -> None:
    """Serve until a signal ends it; with the monitor on this terminal if the log is a file."""
    import trio

    from vllm_router.http.server.socket_handover import passed_sockets
    from vllm_router.runtime.serve import ServeOptions, serve

    try:
        passed = tuple(passed_sockets(os.environ))
    except ValueError as error:
        raise Failure(str(error)) from None
    _raise_descriptor_limit()
    options = ServeOptions(
        config=config,
        source=source,
        demo=demo,
        host=host,
        port=port,
        lane=lane,
        reuse_port=reuse_port,
        passed=passed,
        output=output,
        workers=workers,
    )
    if workers > 1:
        from vllm_router.runtime.workers.parent import serve_workers as serve

    def listening(url: str) -> None:
        quiet = log is None and output.form == "json"
        _announce(url, demo or len(config.servers), hint=bool(demo), quiet=quiet)

    try:
        if log is None:
            trio.run(serve, options, listening)
        else:
            from vllm_router.cli.monitor.attached import serve_with_view

            trio.run(serve_with_view, serve, options, listening, log)
    except OSError as error:
        raise Failure(_why_not_listening(error, host, port)) from None
    except RouterError as error:
        raise Failure(str(error)) from None


def _fleet(
    file: str | None, urls: Sequence[str], demo: int | None, workers: int
) -> tuple[Config, ConfigSource | None]:
    """The configuration that the options name, and the file to follow, if it is one."""
    from vllm_router.config.memory import Memory
    from vllm_router.config.reload import ConfigSource
    from vllm_router.config.schema import Config, default_settings
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
    return _load(source, 2), source


def _servers(urls: Sequence[str]) -> Any:
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


def _load(source: ConfigSource, code: int) -> Config:
    """The configuration in a file; ends the command with `code` and a line for every problem."""
    try:
        return source.load()
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        raise click.exceptions.Exit(code) from None


def _raise_descriptor_limit() -> None:
    """Take what the system allows: a stream holds two descriptors, and the usual limit is 1024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(url: str, servers: int, *, hint: bool, quiet: bool) -> None:
    """Say that the router is up; with `quiet` in the log alone, which is then read by machines."""
    lines = [f"vLLM Router {__version__} on {url}, {servers} server{'s' if servers != 1 else ''}"]
    if hint:
        lines.append(f"try: {_example(url)}")
    if quiet:
        logger.info("%s", lines[0])
        return
    try:
        click.echo("\n".join(lines))
    except OSError:
        # Whoever started us does not read this. That is no reason not to serve, nor to fail at
        # the exit, when Python tries to write it once more.
        logger.warning("nobody reads stdout: %s", lines[0])
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _example(url: str) -> str:
    """A request that the demo answers, to be pasted into a shell."""
    from vllm_router.lab.demo import DEMO_MODEL

    messages = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": DEMO_MODEL, "stream": True, "messages": messages})
    near = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    return f"curl -N {near}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _why_not_listening(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is already in use"
    if isinstance(error, socket.gaierror):
        return f"cannot listen on {host}: {error.strerror}"
    return f"cannot listen on port {port} of {host}: {error.strerror or error}"


# -- check-config -----------------------------------------------------------------------------


@cli.command("check-config")
@click.option("--config", "file", metavar="FILE", default=DEFAULT_CONFIG, show_default=True)
@click.option("--probe", is_flag=True, help="Also ask every server what the router will ask it.")
def check_config(*, file: str, probe: bool) -> None:
    """Say what is wrong with a configuration file.

    Every problem is one line with the path of its key. Exit code 1 if there is one, or if a server
    fails its probe; 2 if there is no file to read.
    """
    from vllm_router.config.reload import ConfigSource
    from vllm_router.routing.policies import POLICY_NAMES

    config = _load(
        ConfigSource(file, policies=POLICY_NAMES),
        1 if os.path.isfile(file) and os.access(file, os.R_OK) else 2,
    )
    count = len(config.servers)
    click.echo(
        f"{file}: OK, {count} server{'s' if count != 1 else ''}, policy {config.settings.policy}"
    )
    if not probe:
        return
    from vllm_router.cli.admin_client import missing_models, probe_fleet, uneven_lengths

    reports = _ask(probe_fleet, config)
    _print_reports(reports)
    for line in uneven_lengths(reports):
        click.echo(visible(line), err=True)
    problems = [f"{report.name}: {problem}" for report in reports for problem in report.problems]
    problems += missing_models(config, reports)
    for line in problems:
        click.echo(visible(line), err=True)
    if problems:
        raise click.exceptions.Exit(1)


def _print_reports(reports: Sequence[ServerReport]) -> None:
    from vllm_router.cli.tables import Cell, Column, print_table

    titles = ("SERVER", "HEALTH", "MODELS", "MAX LEN", "METRICS", "VLLM", "KEY")
    rows: list[list[Cell | str]] = []
    for report in reports:
        models = report.models or {}
        seconds = report.health_seconds
        took = "" if seconds is None else f" {seconds * 1000:.0f} ms"
        lengths = dict.fromkeys(length for length in models.values() if length is not None)
        rows.append(
            [
                report.name,
                Cell(report.health + took, "green" if report.health == "ok" else "bold red"),
                ", ".join(models),
                ", ".join(map(str, lengths)),
                " ".join(report.metrics),
                report.version,
                Cell(report.key, "red" if report.key in ("refused", "missing") else ""),
            ]
        )
    print_table([Column(title, right=title == "MAX LEN") for title in titles], rows)


# -- a running router -------------------------------------------------------------------------


@cli.command()
@click.argument("url", default=DEFAULT_URL)
@for_router
@click.option("--json", "as_json", is_flag=True, help="Everything the router says, as JSON.")
def status(*, url: str, key: str | None, ca: str | None, as_json: bool) -> None:
    """Show the load and state of every server of a running router.

    URL is the router's, http://127.0.0.1:8888 if not given.
    """
    from vllm_router.cli.admin_client import Router

    async def ask() -> Status:
        async with Router(url, key, ca) as router:
            return await router.status()

    found = _ask(ask)
    if as_json:
        click.echo(json.dumps({"health": found.health, "load": found.load}, indent=2))
    else:
        _print_status(found)


_FIGURES = ("LOAD", "RUNNING", "WAITING", "IN FLIGHT", "CAPACITY")
_STYLES = {
    "up": "green",
    **dict.fromkeys(("full", "draining", "asleep", "paused", "silent", "refusing"), "yellow"),
}


def _print_status(found: Status) -> None:
    from vllm_router.cli.tables import Cell, Column, print_table

    titles = ("SERVER", "STATE", *_FIGURES, "MODELS", "REASON")
    rows: list[list[Cell | str]] = [
        [
            server.name,
            Cell(server.state, _STYLES.get(server.state, "bold red")),
            _figure(server.load, 2),
            _figure(server.running),
            _figure(server.waiting),
            _figure(server.in_flight),
            _figure(server.capacity),
            ", ".join(server.models),
            server.reason,
        ]
        for server in found.servers
    ]
    print_table([Column(title, right=title in _FIGURES) for title in titles], rows)


def _figure(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


@cli.command()
@click.argument("server")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The router's.")
@for_router
def drain(*, server: str, url: str, key: str | None, ca: str | None) -> None:
    """Send a server no new requests, and wait until its last one has ended.

    Ctrl-C ends the waiting, not the drain; `undrain` takes the server back.
    """
    from vllm_router.cli.admin_client import Router

    async def work() -> None:
        async with Router(url, key, ca) as router:
            await router.drain(server, on=True)
            async for number in router.watch_drain(server):
                _progress(f"{server}: {number} in flight", last=number == 0)

    try:
        _ask(work)
    except KeyboardInterrupt:
        click.echo(f"\n{server} goes on draining; vllm-router undrain {server} takes it back")
        raise click.exceptions.Exit(130) from None
    click.echo(f"{server} is drained")


@cli.command()
@click.argument("server")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The router's.")
@for_router
def undrain(*, server: str, url: str, key: str | None, ca: str | None) -> None:
    """Take a drained server back."""
    from vllm_router.cli.admin_client import Router

    async def work() -> None:
        async with Router(url, key, ca) as router:
            await router.drain(server, on=False)

    _ask(work)
    click.echo(f"{server} takes requests again")


def _progress(text: str, *, last: bool) -> None:
    """One line that changes on a terminal, and a line for each change elsewhere."""
    terminal = sys.stdout.isatty()
    click.echo(f"\r{text}\x1b[K" if terminal else text, nl=last or not terminal)


def _ask(work: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
    """Run a client; what it could not do is the command's one line."""
    import trio

    try:
        return trio.run(work, *args)
    except RouterError as error:
        raise Failure(str(error)) from None


# -- version ----------------------------------------------------------------------------------


@cli.command()
def version() -> None:
    """Show the version."""
    click.echo(f"vLLM Router {__version__}")
