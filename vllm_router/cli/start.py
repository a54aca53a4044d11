"""Start the router and announce its URL."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_router import __version__
from vllm_router.cli.common import Failure, discard_output
from vllm_router.errors import RouterError
from vllm_router.runtime.early_signals import raise_on_interrupt

if TYPE_CHECKING:
    from vllm_router.config.schema import Config
    from vllm_router.config.source import ConfigSource
    from vllm_router.observability.log_output import LogOutput

logger = logging.getLogger(__name__)


def start(
    config: Config,
    source: ConfigSource | None,
    output: LogOutput,
    demo: int,
    demo_load: float,
    host: str,
    port: int,
    log: Path | None,
    workers: int,
    *,
    lane: bool,
    reuse_port: bool,
) -> None:
    """Serve until a signal, with the monitor on this terminal if the log goes to a file."""
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
        demo_load=demo_load,
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

    raise_on_interrupt()
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


def _raise_descriptor_limit() -> None:
    """Raise the soft limit: a stream needs two descriptors, and the usual limit is 1024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(url: str, servers: int, *, hint: bool, quiet: bool) -> None:
    """Print that the router is up; with `quiet`, which is for JSON logs, only to the log."""
    lines = [f"vLLM Router {__version__} on {url}, {servers} server{'s' if servers != 1 else ''}"]
    if hint:
        lines.append(f"try: {_example(url)}")
        lines.append(f"or open {_near(url)} in a browser")
    if quiet:
        logger.info("%s", lines[0])
        return
    try:
        click.echo("\n".join(lines))
    except OSError:
        # The reader of stdout has gone, or its disk is full: keep serving.
        logger.warning("stdout is closed: %s", lines[0])
        discard_output()


def _near(url: str) -> str:
    """The URL for a client on this machine."""
    return url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")


def _example(url: str) -> str:
    """A shell command with a request that the demo answers."""
    from vllm_router.lab.demo import DEMO_MODEL

    messages = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": DEMO_MODEL, "stream": True, "messages": messages})
    return (
        f"curl -N {_near(url)}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )


def _free_port_hint(host: str, port: int) -> str:
    """Advice with the next port on which this program could listen, if there is one near."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for other in range(port + 1, min(port + 20, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, other))
            except OSError:
                continue
            return f"; --port {other} is free"
    return "; choose another one with --port"


def _why_not_listening(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is already in use{_free_port_hint(host, port)}"
    if isinstance(error, socket.gaierror):
        return f"cannot listen on {host}: {error.strerror}"
    return f"cannot listen on port {port} of {host}: {error.strerror or error}"
