"""The simulated engines, the simulated fleet, replay, tables and the command."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from unittest.mock import patch

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.cli.main import cli as router_cli
from vllm_router.lab.simulate import cli, plots
from vllm_router.lab.simulate import grid as grid_module
from vllm_router.lab.simulate.cli import LOADS
from vllm_router.lab.simulate.engine import Engine, Job
from vllm_router.lab.simulate.grid import (
    ALL_POLICIES,
    Run,
    execute,
    execute_all,
    grid,
    lasting,
    rate_at,
    scene_for,
    speeds_of,
)
from vllm_router.lab.simulate.hardware import HARDWARE
from vllm_router.lab.simulate.replay import read_log
from vllm_router.lab.simulate.report import Cell, Figures, percentile
from vllm_router.lab.simulate.scene import Scene
from vllm_router.lab.simulate.standings import interval, losses, margin, standings
from vllm_router.lab.simulate.tables import cell_rows, markdown
from vllm_router.lab.simulate.text import BLOCK_TOKENS, Text
from vllm_router.lab.simulate.workloads import WORKLOADS, conversations
from vllm_router.lab.simulate.world import World
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.prompt.blocks import blocks_in, hash_blocks, pack_hashes

H100 = HARDWARE["8b"]


def run_engine(engine: Engine) -> tuple[dict[Job, float], dict[Job, float]]:
    """Run to the end of all work: the times of each job's first and last token."""
    firsts: dict[Job, float] = {}
    lasts: dict[Job, float] = {}
    while engine.step_end < math.inf:
        now = engine.step_end
        first, last = engine.finish_step()
        firsts.update(dict.fromkeys(first, now))
        lasts.update(dict.fromkeys(last, now))
    return firsts, lasts


def job(tokens: int, output: int = 10, passage: int = 1, text: Text | None = None) -> Job:
    text = text or Text()
    text.add(passage, tokens)
    return Job(None, text, text.length, output, 0.0)


# -- texts -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=8))
def test_simulated_texts_with_common_beginning_share_blocks(passages: list[tuple[int, int]]):
    one, other = Text(), Text()
    for passage, tokens in passages:
        one.add(passage, tokens)
        other.add(passage, tokens)
    common = one.length // BLOCK_TOKENS
    one.add(10, 200)
    other.add(11, 200)
    assert one.blocks[:common] == other.blocks[:common]
    assert one.blocks[common] != other.blocks[common]
    assert len(one.blocks) == one.length // BLOCK_TOKENS


def test_simulated_text_has_blocks_of_prompt_of_its_length():
    text = Text()
    text.add(1, 5000)
    assert len(text.chain(5000)) == blocks_in(20_000)
    assert text.chain(1000) == text.chain(5000)[: blocks_in(4000)]


# -- engines -----------------------------------------------------------------------------------


def test_simulated_request_takes_prefill_and_steps():
    engine = Engine(H100)
    only = job(1000, output=100)
    assert engine.submit(only, 0.0)
    firsts, lasts = run_engine(engine)
    assert firsts[only] == pytest.approx(H100.base + 1000 * H100.per_prompt_token, rel=0.1)
    assert lasts[only] - firsts[only] == pytest.approx(99 * H100.base, rel=0.1)


def test_simulated_cached_prompt_is_not_computed_again():
    engine = Engine(H100)
    engine.submit(job(6400), 0.0)
    run_engine(engine)
    again = job(6400)
    engine.submit(again, 1.0)
    firsts, _ = run_engine(engine)
    assert again.cached == 6399
    assert firsts[again] - 1.0 < 2 * H100.base


def test_simulated_answer_is_cached_for_next_turn():
    engine = Engine(H100)
    text = Text()
    text.add(1, 640)
    text.add(2, 640)  # the response
    engine.submit(Job(None, text, 640, 640, 0.0), 0.0)
    run_engine(engine)
    text.add(3, 64)
    later = Job(None, text, text.length, 1, 20.0)
    engine.submit(later, 20.0)
    run_engine(engine)
    assert later.cached == 1280


