"""READMEs and docs match the program: keys, defaults, options, error codes, curl lines."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from support.cli_process import ROOT, Running, router
from support.mock_process import MockProcess, mock_processes
from vllm_router.cli.main import cli
from vllm_router.config import auth, discovery_tables
from vllm_router.config import models as models_config
from vllm_router.config import schema as config
from vllm_router.config import tls as tls_config
from vllm_router.config.run_options import RunOptions
from vllm_router.config.slo import Objective
from vllm_router.proxy.retry import RULES
from vllm_router.routing.policies import POLICY_NAMES
from vllm_router.runtime.own_machine import find_socket

READMES = ("README.md", "README.zh.md")
PAGES = (
    *("api", "choosing", "commands", "comparison", "configuration", "errors", "operations"),
    *("troubleshooting", "tutorial"),
)
FOLDERS = {"README.md": "docs", "README.zh.md": "docs/zh"}
NOTHING = {"README.md": "none", "README.zh.md": "无"}

KEY_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?) ?\| .+ \|$", re.MULTILINE)


@pytest.fixture(params=READMES)
def readme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text(readme: str) -> str:
    """The README and the pages that exist in both languages, in one text."""
    folder = ROOT / FOLDERS[readme]
    paths = [ROOT / readme, *(folder / f"{page}.md" for page in PAGES)]
    return "\n".join(path.read_text() for path in paths)


def keys(readme: str) -> dict[str, tuple[str, str]]:
    """Every key of the configuration tables, with its default and its unit."""
    found = KEY_ROW.findall(text(readme))
    named = [key for key, _, _ in found]
    assert len(named) == len(set(named))
    return {key: (default, unit) for key, default, unit in found}


def written(value: object, nothing: str) -> str:
    """A default as the tables have it: TOML in a code span."""
    match value:
        case None:
            return nothing
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return f"`{value:g}`"
        case tuple():
            return f"`[{', '.join(json.dumps(item) for item in value)}]`"
    return f'`"{value}"`'


def test_readme_has_every_setting_with_default(readme: str):
    defaults = msgspec.structs.asdict(config.Settings())
    expected = {key: written(value, NOTHING[readme]) for key, value in defaults.items()}
    described = {key: default for key, (default, _) in keys(readme).items()}
    server_keys = {field.name for field in msgspec.structs.fields(config.ServerConfig)}
    server_keys.add("api_key_env")
    server_keys.discard("source")  # not a key: the router sets it
    assert described.keys() == expected.keys() | server_keys
    assert {key: described[key] for key in expected} == expected


def test_readme_has_every_server_key_with_default(readme: str):
    described = keys(readme)
    for field in msgspec.structs.fields(config.ServerConfig):
        if field.default is not msgspec.NODEFAULT and field.name != "source":
            assert described[field.name][0] == written(field.default, NOTHING[readme]), field.name
    assert described["api_key_env"][0] == NOTHING[readme]


def test_readme_has_every_key_of_auth_and_tls(readme: str):
    listed = re.findall(r"^\| `((?:auth|tls)\.[\w.]+)` \|", text(readme), re.MULTILINE)
    assert len(listed) == len(set(listed))
    expected = {f"auth.{key}" for key in [*auth.AUTH_KEYS, "keys"]}
    expected |= {f"auth.keys.{key}" for key in auth.KEY_KEYS}
    expected |= {f"tls.{key}" for key in [*tls_config.TLS_KEYS, "servers"]}
    assert set(listed) == expected
    example = (ROOT / "servers.example.toml").read_text()
    for key in listed:
        assert re.search(rf"^# .*\b{key.rpartition('.')[2]}\b", example, re.MULTILINE), key


def test_readme_has_every_key_of_models(readme: str):
    listed = re.findall(r"^\| `models\.NAME\.(\w+)` \|", text(readme), re.MULTILINE)
    assert listed == list(models_config.MODEL_KEYS)
    example = (ROOT / "servers.example.toml").read_text()
    for key in listed:
        assert re.search(rf"^# {key} = ", example, re.MULTILINE), key


def test_readme_has_every_limit_with_default(readme: str):
    listed = re.findall(r"^\| `limits\.(\w+)` \| (\S+) \|", text(readme), re.MULTILINE)
    assert listed == [
        (key, written(value, NOTHING[readme]))
        for key, value in msgspec.structs.asdict(config.LimitsConfig()).items()
    ]
    example = (ROOT / "servers.example.toml").read_text()
    for key, _ in listed:
        assert re.search(rf"^# .*\b{key}\b", example, re.MULTILINE), key


def test_readme_and_discovery_page_have_every_key_of_discovery(readme: str):
    listed = re.findall(r"^\| `discovery\.(\w+)` \|", text(readme), re.MULTILINE)
    kinds = discovery_tables.KINDS
    assert set(listed) == {*discovery_tables.DISCOVERY_KEYS, *kinds, "defaults"}
    page = (ROOT / "docs" / "discovery.md").read_text()
    for kind, (keys_of_kind, _) in kinds.items():
        section = page.partition(f"\n## `{kind}`")[2].partition("\n## ")[0]
        own = set(keys_of_kind) - set(discovery_tables.COMMON_KEYS)
        assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == own, kind
    example = (ROOT / "servers.example.toml").read_text()
    for key in listed:
        assert re.search(rf"^# .*\b{key}\b", example, re.MULTILINE), key


def test_readme_has_every_log_key_with_default(readme: str):
    listed = re.findall(r"^\| `log\.(\w+)` \| (\S+) \|", text(readme), re.MULTILINE)
    assert listed == [
        (key, written(value, NOTHING[readme]))
        for key, value in msgspec.structs.asdict(config.LogSettings()).items()
    ]


def test_readme_has_every_key_of_slo_with_default(readme: str):
    listed = re.findall(r"^\| `slo\.(\w+)` \| (\S+) \|", text(readme), re.MULTILINE)
    assert listed == [
        (key, written(value, NOTHING[readme]))
        for key, value in msgspec.structs.asdict(Objective()).items()
    ]
    example = (ROOT / "servers.example.toml").read_text()
    for key, _ in listed:
        assert re.search(rf"^# .*\b{key}\b", example, re.MULTILINE), key


def test_readme_has_every_key_of_run_with_default(readme: str):
    listed = re.findall(r"^\| `run\.(\w+)` \| (\S+) \|", text(readme), re.MULTILINE)
    assert listed == [
        (key, written(value, NOTHING[readme]))
        for key, value in msgspec.structs.asdict(RunOptions()).items()
    ]


def test_readme_shows_unit_for_systemd(readme: str):
    unit = (ROOT / "deploy" / "systemd" / "vllm-router.service").read_text()
    assert f"# /etc/systemd/system/vllm-router.service\n{unit}```" in text(readme)


def test_readme_durations_have_seconds_as_unit():
    units = {key: unit for key, (_, unit) in keys("README.md").items()}
    numbers = (config.Seconds, config.SecondsOrZero, config.SecondsOrNone, config.Interval)
    durations = {
        field.name for field in msgspec.structs.fields(config.Settings) if field.type in numbers
    }
    assert {key for key, unit in units.items() if unit == "s"} == durations


def test_readme_names_every_policy(readme: str):
    for name in POLICY_NAMES:
        assert re.search(rf'[`"]{name}[`"]', text(readme)), name


def test_readme_names_every_command_and_option_of_run(readme: str):
    page = text(readme)
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert re.search(rf"^\| `{name}\b", page, re.MULTILINE), name
    run = cli.get_command(context, "run")
    assert run is not None
    for parameter in run.params:
        assert all(f"`{option}" in page for option in parameter.opts), parameter.opts


def test_readme_explains_every_error_code(readme: str):
    codes = {rule.code for rule in RULES.values() if rule.code}
    for path in (ROOT / "vllm_router" / "proxy").glob("*.py"):
        codes |= set(re.findall(r'Refused\(\s*\d{3},\s*"(\w+)"', path.read_text()))
    assert len(codes) > len(RULES) - 3
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [\d, ]+ \|", text(readme), re.MULTILINE)
    assert codes <= set(re.findall(r"`(\w+)`", " ".join(rows)))


def console(readme: str) -> list[tuple[str, str]]:
    """Every `$ command` of the console blocks, with the output shown."""
    blocks = "\n".join(
        re.findall(r"^```console\n(.*?)^```", text(readme), re.MULTILINE | re.DOTALL)
    )
    parts = re.split(r"^\$ ", blocks, flags=re.MULTILINE)[1:]
    return [(command, answer) for command, _, answer in (part.partition("\n") for part in parts)]


CURLS = [(command, answer) for command, answer in console("README.md") if "curl" in command]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A router with three servers like the demo's.

    Its configuration opens engine control.
    """
    scratch: Path = tmp_path_factory.mktemp("readme")
    with mock_processes(3, "--model", "demo") as mocks:
        (scratch / "servers.toml").write_text(_fleet(mocks))
        with router(scratch / "stderr", cwd=scratch) as started:
            yield started


