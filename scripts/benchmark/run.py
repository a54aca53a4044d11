"""Starts everything, runs the load, and stops everything."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .contestants import DIRECT, KEY, Contestant, Place, Plan
from .environment import Environment, Skipped, say
from .workloads import Workload

START_SECONDS = 60.0

HELD_GAP = 50.0
"""Milliseconds that 99 of 100 gaps between chunks may be longer than they were sent with."""


@dataclass(frozen=True)
class Options:
    """Times in seconds.

    `cores` cores are for the proxies alone, the others for the load; 0: any core for all.
    """

    repeat: int = 5
    warmup: float = 1.0
    duration: float = 4.0
    cores: int = 0


@dataclass
class Record:
    """One run of one workload against one contestant, with the load generator's results."""

    workload: str
    contestant: str
    repeat: int
    result: dict[str, Any]


@dataclass
class Results:
    """All measurements. `start_s` is the time from exec to the first response."""

    records: list[Record] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Cores:
    """The cores on which a child starts.

    Undivided, a proxy with threads can use the whole machine, and pays for waking them; with one
    core for the proxies, it starts one thread, and all have equal resources.
    """

    def __init__(self, proxies: int) -> None:
        self._all = sorted(os.sched_getaffinity(0))
        divided = 0 < proxies < len(self._all)
        self.proxy = set(self._all[-proxies:]) if divided else set(self._all)
        self.load = set(self._all[:-proxies]) if divided else set(self._all)

    @contextlib.contextmanager
    def use(self, cores: set[int]) -> Iterator[None]:
        """Child processes started inside inherit it."""
        os.sched_setaffinity(0, cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, self._all)