def test_simulated_long_prompt_is_computed_in_chunks_beside_decoding():
    engine = Engine(H100)
    short, long = job(100, output=200), job(30_000, passage=2)
    engine.submit(short, 0.0)
    engine.submit(long, 0.0)
    firsts, lasts = run_engine(engine)
    assert firsts[short] < firsts[long] < lasts[short]


def test_simulated_batch_slows_tokens():
    def last_of(count: int) -> float:
        engine = Engine(H100)
        for n in range(count):
            engine.submit(job(64, output=100, passage=n), 0.0)
        return max(run_engine(engine)[1].values())

    assert 1.2 * last_of(1) < last_of(100) < 20 * last_of(1)


def test_simulated_requests_wait_for_context_memory():
    small = H100._replace(kv_tokens=64 * 100)
    engine = Engine(small)
    jobs = [job(64 * 60, passage=n) for n in range(3)]
    for one in jobs:
        engine.submit(one, 0.0)
    assert engine.metrics().waiting == 2
    firsts, lasts = run_engine(engine)
    assert firsts[jobs[1]] >= lasts[jobs[0]]


def test_simulated_growing_context_preempts_youngest_which_finishes():
    small = H100._replace(kv_tokens=64 * 40)
    engine = Engine(small)
    jobs = [job(64 * 12, output=600, passage=n) for n in range(3)]
    for one in jobs:
        engine.submit(one, 0.0)
    _, lasts = run_engine(engine)
    assert engine.preemptions > 0
    assert set(lasts) == set(jobs)
    assert max(lasts, key=lambda one: lasts[one]) is jobs[2]


def test_simulated_least_recently_used_prefix_is_evicted():
    engine = Engine(H100._replace(kv_tokens=64 * 100))
    for n in range(4):
        engine.submit(job(64 * 40, passage=n), 0.0)
        run_engine(engine)
    oldest, newest = job(64 * 40, passage=0), job(64 * 40, passage=3)
    engine.submit(newest, 0.0)
    run_engine(engine)
    engine.submit(oldest, 0.0)
    run_engine(engine)
    assert newest.cached > 0
    assert oldest.cached == 0


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 900), st.integers(1, 60)), max_size=25))
def test_simulated_engine_finishes_every_job_and_balances(jobs: list[tuple[int, int, int]]):
    engine = Engine(H100._replace(kv_tokens=64 * 30, max_running=4))
    made = [job(tokens, output, passage) for passage, tokens, output in jobs]
    for one in made:
        engine.submit(one, 0.0)
    _, lasts = run_engine(engine)
    assert set(lasts) == set(made)
    assert all(one.generated == one.output_tokens for one in made)
    metrics = engine.metrics()
    assert (metrics.running, metrics.waiting, metrics.kv_usage) == (0, 0, 0)
    assert metrics.generation_tokens is not None
    assert metrics.generation_tokens >= sum(one.output_tokens for one in made)


def test_simulated_adapter_shares_no_blocks_with_base_model():
    engine = Engine(H100)
    text = Text()
    text.add(1, 6400)
    for adapter, cached in ((0, 0), (1, 0), (1, 6399), (0, 6399)):
        one = Job(None, text, 6400, 1, 0.0, adapter)
        engine.submit(one, 0.0)
        run_engine(engine)
        assert one.cached == cached


def test_simulated_adapter_is_swapped_in_once_and_delays_the_step():
    engine = Engine(H100)
    first, second = (Job(None, Text(), 64, 1, 0.0, 7) for _ in range(2))
    engine.submit(first, 0.0)
    firsts, _ = run_engine(engine)
    assert firsts[first] > H100.adapter_swap
    engine.submit(second, 1.0)
    firsts, _ = run_engine(engine)
    assert firsts[second] - 1.0 < 0.1 * H100.adapter_swap


