"""The tasks of the leader process, from its listeners to the end of the drain."""

from __future__ import annotations

import contextlib
import logging
import socket
from functools import partial

import trio

from vllm_router.config.memory import Memory
from vllm_router.config.source import ConfigSource
from vllm_router.config.types import Secret
from vllm_router.http.hypercorn.handler import HypercornHandler
from vllm_router.http.server.listener import Listener
from vllm_router.observability import tracing
from vllm_router.routing.paths import is_inference
from vllm_router.routing.policies import POLICY_NAMES
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.runtime.local_listener import LocalListener
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.serve import (
    IDLE_GRACE,
    LINGER,
    client_limits,
    end_at_once,
    follow_limits,
    follow_tls,
    most_connections,
)
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers import control_channel
from vllm_router.runtime.workers.adopted import AdoptedConnections
from vllm_router.runtime.workers.environment import Environment
from vllm_router.runtime.workers.leader import build
from vllm_router.runtime.workers.spawn_spec import SpawnSpec
from vllm_router.web.guard import MonitorListener

logger = logging.getLogger(__name__)


async def run(environment: Environment) -> None:
    """Lead until ordered to drain."""
    spec, control, output = environment.spec, environment.control, environment.output
    config = environment.config
    app = RequestDispatcher()
    limits = client_limits(config.settings)
    handler = HypercornHandler(app, limits=limits, on_rejected=output.access.refused)
    handler.closing = True  # the next request may be for inference, which workers serve
    front = Listener(app, accepts=is_inference, limits=limits, tls_only=True, handler=handler)
    environment.adopt_listeners(front)
    with contextlib.ExitStack() as ending:
        sockets = [socket.socket(fileno=fileno) for fileno in spec.local]
        for sock in sockets:
            ending.callback(sock.close)
        local = LocalListener(app, sockets, limits=limits, on_rejected=output.access.refused)
        spans = ending.enter_context(tracing.running(config.log))
        async with trio.open_nursery() as nursery:
            if spec.demo:
                from vllm_router.lab.demo import start_demo

                config = await start_demo(
                    nursery, spec.demo, config.settings, several_models=spec.demo_traffic
                )
            leader = build(
                config,
                _source(spec),
                nursery=nursery,
                adopted=AdoptedConnections(handler, nursery, most_connections()),
                counters=environment.counters(),
                queue=environment.queue(),
                channels=environment.channels,
                snapshot=environment.snapshot,
                signals=control,
                output=output,
                telemetry=spans,
                admin_port=spec.admin_port,
                monitor_listener=_monitor_listener(spec),
            )
            supervisor = leader.supervisor
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            supervisor.before_apply.append(partial(follow_limits, front, supervisor))
            app.attach(supervisor)
            lame = trio.Event()
            control.lost = leader.workers.lost
            control.lame = lame.set
            await nursery.start(supervisor.run)
            await nursery.start(control.listen)
            nursery.start_soon(front.serve)
            await nursery.start(local.serve)
            nursery.start_soon(_drain_with_workers, supervisor, handler, lame)
            control.send(control_channel.SERVING)
            await control.first.wait()
            with control.until_second() as patience:
                # The workers have ended, so that all requests had time to finish.
                front.stop_accepting()
                front.begin_drain()
                await supervisor.wind_down()
                with trio.move_on_after(LINGER):
                    while front.connections or handler.connections:  # noqa: ASYNC110  once
                        await trio.sleep(0.01)
            if patience.cancelled_caught:
                await end_at_once(supervisor, front)
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


def _source(spec: SpawnSpec) -> ConfigSource | None:
    if spec.source is None:
        return None
    memory = Memory(memory_limit_mb(), spec.workers)
    return ConfigSource(spec.source, memory=memory, policies=POLICY_NAMES)


def _monitor_listener(spec: SpawnSpec) -> MonitorListener | None:
    if spec.monitor is None:
        return None
    port, digest = spec.monitor
    return MonitorListener(port, Secret(digest))


async def _drain_with_workers(
    supervisor: Supervisor, handler: HypercornHandler, lame: trio.Event
) -> None:
    """Finish the connections that workers have handed over while the workers finish theirs."""
    await lame.wait()
    await supervisor.lame_duck()
    await trio.sleep(IDLE_GRACE)
    handler.drain()
    await supervisor.wind_down(others_drain=True)
