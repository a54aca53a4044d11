"""From found targets to servers: checks, labels, and the merge with the file."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from vllm_router.config.discovered import MAX_TARGETS, merge, read_targets, without_discovered
from vllm_router.config.discovery import Found, Target, Targets, TargetState
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config

SOURCE = '[discovery]\nfile = { path = "a.json" }\n'


def config(text: str = SOURCE, environ: dict[str, str] | None = None) -> Config:
    return parse(text.encode(), "/etc/servers.toml", environ or {})


def read(*found: Found, text: str = SOURCE, environ: dict[str, str] | None = None) -> Any:
    discovery = config(text, environ).discovery
    assert discovery is not None
    return read_targets(found, discovery.sources[0], discovery)


def test_read_targets_address_becomes_normalised_url() -> None:
    read_ = read(Found("GPU-1:8000"), Found("https://gpu-2/llama/v1/"), Found("[::1]:8000"))
    assert [target.url for target in read_.targets] == [
        "http://[::1]:8000",
        "http://gpu-1:8000",
        "https://gpu-2/llama",
    ]


def test_read_targets_scheme_comes_from_label_or_source() -> None:
    text = '[discovery]\nfile = { path = "a.json", scheme = "https" }\n'
    read_ = read(Found("a:1"), Found("b:1", labels={"scheme": "http"}), text=text)
    assert [target.url for target in read_.targets] == ["http://b:1", "https://a:1"]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (Found("a b:1"), '"a b:1": address: expected a URL with a valid host'),
        (Found(""), '"": address: expected a URL with a valid host'),
        (Found("ftp://a"), '"ftp://a": address: expected a URL like "http://host:8000"'),
        (Found("a:99999"), '"a:99999": address: expected a URL with a port from 1 to 65535'),
        (Found("u:p@a:1"), "expected a URL without user name and password"),
        (Found("a:1", labels={"weight": "heavy"}), '"a:1": weight: expected number > 0'),
        (Found("a:1", labels={"weight": "-1"}), "weight: expected number > 0"),
        (Found("a:1", labels={"max_concurrent_requests": "1.5"}), "expected int ≥ 1"),
        (Found("a:1", labels={"wieght": "1"}), 'unknown key "wieght", did you mean "weight"?'),
        (Found("a:1", labels={"state": "gone"}), 'state: expected "up", "drain" or "wait"'),
        (Found("a:1", labels={"name": "two words"}), "name: expected 1 to 100 visible ASCII"),
        (Found("a:1", labels={"models": ""}), "models"),
        (Found("a:1", labels={"verify": "false"}), 'unknown key "verify"'),
        (Found("a:1", labels={"api_key_env": "AWS_SECRET"}), "discovery.label_key_envs"),
        (Found("a:1\n2"), "expected a URL with a port"),
    ],
)
def test_read_targets_bad_target_is_named_and_left_out(found: Found, problem: str) -> None:
    read_ = read(found, Found("good:1"))
    assert [target.url for target in read_.targets] == ["http://good:1"]
    (line,) = read_.problems
    assert problem in line
    assert "\n" not in line


def test_read_targets_labels_become_options() -> None:
    labels = {"weight": "2.5", "max_concurrent_requests": "16", "models": "m, org/n"}
    (target,) = read(Found("a:1", labels=labels)).targets
    assert dict(target.options) == {
        "weight": 2.5,
        "max_concurrent_requests": 16,
        "models": ("m", "org/n"),
    }


def test_read_targets_key_label_chooses_among_listed_variables() -> None:
    text = f'{SOURCE}label_key_envs = ["KEY_A"]\n'
    (target,) = read(
        Found("a:1", labels={"api_key_env": "KEY_A"}), text=text, environ={"KEY_A": "secret-a"}
    ).targets
    assert dict(target.options) == {"api_key": "secret-a"}
    assert "secret-a" not in repr(target)


def test_read_targets_duplicate_is_used_once_in_its_best_state() -> None:
    read_ = read(
        Found("a:1", state=TargetState.DRAIN, labels={"weight": "1"}),
        Found("A:1", state=TargetState.UP, labels={"weight": "2"}),
        Found("a:1", state=TargetState.WAIT),
        Found("a:1", state=TargetState.UP, labels={"weight": "3"}),
    )
    (target,) = read_.targets
    assert target.state is TargetState.UP
    assert dict(target.options) == {"weight": 2}


def test_read_targets_more_than_the_limit_are_left_out() -> None:
    read_ = read(*[Found(f"h{n}:1") for n in range(MAX_TARGETS + 5)])
    assert len(read_.targets) == MAX_TARGETS
    assert "expected at most" in read_.problems[0]


# -- merge ------------------------------------------------------------------------------------

BOTH = """
[servers]
servers = [{ url = "http://a:1", name = "first", weight = 5 }]
[discovery]
defaults = { max_concurrent_requests = 32 }
file = [
    { path = "a.json", defaults = { weight = 2 } },
    { path = "b.json", id = "other" },
]
"""


def up(*urls: str, **options: Any) -> Targets:
    return tuple([Target(url, options=tuple(options.items())) for url in urls])


def test_merge_file_wins_then_earlier_source() -> None:
    found = {"file": up("http://a:1", "http://b:1"), "other": up("http://b:1", "http://c:1")}
    merged = merge(config(BOTH), found).config
    got = [(one.url, one.source, one.weight, one.max_concurrent_requests) for one in merged.servers]
    assert got == [
        ("http://a:1", None, 5.0, None),
        ("http://b:1", "file", 2.0, 32),
        ("http://c:1", "other", 1.0, 32),
    ]
    assert merged.awaited == ()


def test_merge_labels_win_over_defaults() -> None:
    merged = merge(config(BOTH), {"file": up("http://b:1", weight=7.0)}).config
    assert merged.servers[1].weight == 7.0


def test_merge_only_targets_that_are_up_become_servers() -> None:
    targets = tuple([Target(f"http://{state}:1", state=state) for state in TargetState])
    merged = merge(config(BOTH), {"file": targets}).config
    assert [one.url for one in merged.servers] == ["http://a:1", "http://up:1"]


def test_merge_taken_name_is_replaced_by_host_and_port() -> None:
    found = {"file": (Target("http://b:1", "first"), Target("http://c:1", "own"))}
    merged = merge(config(BOTH), found)
    assert [one.name for one in merged.config.servers] == ["first", "b:1", "own"]
    assert not merged.problems


def test_merge_target_without_any_free_name_is_a_problem() -> None:
    text = '[servers]\nservers = [{ url = "http://a:1", name = "b:1" }]\n' + SOURCE
    merged = merge(config(text), {"file": up("http://b:1")})
    assert len(merged.config.servers) == 1
    assert merged.problems == {"file": ("http://b:1: another server has its name b:1",)}


def test_merge_is_idempotent_and_can_be_undone() -> None:
    plain = config(BOTH)
    found = {"file": up("http://b:1"), "unknown": up("http://z:1")}
    once = merge(plain, found).config
    assert merge(once, dict(once.found)).config == once
    assert without_discovered(once) == plain
    assert pickle.loads(pickle.dumps(once)) == once


def test_merge_sources_that_have_not_answered_are_awaited() -> None:
    assert config(BOTH).awaited == ("file", "other")
    assert merge(config(BOTH), {"other": ()}).config.awaited == ("file",)


def test_merge_applies_the_limits_of_the_configuration() -> None:
    text = BOTH + "[limits]\nstrict_capacity = true\n"
    merged = merge(config(text), {"file": up("http://b:1", max_in_flight=3) + up("http://c:1")})
    assert [one.max_in_flight for one in merged.config.servers] == [None, 3, 32]
    without = merge(config(BOTH), {"file": up("http://b:1", max_in_flight=3)})
    assert without.config.servers[1].max_in_flight is None
    assert without.problems == {
        "file": ("http://b:1: max_in_flight has no effect without [limits]",)
    }


def test_merge_without_discovery_changes_nothing() -> None:
    plain = config('[servers]\nservers = [{ url = "http://a:1" }]\n')
    assert merge(plain, {"file": up("http://b:1")}).config is plain


# -- the table --------------------------------------------------------------------------------


def test_table_defaults_take_keys_from_the_environment_and_tls_of_servers() -> None:
    text = """
    [tls.servers]
    verify = false
    [discovery]
    defaults = { api_key_env = "KEY" }
    [[discovery.file]]
    path = ["x/*.json", "/abs.yml"]
    """
    made = config(text, {"KEY": "k"}).discovery
    assert made is not None
    (source,) = made.sources
    assert dict(source.defaults) == {"verify": False, "api_key": "k"}
    assert source.paths == ("/etc/x/*.json", "/abs.yml")
    assert source.name == "file"


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("[discovery]", "discovery: expected a source (file"),
        ("discovery = 3", "discovery: expected table, got 3"),
        ('[discovery]\nfile = "a.json"', "discovery.file: expected table or array of tables"),
        ("[discovery]\nfile = []", "discovery.file: expected table or array of tables, got an em"),
        ("[discovery]\nfile = [1]", "discovery.file[0]: expected table, got 1"),
        ("[discovery]\nfile = {}", "discovery.file.path: expected the path of a file or a pattern"),
        ("[discovery]\nfile = { path = 3 }", "discovery.file.path: expected the path of a file"),
        ("[discovery]\nfile = { path = [] }", "discovery.file.path: expected the path of a file"),
        (
            '[discovery]\nfile = { path = ["a", 5, "b"] }',
            "discovery.file.path[1]: expected the path of a file (string), got 5",
        ),
        ('[discovery]\nfile = { path = ["a", ""] }', "discovery.file.path[1]: expected the path"),
        ('[discovery]\nfile = { pth = "a" }', 'discovery.file.pth: unknown key "pth", did you me'),
        ('[discovery]\nfiel = { path = "a" }', 'discovery.fiel: unknown key "fiel", did you mean'),
        (
            '[discovery]\nfile = { path = "a", scheme = "ftp" }',
            'discovery.file.scheme: expected one of "http", "https", got "ftp"',
        ),
        (
            '[discovery]\nfile = { path = "a", defaults = { url = "http://a" } }',
            'discovery.file.defaults.url: unknown key "url"',
        ),
        (
            '[discovery]\ndefaults = { api_key_env = "NO" }\nfile = { path = "a" }',
            "discovery.defaults.api_key_env: expected an environment variable that is set",
        ),
        (
            '[discovery]\nfile = [{ path = "a", id = "x" }, { path = "b", id = "x" }]',
            'discovery: expected every source to have its own id, got "x" twice',
        ),
        ("[discovery]\nkeep_for = 0\nfile = { path = 'a' }", "discovery.keep_for: expected number"),
    ],
)
def test_table_problem_names_key_and_expectation(table: str, problem: str) -> None:
    from vllm_router.errors import ConfigError

    with pytest.raises(ConfigError) as raised:
        config(table)
    assert any(problem in line for line in raised.value.problems), raised.value.problems


def test_table_file_needs_no_servers_beside_it() -> None:
    assert config().servers == ()
    assert config("[servers]\nservers = []\n" + SOURCE).servers == ()


def test_table_default_names_are_numbered() -> None:
    made = config('[discovery]\nfile = [{ path = "a" }, { path = "b" }]\n').discovery
    assert made is not None
    assert [source.name for source in made.sources] == ["file", "file-2"]


def test_labels_of_json_numbers_are_read_as_text() -> None:
    from vllm_router.discovery.file_sd import read_json

    found, problems = read_json(
        json.dumps([{"targets": ["a:1"], "labels": {"__weight": 2}}]).encode()
    )
    assert found[0].labels == {"weight": "2"}
    assert problems == []
