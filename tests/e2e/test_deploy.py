"""Dashboard and alerts: names that exist, and queries that a real Prometheus answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.mock_process import mock_processes
from support.ports import free_port
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from vllm_router.observability.metric_families import FAMILIES
from vllm_router.observability.prometheus_text import Kind

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "vllm-router.rules.yml"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}

# Dashboard variables as Grafana fills them in when "All" is chosen.
VARIABLES = {"$instance": ".*", "$server": ".*", "$model": ".*", "$__rate_interval": "5s"}

GRID = 24


def tool(name: str) -> str:
    """A program of Debian's package `prometheus`, which scripts/setup --system puts into .venv."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is missing: scripts/setup --dev --system gets it"
    return found


def promtool(*arguments: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_runbook_has_an_entry_for_every_alert():
    text = RULES.read_text()
    alerts = re.findall(r"alert: (\w+)", text)
    linked = re.findall(r'runbook_url: "\S+/docs/runbook\.md#(\w+)"', text)
    entries = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert linked == [alert.lower() for alert in alerts]
    assert entries == alerts


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    """Every query of the panels, with the variables filled in."""
    found = [
        filled(target["expr"])
        for dashboard in DASHBOARDS.values()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]
    return list(dict.fromkeys(found))


def variable_queries() -> list[str]:
    """How many values each variable of the dashboards gets from its series."""
    queries = {
        variable["query"]["query"]
        for dashboard in DASHBOARDS.values()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    }
    found = [re.fullmatch(r"label_values\((.+), (\w+)\)", query) for query in sorted(queries)]
    assert all(found)
    return [filled(f"count by ({one[2]}) ({one[1]})") for one in found if one]


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def alert_queries() -> list[str]:
    """The expressions of the rules, found without a YAML parser."""
    text = RULES.read_text()
    blocks = re.findall(r"^ +expr: (?:\|\n((?: {10,}.*\n)+)|(.+)\n)", text, re.MULTILINE)
    queries = [" ".join((block or line).split()) for block, line in blocks]
    assert len(queries) == text.count("- alert:") + text.count("- record:")
    return queries


QUERIES = [*dashboard_queries(), *variable_queries(), *alert_queries()]


def known_names() -> set[str]:
    names = set(re.findall(r"record: model:(vllm_router_\w+):", RULES.read_text()))
    names |= {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
    names |= {"process_open_fds", "process_max_fds"}
    for family in FAMILIES:
        names.add(family.name)
        if family.kind is Kind.HISTOGRAM:
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return names


def test_deploy_queries_name_existing_metrics_and_labels():
    labels = {family.name: set(family.labels) for family in FAMILIES}
    for query in QUERIES:
        names = set(re.findall(r"\b(?:vllm_router|process)_\w+|\bup\b", query))
        assert names, query
        assert names <= known_names(), query
        for name, selector in re.findall(r"(vllm_router_\w+)\{([^}]*)\}", query):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert used <= labels.get(base, labels.get(name, set())) | {"instance", "job", "le"}
        by = {
            label for found in re.findall(r"by \(([^)]*)\)", query) for label in found.split(", ")
        }
        assert by <= set().union(*labels.values()) | {"instance", "le"}, query


def test_deploy_documented_names_match_code():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(vllm_router_\w+)`", page, re.MULTILINE)) == {
        family.name for family in FAMILIES
    }


def test_deploy_every_trouble_metric_has_alert_or_panel():
    shown = " ".join(QUERIES)
    left_out = {family.name for family in FAMILIES if family.name not in shown}
    # A new metric comes with a panel or an alert, or is listed here.
    assert left_out <= {
        "vllm_router_server_info",  # a variable of the dashboard
        "vllm_router_build_info",
        "vllm_router_uptime_seconds",
        "vllm_router_ready",
        "vllm_router_config_generation",  # an annotation
        "vllm_router_model_demand",  # for autoscalers
        "vllm_router_server_told_cached_tokens_total",  # a former name
        # Details of a source whose alert is about vllm_router_discovery_up.
        "vllm_router_discovery_age_seconds",
        "vllm_router_discovery_doubtful",
        "vllm_router_discovery_failures_total",
        "vllm_router_discovery_skipped_targets",
        "vllm_router_discovery_targets",
        # Details of the shared state whose alerts are about ..._shared_up and ..._configurations.
        "vllm_router_shared_age_seconds",
        "vllm_router_shared_batches_dropped_total",
        "vllm_router_shared_failures_total",
        "vllm_router_shared_placements_dropped_total",
        "vllm_router_shared_requests_in_flight",
        "vllm_router_shared_servers_spared",
        "vllm_router_shared_routers",
    }


def test_deploy_dashboards_have_links_to_each_other():
    uids = {dashboard["uid"] for dashboard in DASHBOARDS.values()}
    assert len(uids) == len(DASHBOARDS) == 4
    for dashboard in DASHBOARDS.values():
        linked = {link["url"].split("?")[0].removeprefix("/d/") for link in dashboard["links"]}
        assert linked == uids - {dashboard["uid"]}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_deploy_dashboard_is_valid_for_grafana(name: str):
    dashboard = DASHBOARDS[name]
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["uid"]
    assert "id" not in dashboard, "an id belongs to one Grafana"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "instance", "server", "model"}
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_deploy_panels_do_not_overlap(name: str):
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_deploy_rules_and_configuration_are_valid():
    assert "SUCCESS" in promtool("check", "rules", str(RULES))
    for name in ("prometheus.yml", "compose.yml"):
        promtool("check", "config", str(PROMETHEUS / name))


def test_deploy_compose_mounts_what_exists():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    monitoring = [one for one in compose["services"].values() if one.get("profiles")]
    assert [one["profiles"] for one in monitoring] == [["monitoring"]] * 2
    for volume in [volume for one in monitoring for volume in one["volumes"]]:
        source = volume.split(":")[0]
        assert source in compose["volumes"] or (ROOT / source).is_dir()
    for file in (GRAFANA / "provisioning").rglob("*.yml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1


def test_deploy_alerts_fire_when_they_should():
    promtool("test", "rules", str(PROMETHEUS / "vllm-router.rules.test.yml"))


# -- a real Prometheus --------------------------------------------------------------------------


class Scraped:
    """A Prometheus that scrapes a router with traffic."""

    def __init__(self, url: str, router: RouterProcess) -> None:
        self.url, self.router = url, router

    def ask(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=query, trust_env=False)
        assert answer.status_code == 200, f"{query}: {answer.text}"
        assert answer.json()["status"] == "success"
        assert not answer.json().get("warnings"), query
        return answer.json()["data"]

    def query(self, query: str) -> list[Any]:
        return self.ask("query", query=query)["result"]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    scratch = tmp_path_factory.mktemp("prometheus")
    with (
        mock_processes(2, "--model", "m", "--speed", "0.2") as mocks,
        router_process(
            servers_toml([mock.url for mock in mocks], policy="adaptive")
            + "[slo]\nfirst_token = 5\n",
            scratch,
        ) as router,
    ):
        port = free_port()
        text = (PROMETHEUS / "prometheus.yml").read_text()
        text = text.replace("10s", "250ms").replace("localhost:8888", f"127.0.0.1:{router.port}")
        text = text.replace("vllm-router.rules.yml", str(RULES))
        (scratch / "prometheus.yml").write_text(text)
        with (scratch / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={scratch / 'prometheus.yml'}",
                    f"--storage.tsdb.path={scratch / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            under_test = Scraped(f"http://127.0.0.1:{port}", router)
            url = f"{under_test.url}/-/ready"
            until(lambda: httpx.get(url, trust_env=False).status_code == 200, "Prometheus")
            until(lambda: bool(under_test.query("vllm_router_ready == 1")), "a scrape")
            _traffic(under_test)
            yield under_test
        finally:
            process.kill()
            process.wait()


def _traffic(under_test: Scraped) -> None:
    """Answers, streams and refusals, until two scrapes have seen them."""
    router = under_test.router
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for stream in (False, True):
            body = chat(stream=stream, max_tokens=3)
            assert router.post("/v1/chat/completions", body).status_code == 200
        assert router.post("/v1/chat/completions", chat(model="nope")).status_code == 404
        if under_test.query('sum(rate(vllm_router_requests_total{status="200"}[5s])) > 0'):
            return
    raise TimeoutError("Prometheus has seen no traffic")


def test_deploy_prometheus_answers_every_query(scraped: Scraped):
    for query in QUERIES:
        scraped.query(query)


def test_deploy_queries_on_live_router_have_data(scraped: Scraped):
    # Queries about events that did not happen have no data: failures, and rates over a window
    # shorter than the scrape interval.
    without = re.compile(
        r"!=\"answered\"|5\.\.|> |< |== |transitions_total|key_requests|key_tokens|kv_cache"
        r"|refused|dropped|queue_|max_in_flight|worker_|5m|1h"
    )
    queries = [*dashboard_queries(), *variable_queries()]
    missing = [query for query in queries if not without.search(query)]

    def complete() -> bool:
        # A scrape that a busy machine delays leaves no data for a moment.
        missing[:] = [query for query in missing if not scraped.query(query)]
        return not missing

    until(complete, f"data for {missing}")


def test_deploy_objectives_are_computed_by_a_real_prometheus(scraped: Scraped):
    """The join of targets and buckets. Without an increase between two scrapes it is 0/0."""

    def computed() -> bool:
        body = chat(stream=True, max_tokens=3)
        assert scraped.router.post("/v1/chat/completions", body).status_code == 200
        names = [f"model:vllm_router_{metric}_burn:rate5m" for metric in ("first_token", "error")]
        return all(scraped.query(f'{name}{{model="m"}} >= 0') for name in names)

    until(computed, "burn rates of both objectives")


def test_deploy_healthy_fleet_raises_no_alert(scraped: Scraped):
    alerts = scraped.ask("alerts")["alerts"]
    firing = [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]
    assert firing == []
    groups = scraped.ask("rules")["groups"]
    assert [rule["health"] for group in groups for rule in group["rules"]] == ["ok"] * len(
        alert_queries()
    )


def test_deploy_metrics_page_passes_promtool_lint(scraped: Scraped):
    assert promtool("check", "metrics", stdin=scraped.router.get("/metrics").text) == ""