def test_simulated_request_without_adapter_slot_is_skipped_until_one_is_free():
    engine = Engine(H100._replace(adapter_slots=1))
    running, skipped, base = (Job(None, Text(), 64, 50, 0.0, adapter) for adapter in (1, 2, 0))
    for one in (running, skipped, base):
        engine.submit(one, 0.0)
    metrics = engine.metrics()
    assert (metrics.max_adapters, metrics.adapters) == (1, ("adapter-1",))
    assert metrics.waiting_adapters == ("adapter-2",)
    firsts, lasts = run_engine(engine)
    assert firsts[base] < lasts[running] < firsts[skipped]
    assert engine.metrics().adapters == engine.metrics().waiting_adapters == ()


# -- the simulated fleet -----------------------------------------------------------------------


def scene(**changes: object) -> Scene:
    base = Scene(H100, (1.0,) * 4, seconds=15.0, warm_up=5.0)
    return dataclasses.replace(base, **changes)


@functools.cache
def figures_of(
    policy: str, workload: str = "chat", rate: float = 60.0, **changes: object
) -> Figures:
    return execute(Run(workload, 0.0, 1, policy, scene(**changes), rate)).figures


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_simulate_every_policy_serves_everything(policy: str):
    found = figures_of(policy, "multi-turn")
    assert found.requests > 200
    assert (found.failed, found.goodput) == (0, 1.0)


WITHOUT_END = ("swarm", "agents-thinking", "agents-oversubscribed")
"""Their agents ask again and again, as fast as they get answers."""


@pytest.mark.parametrize("workload", WORKLOADS)
def test_simulate_workload_has_its_rate_and_is_equal_for_policies(workload: str):
    def asked(seed: int) -> list[tuple[float, int]]:
        made = conversations(WORKLOADS[workload], seed, 30.0, 50.0)
        most = 5 if workload in WITHOUT_END else None
        return [
            (one.start, turn.added) for one in made for turn in itertools.islice(one.turns, most)
        ]

    found = asked(1)
    assert found == asked(1) != asked(2)
    if workload not in WITHOUT_END:
        assert 0.6 < len(found) / (30 * 50) < 1.5


def test_simulate_same_seed_gives_same_result():
    run = Run("agents", 0.0, 1, "adaptive", scene(), 10.0)
    assert execute(run) == execute(run)


def test_simulate_leases_are_returned():
    run = Run("multi-turn", 0.0, 1, "adaptive", scene(failing=(1,), routers=2), 60.0)
    made = conversations(WORKLOADS["multi-turn"], 1, 60.0, 15.0)
    world = World(run.scene, made, lambda rng: ALL_POLICIES["adaptive"](rng), 1).run()
    assert all(server.in_flight == 0 for router in world.routers for server in router.servers)
    assert all(call.ended_at < math.inf for call in world.calls)


def test_simulate_prefixes_are_found_by_prefix_policies():
    blind, minding = (figures_of(name, "many-systems") for name in ("least_load", "adaptive"))
    assert minding.hit_rate > blind.hit_rate + 0.2
    assert minding.first_p50 < blind.first_p50


def test_simulate_slow_server_gets_less_from_aware_policy():
    blind, seeing = (figures_of(name, slow=((0, 5.0),)) for name in ("round_robin", "adaptive"))
    assert blind.shares[0] == pytest.approx(0.25, abs=0.02)
    assert seeing.shares[0] < 0.12


def test_simulate_fast_failing_server_gets_few_and_loses_none():
    found = figures_of("adaptive", failing=(0,), failing_from=6.0)
    assert found.failed == 0
    assert 0 < found.shares[0] < 0.02
    assert sum(found.shares) > 1  # failed requests were retried elsewhere


def test_simulate_several_routers_serve_everything():
    found = figures_of("adaptive", "multi-turn", routers=3)
    assert (found.failed, found.goodput) == (0, 1.0)


@pytest.mark.parametrize("share", ["prompts", "prompts,queued"])
def test_simulate_routers_that_share_prompts_find_more_cached(share: str):
    alone, sharing = (
        figures_of("adaptive", "agents", 12.0, routers=4, share=mode) for mode in ("none", share)
    )
    assert sharing.failed == 0
    assert sharing.hit_rate > alone.hit_rate + 0.02


