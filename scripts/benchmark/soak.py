"""The command `scripts/soak`: mixed load for minutes, and its memory, descriptors and tasks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .contestants import Place, ours
from .environment import HERE, ROOT, Environment, Skipped, say
from .options import above_zero, directory
from .run import Cores, Running, Server, free_ports, get, raise_descriptor_limit
from .workloads import Workload

SERVERS = 5

# Streams that are cut off when their time is over: clients that disconnect in the middle.
LOADS = {
    "json": ["-c", "32", "-rate", "100"],
    "streams": ["-c", "64", "-stream", "-tokens", "100000", "-spread", "1s"],
    "short streams": ["-c", "8", "-stream", "-tokens", "20"],
    "new connections": ["-c", "2", "-rate", "20", "-new-connection"],
    "long prompts": ["-c", "2", "-rate", "2", "-prompt", "200000"],
}

PLOT = """
import json, sys
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
samples = json.load(open(sys.argv[1]))["samples"]
minutes = [sample["seconds"] / 60 for sample in samples]
names = [name for name in samples[0] if name != "seconds"]
figure, axes = pyplot.subplots(len(names), 1, sharex=True, figsize=(9, 1.7 * len(names)))
for axis, name in zip(axes, names):
    axis.plot(minutes, [sample[name] for sample in samples], linewidth=1)
    axis.set_ylabel(name)
    axis.set_ylim(0, 1.1 * max(1, *(sample[name] for sample in samples)))
    axis.grid(alpha=0.3)
axes[-1].set_xlabel("minutes")
figure.tight_layout()
figure.savefig(sys.argv[2], dpi=110)
"""


class Soak:
    """The router with five servers.

    In every interval one of them is added and removed by reloads.
    """

    def __init__(self, environment: Environment, interval: float) -> None:
        self.interval = interval
        self._loadgen = environment.go_program("loadgen")
        cores = Cores(0)
        self.server = Server(environment.go_program("server"), SERVERS, cores)
        self.tasks = environment.run / "tasks"
        port, side_port = free_ports(2)
        plan = ours("lane")(environment)(Place(port, side_port, self.server.urls, environment.run))
        self.config = environment.run / "servers.toml"
        start = plan.command.index("-m")
        plan.command[start : start + 2] = [str(HERE / "counted.py"), str(self.tasks)]
        # The script's directory is not to be searched for modules, the source tree is.
        self.router = Running("router", plan, port, environment.run / "output.log", cores)

    def close(self) -> None:
        self.router.stop()
        self.server.stop()

    def sample(self, began: float, number: int) -> dict[str, float]:
        """Load for one interval; returns the sample at its end."""
        self.server.behave(Workload(name="", title="", interval=20, ttft=5))
        children = {name: self._start(options) for name, options in LOADS.items()}
        time.sleep(self.interval / 2)
        self._reload(SERVERS - number % 2)
        results = {}
        for name, child in children.items():
            output, _ = child.communicate()
            results[name] = json.loads(output)
        time.sleep(0.5)  # so that the router notices the disconnects
        values = metrics(get(f"{self.router.url}/metrics").decode())
        failures = {name: r["first_failure"] for name, r in results.items() if r["failures"]}
        if failures:
            say(f"failures: {failures}")
        return {
            "seconds": round(time.monotonic() - began, 1),
            "RSS MB": values["process_resident_memory_bytes"] / 1e6,
            "descriptors": values["process_open_fds"],
            "tasks": struct.unpack("<q", self.tasks.read_bytes())[0],
            "in flight": values["vllm_router_requests_in_flight"],
            "p99 ms": results["json"]["latency_ms"]["p99"],
            "loop lag ms": values["vllm_router_event_loop_lag_seconds"] * 1e3,
            "failures": float(sum(result["failures"] for result in results.values())),
        }

    def _start(self, options: list[str]) -> subprocess.Popen[str]:
        url = self.router.url
        command = [str(self._loadgen), "-url", url, "-warmup", "1s"]
        command += ["-duration", f"{self.interval}s", "-feed", f"{url}/ws/load"]
        command += ["-scrape", f"{url}/metrics", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _reload(self, count: int) -> None:
        lines = [f'  {{ url = "{url}" }},' for url in self.server.urls[:count]]
        new = self.config.with_suffix(".new")
        new.write_text("\n".join(["[servers]", "servers = [", *lines, "]"]) + "\n")
        new.rename(self.config)


def metrics(page: str) -> dict[str, float]:
    """The samples without labels."""
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.MULTILINE)}


def verdict(samples: list[dict[str, Any]]) -> str:
    """The last quarter compared with the second: the first still warms up."""
    quarter = len(samples) // 4
    if not quarter:
        return "too short to tell whether anything grows"
    lines = []
    for name in samples[0]:
        if name in ("seconds", "failures"):
            continue
        early, late = (
            sorted(sample[name] for sample in part)[quarter // 2]
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        lines.append(f"{name:12} {early:10.1f} -> {late:10.1f}")
    lines.append(f"failures     {sum(sample['failures'] for sample in samples):10.0f}")
    return "\n".join(lines)


def plot(environment: Environment, file: Path) -> Path | None:
    """A plot of the samples, if matplotlib is available."""
    try:
        python = environment.venv("plot", "matplotlib")
    except Skipped as why:
        say(f"no picture: {why}")
        return None
    picture = file.with_suffix(".png")
    subprocess.run([python, "-c", PLOT, file, picture], check=True)
    return picture


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("minutes", type=above_zero)
    parser.add_argument(
        "--interval", type=above_zero, default=10.0, help="seconds of a sample (10)"
    )
    parser.add_argument("--no-install", action="store_true", help="no picture without matplotlib")
    parser.add_argument(
        "--results", type=directory, help="where JSON and picture go (.bench/results)"
    )
    args = parser.parse_args(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_descriptor_limit()
    environment = Environment(ROOT / ".bench", install=not args.no_install)
    samples: list[dict[str, Any]] = []
    with contextlib.closing(Soak(environment, args.interval)) as soak:
        soak.router.wait_ready()
        began = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() - began < args.minutes * 60:
                samples.append(soak.sample(began, len(samples)))
                say("  ".join(f"{name} {value:.1f}" for name, value in samples[-1].items()))
    if not samples:
        return 130
    stamp = time.strftime("%Y%m%d-%H%M%S")
    file = (args.results or environment.directory / "results") / f"soak-{stamp}.json"
    file.write_text(json.dumps({"machine_cores": os.cpu_count(), "samples": samples}, indent=1))
    print(verdict(samples))
    print(file)
    if picture := plot(environment, file):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
