"""`[auth]` and `[tls]` in servers.toml, and the owner of a request's key."""

from __future__ import annotations

import base64
import hashlib
import re
import string
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.config.auth import AuthConfig
from vllm_router.config.changes import changes
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError
from vllm_router.proxy.identity import ANONYMOUS, UNKNOWN_KEY, Identity, Keyring, keys_in

ONE_SERVER = '[servers]\nservers = [{ url = "https://h:8000", name = "h" }]\n'
DIGEST = hashlib.sha256(b"sk-a").hexdigest()


def read(text: str, files: Mapping[str, bytes] | None = None, **environ: str) -> Config:
    def read_file(path: str) -> bytes:
        if files is None or path not in files:
            raise ConfigError([f"{path}: cannot be read: No such file or directory"])
        return files[path]

    return parse((ONE_SERVER + text).encode(), "etc/servers.toml", environ, read_file)


def auth(text: str, files: Mapping[str, bytes] | None = None, **environ: str) -> AuthConfig:
    found = read(f"[auth]\n{text}", files, **environ).auth
    assert found is not None
    return found


def problems(text: str, files: Mapping[str, bytes] | None = None, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, files, **environ)
    # Positions have tests of their own.
    lines = [re.sub(r"(?<=\.toml):\d+:\d+(?=: )", "", one) for one in caught.value.problems]
    return [line.removeprefix("etc/servers.toml: ") for line in lines]


# -- keys in the configuration ----------------------------------------------------------------


def test_auth_without_table_has_no_keys():
    assert read("").auth is None


def test_auth_key_is_stored_as_digest_in_every_form():
    plain = auth('keys = [{ name = "a", key = "sk-a" }]')
    hashed = auth(f'keys = [{{ name = "a", key = "sha256:{DIGEST.upper()}" }}]')
    variable = auth('keys = [{ name = "a", key_env = "K" }]', K="sk-a\n")
    assert plain == hashed == variable
    assert plain.keys[0].digest == DIGEST


def test_auth_key_has_its_models_and_limits():
    (key,) = auth(
        '[[auth.keys]]\nname = "a"\nkey = "sk-a"\nmodels = ["m"]\nrequests_per_minute = 90\n'
        "max_concurrent_requests = 4"
    ).keys
    assert (key.models, key.requests_per_minute, key.max_concurrent_requests) == (("m",), 90, 4)
    assert key.allows("m")
    assert not key.allows("n")
    assert not key.allows(None)


def test_auth_keys_file_is_relative_to_configuration_and_adds_keys():
    found = auth(
        'keys_file = "keys.toml"\nkeys = [{ name = "a", key = "sk-a" }]',
        {"etc/keys.toml": b'[[keys]]\nname = "b"\nkey = "sk-b"\n'},
    )
    assert [key.name for key in found.keys] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "auth: expected keys, keys_file, admin_key or status_key, got none of them"),
        ("protect_status = true\n" + 'keys = [{ name = "a", key = "x" }]', "protect_status"),
        ('keys = [{ name = "a" }]', "auth.keys[0].key: expected key or key_env, got neither"),
        ('keys = [{ key = "a" }]', "auth.keys[0].name: expected a name for the key, got none"),
        ('keys = [{ name = "a", key = "x", key_env = "K" }]', "expected key or key_env, got both"),
        ('keys = [{ name = "a", key_env = "NONE" }]', 'variable that is set, got "NONE"'),
        ('keys = [{ name = "a", key = "sha256:12" }]', 'hexadecimal digits after "sha256:"'),
        ('keys = [{ name = "a", key = "a b" }]', "visible ASCII characters, no spaces"),
        ('keys = [{ name = "a", key = "x" }, { name = "a", key = "y" }]', "expected a unique name"),
        ('keys = [{ name = "a", key = "x" }, { name = "b", key = "x" }]', "got the key of a"),
        ('admin_key = "x"\nkeys = [{ name = "a", key = "x" }]', "auth.admin_key: expected a key"),
        (
            'admin_key = "x"\nkeys = [{ name = "a", key = "y" }, { name = "b", key = "x" }]',
            "auth.admin_key: expected a key of its own",
        ),
        (
            'admin_key = "x"\nkeys = [{ name = "a", key = "x" }, { name = "b", key = "y" }]',
            "auth.admin_key: expected a key of its own",
        ),
        ('admin_key = "x"\nstatus_key = "x"', "auth.admin_key: expected a key of its own"),
        ('admin_key = "x"\nadmin_key_env = "K"', "expected admin_key or admin_key_env, got both"),
        ('keys_file = "none.toml"', "auth.keys_file: etc/none.toml: cannot be read: No such file"),
        ("keys = 3", "auth.keys: expected array of tables, got 3"),
        ("keys = [3]", "auth.keys[0]: expected table, got 3"),
        ('key = "x"', 'auth.key: unknown key "key"'),
    ],
)
def test_auth_key_problems_are_reported(text: str, expected: str):
    found = "\n".join(problems(f"[auth]\n{text}", K="k"))
    assert expected in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[[key]]\nname = "b"\nkey = "sk-b"\n', 'etc/keys.toml: key: unknown key "key"'),
        (b'[auth]\nadmin_key = "x"\n', 'etc/keys.toml: auth: unknown key "auth"'),
        (b"keys = 3", "etc/keys.toml: keys: expected array of tables, got 3"),
        (b'[[keys]]\nname = "b"\nkee = "x"\n', 'etc/keys.toml: keys[0].kee: unknown key "kee"'),
        (b"[[keys]\n", "etc/keys.toml"),
    ],
)
def test_auth_keys_file_with_invalid_parts_is_refused(content: bytes, expected: str):
    text = '[auth]\nkeys_file = "keys.toml"\nadmin_key = "z"'
    found = "\n".join(problems(text, {"etc/keys.toml": content}))
    assert expected in found


