"""TLS contexts for clients and for servers, and the words for files that OpenSSL cannot use."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fleet_makers import make_config
from vllm_router.config.discovery import DiscoveryConfig, HttpSource
from vllm_router.config.schema import ServerConfig
from vllm_router.config.ssl_contexts import ServerContexts, problems, serving_context
from vllm_router.config.tls import File, TlsConfig
from vllm_router.config.types import Secret
from vllm_router.errors import ConfigError

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"
ENCRYPTED = """-----BEGIN RSA PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-256-CBC,0102030405060708090A0B0C0D0E0F10

AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
-----END RSA PRIVATE KEY-----
"""


def file(path: object) -> File:
    return File(str(path), Secret("digest"))


GOOD, MISSING = file(PEM), file("/nowhere.pem")


def server(name: str = "a", scheme: str = "https", **tls: Any) -> ServerConfig:
    return ServerConfig(url=f"{scheme}://{name}.test:1", name=name, **tls)


# -- for clients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "expected"), [("1.2", ssl.TLSVersion.TLSv1_2), ("1.3", ssl.TLSVersion.TLSv1_3)]
)
def test_ssl_contexts_serving_keeps_to_the_configured_version(version, expected):
    context = serving_context(TlsConfig(certificate=GOOD, key=GOOD, min_version=version))
    assert context.minimum_version is expected
    assert context.verify_mode is ssl.CERT_NONE
    for option in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_COMPRESSION):
        assert context.options & option


def test_ssl_contexts_serving_with_client_ca_wants_a_certificate():
    context = serving_context(TlsConfig(certificate=GOOD, key=GOOD, client_ca=GOOD))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


def test_ssl_contexts_serving_names_files_that_cannot_be_used(tmp_path):
    key = tmp_path / "key.pem"
    key.write_text(ENCRYPTED)
    with pytest.raises(ConfigError) as encrypted:
        serving_context(TlsConfig(certificate=GOOD, key=file(key)))
    (problem,) = encrypted.value.problems
    assert problem == f"tls.certificate: cannot be used, the key is encrypted: {PEM} with {key}"
    with pytest.raises(ConfigError) as missing:
        serving_context(TlsConfig(certificate=GOOD, key=GOOD, client_ca=MISSING))
    (problem,) = missing.value.problems
    assert problem == "tls.client_ca: cannot be used, no such file or directory: /nowhere.pem"


def test_ssl_contexts_half_written_certificate_is_called_malformed(tmp_path):
    """OpenSSL says `[SSL] PEM lib (_ssl.c:3874)`."""
    half = tmp_path / "half.pem"
    text = PEM.read_text()
    start = text.index("-----BEGIN CERTIFICATE-----")
    half.write_text(text[start : start + 200])
    with pytest.raises(ConfigError) as caught:
        serving_context(TlsConfig(certificate=file(half), key=GOOD))
    (problem,) = caught.value.problems
    assert problem == (
        f"tls.certificate: cannot be used, malformed PEM, perhaps half written: {half} with {PEM}"
    )


# -- for servers --------------------------------------------------------------------------------


def test_ssl_contexts_servers_with_the_same_files_share_one():
    contexts = ServerContexts()
    own, other = contexts.of(server("a", ca=GOOD)), contexts.of(server("b", ca=GOOD))
    assert own is other
    assert own.verify_mode is ssl.CERT_REQUIRED
    assert own.check_hostname
    assert len(own.get_ca_certs()) == 1
    assert contexts.of(server("c", ca=GOOD, verify=False)) is not own


def test_ssl_contexts_server_without_verification_accepts_any_certificate():
    context = ServerContexts().of(server(verify=False, ca=MISSING))
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_ssl_contexts_server_without_ca_trusts_the_systems_authorities():
    context = ServerContexts().of(server())
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_ssl_contexts_http_server_reads_no_file():
    contexts = ServerContexts()
    plain = server(scheme="http", ca=MISSING)
    contexts.prepare([plain, server(ca=GOOD)])
    assert contexts.of(plain) is contexts.of(server("b", scheme="http"))
    with pytest.raises(ConfigError, match=r"server a: ca: cannot be used"):
        contexts.check(plain)


def test_ssl_contexts_client_certificate_of_the_router_is_loaded(tmp_path):
    contexts = ServerContexts()
    contexts.check(server(client_certificate=GOOD, client_key=GOOD))
    odd = tmp_path / "odd.pem"
    odd.write_text("no certificate")
    for key, label in (("client_certificate", "certificate"), ("client_key", "private key")):
        files = {"client_certificate": GOOD, "client_key": GOOD, key: file(odd)}
        with pytest.raises(ConfigError, match=rf"server a: {key}: .* no {label} in PEM: {odd}"):
            contexts.check(server(**files))


def test_ssl_contexts_problems_are_of_clients_servers_and_sources():
    config = make_config(1)
    assert problems(config) == []
    source = HttpSource(name="list", url="https://list.test/", ca=MISSING)
    config = msgspec.structs.replace(
        config,
        tls=TlsConfig(certificate=MISSING, key=GOOD),
        servers=(server("a"), server("b", "http", ca=MISSING), server("c", ca=GOOD)),
        discovery=DiscoveryConfig(sources=(source,)),
    )
    missing = "cannot be used, no such file or directory: /nowhere.pem"
    assert problems(config) == [
        (("tls.certificate",), missing, False),
        (("servers.servers[1].ca", "tls.servers.ca"), missing, False),
        (("discovery.http[0].ca", "discovery.http.ca"), missing, False),
    ]
