"""The pages of the control plane: contents, and the router's own errors."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import trio

from support.fleet_makers import come_up, eject, gauges, go_down
from support.web_harness import LOCAL, TOML, Lab
from vllm_router import __version__
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.capacity import ASSUMED, EQUAL_SHARE
from vllm_router.observability.decisions import KEPT, LONGEST
from vllm_router.proxy.identity import ANONYMOUS
from vllm_router.proxy.retry import Outcome
from vllm_router.web.admin import SHOWN_KEYS

# -- models -----------------------------------------------------------------------------------


async def test_models_are_merged_with_all_fields_of_engines():
    lab = Lab()
    card = {"id": "m", "object": "model", "max_model_len": 4096, "permission": [{"x": None}]}
    lab["a"].listed({"m": card}, 0.0)
    lab["b"].listed({"m": {"id": "m"}, "lora": {"id": "lora", "parent": "m"}}, 0.0)
    reply = await lab.get("/v1/models")
    assert reply.json == {"object": "list", "data": [card, {"id": "lora", "parent": "m"}]}
    assert (await lab.get("/v1/models/m")).json == card


async def test_models_of_down_server_are_not_listed():
    lab = Lab()
    come_up(lab["b"], 0.0, "other")
    go_down(lab["b"], 0.0)
    reply = await lab.get("/v1/models")
    assert [card["id"] for card in reply.json["data"]] == ["m"]


async def test_models_name_may_have_slashes():
    lab = Lab(1)
    come_up(lab["a"], 0.0, "org/model:tag")
    assert (await lab.get("/v1/models/org/model:tag")).json["id"] == "org/model:tag"
    assert (await lab.get("/v1/models/org%2Fmodel%3Atag")).json["id"] == "org/model:tag"


async def test_models_unknown_is_404_naming_known_ones():
    reply = await Lab().get("/v1/models/nope")
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert reply.error["param"] == "model"
    assert reply.error["message"].endswith("Available models: m.")


async def test_models_before_first_probe_are_503_not_empty():
    reply = await Lab(up=False).get("/v1/models")
    assert reply.status == 503
    assert reply.error["code"] == "starting"
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/livez", "/none", "/"])
async def test_control_plane_answers_without_thread(path, monkeypatch):
    """Quart runs functions that are not `async` in a thread, which costs more than most pages."""
    threads = []
    monkeypatch.setattr(trio.to_thread, "run_sync", lambda *_: threads.append(path))
    reply = await Lab().get(path)
    assert (reply.status, threads) == (404 if path == "/none" else 200, [])


# -- the predecessor's pages ------------------------------------------------------------------


async def test_health_has_every_field_of_predecessor():
    page = (await Lab().get("/health")).json
    assert page["status"] == "healthy"
    assert page["health_score"] == 1.0
    assert (page["total_servers"], page["healthy_servers"], page["unhealthy_servers"]) == (2, 2, 0)
    assert page["config"] == {
        "health_check_enabled": True,
        "health_check_interval": 2.0,
        "min_success_rate": 0.8,
        "max_response_time": 10.0,
    }
    ancestors = {
        "url", "healthy", "last_check", "consecutive_failures", "success_rate",
        "avg_response_time", "last_response_time", "total_checks", "supported_models",
        "models_last_updated",
    }  # fmt: skip
    assert ancestors <= page["servers"][0].keys()
    assert page["servers"][0]["supported_models"] == ["m"]
    assert page["servers"][0]["last_check"].endswith("+00:00")


@pytest.mark.parametrize(
    ("down", "status"), [(0, "healthy"), (1, "healthy"), (2, "degraded"), (3, "unhealthy")]
)
async def test_health_is_always_200_with_state_in_body(down, status):
    lab = Lab(5)
    for name in "abc"[:down]:
        go_down(lab[name], 0.0)
    reply = await lab.get("/health")
    assert reply.status == 200
    assert reply.json["status"] == status
    assert reply.json["healthy_servers"] == 5 - down


async def test_health_has_reason_and_time_of_server_not_up():
    lab = Lab()
    lab["a"].checked(Check.TIMEOUT, 2.0, 0.0)
    go_down(lab["a"], 0.0)
    eject(lab["b"], trio.current_time())
    lab.settle()
    one, other = (await lab.get("/health")).json["servers"]
    assert (one["state"], one["reason"]) == ("down", "unreachable (3 checks in a row)")
    assert (other["state"], other["ejections"], other["healthy"]) == ("ejected", 1, False)
    assert other["ejected_for"] == pytest.approx(5.0, abs=1.0)


async def test_load_stats_have_every_field_of_predecessor():
    lab = Lab([{"url": "http://a.test:1", "name": "a", "max_concurrent_requests": 8}])
    lab["a"].scraped(gauges(4, 2, kv_usage=0.5), trio.current_time(), 0)
    page = (await lab.get("/load-stats")).json
    server = page["servers"][0]
    assert server["url"] == "http://a.test:1"
    assert (server["current_load"], server["max_capacity"], server["available_capacity"]) == (
        6,
        8,
        2,
    )
    assert server["utilization_percent"] == 75.0
    assert server["status"] is True
    assert server["last_updated"].endswith("+00:00")
    assert server["detailed_metrics"] == {
        "num_requests_running": 4,
        "num_requests_waiting": 2,
        "gpu_cache_usage_perc": 0.5,
        "process_max_fds": 65535,
    }
    assert server["load"] == 0.625
    ancestors = {
        "total_servers": 1,
        "healthy_servers": 1,
        "total_active_load": 6,
        "total_capacity": 8,
        "overall_utilization_percent": 75.0,
    }
    assert ancestors.items() <= page["summary"].items()


async def test_server_models_have_every_field_of_predecessor():
    page = (await Lab(1).get("/server-models")).json
    server = page["servers"]["http://a.test:1"]
    assert server["supported_models"] == ["m"]
    assert server["healthy"] is True
    assert server["models_last_updated"]
    assert (page["total_servers"], page["healthy_servers"]) == (1, 1)


async def test_root_is_json_for_programs_and_dashboard_for_browsers():
    lab = Lab()
    reply = await lab.get("/", headers={"accept": "*/*"})
    assert reply.json == {"service": "vLLM Router", "version": __version__, "status": "running"}
    page = await lab.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "accept, accept-encoding"


# -- health -----------------------------------------------------------------------------------


async def test_ready_once_every_server_is_probed():
    lab = Lab(up=False)
    reply = await lab.get("/readyz")
    assert reply.status == 503
    assert reply.json == {
        "ready": False,
        "reason": "servers not probed yet",
        "servers": ["a", "b"],
    }
    come_up(lab["a"], 0.0)
    go_down(lab["b"], 0.0)
    reply = await lab.get("/readyz")
    assert (reply.status, reply.json) == (200, {"ready": True})


async def test_ready_is_false_while_draining_but_alive():
    lab = Lab()
    lab.router.draining = True
    reply = await lab.get("/readyz")
    assert (reply.status, reply.json["reason"]) == (503, "draining")
    assert (await lab.get("/livez")).status == 200
    assert (await lab.get("/")).json["status"] == "draining"


async def test_version_and_ping_answer():
    lab = Lab()
    assert (await lab.get("/version")).json["version"] == __version__
    assert (await lab.get("/ping")).status == 200
    assert (await lab.post("/ping")).status == 200


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/models/", "/health/", "/v1//models", "/%2e%2e/health"]
)
async def test_unknown_path_is_the_routers_404(path):
    reply = await Lab().get(path)
    assert reply.status == 404
    assert reply.error["code"] in {"not_found", "model_not_found"}


async def test_wrong_method_is_the_routers_405_with_allow():
    reply = await Lab().request("DELETE", "/health")
    assert reply.status == 405
    assert reply.error["code"] == "method_not_allowed"
    assert "GET" in reply.headers["allow"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_inference_path_by_get_is_405_naming_post(path):
    reply = await Lab().get(path)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


async def test_defect_is_logged_and_shows_no_traceback(monkeypatch, caplog):
    lab = Lab()
    monkeypatch.setattr(lab.router.fleet, "model_cards", lambda: 1 / 0)
    reply = await lab.get("/v1/models")
    assert reply.status == 500
    assert reply.error["code"] == "internal_error"
    assert b"ZeroDivisionError" not in reply.body
    assert "ZeroDivisionError" in caplog.text


async def test_control_plane_body_too_large_is_refused():
    reply = await Lab().post("/explain", b"x" * 1_100_000)
    assert reply.status == 413
    assert reply.error["code"] == "body_too_large"


async def test_every_response_has_request_id():
    for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
        reply = await Lab().get(path)
        assert len(reply.headers["x-request-id"]) == 32, path


async def test_request_id_of_client_is_returned():
    reply = await Lab().get("/nope", headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"


# -- explain and decisions --------------------------------------------------------------------


async def test_explain_ranks_candidates_and_picks_least_loaded():
    lab = Lab(3, policy="least_load")
    now = trio.current_time()
    lab["a"].scraped(gauges(2), now, 0)
    lab["b"].scraped(gauges(0), now, 0)
    lab["c"].scraped(gauges(1, 4), now, 0)
    page = (await lab.get("/explain?model=m")).json
    assert page["picked"] == "b"
    assert [one["server"] for one in page["candidates"]] == ["b", "a", "c"]
    busiest = page["candidates"][-1]
    assert (busiest["running"], busiest["waiting"], busiest["capacity"]) == (1, 4, ASSUMED)
    assert busiest["score"] == pytest.approx(3 / EQUAL_SHARE)
    assert page["out"] == []


async def test_explain_excluded_server_has_reason():
    lab = Lab(6)
    now = trio.current_time()
    come_up(lab["a"], now, "another")
    go_down(lab["b"], now)
    lab["c"].drain(on=True)
    eject(lab["d"], now)
    lab["e"].refused(now, 30.0)
    lab.settle()
    page = (await lab.get("/explain?model=m")).json
    out = {one["server"]: (one["state"], one["reason"]) for one in page["out"]}
    assert [one["server"] for one in page["candidates"]] == ["f"]
    assert out["a"] == ("up", "does not list the model")
    assert out["b"] == ("down", "unreachable (3 checks in a row)")
    assert out["c"] == ("draining", "draining, 0 in flight")
    assert out["d"][0] == "ejected"
    assert "trial in" in out["d"][1]
    assert out["e"][0] == "full"
    assert "tried again in" in out["e"][1]


async def test_explain_reads_request_body_like_routing():
    lab = Lab()
    body = json.dumps({"model": "nope", "stream": True, "messages": []}).encode()
    page = (await lab.post("/explain", body, headers={"content-type": "application/json"})).json
    assert (page["model"], page["stream"], page["model_known"]) == ("nope", True, False)
    assert page["picked"] is None
    assert "nope" in page["note"]


async def test_explain_notes_panic_rule_and_equal_servers():
    lab = Lab()
    assert "equal" in (await lab.get("/explain?model=m")).json["note"]
    for name in "ab":
        eject(lab[name], trio.current_time())
    lab.settle()
    assert "ejected" in (await lab.get("/explain?model=m")).json["note"]


async def test_explain_shows_server_of_continued_response():
    lab = Lab()
    second = list(lab.router.fleet.servers.values())[1]
    lab.router.proxy.context.owners.remember("resp_1", second.url, "")
    header = {"content-type": "application/json"}
    body = b'{"model":"m","input":"x","previous_response_id":"resp_1"}'
    page = (await lab.post("/explain", body, headers=header)).json
    assert (page["owner"], page["picked"]) == (second.name, second.name)
    assert [row["server"] for row in page["candidates"]] == [second.name]
    assert "no other server is used" in page["note"]
    assert all("does not have the response" in row["reason"] for row in page["out"])
    unknown = (await lab.post("/explain", body.replace(b"_1", b"_2"), headers=header)).json
    assert unknown["owner"] is None
    assert "all servers would be asked" in unknown["note"]


async def test_explain_changes_nothing():
    lab = Lab(3, policy="round_robin")
    first = (await lab.get("/explain")).json["picked"]
    assert all([(await lab.get("/explain")).json["picked"] == first for _ in range(4)])
    assert lab.router.fleet.in_flight == 0


async def test_decisions_are_last_exchanges_newest_first():
    lab = Lab()
    lab.ended(lab["a"], request_id=b"first")
    lab.ended(lab["b"], request_id=b"second", attempts=2, retries=[Outcome.CONNECTION_LOST])
    newest, oldest = (await lab.get("/decisions")).json["decisions"]
    assert oldest["request_id"] == "first"
    assert newest["request_id"] == "second"
    assert newest["server"] == "b"
    assert (newest["attempts"], newest["retries"]) == (2, ["lost"])
    assert (newest["outcome"], newest["status"], newest["model"]) == ("answered", 200, "m")
    assert newest["duration_seconds"] == pytest.approx(1.0)
    assert len((await lab.get("/decisions?limit=1")).json["decisions"]) == 1


async def test_decisions_are_chosen_by_server_and_failure():
    lab = Lab()
    lab.ended(lab["a"], request_id=b"good")
    lab.ended(lab["b"], request_id=b"bad", outcome=Outcome.TRUNCATED)
    lab.ended(lab["a"], request_id=b"left", outcome=Outcome.CLIENT_GONE, status=200)
    lab.ended(None, request_id=b"full", outcome=None, status=429, code="queue_full")

    async def ids(query: str) -> list[str]:
        rows = (await lab.get(f"/decisions?{query}")).json["decisions"]
        return [row["request_id"] for row in rows]

    assert await ids("server=a") == ["left", "good"]
    assert await ids("server=a&limit=1") == ["left"]
    assert await ids("failed=1") == ["full", "bad"]
    assert await ids("failed=1&server=a") == []
    assert await ids("failed=0") == ["full", "left", "bad", "good"]


async def test_decisions_are_bounded_for_any_client():
    lab = Lab()
    for _ in range(KEPT + 10):
        lab.ended(lab["a"], model="x" * 100_000, path=b"/v1/" + b"y" * 60_000)
    decisions = (await lab.get(f"/decisions?limit={KEPT * 2}")).json["decisions"]
    assert len(decisions) == KEPT
    assert {len(one["model"]) for one in decisions} == {LONGEST}
    assert {len(one["path"]) for one in decisions} == {LONGEST}


# -- static files -----------------------------------------------------------------------------


async def test_static_files_are_compressed_for_clients_that_accept_it():
    lab = Lab()
    plain = await lab.get("/static/app.css")
    packed = await lab.get("/static/app.css", headers={"accept-encoding": "br, gzip;q=0.8"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body) / 3
    assert packed.headers["vary"] == "accept-encoding"
    refused = await lab.get("/static/app.css", headers={"accept-encoding": "gzip;q=0"})
    assert refused.body == plain.body


async def test_dashboard_names_its_files_by_content_so_that_they_are_kept():
    lab = Lab()
    index = (await lab.get("/", headers={"accept": "text/html"})).body.decode()
    paths = re.findall(r'(?:src|href)="(static/[^"]+)"', index)
    assert len(paths) >= 5
    for path in paths:
        reply = await lab.get(f"/{path}")
        assert reply.status == 200
        assert "immutable" in reply.headers["cache-control"]
    # A page that was loaded before an update still gets its modules.
    older = re.sub("v-[0-9a-f]{16}", f"v-{0:016}", paths[-1])
    reply = await lab.get(f"/{older}")
    assert (reply.status, reply.headers["cache-control"]) == (200, "no-cache")
    assert (await lab.get("/static/js/main.js")).headers["cache-control"] == "no-cache"


async def test_static_files_have_strict_policy_and_are_cached():
    lab = Lab()
    reply = await lab.get("/static/index.html")
    assert reply.status == 200
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    again = await lab.get("/static/index.html", headers={"if-none-match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%00",
        "/static/js",
        "/static/",
    ],
)
async def test_static_path_cannot_leave_its_directory(path):
    assert (await Lab().get(path)).status == 404


# -- administration ---------------------------------------------------------------------------

LONG_NAME = "gpu-1:8081/prefix"


@pytest.mark.parametrize(
    "written", ["gpu-1:8081/prefix", "gpu-1%3A8081%2Fprefix", "gpu-1:8081%2Fprefix"]
)
async def test_drain_and_undrain_accept_any_spelling_of_name(written):
    lab = Lab([{"url": "http://gpu-1:8081/prefix", "name": LONG_NAME}])
    server = lab[LONG_NAME]
    lease = server.lease(trio.current_time())
    reply = await lab.post(f"/admin/servers/{written}/drain")
    assert reply.status == 200
    assert (reply.json["name"], reply.json["state"]) == (LONG_NAME, "draining")
    assert reply.json["in_flight"] == 1
    assert server.draining
    lease.release()
    server.elsewhere = 2
    shown = (await lab.get(f"/admin/servers/{written}")).json
    assert (shown["in_flight"], shown["in_flight_elsewhere"]) == (0, 2)
    reply = await lab.post(f"/admin/servers/{written}/undrain")
    assert reply.json["state"] == "up"
    assert not server.draining


async def test_drain_twice_changes_nothing():
    lab = Lab()
    for _ in range(2):
        assert (await lab.post("/admin/servers/a/drain")).json["draining"] is True


async def test_drain_unknown_server_is_404_naming_known_ones():
    reply = await Lab().post("/admin/servers/nope/drain")
    assert (reply.status, reply.error["code"]) == (404, "server_not_found")
    assert "a, b" in reply.error["message"]
    assert reply.error["values"] == {"server": "nope", "known": "a, b"}


async def test_status_removed_server_is_shown_until_last_request_ends():
    lab = Lab(2)
    lab["b"].lease(trio.current_time())
    lab.apply(1)
    servers = (await lab.get("/admin/servers")).json["servers"]
    assert [(one["name"], one["leaving"], one["in_flight"]) for one in servers] == [
        ("a", False, 0),
        ("b", True, 1),
    ]
    refused = (await lab.post("/admin/servers/b/undrain")).error
    assert (refused["code"], refused["values"]) == ("server_leaving", {"server": "b"})


async def test_reload_applies_file_or_reports_problems(tmp_path):
    file = tmp_path / "servers.toml"
    file.write_text(TOML)
    lab = Lab(file=file)
    assert (await lab.post("/admin/reload")).json["result"] == "unchanged"
    file.write_text(TOML.replace('name = "a"', 'name = "new"'))
    reply = await lab.post("/admin/reload")
    assert (reply.json["result"], reply.json["generation"]) == ("applied", 2)
    assert list(lab.router.fleet.servers) == ["new"]
    file.write_text("[servers\n")
    reply = await lab.post("/admin/reload")
    assert (reply.status, reply.error["code"]) == (422, "config_refused")
    assert "servers.toml" in reply.error["message"]
    assert reply.error["values"] == {"problem": reply.error["message"]}
    assert (await lab.get("/health")).json["reload"]["error"]
    assert (await lab.get("/health")).json["reload"]["refused"] == 1


async def test_reload_without_file_is_refused():
    assert (await Lab().post("/admin/reload")).error["code"] == "no_config_file"


ADMIN = [
    ("GET", "/admin/servers"),
    ("GET", "/admin/keys"),
    ("GET", "/admin/servers/a"),
    ("POST", "/admin/servers/a/drain"),
    ("POST", "/admin/servers/a/undrain"),
    ("POST", "/admin/reload"),
]


async def test_admin_keys_have_requests_refusals_and_tokens_of_the_busiest():
    lab = Lab()
    for number in range(SHOWN_KEYS + 3):
        for _ in range(number + 1):
            lab.ended(lab["a"], key_name=f"k{number}", prompt_tokens=100, completion_tokens=20)
    busiest = f"k{SHOWN_KEYS + 2}"
    lab.ended(None, key_name=busiest, status=429, outcome=None, code="key_rate_exceeded")
    lab.ended(lab["a"], key_name=busiest, status=502, outcome=Outcome.CONNECTION_LOST, code="x")
    lab.ended(lab["a"])
    shown = (await lab.get("/admin/keys")).json
    assert len(shown["keys"]) == SHOWN_KEYS
    assert (shown["more"], shown["seconds"]) == (3, 300)
    assert shown["keys"][0] == {
        "name": busiest,
        "requests": SHOWN_KEYS + 5,
        "refused": 1,
        "tokens": (SHOWN_KEYS + 3) * 120,
    }


@pytest.mark.parametrize(("method", "path"), [*ADMIN, ("POST", "/admin/sign-in")])
@pytest.mark.parametrize("client", ["192.0.2.1", "unknown", LOCAL, "::1", "::ffff:127.0.0.1"])
async def test_admin_without_proof_is_refused_from_every_address(method, path, client):
    lab = Lab()
    reply = await lab.request(method, path, client=client, identity=ANONYMOUS)
    assert (reply.status, reply.error["code"]) == (403, "admin_local_only")
    assert "vllm-router open" in reply.error["message"]
    assert not lab["a"].draining


async def test_sign_in_exchanges_code_once_for_key():
    lab = Lab()
    code = (await lab.post("/admin/sign-in")).json["code"]
    body = json.dumps({"code": code}).encode()
    reply = await lab.post("/sign-in", body, identity=ANONYMOUS)
    assert lab.router.sessions.holds([reply.json["key"].encode()])
    again = await lab.post("/sign-in", body, identity=ANONYMOUS)
    assert (again.status, again.error["code"]) == (403, "sign_in_expired")


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"code": 1}', b'{"code": "\\ud800"}', b"[" * 9999, b'{"x":' + b"[" * 99_999],
)
async def test_sign_in_odd_body_is_refused(body):
    reply = await Lab().post("/sign-in", body, identity=ANONYMOUS)
    assert reply.status in (400, 403)
