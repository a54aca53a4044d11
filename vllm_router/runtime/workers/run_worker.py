"""The tasks of a worker process, from its listeners to its last report."""

from __future__ import annotations

import contextlib
import logging
from functools import partial

import trio

from vllm_router.http.server.listener import Listener
from vllm_router.observability import tracing
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.runtime.serve import (
    client_limits,
    drain,
    end_at_once,
    follow_limits,
    follow_tls,
    most_connections,
    probed,
)
from vllm_router.runtime.supervisor import END_TIME, Supervisor
from vllm_router.runtime.workers import control_channel
from vllm_router.runtime.workers.environment import Environment
from vllm_router.runtime.workers.handover import FairAccept, LeaderHandover
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.worker import build, not_here

logger = logging.getLogger(__name__)

LAST_REPORT = 1.0
"""Seconds for the leader to take the last reports."""


async def run(environment: Environment) -> None:
    """Serve until ordered to drain."""
    spec, control, output = environment.spec, environment.control, environment.output
    app = RequestDispatcher()
    (channel,) = environment.channels
    counters = environment.counters()
    reporter = Reporter(channel)
    handover = LeaderHandover(channel, reporter)
    front = Listener(
        app,
        accepts=is_inference,
        limits=client_limits(environment.config.settings),
        tls_only=True,
        max_connections=most_connections(),
        on_rejected=output.access.refused,
        handler=handover,
        accept_policy=FairAccept(counters),
    )
    environment.adopt_listeners(front)
    with tracing.running(environment.config.log) as spans:
        async with trio.open_nursery() as nursery:
            worker = build(
                environment.config,
                output=output,
                telemetry=spans,
                admin_port=spec.admin_port,
                counters=counters,
                channel=channel,
                reporter=reporter,
                queue=environment.queue(),
                snapshot=environment.snapshot,
                workers=spec.workers,
                signals=control,
            )
            supervisor = worker.supervisor
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            supervisor.before_apply.append(partial(follow_limits, front, supervisor))
            app.attach(supervisor, not_here)
            await nursery.start(supervisor.run)
            await nursery.start(control.listen)
            await _any(worker.leader.welcomed, control.first)
            if spec.patient:
                await probed(supervisor)
            worker.stats.connections = lambda: front.connections
            await nursery.start(front.serve)
            worker.stats.serving = True
            control.send(control_channel.SERVING)
            await control.first.wait()
            with control.until_second() as patience:
                await drain(supervisor, front, partial(_wind_down, supervisor, handover))
            if patience.cancelled_caught:
                await end_at_once(supervisor, front)
            worker.stats.serving = False
            with trio.move_on_after(LAST_REPORT), contextlib.suppress(trio.BrokenResourceError):
                await reporter.flush()
                await worker.stats.send()
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


async def _wind_down(supervisor: Supervisor, handover: LeaderHandover) -> None:
    """Finish the requests of this process and the relays that the leader uses."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.wind_down)
        # The leader drains at the same time, and closes a relay after its response.
        with trio.move_on_after(supervisor.config.settings.drain_timeout + END_TIME):
            while handover.connections:  # noqa: ASYNC110  once per shutdown
                await trio.sleep(0.02)


async def _any(*events: trio.Event) -> None:
    """Wait for the first of several events."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel(reason="an event is set")

        for event in events:
            nursery.start_soon(wait, event)