def test_simulate_queued_tokens_of_other_routers_are_shared():
    def run_with(share: str) -> list[float]:
        seen: list[float] = []
        run = scene(routers=2, share=share)
        made = conversations(WORKLOADS["agents"], 1, 20.0, 15.0)
        world = World(run, made, lambda rng: ALL_POLICIES["adaptive"](rng), 1)
        policy = world.routers[0].policy
        with patch.object(
            policy, "queued_elsewhere", side_effect=lambda _, tokens: seen.append(tokens)
        ):
            world.run()
        return seen

    assert max(run_with("prompts,queued")) > 3000
    assert run_with("prompts") == []


def test_simulate_sticky_balancer_keeps_conversations_on_one_router():
    made = conversations(WORKLOADS["agents"], 1, 12.0, 15.0)
    run = scene(routers=3, sticky=True)
    world = World(run, made, lambda rng: ALL_POLICIES["random"](rng), 1).run()
    routers: dict[int, set[int]] = {}
    for call in world.calls:
        routers.setdefault(call.conversation.number, set()).add(id(call.router))
    assert all(len(used) == 1 for used in routers.values())
    assert len(set.union(*routers.values())) == 3


def test_simulate_admission_of_sessions_keeps_contexts_cached():
    """Three times what the servers can take, by agents with twice the context of all caches."""
    run = scene_for(scene(seconds=40.0, warm_up=20.0), WORKLOADS["agents-oversubscribed"], 2)
    without, admitting = (
        execute(
            Run(
                "agents-oversubscribed", 0.0, 1, "adaptive",
                dataclasses.replace(run, session_idle=idle), 7.5,
            )
        ).figures
        for idle in (0.0, 10.0)
    )  # fmt: skip
    assert admitting.hit_rate > without.hit_rate + 0.2
    assert admitting.good_per_second > 1.5 * without.good_per_second


def test_simulate_new_sessions_are_admitted_in_their_order():
    run = scene_for(
        scene(seconds=20.0, session_idle=3.0), WORKLOADS["agents-oversubscribed"], 1
    )  # fmt: skip
    made = conversations(WORKLOADS["agents-oversubscribed"], 1, 3.0, 20.0, 1)
    world = World(run, made, lambda rng: ALL_POLICIES["random"](rng), 1).run()
    firsts = {}
    for call in world.calls:
        if call.lease is not None:
            firsts.setdefault(call.info.session, (call.arrived, call.first_at))
    admitted = sorted(firsts.values())
    assert len(admitted) > 5
    assert max(first - arrived for arrived, first in admitted) > 1.0
    assert [first for _, first in admitted] == sorted(first for _, first in admitted)


def test_simulate_restarting_server_is_used_again():
    found = figures_of("adaptive", restarting=(0,), failing_from=5.0, seconds=25.0)
    assert found.failed == 0
    assert found.shares[0] > 0.05


def test_simulate_joining_and_draining_servers_get_requests_only_while_they_are_there():
    base = scene(seconds=20.0, warm_up=1.0)
    changing = dataclasses.replace(
        base, joining=(3,), joining_at=8.0, draining=(0,), draining_at=14.0
    )
    made = conversations(WORKLOADS["chat"], 1, 60.0, 20.0)
    world = World(changing, made, lambda rng: ALL_POLICIES["adaptive"](rng), 1).run()
    by_server = [[call.arrived for call in world.calls if call.server == n] for n in range(4)]
    assert min(by_server[3]) >= 8.0
    assert max(by_server[0]) < 14.0
    assert not any(call.failed for call in world.calls)


def test_simulate_adapter_requests_go_only_to_servers_that_have_adapters():
    workload = WORKLOADS["adapters"]
    placed = scene_for(scene(), workload, 4)
    made = conversations(workload, 1, 60.0, 15.0)
    world = World(placed, made, lambda rng: ALL_POLICIES["round_robin"](rng), 1).run()
    adapters = {call.server for call in world.calls if call.conversation.adapter}
    assert adapters == {1, 2, 3}
    assert {call.server for call in world.calls} == {0, 1, 2, 3}


