"""Any file content gives a configuration or clear error lines, without secrets in them."""

from __future__ import annotations

import math
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_router.config.changes import changes
from vllm_router.config.log import LogSettings
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config, Settings
from vllm_router.config.server_url import normalise_url, quoted, server_name
from vllm_router.config.servers import SERVER_KEYS
from vllm_router.errors import ConfigError

SECRET = "SeCrEt0123456789"

PROBLEM = re.compile(r"f\.toml(:\d+:\d+)?: \S")

# -- TOML out of Python values, as strange as they come ---------------------------------------


def toml_string(text: str) -> str:
    return '"' + "".join(f"\\U{ord(char):08x}" for char in text) + '"'


def toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            return toml_string(value)
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            pairs = (f"{toml_string(key)} = {toml(item)}" for key, item in value.items())
            return f"{{ {', '.join(pairs)} }}"
    raise TypeError(value)


def mixed(*known: str, values: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """Tables whose keys are mostly known ones."""
    return st.dictionaries(st.sampled_from(known) | st.text(max_size=12), values, max_size=6)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-2, 20),
    st.floats(),
    text,
    st.sampled_from(["http://h:1", "HTTP://H/v1", "least_load", "10.0.0.0/8", "", "name"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
urls = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http", "https", "HTTP", "ftp"]),
    st.sampled_from(["h", "H", "g", "[::1]", "[::0:1]", "10.0.0.1", "a_b", "user:pw@h"]) | text,
    st.sampled_from(["", ":", ":80", ":443", ":8000", ":0", ":x"]),
    st.sampled_from(["", "/", "/v1", "/v1/", "/a", "/a/v1/v1//", "/..", "?x"]) | text,
)
servers = st.lists(
    st.one_of(
        mixed(*SERVER_KEYS, values=values),
        st.fixed_dictionaries({"url": urls}, optional={"name": text, "models": st.lists(text)}),
    ),
    max_size=4,
)
documents = st.one_of(
    st.fixed_dictionaries(
        {
            "servers": st.fixed_dictionaries({"servers": servers | values}),
            "config": mixed(*Settings.__struct_fields__, values=values),
            "log": mixed(*LogSettings.__struct_fields__, values=values),
        }
    ),
    mixed("servers", "config", "auth", "tls", values=values),
)


def read(data: bytes) -> Config | tuple[str, ...]:
    try:
        return parse(data, "f.toml", {"A": "key"})
    except ConfigError as error:
        return error.problems


def check_lines(problems: tuple[str, ...]) -> None:
    assert problems
    for problem in problems:
        first, *excerpt = problem.split("\n")
        assert PROBLEM.match(first)
        assert len(excerpt) in (0, 2)  # the line in the file, and a caret
        assert all(line.isprintable() for line in (first, *excerpt))
        assert len(problem) < 2000


def check_config(config: Config) -> None:
    assert config.servers
    assert len({server.url for server in config.servers}) == len(config.servers)
    assert len({server.name for server in config.servers}) == len(config.servers)
    for server in config.servers:
        assert normalise_url(server.url) == server.url
        assert server.name.isascii()
        capacity = server.max_concurrent_requests
        assert capacity is None or capacity >= 1
        assert server.models is None or all(server.models)
    for field in config.settings.__struct_fields__:
        value = getattr(config.settings, field)
        if not isinstance(value, bool) and isinstance(value, int | float):
            assert math.isfinite(value)
            assert value >= 0
        assert field not in {"request_timeout", "total_timeout"} or value is None or value > 0
    assert changes(config, config) == "nothing changed"


@given(documents)
@settings(deadline=None, max_examples=300)
def test_config_any_document_loads_or_gives_clear_lines(document: dict[str, object]):
    data = "\n".join(f"{toml_string(k)} = {toml(v)}" for k, v in document.items()).encode()
    found = read(data)
    if isinstance(found, Config):
        check_config(found)
    else:
        check_lines(found)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
@settings(deadline=None, max_examples=300)
def test_config_any_bytes_are_refused_in_clear_lines(data: bytes):
    found = read(data)
    assert isinstance(found, tuple)
    check_lines(found)


WHOLE = b"""\
[servers]
servers = [
    { url = "http://gpu-server-1:8081", max_concurrent_requests = 3, models = ["m"] },
    { url = "http://gpu-server-2:8088", api_key_env = "A" },
]
[config]
health_check_interval = 10
trusted_proxies = ["10.0.0.0/8"]
"""


@given(st.integers(0, len(WHOLE)), st.integers(0, 20), st.binary(max_size=5))
@settings(deadline=None, max_examples=300)
def test_config_damaged_file_loads_or_gives_clear_lines(at: int, cut: int, put: bytes):
    found = read(WHOLE[:at] + put + WHOLE[at + cut :])
    if isinstance(found, Config):
        check_config(found)
    else:
        check_lines(found)


@pytest.mark.parametrize("key", ["api_key", "api_key_env"])
@given(around=st.tuples(text, text), nested=st.sampled_from(["{}", "[{}]", "{{ x = {} }}"]))
@settings(deadline=None, max_examples=100)
def test_config_secret_is_in_no_line_and_no_repr(key: str, around: tuple[str, str], nested: str):
    value = nested.format(toml_string(SECRET.join(around)))
    found = read(f'[[servers.servers]]\nurl = "http://h"\n{key} = {value}\n'.encode())
    shown = repr(found) if isinstance(found, Config) else "\n".join(found)
    assert SECRET not in shown


@given(st.text(), st.sampled_from(["http", "https", "ftp", ""]), st.text(string.ascii_letters))
@settings(deadline=None, max_examples=200)
def test_config_password_in_url_is_never_shown(user: str, scheme: str, host: str):
    assert SECRET not in quoted(f"{scheme}://{user}:{SECRET}@{host}")
    assert SECRET not in quoted(f"{user}:{SECRET}@{host}")


@given(urls)
@settings(deadline=None, max_examples=300)
def test_config_normalised_url_is_stable(url: str):
    try:
        normal = normalise_url(url)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("expected a URL")
        assert refusal.isprintable()
        return
    assert normalise_url(normal) == normal
    assert normalise_url(f"{normal}/v1/") == normal
    assert server_name(normal)
    assert normal.isascii()
    assert normal.isprintable()
    assert " " not in normal
