"""The benchmark still runs, and its load generator distinguishes good from bad responses.

No thresholds: the figures depend on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark.environment import Environment  # noqa: E402
from benchmark.report import markdown  # noqa: E402
from benchmark.run import Cores, Server  # noqa: E402
from benchmark.workloads import WORKLOADS, Workload  # noqa: E402

ALWAYS = ("direct", "lane", "lane-2", "hypercorn", "naive")
"""What needs nothing that the tests do not need, too."""

# LiteLLM takes a quarter of a minute to start.
CONTESTANTS = ("nginx", "haproxy", "rust", "lane", "lane-2", "hypercorn", "naive")


def bench(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "bench", "--no-install", "--results", results, *arguments],
        env=os.environ | {"PYTHON": sys.executable, "BENCH_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_bench_available_contestants_are_measured(tmp_path: Path):
    loads = ("json", "ttft", "sse")
    arguments = ["--contestants", ",".join(CONTESTANTS), "--workloads", ",".join(loads)]
    done = bench(tmp_path, "--tiny", "--repeat", "1", "--seconds", "0.3", *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "latest.json").read_text())
    assert not set(ALWAYS) & set(document["skipped"]), document["skipped"]
    for name in loads:
        rows = document["summary"][name]
        assert set(ALWAYS) <= set(rows)
        for contestant in ALWAYS:
            assert rows[contestant]["per_s"] > 0, (name, contestant)
            assert rows[contestant]["failures"] == 0, (name, contestant)
        assert rows["lane"]["rss_mb"] > 1
        assert WORKLOADS[name].title in done.stdout
    assert all("added_ttft_p50_ms" in row for row in document["summary"]["ttft"].values())

    again = bench(tmp_path, "--report", str(tmp_path / "latest.json"))
    assert again.stdout.strip() in done.stdout


def test_bench_unknown_contestant_is_one_line(tmp_path: Path):
    done = bench(tmp_path, "--contestants", "lane,unknown")
    assert (done.returncode, done.stderr) == (
        2, "scripts/bench: no unknown; see scripts/bench --help\n",
    )  # fmt: skip


def test_soak_samples_memory_descriptors_and_tasks(tmp_path: Path):
    done = subprocess.run(
        [
            *(ROOT / "scripts" / "soak", "0.01", "--interval", "1"),
            *("--no-install", "--results", tmp_path),
        ],
        env=os.environ | {"PYTHON": sys.executable, "BENCH_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("soak-*.json")
    (sample,) = json.loads(file.read_text())["samples"]
    assert sample["RSS MB"] > 1
    assert sample["tasks"] > 1
    assert sample["descriptors"] > 1
    assert sample["p99 ms"] > 0


# -- the load generator -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment() -> Environment:
    return Environment(ROOT / ".bench", install=False)


@pytest.fixture(scope="module")
def server(environment: Environment) -> Iterator[Server]:
    started = Server(environment.go_program("server"), 2, Cores(0))
    try:
        yield started
    finally:
        started.stop()


def load(environment: Environment, url: str, *options: str) -> dict[str, Any]:
    command = [environment.go_program("loadgen"), "-url", url, "-warmup", "100ms", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def short_load(environment: Environment, url: str) -> dict[str, Any]:
    """One streaming client, until it has had some responses."""
    return load(environment, url, "-c", "1", "-stream", "-duration", "200ms", "-fewest", "3")


@pytest.mark.parametrize(
    ("fewest", "counted"), [(("-fewest", "1"), "requests"), (("-fewest-chunks", "1"), "chunks")]
)
def test_loadgen_measures_longer_until_enough_is_counted(
    environment: Environment, server: Server, fewest: tuple[str, str], counted: str
):
    server.behave(Workload(name="", title="", ttft=1500))
    short = ("-c", "1", "-stream", "-tokens", "3", "-duration", "10ms")
    result = load(environment, server.urls[1], *short, *fewest)
    assert result[counted] >= 1
    assert result["seconds"] > 0.5


def test_loadgen_stall_counts_for_delayed_requests(environment: Environment, server: Server):
    """One connection with responses of 200 ms can serve 5 of the 50 requests due per second."""
    server.behave(Workload(name="", title="", ttft=200))
    result = load(environment, server.urls[1], "-c", "1", "-rate", "50", "-duration", "2s")
    assert result["latency_ms"]["p50"] > 2 * result["service_ms"]["p50"]
    assert result["service_ms"]["p50"] > 0.98 * 200  # a bucket is 1.6 % wide


def test_loadgen_percentiles_match_server_delays(environment: Environment, server: Server):
    server.behave(Workload(name="", title="", ttft=30, interval=40))
    long_enough = ("-duration", "1s", "-fewest", "8")
    result = load(environment, server.urls[0], "-c", "4", "-stream", "-tokens", "5", *long_enough)
    assert result["failures"] == 0
    assert result["ttft_ms"]["p50"] > 0.98 * 30
    # Most gaps are 40 ms; on a busy machine some chunks are read together.
    assert result["gap_ms"]["max"] >= 20
    assert result["latency_ms"]["p50"] > 0.98 * (30 + 4 * 40)
    assert result["transit_ms"]["count"] == result["chunks"] > 0
    for kind in ("ttft_ms", "gap_ms", "latency_ms", "transit_ms"):
        seen = result[kind]
        # The largest value is exact, the others are midpoints of buckets 1.6 % wide.
        in_order = [
            seen["p50"],
            seen["p90"],
            seen["p99"],
            seen["p99.9"],
            1.02 * seen["max"] + 0.001,
        ]
        assert in_order == sorted(in_order), kind


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
DATA = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that sends these bytes to every client and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = listener.accept()
                    with accepted, contextlib.suppress(OSError):
                        accepted.recv(65536)
                        accepted.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (HEAD + b"\r\n" + DATA, "without [DONE]"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n2f\r\n" + DATA + b"\r\n", "between chunks"),
        (HEAD + b"content-length: 100\r\n\r\n" + DATA, "answer cut"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", "503"),
        (b"", "no answer"),
    ],
)
def test_loadgen_bad_response_is_a_failure(environment: Environment, answer: bytes, why: str):
    with answering(answer) as url:
        result = short_load(environment, url)
    assert result["failures"] > 0
    assert result["requests"] == 0
    assert why in result["first_failure"]


def test_loadgen_response_ending_with_connection_is_good(environment: Environment):
    with answering(HEAD + b"\r\n" + DATA + b"data: [DONE]\n\n") as url:
        result = short_load(environment, url)
    assert result["failures"] == 0
    # The measurement may begin or end between the chunk and the end of a response.
    assert result["requests"] > 1
    assert abs(result["chunks"] - result["requests"]) <= 1


# -- the tables -------------------------------------------------------------------------------


def run(requests: int, cpu: float) -> dict[str, Any]:
    latency = {"count": requests, "p50": 1.0, "p99": 2.0, "p99.9": 3.0, "max": 4.0}
    return {
        "seconds": 2.0,
        "requests": requests,
        "chunks": 0,
        "failures": 0,
        "latency_ms": latency,
        "ttft_ms": None,
        "gap_ms": None,
        "transit_ms": None,
        "proxy_cpu_s": cpu,
        "server_cpu_s": 0.1,
        "load_cpu_s": 0.1,
        "machine_cpu_s": cpu + 0.2,
        "rss_mb": 50.0,
        "scrape_ms": 0,
    }


def test_bench_ratios_are_of_medians_to_baseline():
    records = [
        {"workload": "json", "contestant": name, "repeat": repeat, "result": result}
        for name, results in {
            "direct": [run(100_000, 0)] * 3,
            "rust": [run(10_000, 1.0), run(10_000, 9.0), run(10_000, 0.9)],
            "lane": [run(5_000, 1.0), run(1, 1.0), run(5_000, 1.0)],
        }.items()
        for repeat, result in enumerate(results)
    ]
    page = markdown({"records": records, "start_s": {}, "skipped": {"nginx": "not here"}}, "rust")
    (row,) = [line for line in page.splitlines() if line.startswith("| this router")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 2500 requests a second, half of Rust's 5000; 200 µs each, twice Rust's 100.
    assert cells[1:5] == ["2500", "0.50", "200", "2.00"]
    assert "Direct is 10.0 × as fast as vllm-router" in page
    assert "Skipped: nginx: not here" in page
