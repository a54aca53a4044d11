"""A process that has imported what routers and simulated servers need, and forks them.

A Python process that starts from nothing imports for most of a second of CPU, and the tests start
many hundreds. A forked one is a process like any other: signals, exit codes, descriptors, its own
memory. It runs a module as `python -m` does. Tests of how a program starts use `subprocess`.

`start` is like `subprocess.Popen` with a pipe for stdout. The fork server begins with the first
process and ends, with all its processes, when the tests' process ends. A router with `--workers`
has a fork server of its own, which forks its leader and workers and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vllm_router.runtime.workers import process_slot

ROOT = Path(__file__).parents[2]
TESTS = str(ROOT / "tests")

PRELOADED = (
    *("click", "h11", "h2.connection", "httpx", "hypercorn.config", "hypercorn.trio.tcp_server"),
    *("jinja2", "msgspec.json", "prometheus_client", "quart_trio", "rich.console", "rich.table"),
    *("trio_websocket", "wsproto", "httptools", "tomllib", "ssl", "email.message"),
    "vllm_router.lab.mock.cli",
    "vllm_router.lab.mock.server",
    *("vllm_router.cli.run", "vllm_router.cli.start", "vllm_router.runtime.serve"),
    *("vllm_router.runtime.workers.main", "vllm_router.runtime.workers.parent"),
)
"""Libraries, the simulated server and the router; not `vllm_router.cli.main`, which catches signals
from its import on."""

OF_ONE_PROCESS = "vllm_router.http.request_ids"
"""The module whose state each process makes anew: the beginning of its request ids."""

_LARGEST = 1 << 18

UNCLOSED = "Unclosed <MemoryObject"
"""Beginning of the warnings about streams that coredis leaves open where a connection fails. They
are memory of the process, and freed; an interpreter without `-W error` shows no such warning."""


class ForkedProcess:
    """A running process, with the part of `subprocess.Popen` that tests and router use."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
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


class Forked(ForkedProcess):
    """A process whose output the tests read."""

    def __init__(self, pid: int, status: socket.socket, stdout: IO[bytes]) -> None:
        super().__init__(pid, status)
        self.stdout = stdout


def start(
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    strict: bool = False,
    errors: int | None = None,
    cwd: Path = ROOT,
    buffering: int = -1,
) -> Forked:
    """Run a module in a process; stdin is empty.

    With `strict`, stdout has also what is written to stderr, and warnings are errors (`-W error`).
    Otherwise `errors` is the descriptor of stderr. `buffering` is for our end of stdout.
    """
    pipe, output = os.pipe()
    try:
        descriptors = {1: output}
        if strict:
            errors = output
        if errors is not None:
            descriptors[2] = errors
        pid, status = _request(
            *(_control(), module, arguments, descriptors),
            env=dict(env),
            strict=strict,
            cwd=str(cwd),
        )
    finally:
        os.close(output)
    return Forked(pid, status, os.fdopen(pipe, "rb", buffering))


def _request(
    control: socket.socket,
    module: str,
    arguments: Sequence[str],
    descriptors: Mapping[int, int],
    *,
    env: dict[str, str] | None = None,
    strict: bool = False,
    cwd: str = ".",
) -> tuple[int, socket.socket]:
    """Have a process forked; returns its id, and the socket that its exit status comes from.

    `descriptors` are the ones of this process by the numbers that they get in the new one.
    """
    status, reported = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reported:
        request = json.dumps([module, arguments, env, strict, cwd, list(descriptors)]).encode()
        socket.send_fds(control, [request], [reported.fileno(), *descriptors.values()])
        return int(status.recv(100)), status


class WorkerStarter:
    """Stands for the module `subprocess` where a router starts its leader and workers."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def Popen(  # noqa: N802
        self, command: Sequence[str], *, pass_fds: Sequence[int], stdout: int | None, **_: Any
    ) -> ForkedProcess:
        module, *arguments = command[command.index("-m") + 1 :]
        with open(os.devnull, "wb") as nothing:
            descriptors = {number: number for number in pass_fds}
            if stdout == self.DEVNULL:
                descriptors |= {1: nothing.fileno(), 2: nothing.fileno()}
            pid, status = _request(self._control, module, arguments, descriptors)
        return ForkedProcess(pid, status)


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


def serve(control: socket.socket, *, end_all: bool) -> Callable[[], object]:
    """Fork processes until the other end closes. Returns in each of the forked ones, with its work.

    At the end they are killed with `end_all`, else left alone.
    """
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
            request, descriptors, _, _ = socket.recv_fds(control, _LARGEST, 200)
            if not request:
                for pid in statuses if end_all else ():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            reported, *descriptors = descriptors
            status = socket.socket(fileno=reported)
            pid = os.fork()
            if pid == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
            statuses[pid] = status
            status.send(b"%d" % pid)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for sock in (control, awake, wake, status, *statuses.values()):
        sock.close()
    return _prepared(request, descriptors)


def _report(statuses: dict[int, socket.socket]) -> None:
    """Tell the tests of the processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with statuses.pop(pid) as status, contextlib.suppress(OSError):
                status.send(b"%d" % code)


def _prepared(request: bytes, descriptors: Sequence[int]) -> Callable[[], object]:
    """Take over descriptors, environment and arguments; returns the work of the process."""
    module, arguments, env, strict, cwd, numbers = json.loads(request)
    os.chdir(cwd)
    _number(descriptors, numbers)
    if strict:
        warnings.resetwarnings()
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", UNCLOSED, ResourceWarning)
        # For its own processes.
        sys.warnoptions[:] = ["error", f"ignore:{UNCLOSED}:ResourceWarning"]
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
        sys.path.remove(TESTS)
    sys.argv = [module, *arguments]
    importlib.reload(sys.modules[OF_ONE_PROCESS])
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(line_buffering=True, write_through=True)
    if "--workers" in arguments:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            return serve(theirs, end_all=False)
        theirs.close()
        vars(process_slot)["subprocess"] = WorkerStarter(ours)
    if env is None:
        Path("/proc/self/comm").write_text(arguments[-1])
    return functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)


def _number(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the descriptors these numbers, which some of them may have already."""
    above = max(numbers) + 1
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), end_all=True)()


if __name__ == "__main__":
    main()
