"""The metrics page: counted events, labels, and the bound on the number of series."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from unittest.mock import Mock

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from support.fleet_makers import come_up, gauges, go_down
from support.shared_bus import shared_status
from support.web_harness import TOML, Lab
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.state import State
from vllm_router.observability import metrics as metrics_module
from vllm_router.observability.counted_families import FIRST_TOKEN
from vllm_router.observability.exchange_counts import MAX_MODELS
from vllm_router.observability.metric_families import FAMILIES
from vllm_router.observability.prometheus_text import Counter, Family, Kind
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, MEMORY
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.prompt.conversation import plain_prompt
from vllm_router.routing.prompt.routing_info import RoutingInfo

ROOT = Path(__file__).parents[3]


async def samples(lab):
    """Every sample of the page by name and labels, read by Prometheus' own parser."""
    reply = await lab.get("/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def pick(found, name, **labels):
    """The sum of the samples of a name whose labels include these."""
    return sum(
        value
        for (sample, *pairs), value in found.items()
        if sample == f"vllm_router_{name}" and labels.items() <= dict(pairs).items()
    )


def series(found, name, label):
    return {dict(pairs)[label] for (sample, *pairs) in found if sample == f"vllm_router_{name}"}


async def test_metrics_models_have_servers_load_and_fallback():
    tables = '[models]\ngpt = { serves = "m", fallback = "other" }\n'
    lab = Lab(3, tables=tables)
    come_up(lab["c"], trio.current_time(), "other")
    lab["a"].scraped(gauges(3, 2), trio.current_time(), 0)
    go_down(lab["b"], trio.current_time())
    lab.settle()
    found = await samples(lab)
    assert pick(found, "model_servers", model="m") == 2
    assert pick(found, "model_available_servers", model="m") == 1
    assert pick(found, "model_running", model="m") == 3
    assert pick(found, "model_waiting", model="m") == 2
    assert pick(found, "model_capacity", model="m") == lab["a"].capacity
    assert pick(found, "model_load", model="m") == pytest.approx(lab["a"].load, abs=1e-6)
    assert pick(found, "model_fallback_active", model="m") == 0
    go_down(lab["a"], trio.current_time())
    lab.settle()
    found = await samples(lab)
    assert pick(found, "model_available_servers", model="m") == 0
    assert pick(found, "model_available_servers", model="other") == 1
    assert pick(found, "model_fallback_active", model="m") == 1
    assert series(found, "model_servers", "model") == {"m", "other"}


async def test_metrics_objectives_are_targets_of_models(tmp_path):
    file = tmp_path / "servers.toml"
    file.write_text(TOML + "[slo]\nfirst_token = 0.1\n[slo.models.own]\nfirst_token = 5\n")
    lab = Lab(file=file)
    lab.ended(lab["a"])
    found = await samples(lab)
    assert series(found, "slo_first_token_target", "model") == {"own", "m"}
    assert pick(found, "slo_first_token_target", model="m", seconds="0.1") == 0.95
    # Prometheus 2 keeps le="5" of the histogram, and Prometheus 3 writes 5.0.
    assert pick(found, "slo_first_token_target", model="own", seconds="5") == 0.95
    assert pick(found, "slo_first_token_target", model="own", seconds="5.0") == 0.95
    assert pick(found, "slo_success_target", model="m") == 0.999
    assert not series(await samples(Lab()), "slo_success_target", "model")


async def test_metrics_budget_left_is_of_worst_objective(tmp_path):
    file = tmp_path / "servers.toml"
    file.write_text(
        TOML + "[slo]\nfirst_token = 0.5\nfirst_token_share = 0.5\nsuccess_share = 0.9\n"
    )
    lab = Lab(file=file)

    def budget(names: list[str]) -> float | None:
        lab.router.proxy.context.recorder.flush()
        return lab.router.metrics.budget_left(names)

    assert budget(["m"]) is None
    now = trio.current_time()
    for _ in range(19):
        lab.ended(lab["a"])
    assert budget(["m"]) == pytest.approx(1.0)
    lab.ended(lab["a"], first_byte_at=now - 0.1)
    assert budget(["m"]) == pytest.approx(0.9)
    lab.ended(lab["a"], status=502, outcome=Outcome.SERVER_ERROR, first_byte_at=0.0)
    assert budget(["m"]) == pytest.approx(1 - (1 / 21) / 0.1)
    assert Lab().router.metrics.budget_left(["m"]) is None


async def test_metrics_saved_requests_are_answered_ones_with_retries():
    lab = Lab()
    lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], attempts=2)
    lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], outcome=Outcome.SERVER_ERROR, status=502)
    lab.ended(lab["a"])
    assert pick(await samples(lab), "requests_saved_total") == 1


