"""One process of the group, leader or worker: start it, watch it, and replace it when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import trio

from vllm_router.observability.log_output import Overrides
from vllm_router.runtime.workers import control_channel, spawn_spec
from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.resources import Resources
from vllm_router.runtime.workers.spawn_spec import SpawnSpec

logger = logging.getLogger(__name__)

LONG_LIFE = 10.0
"""Seconds after which the death of a process does not lengthen the pause before its restart."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a restart; doubled with each death in a row."""

CHECK_INTERVAL = 1.0
"""Seconds between two checks for life signs."""

LEADER_MISSES, WORKER_MISSES = 8, 20
"""Checks in a row without a life sign after which a process is killed and replaced.

Checks are counted, not seconds: if this process was stopped or the machine was asleep, no check was
made meanwhile.
"""


class ProcessSlot:
    """`number` 0 is the leader.

    `serving` is set when the process serves for the first time, `ended` when `run` returns.
    `failure` is the reason if the first process could not start. `lost` is called with the number
    and process id of a process that has died.
    """

    def __init__(self, resources: Resources, number: int, lost: Callable[[int, int], None]) -> None:
        self._resources = resources
        self._lost = lost
        self._number = number
        self.name = f"worker {number}" if number else "leader"
        self.serving = trio.Event()
        self.ended = trio.Event()
        self.leaving = self.lame = False
        self.failure: str | None = None
        self._control: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._scope = trio.CancelScope()
        self._reason = ""
        self._pid = 0
        self._life_signs = 0

    # -- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a process running until `leave` is called or the first one fails to start."""
        pause = FIRST_PAUSE
        with self._scope:
            while True:
                began = trio.current_time()
                try:
                    how = _describe_exit(await self._run_once())
                except OSError as error:
                    how = "cannot be started"
                    self._reason = str(error)
                self._resources.reset(self._number)
                if self.leaving:
                    break
                if not self.serving.is_set():
                    self.failure = self._reason or f"the {self.name} {how} at its start"
                    break
                pause = FIRST_PAUSE if trio.current_time() - began > LONG_LIFE else pause
                reason = f": {self._reason}" if self._reason else ""
                logger.error("%s %s%s; restarting it in %g s", self.name, how, reason, pause)
                self._lost(self._number, self._pid)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self.ended.set()

    async def _run_once(self) -> int:
        """Run one process to its end; returns its exit code. Raises OSError if it cannot start."""
        self._reason, self._pid = "", 0
        ours, theirs = pair()
        control = Channel(ours)
        try:
            process = self._process = self._spawn(theirs)
        except BaseException:
            control.close()
            raise
        self._pid = process.pid
        self._control = control
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, control)
                nursery.start_soon(self._watch, process)
                code = await _wait_for_exit(process)
                nursery.cancel_scope.cancel(reason="the process has ended")
            return code
        finally:
            self._control = self._process = None
            control.close()
            if process.poll() is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await _wait_for_exit(process)

    def _spawn(self, control: socket.socket) -> subprocess.Popen[bytes]:
        """Start the process with its end of the control channel, which is closed here.

        Blocks for some milliseconds: the process must be started by the main thread. A thread of
        Trio's pool ends after 10 s, and the kernel then signals the process that its parent has
        died (PR_SET_PDEATHSIG).
        """
        with contextlib.ExitStack() as ending:
            ending.callback(control.close)
            spec = self._spec(control.fileno())
            record = spawn_spec.write(spec)
            ending.callback(os.close, record)
            # Output outside of the log must not draw over the full-screen monitor.
            output = subprocess.DEVNULL if spec.log is not None else None
            module = "vllm_router.runtime.workers"
            return subprocess.Popen(
                [sys.executable, *interpreter_options(), "-m", module, str(record), self.name],
                pass_fds=[record, *spec.descriptors],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _spec(self, control: int) -> SpawnSpec:
        resources = self._resources
        options, listeners, memory = resources.options, resources.listeners, resources.memory
        output = options.output
        if self._number:
            channels = [resources.channels[self._number - 1][1]]
            accepted = listeners.public
        else:
            channels = [ours for ours, _ in resources.channels]
            accepted = listeners.private
        overrides = output.overrides if output is not None else Overrides(access=False)
        return SpawnSpec(
            number=self._number,
            workers=options.workers,
            control=control,
            channels=tuple(end.fileno() for end in channels),
            counters=memory.counters_fd,
            columns=memory.counters.columns,
            snapshot=memory.snapshot,
            queue=memory.queue_fd,
            wakeups=memory.wakeups,
            listeners=tuple(listener.fileno() for listener in accepted),
            plain=listeners.plain,
            local=tuple(sock.fileno() for sock in listeners.local) if not self._number else (),
            admin_port=listeners.admin_port,
            monitor=listeners.monitor,
            source=str(options.source.path) if options.source is not None else None,
            demo=options.demo,
            demo_traffic=options.demo_load > 0,
            patient=options.reuse_port or bool(options.passed),
            log=str(output.file) if output is not None and output.file is not None else None,
            level=overrides.level,
            form=overrides.form,
            access=overrides.access,
        )

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a process that sends no more life signs: stopped, or its event loop is blocked.

        Its start-up may take any time: the watch begins with the first life sign.
        """
        limit = WORKER_MISSES if self._number else LEADER_MISSES
        seen = missed = self._life_signs = 0
        while True:
            await trio.sleep(CHECK_INTERVAL)
            missed = missed + 1 if seen == self._life_signs > 0 else 0
            seen = self._life_signs
            if missed >= limit:
                seconds = limit * CHECK_INTERVAL
                logger.error("%s has not responded for %g s: killing it", self.name, seconds)
                process.kill()
                return

    async def _listen(self, control: Channel) -> None:
        """Handle the messages of the process until it has ended."""
        while message := (await control.receive())[0]:
            self._life_signs += 1
            if message == control_channel.SERVING:
                self.serving.set()
                if self.lame:
                    self.send(control_channel.LAME)
            elif message.startswith(control_channel.FAILED):
                reason = message.removeprefix(control_channel.FAILED)
                self._reason = reason.decode(errors="replace")

    async def served_or_ended(self) -> None:
        """Return when the process serves, or has failed to start."""
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel(reason="an event is set")

            nursery.start_soon(wait, self.serving)
            nursery.start_soon(wait, self.ended)

    # -- orders -------------------------------------------------------------------------------

    def send(self, order: bytes) -> None:
        """Send an order to the process that runs now, if any."""
        if self._control is not None:
            self._control.send_now(order)

    def leave(self, order: bytes) -> None:
        """Send the last order, DRAIN or STOP: the process is not replaced when it ends."""
        self.leaving = True
        self.send(order)
        if self._process is None:
            self._scope.cancel(reason="leaving")


async def _wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    """Wait until the process has ended; returns its exit code."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:  # not available in some sandboxes
        return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    try:
        while (code := process.poll()) is None:
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    return code


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"has ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def interpreter_options() -> list[str]:
    """The options of this interpreter that its child processes need, too."""
    flags = [f"-W{option}" for option in sys.warnoptions]
    if not {"", os.getcwd()}.intersection(sys.path):
        flags.append("-P")  # -m would add the working directory to sys.path
    return flags