def test_simulate_untuned_fleet_has_equal_configured_capacities():
    untuned = scene_for(scene(), WORKLOADS["untuned"])
    assert len(set(untuned.speeds)) > 1
    assert {untuned.configured_capacity(n) for n in range(8)} == {None}


def test_simulate_untuned_fleet_is_nearly_as_good_as_tuned_one_with_least_load():
    """Without learnt speeds the slow servers get as many requests as the fast, and 1.155 is it."""
    workload = WORKLOADS["untuned"]
    untuned = lasting(scene_for(scene(), workload), 12.0)
    rate = rate_at(workload, 0.7, 8, workload.capacity)

    def token_p99(fleet: Scene) -> float:
        return execute(Run("untuned", 0.7, 4, "least_load", fleet, rate)).figures.token_p99

    tuned = dataclasses.replace(untuned, tuned=True)
    assert token_p99(untuned) < 1.05 * token_p99(tuned)


def test_simulate_large_fleet_has_its_own_servers_and_routers():
    found = scene_for(scene(), WORKLOADS["large-fleet"])
    assert (len(found.speeds), found.routers) == (32, 4)
    assert len(scene_for(scene(), WORKLOADS["large-fleet"], 3).speeds) == 3


def test_simulate_low_load_is_simulated_longer():
    runs = grid(
        ["chat"], [0.05, 0.25, 0.85], [1], ["random"], {"chat": 100.0},
        lambda workload: scene_for(scene(), workload), PolicySettings(),
    )  # fmt: skip
    assert [run.scene.seconds for run in runs] == [60.0, 30.0, 15.0]


def test_oracle_sends_to_server_with_cached_prompt_and_short_queue():
    blind, knowing = (figures_of(name, "many-systems") for name in ("least_load", "oracle"))
    assert knowing.hit_rate > blind.hit_rate + 0.2
    slow = figures_of("oracle", slow=((0, 5.0),))
    assert slow.shares[0] < 0.12


# -- results -----------------------------------------------------------------------------------


def test_percentile_of_empty_list_is_zero():
    assert percentile([], 0.99) == 0.0
    assert percentile([1.0, 2.0, 3.0], 0.99) == 3.0


def cell(
    policy: str, p99: float, *, workload: str = "one", seed: int = 1, load: float = 0.5
) -> Cell:
    figures = Figures(100, 0, 0.01, p99, 0.02, 0.03, 1.0, 0.5, 1.0, 0, (1.0,))
    return Cell(workload, load, seed, policy, figures)


def test_standings_are_relative_to_best_of_each_cell():
    found = standings(
        [
            cell("good", 0.1), cell("bad", 0.7),
            cell("good", 0.1, workload="two"), cell("bad", 0.1, workload="two"),
        ]
    )  # fmt: skip
    assert [(row.policy, row.by_measure["p99 TTFT"]) for row in found] == [
        ("good", pytest.approx(1.0)),
        ("bad", pytest.approx(2.0)),
    ]
    assert found[1].worst["p99 TTFT"] == (pytest.approx(4.0), "one 50%")
    assert found[1].by_measure["TPOT p99"] == pytest.approx(1.0)
    assert found[1].overall.mean == pytest.approx(2.0 ** (1 / 3))


def test_standings_oracle_is_no_rival_and_has_its_own_column():
    good, _ = standings([cell("good", 0.7), cell("oracle", 0.1)])[::-1]
    assert good.policy == "good"
    assert good.by_measure["p99 TTFT"] == pytest.approx(1.0)
    assert good.to_oracle == pytest.approx(4.0 ** (1 / 3))