def test_auth_admin_key_repeated_in_keys_file_is_refused():
    content = b'[[keys]]\nname = "b"\nkey = "y"\n[[keys]]\nname = "c"\nkey = "x"\n'
    text = '[auth]\nkeys_file = "keys.toml"\nadmin_key = "x"'
    found = "\n".join(problems(text, {"etc/keys.toml": content}))
    assert "auth.admin_key: expected a key of its own" in found


def test_auth_key_repeated_in_keys_file_is_refused():
    content = b'[[keys]]\nname = "b"\nkey = "x"\n'
    text = '[auth]\nkeys_file = "keys.toml"\nkeys = [{ name = "a", key = "x" }]'
    found = "\n".join(problems(text, {"etc/keys.toml": content}))
    assert "got the key of a" in found


def test_auth_problem_in_keys_file_names_that_file():
    files = {"etc/keys.toml": b'[[keys]]\nname = "b"\nkye = "sk-secret"\n'}
    found = problems('[auth]\nkeys_file = "keys.toml"', files)
    assert any(line.startswith("etc/keys.toml: keys[0].kye: unknown key") for line in found)


@pytest.mark.parametrize(
    "text",
    [
        'keys = [{ name = "a", key = "sk-SECRET\\n" }]',
        'keys = [{ name = "a", key = "sha256:SECRET" }]',
        'keys = [{ name = "a", key = ["SECRET"] }]',
        'keys = [{ name = "a", key_env = "sk-SECRET" }]',
        'admin_key = "SECRET SECRET"',
        'admin_key_env = "sk-SECRET"',
        'admin_key = "SECRET"\nkeys = [{ name = "a", key = "SECRET" }]',
    ],
)
def test_auth_problems_never_contain_a_key(text: str):
    assert "SECRET" not in "\n".join(problems(f"[auth]\n{text}"))


def test_auth_configuration_and_diff_never_contain_key_or_digest():
    text = '[auth]\nadmin_key = "{}"\nkeys = [{{ name = "a", key = "{}" }}]'
    old, new = read(text.format("sk-x", "sk-a")), read(text.format("sk-y", "sk-b"))
    assert changes(old, new) == "key a digest changed, auth admin_key changed"
    for shown in (repr(old), str(old.auth), changes(old, new)):
        assert "sk-" not in shown
        assert DIGEST not in shown


def test_auth_changed_keys_are_reported_by_name():
    old = read('[auth]\nkeys = [{ name = "a", key = "x" }, { name = "b", key = "y" }]')
    new = read('[auth]\nkeys = [{ name = "b", key = "y", models = ["m"] }, { name = "c", key="z"}]')
    assert changes(old, new) == "key +c, key -a, key b models none → [m]"
    assert changes(read(""), new) == "auth on"
    assert changes(new, read("")) == "auth off"


# -- owners of keys ---------------------------------------------------------------------------


def ring() -> Keyring:
    return Keyring(
        auth(
            'admin_key = "sk-admin"\nstatus_key = "sk-status"\n'
            'keys = [{ name = "a", key = "sk-a" }, { name = "b", key = "sk-ab" }]'
        )
    )


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode("latin-1")}


def name_of(identity: Identity) -> str:
    if identity.key is not None:
        return identity.key.name
    return "admin" if identity.admin else "status" if identity.status else "unknown"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("sk-a", "a"),
        ("sk-ab", "b"),
        ("sk-admin", "admin"),
        ("sk-status", "status"),
        ("sk-", "unknown"),
        ("sk-abc", "unknown"),
        ("SK-A", "unknown"),
        ("", "unknown"),
        ("sk-a\xff", "unknown"),
        ("sk-a" * 10_000, "unknown"),
        (f"sha256:{DIGEST}", "unknown"),
        (DIGEST, "unknown"),
    ],
)
def test_keyring_key_identifies_its_owner(key: str, name: str):
    assert name_of(ring().identify(bearer(key))) == name
    assert name_of(ring().identify({b"x-api-key": key.encode("latin-1")})) == name
    token = base64.urlsafe_b64encode(key.encode("latin-1")).rstrip(b"=")
    fields = {b"sec-websocket-protocol": b"vllm-router.feed, vllm-router.key." + token}
    assert name_of(ring().identify(fields)) == name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"authorization": b"sk-a"},
        {b"authorization": b"Basic sk-a"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer  "},
        {b"authorization": b"Bearer sk-a, Bearer sk-a"},
        {b"cookie": b"key=sk-a"},
        {b"sec-websocket-protocol": b"sk-a"},
        {b"sec-websocket-protocol": b"vllm-router.key.sk-a"},
        {b"sec-websocket-protocol": b"vllm-router.key.=!"},
    ],
)
def test_keyring_key_elsewhere_is_ignored(fields: dict[bytes, bytes]):
    assert ring().identify(fields) in (ANONYMOUS, UNKNOWN_KEY)