class Server:
    """The servers behind the proxies: one process, many ports."""

    def __init__(self, program: Path, count: int, cores: Cores) -> None:
        with cores.use(cores.load):
            self.process = subprocess.Popen(
                [program, "-ports", ",".join(["0"] * count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self.process.stdout is not None
        self.urls = [f"http://127.0.0.1:{p}" for p in self.process.stdout.readline().split(",")]
        self.urls = [url.strip() for url in self.urls]

    def behave(self, load: Workload) -> None:
        query = f"ttft_ms={load.ttft}&interval_ms={load.interval}&answer_bytes={load.answer}"
        get(f"{self.urls[0]}/bench/set?{query}")

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


class Running:
    """A started contestant. All its processes are in one session, and end with it."""

    def __init__(self, name: str, plan: Plan, port: int, log: Path, cores: Cores) -> None:
        self.name, self.plan, self.log = name, plan, log
        self.url = f"http://127.0.0.1:{port}"
        self.began = time.monotonic()
        with cores.use(cores.proxy), log.open("wb") as output:
            self.process = subprocess.Popen(
                plan.command,
                cwd=log.parent,
                env=_clean_environ() | plan.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> float:
        """Seconds from its start to its first response. Raises Skipped."""
        body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        while time.monotonic() - self.began < START_SECONDS:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                if post(f"{self.url}/v1/chat/completions", body) == 200:
                    return time.monotonic() - self.began
            time.sleep(0.02)
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        self.stop()
        raise Skipped(f"did not start: {lines[-1][:200]}")

    def freeze(self) -> None:
        """Stop its CPU use while others are measured."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Bench:
    """Measures contestants under workloads: each workload on one contestant after the other.

    All of that is repeated (A B C A B C …), so that other load on the machine affects all alike.
    """

    def __init__(self, environment: Environment, options: Options) -> None:
        self.environment = environment
        self.options = options
        self.cores = Cores(options.cores)
        self.results = Results()
        self._loadgen = environment.go_program("loadgen")
        self._server = environment.go_program("server")

    def run(self, contestants: list[Contestant], workloads: list[Workload]) -> Results:
        raise_descriptor_limit()
        plans = self._prepare(contestants)
        for count in sorted({load.servers for load in workloads}):
            some = [load for load in workloads if load.servers == count]
            with contextlib.ExitStack() as cleanup:
                server = Server(self._server, count, self.cores)
                cleanup.callback(server.stop)
                running = self._start(plans, server, cleanup)
                self._measure(server, running, some)
        return self.results

    def flame(self, contestant: Contestant, workloads: list[Workload]) -> Iterator[Path]:
        """A flame graph of a contestant written in Python, for each workload. Raises Skipped."""
        raise_descriptor_limit()
        spy = self.environment.venv("py-spy", "py-spy").with_name("py-spy")
        plans = {contestant.name: contestant.prepare(self.environment)}
        for load in workloads:
            with contextlib.ExitStack() as cleanup:
                server = Server(self._server, load.servers, self.cores)
                cleanup.callback(server.stop)
                (running,) = self._start(plans, server, cleanup, load.name)
                running.thaw()
                server.behave(load)
                file = self.environment.directory / "results" / f"flame-{load.name}.svg"
                command = [
                    spy,
                    "record",
                    "--rate",
                    "250",
                    "--format",
                    "flamegraph",
                    "--nonblocking",
                ]
                command += ["--duration", str(int(self.options.duration) or 1), "--output", file]
                spying = subprocess.Popen(
                    [*command, "--pid", str(running.process.pid)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                self._load(server, load, running)
                said, _ = spying.communicate()
                if spying.returncode:
                    raise Skipped(f"py-spy: {said.strip()[-200:]}")
                yield file

    def _prepare(self, contestants: list[Contestant]) -> dict[str, Callable[[Place], Plan]]:
        plans = {}
        for contestant in contestants:
            try:
                plans[contestant.name] = contestant.prepare(self.environment)
            except Skipped as why:
                self._skip(contestant.name, why)
        return plans

    def _skip(self, name: str, why: Skipped) -> None:
        say(f"skipped: {name}: {why}")
        self.results.skipped[name] = str(why)

    def _start(
        self,
        plans: dict[str, Callable[[Place], Plan]],
        server: Server,
        cleanup: contextlib.ExitStack,
        label: str = "",
    ) -> list[Running]:
        started = []
        for name, plan in plans.items():
            directory = (
                self.environment.run / f"{label or len(server.urls)}-{name.replace('/', '_')}"
            )
            directory.mkdir()
            port, side_port = free_ports(2)
            planned = plan(Place(port, side_port, server.urls, directory))
            log = directory / "output.log"
            running = Running(name, planned, port, log, self.cores)
            cleanup.callback(running.stop)
            try:
                seconds = running.wait_ready()
            except Skipped as why:
                self._skip(name, why)
                continue
            self.results.start_s.setdefault(name, round(seconds, 3))
            running.freeze()
            started.append(running)
        return started

    def _measure(self, server: Server, running: list[Running], workloads: list[Workload]) -> None:
        for repeat in range(self.options.repeat):
            for load in workloads:
                if repeat >= load.most_repeats:
                    continue
                if load.connections:
                    self._note(load, DIRECT, repeat, self._measure_one(server, load, None))
                for contestant in running:
                    if contestant.process.poll() is not None:
                        self.results.skipped[contestant.name] = "ended by itself"
                        continue
                    contestant.thaw()
                    time.sleep(0.1)
                    result = self._measure_one(server, load, contestant)
                    time.sleep(0.2)  # so that it notices the disconnects
                    contestant.freeze()
                    self._note(load, contestant.name, repeat, result)

    def _note(self, load: Workload, name: str, repeat: int, result: dict[str, Any]) -> None:
        self.results.records.append(Record(load.name, name, repeat, result))
        unit = "chunks" if load.per_chunk else "requests"
        cpu = result["proxy_cpu_s"] / max(1, result[unit]) * 1e6
        rate = result[unit] / result["seconds"]
        bad = (
            f"  {result['failures']} failed: {result['first_failure']}"
            if result["failures"]
            else ""
        )
        say(f"{repeat + 1} {load.name:12} {name:13} {rate:8.0f} {unit}/s {cpu:8.1f} µs{bad}")

    def _measure_one(
        self, server: Server, load: Workload, contestant: Running | None
    ) -> dict[str, Any]:
        """The result; for a ladder, the result of the highest rate held, or of the lowest."""
        best = None
        for interval in load.ladder or (load.interval,):
            step = replace(load, interval=interval)
            server.behave(step)
            result = self._load(server, step, contestant)
            if best is not None and not _held(step, result):
                break
            best = result | {"interval_ms": interval, "held": _held(step, result)}
            if not best["held"]:
                break
        assert best is not None
        return best

    def _load(self, server: Server, load: Workload, contestant: Running | None) -> dict[str, Any]:
        options = self.options
        url = contestant.url if contestant else server.urls[0]
        command = [str(self._loadgen), "-url", url, "-c", str(load.connections), "-key", KEY]
        command += ["-prompt", str(load.prompt), "-messages", str(load.messages)]
        command += ["-tokens", str(max(1, load.tokens))]
        command += ["-rate", str(load.rate), "-spread", f"{load.spread}ms"]
        command += ["-warmup", f"{options.warmup + load.spread / 1000}s"]
        command += ["-duration", f"{options.duration}s", "-server-pids", str(server.process.pid)]
        if load.connections:
            command += ["-fewest-chunks" if load.per_chunk else "-fewest", "1"]
        if load.stream:
            command += ["-stream"]
        if load.new_connection:
            command += ["-new-connection"]
        if contestant:
            command += ["-pids", str(contestant.process.pid)]
            if contestant.plan.scrape:
                command += ["-scrape", contestant.plan.scrape]
            if contestant.plan.feed:
                command += ["-feed", contestant.plan.feed]
        with self.cores.use(self.cores.load):
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise RuntimeError(f"loadgen: {done.stderr.strip()[:2000]}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def _held(load: Workload, result: dict[str, Any]) -> bool:
    """Whether the streams arrived at the pace of their sender."""
    if not load.interval:
        return True
    offered = load.connections / load.interval * 1000 * result["seconds"]
    late = (result["gap_ms"] or {}).get("p99", float("inf"))
    return bool(result["chunks"] >= 0.98 * offered and late < HELD_GAP + load.interval)


def _clean_environ() -> dict[str, str]:
    """No proxy, Python or tracing setting of the caller reaches a contestant."""
    unwanted = ("PYTHON", "OTEL_", "LITELLM_", "VLLM_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(unwanted) and not name.lower().endswith("_proxy")
    }


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def get(url: str) -> bytes:
    """The body of a page. Raises OSError."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    try:
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise OSError(f"{url}: {answer.status} {body[:200]!r}")
        return body
    finally:
        connection.close()


def post(url: str, body: Any) -> int:
    """The status of the answer. Raises OSError or HTTPException."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", f"/{path}", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()
