"""The router as a part of another Trio program.

```python
import trio
from vllm_router import load_config, serve

async def main():
    async with trio.open_nursery() as nursery:
        router = await nursery.start(serve, load_config("servers.toml"))
        print(router.url)
        ...
        await router.stop()

trio.run(main)
```

`serve` has the router's own HTTP server. `run_app` starts everything but the server and returns an
ASGI application, for a program with an ASGI server on Trio. Neither follows the file, handles
signals, or configures logging; both raise the garbage collector's thresholds of the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath

import trio

from vllm_router.config.memory import Memory
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.errors import ConfigError
from vllm_router.http.asgi_types import App
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference
from vllm_router.routing.policies import POLICY_NAMES
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.parts import Parts
from vllm_router.runtime.serve import (
    ServeOptions,
    client_limits,
    drain,
    listen,
    most_connections,
    take_tls,
    url_of,
)
from vllm_router.runtime.supervisor import Supervisor

__all__ = [
    "Config",
    "ConfigError",
    "RunningRouter",
    "load_config",
    "parse_config",
    "run_app",
    "serve",
]


def load_config(path: str | PathLike[str], environ: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration file. `environ` is os.environ unless given.

    Raises ConfigError, whose `problems` has a line for each problem.
    """
    memory = Memory(memory_limit_mb())
    return ConfigSource(fspath(path), environ, memory, POLICY_NAMES).load()


def parse_config(text: str, environ: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration given as TOML that names no other files.

    Raises ConfigError, whose `problems` has a line for each problem.
    """
    memory = Memory(memory_limit_mb())
    return parse(
        text.encode(), "configuration", environ or {}, memory=memory, policies=POLICY_NAMES
    )


class RunningRouter:
    """A router that serves.

    url: its address on this machine, with the actual port.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._stop = trio.Event()
        self._stopped = trio.Event()

    async def stop(self) -> None:
        """Drain as on SIGTERM: finish the requests in flight for `drain_timeout`, then cancel them.

        Returns when `serve` has ended.
        """
        self._stop.set()
        await self._stopped.wait()


async def serve(
    config: Config,
    host: str | None = None,
    port: int | None = None,
    *,
    task_status: trio.TaskStatus[RunningRouter] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled or stopped. `nursery.start` returns a RunningRouter once it listens.

    `host` and `port` replace the keys of `[run]`; port 0 takes a free one. Cancellation ends
    requests in flight at once. Raises OSError if the port is not available, CannotListen for the
    port of `admin_listen`, and ConfigError if the TLS files are unusable.
    """
    app = RequestDispatcher()
    front = Listener(
        app,
        accepts=is_inference,
        lane=config.run.front == "lane",
        limits=client_limits(config.settings),
        tls_only=True,
        max_connections=most_connections(),
    )
    take_tls(front, config)
    options = ServeOptions(
        config=config,
        host=config.run.host if host is None else host,
        port=config.run.port if port is None else port,
    )
    public, admin = listen(front, options)
    running = RunningRouter(url_of(*public, secure=config.tls is not None))
    try:
        async with trio.open_nursery() as nursery:
            admin_port = admin[1] if admin is not None else None
            supervisor = Supervisor(config, None, admin_port=admin_port, parts=_parts())
            app.attach(supervisor)
            await nursery.start(supervisor.run)
            await nursery.start(front.serve)
            task_status.started(running)
            await running._stop.wait()  # noqa: SLF001  one module
            await drain(supervisor, front)
            nursery.cancel_scope.cancel(reason="stopped")
    finally:
        front.abort()
        running._stopped.set()  # noqa: SLF001


async def run_app(
    config: Config, *, task_status: trio.TaskStatus[App] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the router without a server until cancelled. `nursery.start` returns the application.

    It serves HTTP and the websocket of the feed, and is called on the same Trio thread. The server
    listens, and ends TLS.
    """
    app = RequestDispatcher()
    async with trio.open_nursery() as nursery:
        supervisor = Supervisor(config, None, parts=_parts())
        app.attach(supervisor)
        await nursery.start(supervisor.run)
        task_status.started(app)


def _parts() -> Parts:
    """Signals belong to the program."""
    return Parts(signals=None)