def test_losses_are_of_one_policy_and_worst_first():
    cells = [
        cell("adaptive", 0.3), cell("other", 0.1),
        cell("adaptive", 0.7, workload="two"), cell("other", 0.1, workload="two"),
        cell("adaptive", 0.1, workload="three"), cell("other", 0.3, workload="three"),
    ]  # fmt: skip
    found = losses(cells, "adaptive")
    assert [(loss.workload, loss.measure, loss.winner) for loss in found] == [
        ("two", "p99 TTFT", "other"),
        ("one", "p99 TTFT", "other"),
    ]
    assert found[0].ratio.mean == pytest.approx(4.0)


def test_losses_confidence_is_of_pairs_with_the_same_seed():
    p99s = {1: (0.1, 0.3), 2: (0.3, 0.7), 3: (1.9, 3.9)}
    cells = [
        cell(policy, p99, seed=seed)
        for seed, pair in p99s.items()
        for policy, p99 in zip(("other", "adaptive"), pair, strict=True)
    ]
    (loss,) = losses(cells, "adaptive")
    assert loss.ratio == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


def test_interval_of_ratios_is_students():
    found = interval([math.log(1.0), math.log(4.0)])
    assert found.mean == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0 * math.exp(12.71 * math.log(2.0)))
    assert interval([0.0]) == (1.0, None, None)
    assert str(interval([0.0])) == "1"


def test_margin_of_mean_is_students():
    assert margin([1.0, 2.0, 3.0]) == pytest.approx(4.30 / math.sqrt(3))
    assert margin([1.0]) is None


def test_cell_table_has_confidence_of_several_seeds():
    figures = figures_of("random", rate=20.0, seconds=6.0)
    head, (row,) = cell_rows([Cell("chat", 0.5, seed, "random", figures) for seed in (1, 2)])
    assert dict(zip(head, row, strict=True))["p99"] != ""
    assert row[head.index("p99")].endswith("± 0.000 s")
    _, (row,) = cell_rows([Cell("chat", 0.5, 1, "random", figures)])
    assert "±" not in "".join(row)


def test_simulate_rates_follow_fleet_size():
    chat, unequal = WORKLOADS["chat"], WORKLOADS["unequal"]
    assert rate_at(chat, 0.5, 16, 200.0) == 200.0
    assert speeds_of(unequal, 5) == (1.0, 1.0, 0.4, 0.4, 1.0)
    assert rate_at(unequal, 1.0, 4, 100.0) == pytest.approx(50.0)


def test_simulate_table_is_markdown():
    assert markdown(("a", "b"), [("1", "long")]) == "| a | b    |\n|---|------|\n| 1 | long |"


def test_simulate_runs_in_other_processes_give_same_result():
    runs = [Run("chat", 0.0, seed, "random", scene(seconds=6.0), 20.0) for seed in (1, 2, 3)]
    reported: list[Cell] = []
    assert execute_all(runs, 2, reported.append) == [execute(run) for run in runs]
    assert len(reported) == 3


# -- replay ------------------------------------------------------------------------------------


def log_line(time: float, text: bytes, **more: object) -> bytes:
    line = {"time": time, "prompt_bytes": len(text), "prefix": pack_hashes(hash_blocks(text))}
    return msgspec.json.encode({**line, "status": 200, **more})


def test_replay_log_becomes_requests_at_their_times():
    shared = bytes(n % 251 for n in range(12_000))
    lines = [
        log_line(1000.0, shared),
        b"",
        log_line(1002.5, shared + b"more" * 500, completion_tokens=7),
    ]
    first, second = read_log(lines)
    assert (first.start, second.start) == (0.0, 2.5)
    assert next(second.turns).output == 7
    common = len(hash_blocks(shared))
    assert first.text.chain(3000)[:common] == second.text.chain(3500)[:common]


def test_replay_prefixes_are_cached():
    shared = bytes(n % 251 for n in range(40_000))
    lines = tuple(log_line(n / 5, shared + b"%d" % n) for n in range(60))
    found = execute(Run("log", 0.0, 1, "adaptive", scene(), 0.0, log=lines)).figures
    assert found.hit_rate > 0.7