async def test_metrics_request_is_counted_by_its_labels():
    lab = Lab()
    lab.ended(lab["a"])
    lab.ended(lab["a"])
    lab.ended(lab["b"], status=404, path=b"/v1/completions", stream=False)
    found = await samples(lab)
    assert (
        found[
            "vllm_router_requests_total",
            ("model", "m"),
            ("outcome", "answered"),
            ("path", "/v1/chat/completions"),
            ("server", "a"),
            ("status", "200"),
        ]
        == 2
    )
    assert pick(found, "requests_total", server="b", status="404", path="/v1/completions") == 1
    assert pick(found, "response_chunks_total", server="a") == 20
    assert pick(found, "response_bytes_total") == 3000
    assert pick(found, "request_bytes_total", server="b") == 100


async def test_metrics_histograms_have_one_observation_per_request():
    lab = Lab()
    lab.ended(lab["a"])
    found = await samples(lab)
    assert pick(found, "time_to_first_token_seconds_count", server="a", model="m") == 1
    assert pick(found, "time_to_first_token_seconds_sum") == pytest.approx(0.1)
    assert pick(found, "time_to_first_token_seconds_bucket", le="0.05") == 0
    assert pick(found, "time_to_first_token_seconds_bucket", le="0.25") == 1
    assert pick(found, "time_to_first_token_seconds_bucket", le="+Inf") == 1
    assert pick(found, "request_duration_seconds_sum") == pytest.approx(1.0)
    assert pick(found, "overhead_seconds_sum") == pytest.approx(0.001)


async def test_metrics_empty_histograms_are_omitted():
    lab = Lab()
    lab.ended(lab["a"], outcome=Outcome.CONNECTION_LOST, status=502, first_byte_at=0.0)
    found = await samples(lab)
    assert pick(found, "requests_total") == 1
    assert not any(name.startswith("vllm_router_request_duration") for name, *_ in found)


async def test_metrics_value_on_a_bound_belongs_to_its_bucket():
    histogram = FIRST_TOKEN.histogram("a", "m")
    histogram.observe(0.1)
    assert 'le="0.05"} 0\n' in histogram.lines()
    assert 'le="0.1"} 1\n' in histogram.lines()


async def test_metrics_json_response_has_no_time_to_first_token():
    lab = Lab()
    lab.ended(lab["a"], stream=False)
    found = await samples(lab)
    assert pick(found, "time_to_first_token_seconds_count") == 0
    assert pick(found, "request_duration_seconds_count") == 1


async def test_metrics_request_refused_before_attempt_has_no_server():
    lab = Lab()
    lab.ended(
        None, outcome=None, status=404, code="model_not_found", first_byte_at=0.0, sent_at=0.0
    )
    found = await samples(lab)
    assert pick(found, "requests_total", server="none", outcome="refused", status="404") == 1
    assert pick(found, "refusals_total", code="model_not_found") == 1
    assert pick(found, "request_duration_seconds_count") == 0
    assert pick(found, "overhead_seconds_count") == 0


async def test_metrics_retries_have_reason_and_disconnects_phase():
    lab = Lab()
    lab.ended(lab["a"], attempts=3, retries=[Outcome.CONNECTION_LOST, Outcome.FULL])
    lab.ended(lab["a"], outcome=Outcome.CLIENT_GONE, phase=Phase.WAIT, status=0, first_byte_at=0.0)
    found = await samples(lab)
    assert pick(found, "retries_total", reason="lost") == 1
    assert pick(found, "retries_total", reason="full") == 1
    assert pick(found, "retries_total") == 2
    assert pick(found, "client_disconnects_total", phase="wait") == 1
    assert pick(found, "client_disconnects_total") == 1


async def test_metrics_reasons_and_phases_exist_from_the_start():
    found = await samples(Lab())
    assert "connect_failed" in series(found, "retries_total", "reason")
    assert "stream" in series(found, "client_disconnects_total", "phase")


async def test_metrics_tokens_are_counted_by_model_and_key_as_servers_report_them():
    lab = Lab()
    for cached in (None, 8):
        lab.ended(
            lab["a"],
            prompt_tokens=10,
            cached_tokens=cached,
            completion_tokens=3,
            key_name="alice",
        )
    lab.ended(lab["b"], model="unheard-of", prompt_tokens=5)
    lab.ended(lab["a"])  # a stream without usage
    found = await samples(lab)
    expected = {"prompt": 20, "cached": 8, "completion": 6}
    for kind, tokens in expected.items():
        assert pick(found, "tokens_total", model="m", kind=kind) == tokens
        assert pick(found, "key_tokens_total", key="alice", kind=kind) == tokens
    assert pick(found, "tokens_total", model="other") == 5
    assert series(found, "tokens_total", "model") == {"m", "other"}
    assert series(found, "key_tokens_total", "key") == {"alice"}


