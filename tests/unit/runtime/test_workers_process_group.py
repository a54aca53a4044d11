"""The parent process, without real child processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import pytest
import trio

from support.fleet_makers import make_config
from vllm_router.http.server.listener import Listener
from vllm_router.observability.log_output import LogOutput
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.serve import ServeOptions
from vllm_router.runtime.workers import parent
from vllm_router.runtime.workers.control_channel import REOPEN
from vllm_router.runtime.workers.process_slot import ProcessSlot, interpreter_options
from vllm_router.runtime.workers.resources import accepts_nothing, open_resources


@pytest.fixture
def ending() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def options(**more: Any) -> ServeOptions:
    config = make_config([{"url": "http://127.0.0.1:1"}])
    return ServeOptions(config=config, host="127.0.0.1", port=0, workers=1, **more)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times of failed starts: the system has no processes left."""
    moments: list[float] = []

    def none_left(*_: object, **__: object) -> None:
        moments.append(trio.current_time())
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none_left)
    return moments


async def test_parent_retries_failed_replacement_and_ends_no_process(
    ending: contextlib.ExitStack, attempts: list[float], autojump_clock: trio.testing.MockClock
):
    resources = open_resources(options(), ending)
    slot = ProcessSlot(resources, 1, lambda number, pid: None)
    slot.serving.set()  # it had served before it died
    descriptors = len(os.listdir("/proc/self/fd"))
    with trio.move_on_after(30):
        await slot.run()
    assert not slot.ended.is_set()
    assert len(attempts) > 5
    assert max(b - a for a, b in pairwise(attempts)) < 6
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_parent_failed_first_start_is_a_clear_error(
    ending: contextlib.ExitStack, attempts: list[float]
):
    resources = open_resources(options(), ending)
    async with trio.open_nursery() as nursery:
        with pytest.raises(parent.CannotStart, match="temporarily unavailable"):
            await parent.ProcessGroup(resources, nursery).start()
    assert len(attempts) == 2  # leader and worker


async def test_parent_reopens_its_log_files(ending: contextlib.ExitStack):
    reopened = trio.Event()

    class Output:
        def reopen(self) -> None:
            reopened.set()

    resources = open_resources(options(output=cast("LogOutput", Output())), ending)
    async with trio.open_nursery() as nursery:
        group = parent.ProcessGroup(resources, nursery)
        nursery.start_soon(group.forward, signal.SIGUSR1, REOPEN)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGUSR1)
        with trio.fail_after(60):
            await reopened.wait()
        nursery.cancel_scope.cancel()


def test_parent_workers_serve_all_passed_sockets(ending: contextlib.ExitStack):
    passed = [socket.create_server(("127.0.0.1", 0)).detach() for _ in range(2)]
    resources = open_resources(options(passed=tuple(passed)), ending)
    assert [listener.fileno() for listener in resources.listeners.public] == passed
    assert resources.listeners.private == []


async def test_parent_shared_port_listens_when_served(ending: contextlib.ExitStack):
    resources = open_resources(options(reuse_port=True), ending)
    (listener,) = resources.listeners.public
    front = Listener(accepts_nothing, accepts=is_inference)
    address = front.adopt(os.dup(listener.fileno()), later=True)
    with pytest.raises(OSError, match="all attempts"):
        await trio.open_tcp_stream(*address)
    async with trio.open_nursery() as nursery:
        await nursery.start(front.serve)
        with trio.fail_after(60):
            await (await trio.open_tcp_stream(*address)).aclose()
        front.abort()


@pytest.mark.parametrize("here", [True, False])
def test_parent_children_use_its_module_path(here: bool, monkeypatch: pytest.MonkeyPatch):
    elsewhere = [path for path in sys.path if path not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", [*elsewhere, os.getcwd()] if here else elsewhere)
    assert ("-P" in interpreter_options()) is not here