def _fleet(mocks: list[MockProcess]) -> str:
    tables = [
        f'[[servers.servers]]\nurl = "{mock.url}"\nname = "demo-{number}"\n'
        for number, mock in enumerate(mocks, 1)
    ]
    return "".join([*tables, "[config]\nallow_engine_control = true\n"])


@pytest.mark.parametrize(("command", "shown"), CURLS, ids=[command for command, _ in CURLS])
def test_readme_curl_example_answers_as_shown(demo: Running, command: str, shown: str):
    command = command.replace("http://127.0.0.1:8888", demo.url)
    command = command.replace("$SOCKET", str(find_socket(demo.url)))
    words = shlex.split(command, comments=True)
    done = subprocess.run(
        [*words, "--silent", "--noproxy", "*"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    for key in re.findall(r'"([\w.-]+)": ?', shown):
        assert f'"{key}":' in done.stdout
    for line in shown.splitlines():
        if line.startswith(("HTTP/", "x-vllm-router-error", "vllm_router_")):
            assert re.split(r"[{ ]", line)[0] in done.stdout
        if line.startswith("HTTP/"):
            assert line in done.stdout


def test_readme_blocks_are_run_by_script_or_named_as_not_run():
    script = ROOT / "scripts" / "follow-readme"
    listed = subprocess.run(
        [sys.executable, script, "--list"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    blocks = re.findall(r"^```\w+\n(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [line[25:] for line in listed] == blocks
    assert sum(line.startswith("run ") for line in listed) >= 6


def test_readme_is_short(readme: str):
    assert len((ROOT / readme).read_text().splitlines()) <= 200


def test_readme_languages_show_same_commands_and_answers():
    def bare(readme: str) -> list[tuple[str, str]]:
        return [(command.partition("  ")[0], answer) for command, answer in console(readme)]

    assert bare("README.md") == bare("README.zh.md")
    assert list(keys("README.md")) == list(keys("README.zh.md"))
