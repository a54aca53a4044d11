"""`vllm-router simulate`: try policies on a simulated fleet."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from click.core import ParameterSource

from vllm_router.lab.finite_range import FiniteRange
from vllm_router.lab.simulate import plots
from vllm_router.lab.simulate.grid import (
    ALL_POLICIES,
    CALIBRATED_HARDWARE,
    Run,
    calibrate,
    capacity_of,
    execute_all,
    grid,
    lasting,
    scene_for,
)
from vllm_router.lab.simulate.hardware import HARDWARE
from vllm_router.lab.simulate.oracle import Oracle
from vllm_router.lab.simulate.replay import read_log
from vllm_router.lab.simulate.report import Cell
from vllm_router.lab.simulate.rivals import RIVALS
from vllm_router.lab.simulate.scene import NONE, SHARE_MODES, Scene
from vllm_router.lab.simulate.tables import (
    cell_rows,
    loss_rows,
    markdown,
    share_rows,
    standing_rows,
)
from vllm_router.lab.simulate.traffic import Workload
from vllm_router.lab.simulate.workloads import WORKLOADS
from vllm_router.routing.policies import POLICY_NAMES, PolicySettings

RECOMMENDED = "adaptive"

LOADS = (5, 25, 50, 70, 85, 95)
QUICK_LOADS, QUICK_SECONDS = (25, 85), 20.0

FIRST_WORKLOADS = ("chat", "multi-turn")
"""Simulated without arguments, with the grid of `--quick`: less than a minute."""

_OUTPUT_OPTIONS = {"json_file", "plot", "shares", "jobs", "seed"}
"""Options that do not choose what is simulated."""

_POLICY_SETTINGS = PolicySettings()

FEW = 30
"""A replayed log with fewer requests after the warm-up has no meaningful percentiles."""


class _SlowServer(click.ParamType[tuple[int, float]]):
    """`SERVER:FACTOR`."""

    name = "server:factor"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        place, _, factor = str(value).partition(":")
        try:
            server, times = int(place), float(factor or 5.0)
        except ValueError:
            server, times = 0, math.nan
        if not 0 < times < math.inf:
            self.fail(f"expected a server's number and a factor above 0 like 0:5, got {value!r}")
        return server, times


@click.command(name="simulate", context_settings={"show_default": True})
@click.option(
    "--workload",
    "workloads",
    envvar="VLLM_ROUTER_SIMULATE_WORKLOAD",
    multiple=True,
    type=click.Choice(list(WORKLOADS)),
    help="[all; without any option two, with --quick]",
)
@click.option(
    "--policy",
    "policies",
    envvar="VLLM_ROUTER_SIMULATE_POLICY",
    multiple=True,
    type=click.Choice(list(ALL_POLICIES)),
    help="[all that the router has]",
)
@click.option("--rivals", is_flag=True, help="Other routers' policies and the oracle, too.")
@click.option(
    "--load",
    "loads",
    envvar="VLLM_ROUTER_SIMULATE_LOAD",
    multiple=True,
    type=click.IntRange(1, 300),
    help=f"Percent of what the fleet can take.  [{', '.join(map(str, LOADS))}]",
)
@click.option("--seeds", type=click.IntRange(1, 100), default=1, help="Runs of each, to average.")
@click.option("--seed", type=click.IntRange(1), default=1, help="The first of them.")
@click.option(
    "--seconds",
    type=FiniteRange(5),
    default=60.0,
    help="Simulated, per run; longer at loads below 50 and for some workloads.",
)
@click.option(
    "--quick", is_flag=True, help="A small grid: half of the servers, 20 seconds, loads 25 and 85."
)
@click.option("--full", is_flag=True, help="The whole grid; alone it takes about half an hour.")
@click.option("--servers", type=click.IntRange(1, 200), default=None, help="[8; 32 in large-fleet]")
@click.option("--hardware", type=click.Choice(list(HARDWARE)), default="8b", help="Of a server.")
@click.option(
    "--capacity", type=click.IntRange(1), default=32, help="max_concurrent_requests per server."
)
@click.option(
    "--tuned/--untuned",
    "tuned",
    default=None,
    help="Whether max_concurrent_requests follows the speeds, or is learnt.  [untuned: learnt]",
)
@click.option("--routers", type=click.IntRange(1, 16), default=1, help="Before the same servers.")
@click.option("--share", type=click.Choice(SHARE_MODES), default=NONE, help="Between the routers.")
@click.option(
    "--period", type=FiniteRange(0.01), default=0.2, help="Seconds between two such messages."
)
@click.option(
    "--balancer",
    type=click.Choice(("random", "sticky")),
    default="random",
    help="Before the routers: sticky keeps a conversation on one of them.",
)
@click.option(
    "--session-admission",
    type=FiniteRange(0),
    default=0.0,
    help="Let new sessions wait until they fit into a cache; the session_idle in seconds, 0: off.",
)
@click.option("--metrics-interval", type=FiniteRange(0.01), default=0.5, help="Seconds.")
@click.option("--slow", multiple=True, type=_SlowServer(), help="A server slower than the rest.")
@click.option(
    "--failing", multiple=True, type=int, help="A server that fails everything, /health green."
)
@click.option("--restarting", multiple=True, type=int, help="A server that restarts.")
@click.option("--plain", type=FiniteRange(0, 1), default=0.0, help="Share of answers not streamed.")
@click.option(
    "--replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The router's access log (JSON lines) instead of a workload.",
)
@click.option(
    "--tokens-per-request",
    type=FiniteRange(0, min_open=True),
    default=_POLICY_SETTINGS.tokens_per_request,
    help="Knob T.",
)
@click.option(
    "--waste-growth", type=FiniteRange(0), default=_POLICY_SETTINGS.waste_growth, help="Knob K."
)
@click.option(
    "--prompt-growth", type=FiniteRange(0), default=_POLICY_SETTINGS.prompt_growth, help="Knob K'."
)
@click.option(
    "--json",
    "json_file",
    envvar="VLLM_ROUTER_SIMULATE_JSON",
    type=click.Path(path_type=Path),
    help="Every run, as JSON.",
)
@click.option(
    "--plot", type=click.Path(file_okay=False, path_type=Path), help="Folder for PNG and SVG."
)
@click.option(
    "--shares", is_flag=True, help="Also: which part of the requests was sent to each server."
)
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="At a time.")
@click.option(
    "--calibrate",
    "find",
    envvar="VLLM_ROUTER_SIMULATE_CALIBRATE",
    is_flag=True,
    help="Find the fleet's capacity instead.",
)
@click.pass_context
def simulate_command(
    context: click.Context,
    *,
    workloads: tuple[str, ...],
    policies: tuple[str, ...],
    rivals: bool,
    loads: tuple[int, ...],
    seeds: int,
    seed: int,
    seconds: float,
    quick: bool,
    servers: int | None,
    hardware: str,
    capacity: int,
    tuned: bool | None,
    routers: int,
    share: str,
    period: float,
    balancer: str,
    session_admission: float,
    metrics_interval: float,
    slow: tuple[tuple[int, float], ...],
    failing: tuple[int, ...],
    restarting: tuple[int, ...],
    plain: float,
    replay: Path | None,
    tokens_per_request: float,
    waste_growth: float,
    prompt_growth: float,
    json_file: Path | None,
    plot: Path | None,
    shares: bool,
    jobs: int,
    find: bool,
    full: bool,
) -> None:
    """Try policies on a simulated fleet of vLLM servers.

    The policies are the very ones of the router, the servers a model of vLLM: continuous batching,
    chunked prefill, a KV cache with preemption and a prefix cache. Same seed, same result.

    \b
    vllm-router simulate
    vllm-router simulate --workload agents --load 85 --rivals
    vllm-router simulate --replay access.log --servers 6 --plot plots/
    """
    if plot is not None and not plots.available():
        raise click.UsageError(plots.MISSING)
    chosen = {
        name
        for name in context.params
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if not chosen - _OUTPUT_OPTIONS:
        workloads, quick = FIRST_WORKLOADS, True
        click.echo(
            f"A quick look at {' and '.join(FIRST_WORKLOADS)}; --workload names others, --full "
            "runs all.",
            err=True,
        )
    workloads = workloads or tuple(WORKLOADS)
    policies = policies or POLICY_NAMES
    if rivals:
        policies = tuple(dict.fromkeys((*policies, *RIVALS, Oracle.name)))
    if find:
        for name in workloads:
            click.echo(f"{name}: {calibrate(WORKLOADS[name], hardware):.4g} requests/s")
        return
    if quick:
        loads = loads or QUICK_LOADS
        seconds = min(seconds, QUICK_SECONDS)

    def servers_of(workload: Workload) -> int:
        return servers or (workload.servers // 2 if quick else workload.servers)

    count = min(servers_of(WORKLOADS[name]) for name in workloads)
    for place in (*failing, *restarting, *(place for place, _ in slow)):
        if not 0 <= place < count:
            raise click.UsageError(f"there is no server {place}: they are 0 to {count - 1}")
    base = Scene(
        HARDWARE[hardware],
        (),
        capacity=capacity,
        routers=routers,
        scrape_interval=metrics_interval,
        seconds=seconds,
        slow=slow,
        failing=failing,
        restarting=restarting,
        plain=plain,
        share=share,
        share_period=period,
        sticky=balancer == "sticky",
        session_idle=session_admission,
    )

    settings = PolicySettings(
        tokens_per_request=tokens_per_request,
        waste_growth=waste_growth,
        prompt_growth=prompt_growth,
    )
    if replay is not None:
        fleet = scene_for(base, WORKLOADS["chat"], servers_of(WORKLOADS["chat"]), tuned)
        runs = _replayed(replay, range(seed, seed + seeds), policies, settings, fleet)
    else:
        shares_of_capacity = [load / 100 for load in loads or LOADS]
        runs = list(
            grid(
                workloads,
                shares_of_capacity,
                range(seed, seed + seeds),
                policies,
                _capacities(workloads, hardware),
                lambda workload: scene_for(base, workload, servers_of(workload), tuned),
                settings,
            )
        )
    cells = _run(runs, jobs)
    if len(policies) > 1 and RECOMMENDED in policies:
        behind = loss_rows(cells, RECOMMENDED)
        click.echo(f"Where {RECOMMENDED} is more than 5 % behind the best policy:\n")
        click.echo(markdown(*behind) if behind[1] else "nowhere")
        click.echo("")
    click.echo(markdown(*cell_rows(cells)))
    if len(policies) > 1:
        click.echo(
            "\nRelative to the best policy of each cell (geometric means, 95 % confidence):\n"
        )
        click.echo(markdown(*standing_rows(cells)))
    if shares:
        click.echo("\n" + markdown(*share_rows(cells)))
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode([_row(c) for c in cells])))
    if plot is not None:
        for path in plots.draw(cells, plot):
            click.echo(f"wrote {path}", err=True)


def _capacities(workloads: Sequence[str], hardware: str) -> dict[str, float]:
    """Capacities of eight servers by workload; other hardware than 8b needs a calibration."""
    if hardware == CALIBRATED_HARDWARE:
        return {name: capacity_of(WORKLOADS[name], hardware) for name in workloads}
    found: dict[str, float] = {}
    label = f"capacity of {hardware} servers"
    with click.progressbar(workloads, label=label, file=sys.stderr, item_show_func=str) as bar:
        for name in bar:
            found[name] = capacity_of(WORKLOADS[name], hardware)
    return found


def _replayed(
    log: Path,
    seeds: Sequence[int],
    policies: tuple[str, ...],
    settings: PolicySettings,
    fleet: Scene,
) -> list[Run]:
    lines = tuple(log.read_bytes().splitlines())
    try:
        found = read_log(lines)
    except ValueError as error:
        raise click.UsageError(f"{log}: {error}") from None
    if not found:
        raise click.UsageError(f"{log}: no request with a prompt in it")
    last = max(conversation.start for conversation in found)
    scene = lasting(fleet, last + 1.0)
    measured = sum(conversation.start >= scene.warm_up for conversation in found)
    if not measured:
        raise click.UsageError(
            f"{log}: too short to be measured: its {len(found)} requests came within {last:.1f} s, "
            f"and the first {scene.warm_up:.1f} s of a replay only warm up the caches. "
            "Replay a longer log."
        )
    if measured < FEW:
        click.echo(
            f"{log}: only {measured} of {len(found)} requests come after the warm-up: percentiles "
            "of so few say little.",
            err=True,
        )
    return [
        Run(log.name, 0.0, seed, policy, scene, 0.0, settings, lines)
        for seed in seeds
        for policy in policies
    ]


def _run(runs: list[Run], jobs: int) -> list[Cell]:
    with click.progressbar(
        length=len(runs),
        label=f"{len(runs)} runs",
        file=sys.stderr,
        item_show_func=lambda cell: f"{cell.policy}, {cell.workload}" if cell is not None else "",
    ) as bar:
        return execute_all(runs, min(jobs, len(runs)), lambda cell: bar.update(1, cell))


def _row(cell: Cell) -> dict[str, object]:
    return {
        "workload": cell.workload,
        "load": cell.load,
        "seed": cell.seed,
        "policy": cell.policy,
        **cell.figures.as_json(),
    }
