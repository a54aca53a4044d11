"""The chaos harness itself: verdicts from measurements."""

from __future__ import annotations

import pytest

from chaos.harness import Card, NotRun, Scenario, Verdict, judge, percentile, table


async def verdict_of(run) -> Verdict:
    return await judge(Scenario("X1", "a scenario", run, p0=True))


async def test_chaos_gate_all_numbers_within_pass():
    async def run(card: Card) -> None:
        card.most("time", 1.0, 1.0, " s")
        card.equal("states", {"up"}, {"up"})
        card.note("rival", "slow")

    assert (await verdict_of(run)).verdict == "pass"


@pytest.mark.parametrize("value", [1.01, float("nan")])
async def test_chaos_gate_one_number_beyond_fails(value):
    async def run(card: Card) -> None:
        card.most("fine", 0, 1)
        card.most("time", value, 1.0, " s")

    found = await verdict_of(run)
    assert found.verdict == "FAIL"
    assert table([found]).count("<-- FAIL") == 1


async def test_chaos_scenario_exception_fails_with_location():
    async def run(card: Card) -> None:
        card.equal("fine", 1, 1)
        raise ValueError("broken")

    found = await verdict_of(run)
    assert found.verdict == "FAIL"
    assert "ValueError: broken (test_harness.py:" in found.why


async def test_chaos_scenario_without_measurement_fails():
    async def run(card: Card) -> None:
        pass

    assert (await verdict_of(run)).verdict == "FAIL"


async def test_chaos_scenario_that_cannot_run_is_skipped():
    async def run(card: Card) -> None:
        raise NotRun("no such tool")

    found = await verdict_of(run)
    assert (found.verdict, found.why) == ("not run", "no such tool")
    assert (await judge(Scenario("X2", "later", None, False, "not built"))).why == "not built"


async def test_chaos_scenario_that_hangs_fails_in_time(autojump_clock):
    import trio

    async def run(card: Card) -> None:
        await trio.sleep_forever()

    assert (await verdict_of(run)).verdict == "FAIL"


def test_chaos_percentiles_are_measured_values():
    assert percentile(range(1, 101)) == 99
    assert percentile([5.0]) == 5.0
