"""One leader or worker from its start to its end."""

from __future__ import annotations

import contextlib
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vllm_router.config.memory import Memory
from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.config.types import Secret
from vllm_router.errors import ConfigError, RouterError
from vllm_router.http.hypercorn.bridge import HypercornSide
from vllm_router.http.server.listener import Front
from vllm_router.observability import tracing as telemetry
from vllm_router.observability.log_output import LogOutput, Overrides
from vllm_router.routing.paths import is_inference
from vllm_router.routing.policies import POLICY_NAMES
from vllm_router.runtime.dispatch import Dispatcher
from vllm_router.runtime.local_door import LocalDoor
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.serve import (
    LAST_CALL,
    LINGER,
    client_limits,
    drain,
    follow_limits,
    follow_tls,
    most_connections,
    probed,
    take_tls,
)
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers import birth as line
from vllm_router.runtime.workers.bells import Bells
from vllm_router.runtime.workers.birth import Birth, Orders
from vllm_router.runtime.workers.board import Board, Sums
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.clock import SharedClock
from vllm_router.runtime.workers.handover import LeaderSide, Turns
from vllm_router.runtime.workers.in_force import InForce
from vllm_router.runtime.workers.leader import Leader
from vllm_router.runtime.workers.orphan import end_when_orphaned
from vllm_router.runtime.workers.peers import SharedQueue, check_limits
from vllm_router.runtime.workers.queue_board import QueueBoard
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.worker import Worker, not_here
from vllm_router.web.guard import OwnDoor

logger = logging.getLogger(__name__)

LAST_WORDS = 1.0
"""Seconds for the last reports to be taken."""


def live(fileno: int) -> int:
    """Be what the descriptor says; the exit code."""
    birth = line.read(fileno)
    orders = Orders(birth.line)
    channels = [Channel(socket.socket(fileno=end)) for end in birth.channels]
    try:
        return _live(birth, orders, channels)
    finally:
        orders.close()
        for channel in channels:
            channel.close()


def _live(birth: Birth, orders: Orders, channels: list[Channel]) -> int:
    in_force = InForce(birth.in_force)
    log = Path(birth.log) if birth.log is not None else None
    overrides = Overrides(level=birth.level, form=birth.form, access=birth.access)
    try:
        output = LogOutput(overrides, file=log, tag=birth.name)
    except OSError as error:
        orders.say(line.FAILED + str(error).encode())
        return 2
    try:
        config = _read(in_force)
        end_when_orphaned(birth.line, lambda: _longest_end(in_force.read() or config))
        output.apply(config.log)
        run = _worker if birth.number else _lead
        trio.run(run, birth, config, in_force, orders, channels, output, clock=SharedClock())
    except (RouterError, ConfigError, OSError) as error:
        orders.say(line.FAILED + str(error).encode())
        return 2
    finally:
        output.close()
    return 0


def _longest_end(config: Config) -> float:
    """Seconds that an orderly end may take."""
    settings = config.settings
    return settings.drain_grace + settings.drain_timeout + LAST_CALL + LINGER + LAST_WORDS


def _read(in_force: InForce) -> Config:
    config = in_force.read()
    if config is None:
        raise ConfigError(["the configuration in force cannot be read"])
    return config


def _listen(front: Front, birth: Birth, config: Config) -> None:
    take_tls(front, config)
    for fileno in birth.listeners:
        address = front.adopt(fileno, later=birth.patient)
        if fileno in birth.plain:
            front.allow_plain(address[1])


def _queue(birth: Birth) -> SharedQueue:
    board = QueueBoard(birth.queue, birth.workers + 1)
    return SharedQueue(board, birth.number, Bells(birth.bells, birth.number))


def _follow(orders: Orders, supervisor: Supervisor, output: LogOutput) -> None:
    orders.reopen = output.reopen
    orders.reload = supervisor.nudge


