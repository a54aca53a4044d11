"""A process that has imported what routers and simulated servers need, and forks them.

A Python process that starts from nothing imports for most of a second of CPU, and the tests start
many hundreds. A forked one is a process like any other: signals, exit codes, descriptors, its own
memory. It runs a module as `python -m` does. Tests of how a program starts use `subprocess`.

`start` is like `subprocess.Popen` with a pipe for stdout. The fork server begins with the first
process and ends, with all its processes, when the tests' process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = str(ROOT / "tests")

PRELOADED = (
    *("click", "h11", "h2.connection", "httpx", "hypercorn.config", "hypercorn.trio.tcp_server"),
    *("jinja2", "msgspec.json", "prometheus_client", "quart_trio", "rich.console", "rich.table"),
    *("trio_websocket", "wsproto", "httptools", "tomllib", "ssl", "email.message"),
    "vllm_router.lab.mock.cli",
    "vllm_router.lab.mock.server",
)
"""Libraries, and the simulated server. The router's own modules are imported by each router: some
have state of their process, such as the beginning of request identifiers."""

_LARGEST = 1 << 18

UNCLOSED = "Unclosed <MemoryObject"
"""Beginning of the warnings about streams that coredis leaves open where a connection fails. They
are memory of the process, and freed; an interpreter without `-W error` shows no such warning."""


class Forked:
    """A running process, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, stdout: io.BufferedReader, status: socket.socket) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(int(self._status.recv(100)))
            self._status.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(module: str, *arguments: str, env: Mapping[str, str], strict: bool = False) -> Forked:
    """Run a module in a process in the root directory; stdin is empty.

    With `strict`, stdout has also what is written to stderr, and warnings are errors (`-W error`).
    """
    with contextlib.ExitStack() as ours:
        pipe, output = os.pipe()
        ours.callback(os.close, output)
        status, reported = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.enter_context(reported)
        request = json.dumps([module, arguments, dict(env), strict]).encode()
        socket.send_fds(_control(), [request], [output, reported.fileno()])
        pid = int(status.recv(100))
    return Forked(pid, os.fdopen(pipe, "rb"), status)


@functools.cache
def _control() -> socket.socket:
    """The connection to the fork server of this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"},
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# -- the server ----------------------------------------------------------------------------------


def serve(control: socket.socket) -> Callable[[], object]:
    """Fork processes until the tests end. Returns in each of the forked ones, with its work."""
    awake, wake = socket.socketpair()
    for sock in (awake, wake):
        sock.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    statuses: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(awake, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if awake in ready:
                awake.recv(1000)
                _report(statuses)
            if control not in ready:
                continue
            request, descriptors, _, _ = socket.recv_fds(control, _LARGEST, 2)
            if not request:
                for pid in statuses:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            output, reported = descriptors
            status = socket.socket(fileno=reported)
            pid = os.fork()
            if pid == 0:
                break
            os.close(output)
            statuses[pid] = status
            status.send(b"%d" % pid)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for sock in (control, awake, wake, status, *statuses.values()):
        sock.close()
    return _prepared(request, output)


def _report(statuses: dict[int, socket.socket]) -> None:
    """Tell the tests of the processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with statuses.pop(pid) as status, contextlib.suppress(OSError):
                status.send(b"%d" % code)


def _prepared(request: bytes, output: int) -> Callable[[], object]:
    """Take over descriptors, environment and arguments; returns the work of the process."""
    module, arguments, env, strict = json.loads(request)
    os.dup2(output, 1)
    if strict:
        os.dup2(output, 2)
        warnings.resetwarnings()
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", UNCLOSED, ResourceWarning)
        # For its own processes.
        sys.warnoptions[:] = ["error", f"ignore:{UNCLOSED}:ResourceWarning"]
    os.close(output)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    sys.path.remove(TESTS)
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(line_buffering=True, write_through=True)
    return functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))()


if __name__ == "__main__":
    main()