async def test_metrics_attempts_are_counted_by_outcome():
    lab = Lab()
    lab.router.proxy.context.recorder.attempt_ended(lab["a"], Outcome.CONNECTION_LOST)
    await trio.lowlevel.checkpoint()  # recorders are called at the turn's end
    found = await samples(lab)
    assert pick(found, "attempts_total", server="a", outcome="lost") == 1


async def test_metrics_server_gauges_are_those_used_by_routing():
    lab = Lab([{"url": "http://a.test:1", "name": "a", "max_concurrent_requests": 4}])
    now = trio.current_time()
    lab["a"].scraped(gauges(2, 4, kv_usage=0.25), now, 0)
    found = await samples(lab)
    expected = {
        "server_up": 1,
        "server_available": 1,
        "server_load": 1.0,
        "server_capacity": 4,
        "server_running": 2,
        "server_waiting": 4,
        "server_leases": 0,
        "server_kv_cache_usage_ratio": 0.25,
    }
    assert {name: pick(found, name, server="a") for name in expected} == expected
    assert pick(found, "server_metrics_age_seconds") < 5
    assert pick(found, "server_info", url="http://a.test:1") == 1


async def test_metrics_expected_cache_hits_stand_beside_actual_ones():
    lab = Lab(1, policy="adaptive")
    server, adaptive = lab["a"], lab.router.proxy.context.policies.default
    found = await samples(lab)
    assert not series(found, "server_prompt_tokens_total", "server")
    assert not series(found, "server_prefix_cache_hits_total", "server")
    facts = RoutingInfo("m", prompt=plain_prompt(b'"%s"' % (b"x" * 4096)))
    for _ in range(2):
        lease = server.lease(0.0)
        adaptive.leased(lease, None, facts, 0.0)
        adaptive.learned(lease, 1024, 512)
        lease.release()
        adaptive.ended(lease, 0.0, failed=False)
    server.scraped(gauges(0, prefix_queries=2048, prefix_hits=1000), trio.current_time(), 0)
    found = await samples(lab)
    expected = {
        "server_prompt_tokens_total": 2048,
        "server_expected_cached_tokens_total": 1024,
        "server_reported_cached_tokens_total": 1024,
        "server_told_cached_tokens_total": 1024,
        "server_prefix_cache_queries_total": 2048,
        "server_prefix_cache_hits_total": 1000,
    }
    assert {name: pick(found, name, server="a") for name in expected} == expected


async def test_metrics_exactly_one_server_state_is_set():
    lab = Lab()
    go_down(lab["a"], trio.current_time())
    lab.settle()
    found = await samples(lab)
    assert series(found, "server_state", "state") == set(State)
    assert pick(found, "server_state", server="a", state="down") == 1
    assert pick(found, "server_state", server="a") == 1
    assert pick(found, "server_up", server="a") == 0
    assert pick(found, "server_transitions_total", server="a", state="down") == 1


async def test_metrics_unknown_figures_are_omitted():
    found = await samples(Lab(up=False))
    names = {name for name, *_ in found}
    assert "vllm_router_server_metrics_age_seconds" not in names
    assert "vllm_router_server_kv_cache_usage_ratio" not in names
    assert "vllm_router_config_last_reload_successful" not in names


# -- bounded cardinality ----------------------------------------------------------------------


async def test_metrics_unlisted_models_are_other():
    lab = Lab()
    for number in range(500):
        lab.ended(None, model=f"invented-{number}", outcome=None, status=404)
    found = await samples(lab)
    assert series(found, "requests_total", "model") == {"other"}
    assert pick(found, "requests_total") == 500
    assert sum(len(one.by_request) for one in lab.router.metrics._servers.values()) == 0


async def test_metrics_unknown_paths_are_other():
    lab = Lab()
    for number in range(500):
        lab.ended(lab["a"], path=b"/v1/invented/%d" % number)
    found = await samples(lab)
    assert series(found, "requests_total", "path") == {"other"}
    assert sum(len(one.by_request) for one in lab.router.metrics._servers.values()) == 0


async def test_metrics_stored_responses_share_a_series_and_are_not_remembered():
    lab = Lab()
    for number in range(500):
        lab.ended(lab["a"], path=b"/v1/responses/resp_%d" % number)
    found = await samples(lab)
    assert len(series(found, "requests_total", "path")) == 1
    assert pick(found, "requests_total") == 500
    assert sum(len(one.by_request) for one in lab.router.metrics._servers.values()) == 0


async def test_metrics_undefined_statuses_share_a_series():
    lab = Lab()
    for status in range(600, 700):
        lab.ended(lab["a"], status=status)
    assert series(await samples(lab), "requests_total", "status") == {"6xx"}