async def _worker(
    birth: Birth,
    config: Config,
    in_force: InForce,
    orders: Orders,
    channels: list[Channel],
    output: LogOutput,
) -> None:
    app = Dispatcher()
    (channel,) = channels
    sums = Sums(Board(birth.board, birth.workers + 1, birth.columns), birth.number)
    reporter = Reporter(channel)
    side = LeaderSide(channel, reporter)
    front = Front(
        app,
        accepts=is_inference,
        limits=client_limits(config.settings),
        tls_only=True,
        max_connections=most_connections(),
        told=output.access.refused,
        side=side,
        gate=Turns(sums),
    )
    _listen(front, birth, config)
    with telemetry.running(config.log) as spans:
        async with trio.open_nursery() as nursery:
            supervisor = Worker(
                config,
                output=output,
                telemetry=spans,
                admin_port=birth.admin_port,
                sums=sums,
                channel=channel,
                reporter=reporter,
                queue=_queue(birth),
                in_force=in_force,
                workers=birth.workers,
            )
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            supervisor.before_apply.append(partial(follow_limits, front, supervisor))
            app.attach(supervisor, not_here)
            _follow(orders, supervisor, output)
            await nursery.start(orders.listen)
            await nursery.start(supervisor.run)
            await _either(supervisor.welcomed, orders.first)
            if birth.patient:
                await probed(supervisor)
            supervisor.connections = lambda: front.connections
            supervisor.relays = lambda: side.connections
            await nursery.start(front.serve)
            supervisor.serving = True
            orders.say(line.SERVING)
            await orders.first.wait()
            with orders.until_second():
                await drain(supervisor, front)
            supervisor.serving = False
            with trio.move_on_after(LAST_WORDS), contextlib.suppress(trio.BrokenResourceError):
                await reporter.flush()
                await supervisor.tell_figures()
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


async def _lead(
    birth: Birth,
    config: Config,
    in_force: InForce,
    orders: Orders,
    channels: list[Channel],
    output: LogOutput,
) -> None:
    app = Dispatcher()
    limits = client_limits(config.settings)
    side = HypercornSide(app, limits=limits, told=output.access.refused)
    side.closing = True  # the next request may be for the lane, which is elsewhere
    front = Front(app, accepts=is_inference, limits=limits, tls_only=True, side=side)
    _listen(front, birth, config)
    with contextlib.ExitStack() as ending:
        local = [socket.socket(fileno=fileno) for fileno in birth.local]
        for sock in local:
            ending.callback(sock.close)
        door = LocalDoor(app, local, limits=limits, told=output.access.refused)
        spans = ending.enter_context(telemetry.running(config.log))
        async with trio.open_nursery() as nursery:
            if birth.demo:
                from vllm_router.lab.demo import start_demo

                config = await start_demo(nursery, birth.demo, config.settings)
            own_door = None
            if birth.door is not None:
                own_door = OwnDoor(birth.door[0], Secret(birth.door[1]))
            supervisor = Leader(
                config,
                ConfigSource(
                    birth.source,
                    memory=Memory(memory_limit_mb(), birth.workers),
                    policies=POLICY_NAMES,
                )
                if birth.source is not None
                else None,
                output=output,
                telemetry=spans,
                admin_port=birth.admin_port,
                own_door=own_door,
                sums=Sums(Board(birth.board, birth.workers + 1, birth.columns), 0),
                queue=_queue(birth),
                channels=channels,
                in_force=in_force,
                side=side,
                most_connections=most_connections(),
            )
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            supervisor.before_apply.append(partial(follow_limits, front, supervisor))
            supervisor.before_apply.append(check_limits)
            app.attach(supervisor)
            _follow(orders, supervisor, output)
            orders.lost = supervisor.lost
            lame = trio.Event()
            orders.lame = lame.set
            await nursery.start(orders.listen)
            await nursery.start(supervisor.run)
            nursery.start_soon(front.serve)
            await nursery.start(door.serve)
            nursery.start_soon(_drain_with_workers, supervisor, side, lame)
            orders.say(line.SERVING)
            await orders.first.wait()
            with orders.until_second():
                # The workers have gone: there was time enough for everything.
                front.stop_accepting()
                front.begin_drain()
                await supervisor.wind_down()
                with trio.move_on_after(LINGER):
                    while front.connections or side.connections:  # noqa: ASYNC110 (for a second)
                        await trio.sleep(0.01)
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


async def _drain_with_workers(supervisor: Leader, side: HypercornSide, lame: trio.Event) -> None:
    """Finish what the workers have handed over while they finish the rest."""
    await lame.wait()
    await supervisor.lame_duck()
    await trio.sleep(LAST_CALL)
    side.drain()
    await supervisor.wind_down()


async def _either(*events: Any) -> None:
    """Wait for the first of them."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel(reason="one has come")

        for event in events:
            nursery.start_soon(wait, event)