def test_replay_keeps_json_answers_unstreamed():
    lines = [log_line(1.0, b"x" * 5000, stream=False), log_line(2.0, b"y" * 5000, stream=True)]
    world = World(scene(), read_log(lines), lambda rng: ALL_POLICIES["adaptive"](rng), 1).run()
    assert [call.info.stream for call in world.calls] == [False, True]


def test_replay_unreadable_line_is_named():
    with pytest.raises(ValueError, match=r"^line 2: "):
        read_log([log_line(1.0, b"x"), b"{"])


# -- the command -------------------------------------------------------------------------------


def run_command(arguments: Sequence[str]) -> Result:
    return CliRunner().invoke(router_cli, ["simulate", *arguments], prog_name="vllm-router")


def command(*arguments: str) -> str:
    result = run_command(arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


SHORT = ("--seconds", "5", "--servers", "2", "--jobs", "1")


def test_simulate_command_prints_tables_and_writes_json(tmp_path):
    file = tmp_path / "out.json"
    printed = command(
        *SHORT, "--workload", "chat", "--load", "50", "--policy", "adaptive",
        "--policy", "cache_aware", "--shares", "--json", str(file),
    )  # fmt: skip
    assert "| chat     | 50%  | adaptive    |" in printed
    assert printed.startswith("Where adaptive is more than 5 % behind")
    assert "Relative to the best policy" in printed
    assert "server-1" in printed
    rows = msgspec.json.decode(file.read_bytes())
    assert [row["policy"] for row in rows] == ["adaptive", "cache_aware"]
    assert all(row["requests"] > 0 for row in rows)


def test_simulate_command_passes_on_how_routers_share():
    with patch.object(grid_module, "World", wraps=World) as world:
        command(
            *SHORT, "--workload", "chat", "--load", "50", "--policy", "adaptive", "--routers", "2",
            "--share", "prompts,queued", "--period", "0.5", "--balancer", "sticky",
            "--session-admission", "7",
        )  # fmt: skip
    used = world.call_args.args[0]
    assert (used.share, used.share_period, used.sticky) == ("prompts,queued", 0.5, True)
    assert used.session_idle == 7.0


@pytest.mark.parametrize(("flag", "capacity"), [("--tuned", 64), ("--untuned", None)])
def test_simulate_command_tunes_fleet_or_has_it_learnt(flag: str, capacity: int | None):
    with patch.object(cli, "execute_all", return_value=[]) as run:
        command(*SHORT, "--workload", "untuned", "--workload", "chat", flag)
    fleets = {run.workload: run.scene for run in run.call_args.args[0]}
    assert fleets["untuned"].configured_capacity(0) == capacity
    assert (fleets["chat"].configured_capacity(0) is None) is (capacity is None)


def test_simulate_command_replays_log(tmp_path):
    log = tmp_path / "access.log"
    log.write_bytes(b"\n".join(log_line(n / 10, b"x" * 5000) for n in range(100)))
    printed = command(*SHORT, "--replay", str(log), "--policy", "adaptive")
    assert "access.log" in printed


def test_simulate_command_quick_runs_two_loads_on_four_servers():
    printed = command(
        "--quick", "--seconds", "5", "--jobs", "1", "--workload", "adapters", "--policy", "random",
        "--shares",
    )  # fmt: skip
    assert "| adapters | 25% " in printed
    assert "| adapters | 85% " in printed
    assert "server-3" in printed
    assert "server-4" not in printed


def test_simulate_command_quick_runs_all_loads_if_they_are_named():
    chosen = [part for load in LOADS for part in ("--load", str(load))]
    with patch.object(cli, "execute_all", return_value=[]) as run:
        command("--quick", "--workload", "chat", "--policy", "random", *chosen)
    assert {run.load for run in run.call_args.args[0]} == {load / 100 for load in LOADS}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--slow", "7:2"), "there is no server 7: they are 0 to 1"),
        (("--slow", "x"), "expected a server's number and a factor above 0 like 0:5, got 'x'"),
        (("--slow", "0:nan"), "expected a server's number and a factor above 0"),
        (("--slow", "0:0"), "expected a server's number and a factor above 0"),
        (("--seconds", "nan"), "'--seconds': expected a finite number, got 'nan'"),
        (("--period", "inf"), "'--period': expected a finite number, got 'inf'"),
        (("--tokens-per-request", "0"), "'--tokens-per-request': 0.0 is not in the range x>0"),
        (("--waste-growth", "-1"), "'--waste-growth': -1.0 is not in the range x>=0"),
    ],
)
def test_simulate_command_reports_errors(arguments: tuple[str, ...], problem: str):
    result = run_command([*SHORT, *arguments])
    assert result.exit_code == 2
    assert problem in result.output


