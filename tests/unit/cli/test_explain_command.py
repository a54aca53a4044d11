"""`vllm-router explain`: scores, reasons and the last picks, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from support.mock_process import mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from vllm_router.cli.explain import _print_decisions, _print_explanation
from vllm_router.cli.main import cli


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """Two servers, one of which has a model of its own and one that is drained."""
    with mock_processes(2, "--model", "m") as mocks:
        toml = servers_toml([mock.url for mock in mocks], policy="adaptive")
        with router_process(toml, tmp_path_factory.mktemp("explain")) as started:
            yield started


def run(*arguments: str, stdin: str | None = None, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["explain", *arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result.output


def test_explain_table_has_every_server_its_score_and_the_pick(router: RouterProcess):
    first, header, *rest = run("--url", router.url, "--model", "m").splitlines()
    rows, formula = rest[:2], rest[2:]
    assert first.startswith("A request for the model 'm' would go to 127.0.0.1:")
    assert first.split("would go to ")[1].split()[0] in rows[0]
    assert "SCORE" in header
    assert formula[0].startswith("score = slow × (1 + load")
    assert "WHY OUT" not in header
    for part in header.split("SCORE")[1].split("  "):
        assert part.strip() in " ".join(formula)
    assert [row.startswith("→") for row in rows] == [True, False]


def test_explain_excluded_server_has_reason(router: RouterProcess):
    name = router.get("/load-stats").json()["servers"][0]["name"]
    router.administrate("POST", f"/admin/servers/{name}/drain")
    try:
        header, *_, out = run("--url", router.url, "--model", "m").splitlines()[1:4]
    finally:
        router.administrate("POST", f"/admin/servers/{name}/undrain")
    assert "WHY OUT" in header
    assert name in out
    assert "draining" in out


def test_explain_unknown_model_is_refused(router: RouterProcess):
    printed = run("--url", router.url, "--model", "gpt-9\n", code=1)
    assert "would be refused" in printed
    assert "No server lists the model" in printed
    assert "does not list the model" in printed


def test_explain_accepts_request_body(router: RouterProcess, tmp_path: Path):
    file = tmp_path / "body.json"
    file.write_text(json.dumps(chat(text="word " * 2000)))
    from_file = run("--url", router.url, "--body", str(file))
    assert "A request for the model 'm' would go to" in from_file
    assert "SCORE" in from_file
    assert "would go to" in run(router.url, "--body", "-", stdin=file.read_text())


def test_explain_body_that_is_no_json_is_one_line(router: RouterProcess):
    printed = run(router.url, "--body", "-", stdin="{not json", code=2)
    assert "--body: expected JSON, got " in printed


def test_explain_last_picks_are_newest_first(router: RouterProcess):
    assert router.post("/v1/chat/completions", chat()).status_code == 200
    assert router.post("/v1/chat/completions", chat(model="nope")).status_code == 404
    until(lambda: len(router.get("/decisions").json()["decisions"]) >= 2, "both picks")
    header, refused, answered, *_ = run("--url", router.url, "--decisions").splitlines()
    assert header.split()[:4] == ["TIME", "SERVER", "MODEL", "PATH"]
    assert "refused" in refused
    assert "answered" in answered
    assert len(run("--url", router.url, "--decisions", "1").splitlines()) == 2


def test_explain_json_is_the_routers_response(router: RouterProcess):
    found = json.loads(run("--url", router.url, "--model", "m", "--json"))
    assert found["policy"] == "adaptive"
    assert len(found["candidates"]) == 2


def test_explain_router_unreachable_is_one_line():
    assert "no router answers" in run("--url", "http://127.0.0.1:9", code=2)


def test_explain_options_exclude_each_other():
    assert "exclude each other" in run("--model", "m", "--decisions", code=2)


def test_explain_policy_without_scores_and_hostile_name_are_shown(
    capsys: pytest.CaptureFixture[str],
):
    row = {"server": "a\x1b[2J", "load": 0.5, "score": None, "parts": {}}
    _print_explanation(
        {"model": None, "policy": "random", "picked": "a\x1b[2J", "candidates": [row], "out": []}
    )
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "any model would go to" in printed


def test_explain_session_is_shown_with_its_source(capsys: pytest.CaptureFixture[str]):
    found = {"policy": "session", "session": "s-\x1b[2J1", "session_source": "body:session_id"}
    _print_explanation({"model": "m", "picked": "a", **found})
    printed = capsys.readouterr().out
    assert "(from body:session_id)" in printed
    assert "\x1b" not in printed


def test_explain_without_picks_is_empty_table(capsys: pytest.CaptureFixture[str]):
    _print_decisions([])
    assert capsys.readouterr().out.startswith("TIME")