def test_keyring_scheme_is_case_insensitive():
    assert name_of(ring().identify({b"authorization": b"bEARER sk-a"})) == "a"


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_keyring_any_bytes_are_a_known_key_or_none(one: bytes, two: bytes, three: bytes):
    fields = {b"authorization": one, b"x-api-key": two, b"sec-websocket-protocol": three}
    assert name_of(KEYS.identify(fields)) in {"a", "b", "admin", "status", "unknown"}


@given(st.text(string.printable.strip(), min_size=1, max_size=60))
def test_keyring_key_in_subprotocol_is_read_whole(key: str):
    token = base64.urlsafe_b64encode(key.encode()).rstrip(b"=")
    assert keys_in({b"sec-websocket-protocol": b"vllm-router.key." + token}) == [key.encode()]


KEYS = ring()


# -- [tls] ------------------------------------------------------------------------------------

FILES = {f"etc/{name}.pem": name.encode() for name in ("c", "k", "ca", "own", "more")}


def test_tls_certificate_is_identified_by_path_and_content():
    text = '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\n'
    old, new = read(text, FILES), read(text, {**FILES, "etc/c.pem": b"renewed"})
    assert old.tls is not None
    assert (old.tls.certificate.path, old.tls.min_version) == ("etc/c.pem", "1.2")
    assert changes(old, new) == "tls certificate changed"
    assert changes(read(""), old) == "tls on"


def test_tls_servers_use_common_files_unless_overridden():
    text = '[tls.servers]\nca = "ca.pem"\nverify = true\n[[servers.servers]]\nurl = "https://a"\n'
    text += '[[servers.servers]]\nurl = "https://b"\nca = "own.pem"\nverify = false\n'
    config = parse(text.encode(), "etc/servers.toml", {}, FILES.__getitem__)
    common, own = config.servers
    assert config.tls is None
    assert (str(common.ca), common.verify) == ("etc/ca.pem", True)
    assert (str(own.ca), own.verify) == ("etc/own.pem", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[tls]", "tls: expected certificate and key, or servers, got none of them"),
        ('[tls]\ncertificate = "c.pem"', "tls.key: expected the path of a file, got none"),
        ('[tls]\nkey = "k.pem"', "tls.certificate: expected the path of a file, got none"),
        ('[tls]\ncertificate = "no.pem"\nkey = "k.pem"', "etc/no.pem: cannot be read"),
        ('[tls]\ncertificate = "c.pem"\nkey = "k.pem"\nmin_version = "1.1"', '"1.2" or "1.3"'),
        (
            '[tls.servers]\nclient_key = "k.pem"',
            "expected both client_certificate and client_key, got only one",
        ),
        ("[tls]\nservers = 3", "tls.servers: expected table, got 3"),
        ("[tls.servers]\nverify = 1", "tls.servers.verify: expected true or false, got 1"),
    ],
)
def test_tls_problems_are_reported(text: str, expected: str):
    assert expected in "\n".join(problems(text, FILES))


# -- settings ---------------------------------------------------------------------------------


def test_guard_origins_hosts_and_addresses_are_normalised():
    settings = read(
        '[config]\ncors_origins = ["HTTPS://App.Example:443", "http://[::1]:3000", "*"]\n'
        'allowed_hosts = ["LLM.example."]\nadmin_listen = "[::1]:8889"'
    ).settings
    assert settings.cors_origins == ("https://app.example", "http://[::1]:3000", "*")
    assert settings.allowed_hosts == ("llm.example",)
    assert settings.admin_listen == "[::1]:8889"


@pytest.mark.parametrize(
    "line",
    [
        'cors_origins = ["app.example"]',
        'cors_origins = ["https://a\\r\\nx"]',
        'allowed_hosts = ["a:1"]',
        'allowed_hosts = ["*"]',
        'admin_listen = "8889"',
        'admin_listen = "localhost"',
        'admin_listen = "a:99999"',
        'admin_listen = "http://a:1"',
        'admin_listen = "two words:1"',
        'admin_listen = "ä:1"',
        'admin_listen = "\\u0000:1"',
        "admin_listen = 8889",
        "max_bodies_mb = 63",
        "max_body_mb = 100\nmax_bodies_mb = 99",
    ],
)
def test_guard_invalid_settings_are_refused(line: str):
    assert len(problems(f"[config]\n{line}")) == 1


def test_guard_body_memory_fits_one_largest_body():
    assert read("[config]\nmax_body_mb = 2000").settings.max_bodies_mb == 2000
    assert read("[config]\nmax_body_mb = 1").settings.max_bodies_mb == 512
