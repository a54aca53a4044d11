"""The command `scripts/bench`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .contestants import CONTESTANTS, contestant
from .environment import ROOT, Environment, Skipped, say
from .options import above_zero, count, directory
from .report import markdown, summary
from .run import Bench, Options
from .workloads import WORKLOADS, tiny


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures this router and others side by side: tables on stdout, everything as "
        "JSON under .bench/results/. What it needs is made under .bench/ at the first run.",
    )
    parser.add_argument(
        "--contestants",
        metavar="A,B",
        help=f"{', '.join(CONTESTANTS)} (all); lane@REVISION or lane@DIRECTORY is another version",
    )
    parser.add_argument("--workloads", metavar="X,Y", help=f"{', '.join(WORKLOADS)} (all)")
    parser.add_argument("--repeat", type=count, metavar="N", help="rounds; the median counts (5)")
    parser.add_argument("--seconds", type=above_zero, metavar="S", help="of one measurement (4)")
    parser.add_argument(
        "--cores",
        type=int,
        default=0,
        metavar="N",
        help="cores for the proxies alone, the others for the load; 0 (default): any for all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="json and sse unless others are named, 3 x 2 s"
    )
    parser.add_argument("--tiny", action="store_true", help="four connections: tests the harness")
    parser.add_argument("--baseline", metavar="A", help="whose values are 1.00 (rust)")
    parser.add_argument(
        "--no-install", action="store_true", help="skip contestants that are not installed"
    )
    parser.add_argument(
        "--flame",
        action="store_true",
        help="no measurement: a flame graph (py-spy) of each workload on the first contestant",
    )
    parser.add_argument("--report", metavar="FILE", help="only print the tables of these results")
    parser.add_argument(
        "--results", type=directory, metavar="DIR", help="where the JSON goes (.bench/results)"
    )
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    args = arguments(given)
    if args.report:
        try:
            document = json.loads(Path(args.report).read_text())
        except (OSError, ValueError) as error:
            say(f"scripts/bench: --report {args.report}: {error}")
            return 2
        print(markdown(document, _baseline(args.baseline, document)))
        return 0
    quick = args.quick
    try:
        contestants = [contestant(name) for name in _names(args.contestants, CONTESTANTS)]
        usual = [name for name, load in WORKLOADS.items() if not load.by_name_only]
        names = _names(args.workloads, ["json", "sse"] if quick else usual)
        workloads = [WORKLOADS[name] for name in names]
    except KeyError as error:
        say(f"scripts/bench: no {error.args[0]}; see scripts/bench --help")
        return 2
    if args.tiny:
        workloads = [tiny(load) for load in workloads]
    options = Options(
        repeat=args.repeat or (3 if quick else 5),
        warmup=0.2 if args.tiny else 0.7 if quick else 1.0,
        duration=args.seconds or (2.0 if quick else 4.0),
        cores=args.cores,
    )
    # SIGTERM must end what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = Environment(ROOT / ".bench", install=not args.no_install)
    try:
        bench = Bench(environment, options)
    except Skipped as why:
        say(f"scripts/bench: {why}")
        return 1
    about = machine()
    say(f"{len(contestants)} contestants, {len(workloads)} workloads, {options.repeat} rounds")
    if args.flame:
        try:
            for picture in bench.flame(contestants[0], workloads):
                print(picture)
        except Skipped as why:
            say(f"scripts/bench: {why}")
            return 1
        return 0
    interrupted = False
    try:
        bench.run(contestants, workloads)
    except KeyboardInterrupt:
        interrupted = True
    document = {
        "command": ["scripts/bench", *given],
        "machine": about,
        "options": asdict(options),
        "interrupted": interrupted,
        **asdict(bench.results),
    }
    document["summary"] = summary(document)
    file = write(args.results or environment.directory / "results", document)
    print(markdown(document, _baseline(args.baseline, document)))
    print(f"\n{_noise(document)}{file}")
    return 130 if interrupted else 0


def _names(given: str | None, all_of_them: Iterable[str]) -> list[str]:
    return given.split(",") if given else list(all_of_them)


def _baseline(wanted: str | None, document: dict[str, Any]) -> str:
    measured = {record["contestant"] for record in document["records"]}
    return wanted or next((name for name in ("rust", "lane") if name in measured), "direct")


def _noise(document: dict[str, Any]) -> str:
    """The other load on the machine."""
    rows = [row for by_name in document["summary"].values() for row in by_name.values()]
    worst = max((row["others_cores"] or 0 for row in rows), default=0)
    if worst < 0.15:
        return ""
    return f"Other programs used up to {worst:.1f} of {document['machine']['cores']} cores.\n"


def write(directory: Path, document: dict[str, Any]) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    file = directory / f"{stamp}.json"
    file.write_text(json.dumps(document, indent=1))
    latest = directory / "latest.json"
    with contextlib.suppress(FileNotFoundError):
        latest.unlink()
    latest.symlink_to(file.name)
    return file


def machine() -> dict[str, Any]:
    """The circumstances of the figures."""
    cpu = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "vllm_router")),
    }


def _git(*command: str) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(
            ["git", "-C", ROOT, *command], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
