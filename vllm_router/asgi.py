"""The one ASGI application: inference paths to the proxy, all others to the Quart app.

`vllm_router.asgi:app` is it for any ASGI server on Trio; the configuration file is named by
VLLM_ROUTER_CONFIG (default servers.toml), and the lifespan protocol starts and ends the tasks.
`vllm-router run` builds the same application around a supervisor of its own.
"""

# ruff: noqa: E402 (signals must not kill while the rest is imported)

from __future__ import annotations

from vllm_router.early_signals import hold

hold()

import contextlib
import logging
import os
import re
import sys

import trio
from hypercorn.config import Config as HypercornConfig

from vllm_router import telemetry
from vllm_router.errors import ConfigError, Refused
from vllm_router.front import Address
from vllm_router.hypercorn_bridge import hold_last, install
from vllm_router.kinds import split_address
from vllm_router.local_door import LocalDoor, LocalSockets
from vllm_router.log_output import LogOutput
from vllm_router.logs import configure_if_unset
from vllm_router.memory_config import Memory
from vllm_router.memory_limit import memory_limit_mb
from vllm_router.paths import PathClass, classify, without_slash
from vllm_router.proxy.refusal import refusal_messages
from vllm_router.proxy.types import OUTLET, App, Receive, Scope, Send
from vllm_router.request_ids import request_id
from vllm_router.supervisor import Supervisor, tell_memory
from vllm_router.tasks.watch import ConfigSource
from vllm_router.web.app import make_app

logger = logging.getLogger(__name__)

_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class Application:
    """Dispatch by path, with a supervisor that runs: attached, or started by the lifespan."""

    def __init__(self) -> None:
        self._supervisor: Supervisor | None = None
        self._control: App
        self._addresses: list[Address] = []

    def attach(self, supervisor: Supervisor, control: App | None = None) -> None:
        """Serve with this supervisor from now on; `control` has what is not inference."""
        self._supervisor = supervisor
        self._control = control if control is not None else hold_last(make_app(supervisor))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        supervisor = self._supervisor
        if supervisor is None:
            raise RuntimeError("the application needs the lifespan protocol to start")
        path = _origin_form(scope)
        guard = supervisor.guard
        if guard.remembers(scope):
            await supervisor.proxy(scope, receive, send)
            return
        path_class = classify(scope.get("method", ""), path)
        bare, send = send, guard.for_pages(scope, path_class, send)
        if send is not bare:
            # An outlet would send past the fields that are added.
            scope["extensions"] = {**scope.get("extensions", {})}
            scope["extensions"].pop(OUTLET, None)
        try:
            allowed = guard.preflight(scope)
            if allowed is not None:
                await bare({"type": "http.response.start", "status": 204, "headers": allowed})
                await bare({"type": "http.response.body", "body": b"", "more_body": False})
                return
            guard.admit(scope, path_class)
            if path_class is PathClass.INFERENCE:
                await supervisor.proxy(scope, receive, send)
                return
            if (
                path_class is PathClass.ENGINE_CONTROL
                and not supervisor.config.settings.allow_engine_control
            ):
                raise Refused(403, "engine_control_closed", _CONTROL_CLOSED)
        except Refused as refused:
            supervisor.refused(refused.code)
            await _refuse(scope, receive, send, refused)
            return
        supervisor.fleet.look()
        supervisor.proxy.tell()
        await self._control(scope, receive, send)

    def prepare(self, hypercorn: HypercornConfig, addresses: list[Address]) -> None:
        """Hypercorn is about to start with this configuration, and listens at these addresses.

        Several processes of Hypercorn would be several routers: each with its own limits of keys,
        its own view of the load, and drains that the others do not know.
        """
        if hypercorn.workers > 1:
            sys.stderr.write(
                f"vllm-router: hypercorn -w {hypercorn.workers} would run "
                f"{hypercorn.workers} routers that know nothing of each other; for several "
                f"processes use: vllm-router run --workers {hypercorn.workers}\n"
            )
            raise SystemExit(2)
        self._addresses = addresses

    async def wind_down(self) -> None:
        """Finish what runs; called while the server still listens."""
        if self._supervisor is not None:
            await self._supervisor.lame_duck()
            await self._supervisor.wind_down(still_listening=True)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start the supervisor, and end it when the server does."""
        await receive()
        ours = configure_if_unset()
        file = os.environ.get("VLLM_ROUTER_CONFIG", "servers.toml")
        source = ConfigSource(file, memory=Memory(memory_limit_mb()))
        try:
            config = source.load()
        except ConfigError as error:
            for problem in error.problems:
                logger.error("%s", problem)
            await send({"type": "lifespan.startup.failed", "message": "\n".join(error.problems)})
            return
        output = LogOutput(with_log=ours)
        try:
            output.apply(config.log)
        except OSError as error:
            output.close()
            problem = f"cannot write the log: {error}"
            logger.error("%s", problem)
            await send({"type": "lifespan.startup.failed", "message": problem})
            return
        if config.tls is not None:
            logger.warning("[tls] is for `vllm-router run`; Hypercorn has --certfile and --keyfile")
        address = config.settings.admin_listen
        admin_port = split_address(address)[1] if address is not None else None
        try:
            with telemetry.running(config.log) as spans:
                supervisor = Supervisor(
                    config, source, output=output, telemetry=spans, admin_port=admin_port
                )
                await self._run(supervisor, receive, send)
        finally:
            output.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self, supervisor: Supervisor, receive: Receive, send: Send) -> None:
        tell_memory(supervisor.config.settings, workers=1)
        self.attach(supervisor)
        with contextlib.closing(LocalSockets()) as local:
            local.open(self._addresses)
            await self._run_with(supervisor, LocalDoor(self, local.sockets), receive, send)

    async def _run_with(
        self, supervisor: Supervisor, door: LocalDoor, receive: Receive, send: Send
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            await nursery.start(door.serve)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel(reason="shutdown")


_CONTROL_CLOSED = (
    "This path controls the engine and is closed; allow_engine_control = true opens it."
)


async def _refuse(scope: Scope, receive: Receive, send: Send, refused: Refused) -> None:
    """Answer a request, or a websocket's handshake, without having read more than its head."""
    prefix = "http"
    if scope["type"] == "websocket":
        await receive()
        prefix = "websocket.http"
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # the server's own 403
            return
    identifier = request_id(dict(scope["headers"]).get(b"x-request-id"))
    for message in refusal_messages(refused, identifier, path=scope["raw_path"]):
        await send({**message, "type": prefix + message["type"].removeprefix("http")})


def _origin_form(scope: Scope) -> bytes:
    """The path of the target, which becomes the scope's.

    An absolute-form target (RFC 9112 3.2.2) loses its authority, and a path the slashes at its end.
    """
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if raw[:1] == b"/" and raw[-1:] != b"/":
        return raw
    found = _ABSOLUTE.match(raw)
    if found is not None:
        raw = raw[found.end() :] or b"/"
        scope["path"] = raw.decode("latin-1")
    path = without_slash(raw)
    if len(path) < len(raw):
        scope["path"] = scope["path"][: len(path) - len(raw)]
    scope["raw_path"] = path
    return path


app = Application()
install(before_shutdown=app.wind_down, before_start=app.prepare)