async def test_metrics_models_beyond_cap_are_other_until_some_go():
    lab = Lab(1)
    server = lab["a"]
    first = [f"old-{number}" for number in range(MAX_MODELS)]
    come_up(server, trio.current_time(), *first, "late")
    for model in [*first, "late"]:
        lab.ended(server, model=model)
    assert "late" not in series(await samples(lab), "requests_total", "model")
    come_up(server, trio.current_time(), "late")
    await samples(lab)
    lab.ended(server, model="late")
    found = await samples(lab)
    assert series(found, "requests_total", "model") == {"late", "other"}
    assert series(found, "request_duration_seconds_count", "model") == {"late", "other"}


async def test_metrics_series_of_removed_server_are_removed():
    lab = Lab(2)
    lab.ended(lab["a"])
    lab.ended(lab["b"])
    lab.apply(1)
    lab.router.fleet.gone()
    found = await samples(lab)
    assert {dict(pairs).get("server", "a") for _, *pairs in found} <= {"a", "none"}


async def test_metrics_reused_name_of_removed_server_appears_once():
    lab = Lab(1)
    lab["a"].lease(trio.current_time())
    lab.apply([{"url": "http://elsewhere.test:1", "name": "a"}])
    assert len(lab.router.fleet.leaving) == 1
    found = await samples(lab)  # it fails on duplicate samples
    assert series(found, "server_info", "url") == {"http://elsewhere.test:1"}


async def test_metrics_labels_are_escaped():
    lab = Lab(1)
    nasty = 'quote " back \\ slash\nline'
    come_up(lab["a"], trio.current_time(), nasty)
    lab.ended(lab["a"], model=nasty)
    assert series(await samples(lab), "requests_total", "model") == {nasty}


# -- rendering --------------------------------------------------------------------------------


async def test_metrics_long_page_yields_to_other_tasks(nursery, monkeypatch):
    """Virtual time of the renderer: every look at the clock finds the turn over."""
    lab = Lab(1)
    turns = 0
    monkeypatch.setattr(metrics_module, "perf_counter", iter(range(10**6)).__next__)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    nursery.start_soon(other)
    await lab.router.metrics.page()
    assert turns > 20
    nursery.cancel_scope.cancel()


async def refused_as_full(lab):
    """A request has waited, so that there is a queue."""
    lab["a"].lease(trio.current_time())
    with trio.move_on_after(0.01):
        await lab.infer()


async def test_metrics_page_has_every_metric_with_type_and_labels(tmp_path):
    file = tmp_path / "servers.toml"
    tables = '[config]\npolicy = "adaptive"\n[limits]\nmax_in_flight = 1\n[slo]\nfirst_token = 1\n'
    file.write_text(TOML + tables)
    lab = Lab(file=file)
    await refused_as_full(lab)
    lab.router.proxy.context.recorder.attempt_ended(lab["a"], Outcome.CONNECTION_LOST)
    scraped = gauges(1, kv_usage=0.5, prefix_queries=9, prefix_hits=3)
    lab["a"].scraped(scraped, trio.current_time(), 0)
    lab.router.proxy.context.policies.default.leased(
        lab["a"].lease(0.0), None, RoutingInfo("m"), 0.0
    )
    lab.ended(lab["a"], code="x", key_name="k", prompt_tokens=2)
    lab.ended(lab["a"], waited=0.5)
    lab.router.workers = lambda: {"1": dict.fromkeys((CONNECTIONS, IN_FLIGHT, CPU, MEMORY), 1.0)}
    source = SourceStatus("targets", "file", "targets/*.json", answered_at=0.0)
    lab.router.sources.discovery = Mock(statuses=[source])
    lab.router.shared = Mock(status=shared_status)
    page = (await lab.get("/metrics")).body.decode()
    parsed = {family.name: family for family in text_string_to_metric_families(page)}
    for family in FAMILIES:
        found = parsed[family.name.removesuffix("_total")]
        assert found.type == family.kind
        assert found.documentation == family.help
        assert set(found.samples[0].labels) - {"le"} == set(family.labels), family.name


async def test_metrics_page_has_nothing_undocumented():
    page = (await Lab().get("/metrics")).body.decode()
    documented = {family.name.removesuffix("_total") for family in FAMILIES}
    for family in text_string_to_metric_families(page):
        assert family.name in documented or family.name.startswith("process_")


def test_metrics_values_are_written_for_prometheus():
    counter = Counter(Family("c_total", Kind.COUNTER, "help").key())
    counter.value += 3
    assert counter.line() == "c_total 3\n"


def test_metrics_documentation_equals_generated_page():
    script = ROOT / "scripts" / "gen-docs"
    loader = importlib.machinery.SourceFileLoader("gen_docs", str(script))
    spec = importlib.util.spec_from_loader("gen_docs", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    for path, text in module.pages().items():
        assert (ROOT / path).read_text() == text, f"run scripts/gen-docs: {path} is out of date"
