"""Options and switches of the simulated server: a wrong one is named with what was expected."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from support.mock_memory import running_mock
from vllm_router.cli.main import cli

PATH = "/v1/chat/completions"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ttft", "nan"), "ttft: expected a number ≥ 0, got nan"),
        (("--sse-keep-alive", "nan"), "sse_keep_alive: expected a number ≥ 0, got nan"),
        (("--keep-alive", "-1"), "keep_alive: expected a number ≥ 0, got -1"),
        (("--log-size", "-1"), "log_size: expected a number ≥ 0, got -1"),
        (("--speed", "inf"), "speed: expected a number > 0, got inf"),
        (("--block-size", "0"), "block_size: expected a number > 0, got 0"),
        (("--max-model-len", "-5"), "max_model_len: expected a number > 0, got -5"),
        (("--name", "a\nb"), "name: expected printable ASCII, got 'a\\nb'"),
        (("--lora", "=path"), "loras: expected NAME or NAME=PATH, got '=path'"),
        (("--set", "{"), "'--set': Input data was truncated"),
        (("--set", '{"mode": 5}'), "mode: expected a status from 200 to 599 or one of abort"),
    ],
)
def test_mock_wrong_option_is_named_with_value_and_expectation(
    arguments: tuple[str, ...], problem: str
):
    result = CliRunner().invoke(cli, ["mock", "--port", "0", *arguments])
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize(
    ("switches", "problem"),
    [
        ({"mode": 5}, "mode: expected a status from 200 to 599"),
        ({"mode": "²"}, "mode: expected a status from 200 to 599"),
        ({"health": 5}, "health: expected a status from 200 to 599, got 5"),
        ({"health_delay_ms": -5}, "health_delay_ms: expected a number ≥ 0, got -5"),
        ({"after": -1}, "after: expected a number ≥ 0, got -1"),
        ({"fraction": 2}, "fraction: expected 0 to 1, got 2"),
        ({"raw": "!"}, "raw: expected base64"),
    ],
)
async def test_mock_wrong_switch_is_refused_and_changes_nothing(
    autojump_clock, switches: dict[str, object], problem: str
):
    async with running_mock() as mock:
        answer = await mock.ask("POST", "/mock/set", switches)
        assert answer.status == 400
        assert answer.json["error"].startswith(problem)
        assert (await mock.ask("POST", PATH, CHAT)).status == 200
        assert (await mock.ask("GET", "/health")).status == 200


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("delay-ms: nan", "delay-ms: expected a number ≥ 0, got nan"),
        ("delay-ms: -5", "delay-ms: expected a number ≥ 0, got -5"),
        ("ttft-ms: soon", "ttft-ms: expected a number ≥ 0, got soon"),
        ("after: -1", "after: expected an integer ≥ 0, got -1"),
        ("output-tokens: x", "output-tokens: expected an integer ≥ 0, got x"),
        ("mode: nope", "mode: expected a status from 200 to 599 or one of abort_finish"),
        ("mode: 1000", "mode: expected a status from 200 to 599 or one of abort_finish"),
        ("error: nope", "error: expected one of "),
        ("framing: x", "framing: expected close or nothing, got x"),
        ("packing: x", "packing: expected gzip or nothing, got x"),
    ],
)
async def test_mock_wrong_header_is_a_400_that_says_what_was_expected(
    autojump_clock, header: str, problem: str
):
    """A delay that was no number stopped the whole server in an endless loop."""
    async with running_mock() as mock:
        answer = await mock.ask("POST", PATH, CHAT, f"x-mock-{header}")
        assert answer.status == 400
        assert answer.json["error"]["message"].startswith(f"X-Mock header: {problem}")
        assert (await mock.ask("POST", PATH, CHAT)).status == 200