@pytest.mark.parametrize("requests", [1, 50])
def test_replay_log_shorter_than_warm_up_is_an_error(tmp_path, requests):
    log = tmp_path / "access.log"
    log.write_bytes(b"\n".join(log_line(n / 1000, b"x" * 5000) for n in range(requests)))
    result = run_command([*SHORT, "--replay", str(log)])
    assert result.exit_code == 2
    assert "too short to be measured" in result.output
    assert "|" not in result.stdout


def test_replay_log_with_few_requests_after_warm_up_warns(tmp_path):
    log = tmp_path / "access.log"
    log.write_bytes(b"\n".join(log_line(n, b"x" * 5000) for n in range(6)))
    arguments = [*SHORT, "--replay", str(log), "--policy", "least_load"]
    result = run_command(arguments)
    assert result.exit_code == 0
    assert "only 4 of 6 requests come after the warm-up" in result.stderr


def test_replay_log_without_prompts_is_an_error(tmp_path):
    log = tmp_path / "access.log"
    log.write_text('{"time": 1}\n')
    result = run_command([*SHORT, "--replay", str(log)])
    assert result.exit_code == 2
    assert "no request with a prompt in it" in result.output


def test_simulate_without_arguments_runs_small_grid(monkeypatch):
    ran: list[Run] = []

    def execute_none(runs: list[Run], jobs: int, shown: object) -> list[Cell]:
        ran.extend(runs)
        raise click.Abort

    monkeypatch.setattr("vllm_router.lab.simulate.cli.execute_all", execute_none)
    run_command([])
    assert {run.workload for run in ran} == {"chat", "multi-turn"}
    assert len(ran) < 50
    del ran[:]
    run_command(["--full"])
    assert {run.workload for run in ran} == set(WORKLOADS)


def test_plots_are_drawn_as_png_and_svg(tmp_path):
    policies = ("--policy", "adaptive", "--policy", "random")
    command(
        *SHORT, "--workload", "chat", "--load", "50", *policies, "--plot", str(tmp_path)
    )  # fmt: skip
    assert (tmp_path / "chat.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "chat.svg").read_text()
    assert "adaptive" in drawn
    assert "load (% of capacity)" not in drawn


def test_plots_of_several_loads_have_a_line_per_policy(tmp_path):
    cells = [
        cell(policy, p99, load=load)
        for policy, p99s in (("adaptive", (0.1, 0.2)), ("random", (0.3, 0.7)))
        for load, p99 in zip((0.5, 0.8), p99s, strict=True)
    ]
    with patch("matplotlib.figure.Figure.savefig", autospec=True) as save:
        plots.draw(cells, tmp_path)
    panel = save.call_args.args[0].axes[0]
    lines = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in panel.lines}
    assert lines == {"adaptive": (50.0, 80.0, 0.1, 0.2), "random": (50.0, 80.0, 0.3, 0.7)}
    assert (panel.get_xlabel(), panel.get_yscale()) == ("load (% of capacity)", "log")


def test_plots_missing_matplotlib_is_error_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_router.lab.simulate.plots.available", lambda: False)
    result = run_command([*SHORT, "--plot", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{sys.executable} -m pip install matplotlib" in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())
