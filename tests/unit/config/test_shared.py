"""The `[shared]` table: addresses, secrets, and an installation without the library for Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_router.config import shared
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.config.shared import MISSING, StoreAddress, read_address
from vllm_router.config.source import ConfigSource
from vllm_router.errors import ConfigError

SERVERS = '[servers]\nservers = [{ url = "http://gpu:1" }]\n'


def read(table: str, **environ: str) -> Config:
    text = f"{SERVERS}[shared]\n{table}\n"
    return parse(text.encode(), "servers.toml", environ, lambda path: b"PEM")


def problem(table: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(table, **environ)
    (only,) = caught.value.problems
    return only


@pytest.mark.parametrize(
    ("url", "expected", "shown"),
    [
        ("redis://h", StoreAddress(hosts=(("h", 6379),)), "redis://h:6379"),
        (
            "rediss://h:1/2",
            StoreAddress(hosts=(("h", 1),), tls=True, database=2),
            "rediss://h:1/2",
        ),
        ("redis://[::1]:7/", StoreAddress(hosts=(("::1", 7),)), "redis://[::1]:7"),
        (
            "sentinel://a,b:5,[fe80::1]/main",
            StoreAddress(hosts=(("a", 26379), ("b", 5), ("fe80::1", 26379)), service="main"),
            "sentinel://a:26379,b:5,[fe80::1]:26379/main",
        ),
    ],
)
def test_address_of_every_scheme_is_read_and_shown(url: str, expected: StoreAddress, shown: str):
    assert read_address(url) == expected
    assert str(expected) == shown


def test_address_shows_no_user_and_no_password():
    address = read_address("redis://user:p%40ss/w@h".replace("/w", "%2Fw"))
    assert (address.user, address.password) == ("user", "p@ss/w")
    assert "ss" not in str(address).removeprefix("redis")
    assert "p@ss" not in repr(address)
    assert read_address("redis://:word@h").user is None


@pytest.mark.parametrize(
    "url",
    [
        "h:6379",
        "http://h",
        "redis://",
        "redis://h:port",
        "redis://h:0",
        "redis://h:70000",
        "redis://a,b",
        "redis://h/x",
        "redis://h/1?db=2",
        "redis://h/123456",
        "redis://h h",
        "redis://h\n",
        "sentinel://h",
        "sentinel://h/",
        "sentinel://h/two words",
        "redis://secret-user:secret-word@",
    ],
)
def test_address_that_is_wrong_is_refused_without_its_secrets(url: str):
    with pytest.raises(ValueError, match="expected") as caught:
        read_address(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis", "redis:h", "http://h"])
def test_address_without_its_scheme_names_the_schemes(url: str):
    with pytest.raises(ValueError, match="expected a URL with redis://, rediss:// or sentinel://"):
        read_address(url)


@pytest.mark.parametrize("url", ["redis://", "redis:///0", "rediss://user:word@", "sentinel:///m"])
def test_address_without_a_host_says_so(url: str):
    with pytest.raises(ValueError, match="expected a host after"):
        read_address(url)


def test_shared_table_has_defaults_and_a_password_of_the_environment():
    table = 'url = "redis://u@h"\npassword_env = "REDIS_PASSWORD"'
    config = read(table, REDIS_PASSWORD=" word\n").shared
    assert config is not None
    assert (config.fleet, config.name, config.ca) == ("default", None, None)
    assert (config.address.user, config.address.password) == ("u", "word")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "shared.url: expected a URL"),
        ("url = 1", "shared.url: expected a URL"),
        ('url = "redis://user:secret@h h"', "shared.url: expected host:port"),
        ('url = "redis://h"\nfleet = "a b"', "shared.fleet: expected 1 to 64 letters"),
        ('url = "redis://h"\nca = "ca.pem"', "shared.ca: expected a url with rediss://"),
        ('url = "redis://h"\npassword_env = "NONE"', "shared.password_env: expected an env"),
        ('url = "redis://:secret@h"\npassword_env = "P"', "got both"),
        ('url = "redis://h"\nperiod = 1', 'shared.period: unknown key "period"'),
    ],
)
def test_shared_table_that_is_wrong_is_one_clear_problem(table: str, expected: str):
    found = problem(table, P="other")
    assert expected in found
    assert "secret" not in found


@pytest.mark.parametrize(
    "url", ["redis://:secret@h h", "redis//user:secret@h", "secret@h", "redis://h?password=secret"]
)
def test_shared_url_that_is_wrong_shows_no_password_in_the_excerpt(url: str):
    with pytest.raises(ConfigError) as caught:
        read(f"url = {url!r}")
    assert "secret" not in "".join([*caught.value.problems, *caught.value.excerpts.values()])


def test_shared_without_its_library_is_a_problem_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "servers.toml"
    file.write_text(f'{SERVERS}[shared]\nurl = "redis://h"\n')
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        ConfigSource(file).load()
    assert caught.value.problems == (f"{file}:3:1: shared: {MISSING}",)
    assert "pip install '.[shared]'" in MISSING
    file.write_text(SERVERS)
    assert ConfigSource(file).load().shared is None
