"""The command `scripts/bench-routing`: where requests go, on real processes.

Simulated servers (`vllm-router mock`) that batch, prefill at a rate and cache prefixes; before
them each contestant in turn, with the same conversations at the same times. Gaps are factors, so
they survive a shared machine; figures are of no use beyond the comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from .environment import ROOT, Environment, Skipped, say
from .options import above_zero
from .routing_clients import GOOD_FIRST_TOKEN, GOOD_TOKEN_TIME, Clients, Results
from .routing_traffic import WORKLOADS, Workload

RUST = "vllm-router==0.1.17"

MOCK = (
    "--model", "m", "--ttft", "0", "--token-delay", "0.012", "--batch-slowdown", "0.05",
    "--prefill-tokens-per-second", "10000", "--max-num-batched-tokens", "1024",
    "--kv-blocks", "4096",
)  # fmt: skip

OURS = ("adaptive", "session", "least_load")
RIVALS = ("cache_aware", "power_of_two", "round_robin")
CONTESTANTS = (*OURS, *(f"rust-{policy}" for policy in RIVALS))


# -- processes ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def process(arguments: Sequence[str], log: Path, **environ: str) -> Iterator[None]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            list(arguments), stdout=output, stderr=output, start_new_session=True,
            env=os.environ | environ,
        )  # fmt: skip
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def await_port(port: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise Skipped(f"nothing listens on port {port}")


@contextlib.contextmanager
def servers(workload: Workload, folder: Path) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in workload.speeds]
        for port, speed in zip(ports, workload.speeds, strict=True):
            run = [sys.executable, "-m", "vllm_router.lab.mock", "--port", str(port), *MOCK]
            run += workload.mock
            stack.enter_context(process([*run, "--speed", str(speed)], folder / f"mock-{port}.log"))
        for port in ports:
            await_port(port)
        yield [f"http://127.0.0.1:{port}" for port in ports]


@contextlib.contextmanager
def contestant(name: str, urls: Sequence[str], folder: Path, rust: Path | None) -> Iterator[str]:
    """The router's URL, once it answers."""
    port, other = free_port(), free_port()
    log = folder / f"{name}.log"
    if name.startswith("rust-"):
        if rust is None:
            raise Skipped("the Rust router is not installed")
        command = [
            str(rust), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(other),
            "--worker-startup-check-interval", "1", "--policy", name.removeprefix("rust-"),
            "--worker-urls", *urls,
        ]  # fmt: skip
        environ = {"PYTHONPATH": ""}
    else:
        file = folder / f"{name}.toml"
        listed = [f'{{ url = "{url}", max_concurrent_requests = 16 }},' for url in urls]
        file.write_text(
            "\n".join(["[servers]", "servers = [", *listed, "]", "[config]", f'policy = "{name}"'])
        )
        command = [sys.executable, "-m", "vllm_router", "run", "--console", "--config", str(file)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        environ = {}
    with process(command, log, **environ):
        await_port(port)
        yield f"http://127.0.0.1:{port}"


# -- the comparison ----------------------------------------------------------------------------


def measure(
    name: str, workload: Workload, seconds: float, seed: int, folder: Path, rust: Path | None
) -> Results:
    conversations = workload.make(random.Random(seed), seconds)
    with servers(workload, folder) as urls, contestant(name, urls, folder, rust) as url:
        found = trio.run(Clients(url, seconds / 4).run, conversations)
        found.hit_rate = hit_rate(urls)
        return found


def hit_rate(urls: Sequence[str]) -> float:
    """The share of prompt tokens that the servers have found in their caches, by their counters."""
    hits = queries = 0.0
    for url in urls:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith("vllm:prefix_cache_hits_total"):
                    hits += float(line.rsplit(" ", 1)[1])
                elif line.startswith("vllm:prefix_cache_queries_total"):
                    queries += float(line.rsplit(" ", 1)[1])
    return hits / queries if queries else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def row(workload: str, name: str, found: Results) -> str:
    cells = [
        workload,
        name,
        f"{1000 * percentile(found.firsts, 0.5):.0f} ms",
        f"{1000 * percentile(found.firsts, 0.99):.0f} ms",
        f"{1000 * percentile(found.tokens, 0.5):.1f} ms",
        f"{found.good / max(1, found.asked):.1%}",
        f"{found.hit_rate:.1%}",
        f"{found.asked}",
        f"{found.failed}",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-routing", description=__doc__)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), metavar="A,B")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="X,Y")
    parser.add_argument("--seconds", type=above_zero, default=7.0, help="of traffic per run (7)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rust", type=Path, help="the Rust router, if it is installed elsewhere")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    names, workloads = given.contestants.split(","), given.workloads.split(",")
    for name, known in ((names, CONTESTANTS), (workloads, tuple(WORKLOADS))):
        if unknown := set(name) - set(known):
            say(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
            return 2
    rust: Path | None = given.rust
    if rust is None and any(name.startswith("rust-") for name in names):
        try:
            rust = Environment(ROOT / ".bench").venv("rust", RUST).with_name("vllm-router")
        except Skipped as skipped:
            say(f"without the Rust router: {skipped}")
    print("| workload | router | TTFT p50 | p99 | TPOT p50 | goodput | hits | requests | failed |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads:
            for name in names:
                say(f"{workload}: {name}")
                try:
                    found = measure(
                        name, WORKLOADS[workload], given.seconds, given.seed, Path(folder), rust
                    )
                except Skipped as skipped:
                    say(f"{workload}: {name}: left out, {skipped}")
                    continue
                print(row(workload, name, found), flush=True)
    print(
        f"\nGoodput: first token within {1000 * GOOD_FIRST_TOKEN:.0f} ms and "
        f"{1000 * GOOD_TOKEN_TIME:.0f} ms per token. " + "; ".join(
            f"{name}: {WORKLOADS[name].says}" for name in workloads
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
