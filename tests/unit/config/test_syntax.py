"""Documents that are no TOML: what the error says, where it points, and what it does not show."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.config.parser import parse
from vllm_router.config.source import ConfigSource
from vllm_router.errors import ConfigError
from vllm_router.routing.policies import POLICY_NAMES

SERVER = '[[servers.servers]]\nurl = "http://h:1"\n'


def refused(data: str | bytes) -> ConfigError:
    data = data.encode() if isinstance(data, str) else data
    with pytest.raises(ConfigError) as caught:
        parse(data, "f", environ={}, policies=POLICY_NAMES)
    return caught.value


TWICE = "expected each key once, got servers.servers[0].url again: the first is in line 2"


@pytest.mark.parametrize(
    ("text", "expected", "marked"),
    [
        ('url = "http://h', "2:7: expected a quote at the end of the text, got none", '"http://h'),
        ("name = 'abc", "2:8: expected a quote at the end of the text, got none", "'abc"),
        ("name = 'abc\nx = 'y'", "2:8: expected a quote at the end", "'abc"),
        ('name = """abc\n', "2:8: expected three quotes at the end of the text", '"""'),
        ("name = '''abc\n\n", "2:8: expected three quotes at the end of the text", "'''"),
        ('url = "a"\nurl = "b"', f"3:1: {TWICE}", "url = "),
        (
            "a = [\n[1]]\na = [\n[1]]",
            "4:1: expected each key once, got servers.servers[0].a",
            "a = ",
        ),
        ("x = { url = 1, url = 2 }", "2:16: expected each key once, got servers.", "url = "),
        (
            "[tls]\n[tls]",
            "3:1: expected each table once, got [tls] again: the first is in",
            "[tls]",
        ),
        ("[tls\n", "2:5: expected ] after the name of the table, got the end of the line", ""),
        ("[[tls]\n", "2:6: expected ]] after the name of the table", "]"),
        (
            "models = ['a'\nname = 'b'",
            "3:1: expected a comma, or ] at the end of the array",
            "name",
        ),
        (
            "models = ['a'",
            "2:14: expected a comma, or ] at the end of the array, got the end of",
            "",
        ),
        ("x = { url = 1", "2:14: expected a comma, or } at the end of the table, got the end", ""),
        ("name = gpu-1", "2:8: expected a value: a text in quotes, a number, true", "gpu-1"),
        ("verify = True", "2:10: expected a value: a text in quotes, a number, true", "True"),
        ("name =\n", "2:7: expected a value after the =, got none", ""),
        ("name = # later", "2:8: expected a value after the =, got none", ""),
        ("name: 'x'", "2:5: expected = after the key", ":"),
        ("weight = 1 name = 'x'", "2:12: expected the end of the line", "***"),
        ("name = 'x\x01'", "2:10: expected no control character in a text, got U+0001", "?"),
        ('name = "a\\q"', "2:12: expected \\\\ for a backslash, or the text in 'single", '"'),
        ("= 1", "2:1: expected a key or the name of a table in brackets", "="),
    ],
)
def test_syntax_error_is_named_with_place_and_mark(text: str, expected: str, marked: str):
    error = refused(f"[[servers.servers]]\n{text}")
    assert error.problems[0].startswith(f"f:{expected}")
    line, marks = error.excerpts[error.problems[0]].splitlines()
    start = marks.index("^")
    assert line[start : start + marks.count("^")] == marked


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SERVER.encode() + b'name = "caf\xe9"', "f:3:12: expected UTF-8, got byte 0xe9"),
        (SERVER.encode() + b'name = "\0"', "f:3:9: expected text, got a NUL byte"),
        ("\ufeff[tls".encode(), "f:1:5: expected ] after the name"),
        (b"[tls]\r\nkey = 'x\r\n", "f:2:7: expected a quote"),
    ],
)
def test_syntax_error_of_odd_bytes_has_place(data: bytes, expected: str):
    error = refused(data)
    assert error.problems[0].startswith(expected)
    assert "^" in error.excerpts[error.problems[0]]


SECRETS = """\
[[servers.servers]]
url = "http://gpu:8000"
api_key = "hunter2 hunter2"  # hunter2
[auth]
keys = [{ name = "a", key = "hunter2=" }, { name = "b", key = 'hunter2 = "x"' }]
admin_key = \"\"\"
hunter2
hunter2= "hunter2"\"\"\"
"""


@given(
    st.integers(0, len(SECRETS)),
    st.sampled_from([-1, -2, 0]),
    st.sampled_from(["", '"', "'", "#", "=", "\n", "[", "]", "{", "}", "\x01", "é", '"""', "\xa0"]),
)
def test_syntax_error_never_shows_secret(at: int, cut: int, inserted: str):
    text = SECRETS[: max(0, at + cut)] + inserted + SECRETS[at:]
    try:
        parse(text.encode(), "f", environ={}, policies=POLICY_NAMES)
    except ConfigError as error:
        shown = [*error.problems, *error.excerpts.values()]
        # A comment that became a key, or a secret that did, is a key: keys are always named.
        assert not [line for line in shown if "hunter2 hunter2" in line or '"hunter2' in line]


def test_syntax_error_of_broken_secret_masks_it():
    error = refused(SERVER + 'api_key = "hunter2\n')
    assert list(error.excerpts.values()) == ["    3 | api_key = ***\n      |           ^^^"]


def test_tls_file_error_has_place_of_its_key(tmp_path: Path):
    (tmp_path / "bad.pem").write_text("nonsense")
    file = tmp_path / "servers.toml"
    file.write_text(
        '[tls.servers]\nca = "bad.pem"\n[[servers.servers]]\nurl = "http://h:1"\n'
        '[[servers.servers]]\nurl = "http://h:2"\nca = "bad.pem"\n'
        '[discovery.http]\nurl = "http://h/x"\nca = "bad.pem"\n'
        '[tls]\ncertificate = "bad.pem"\nkey = "bad.pem"\n'
    )
    with pytest.raises(ConfigError) as caught:
        ConfigSource(file, environ={}).load()
    places = [problem.removeprefix(str(file)) for problem in caught.value.problems]
    reason = f"cannot be used, no certificate in PEM: {tmp_path / 'bad.pem'}"
    assert places == [
        f":12:15: tls.certificate: {reason}",
        f":2:6: tls.servers.ca: {reason}",
        f":7:6: servers.servers[1].ca: {reason}",
        f":10:6: discovery.http.ca: {reason}",
    ]
    assert len(caught.value.excerpts) == 4


def test_config_faulty_key_of_client_is_one_problem():
    error = refused(SERVER + '[auth]\nkeys = [{ name = "a" }]')
    assert error.problems == ("f:4:9: auth.keys[0].key: expected key or key_env, got neither",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[config]\nprobe_interval = 1", '"health_check_interval" or "metrics_interval"?'),
        ("max_num_seqs = 1", 'did you mean "max_concurrent_requests"?'),
        ("[listen]\nhost = 'x'\nport = 1", 'unknown table "listen", write [run] for host and port'),
    ],
)
def test_config_key_of_other_programs_is_explained(text: str, expected: str):
    assert refused(SERVER + text).problems[0].endswith(expected)
