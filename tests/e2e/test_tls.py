"""TLS to clients and to servers, with real certificates, at real ports."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.certificates import Authority
from support.cli_process import call
from support.mock_process import mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from vllm_router.cli.alive import alive


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other")


def trusting(authority: Authority, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


# -- to clients -------------------------------------------------------------------------------


@contextlib.contextmanager
def secure_router(
    urls: list[str], directory: Path, tls: str, *arguments: str, **settings: Any
) -> Iterator[RouterProcess]:
    """A router with an admin listener, which shows when it is ready."""
    config = servers_toml(urls, admin_listen="127.0.0.1:0", **settings)
    file = directory / "servers.toml"
    file.write_text(f"{config}[tls]\n{tls}")
    router = RouterProcess(file, *arguments)
    try:

        def listening() -> bool:
            assert router.process.poll() is None, router.text
            # One is printed, the other logged by its own thread.
            return " on https://" in router.text and "administration on" in router.text

        until(listening, "the router")
        found = re.search(r"administration on (http://\S+)", router.text)
        assert found is not None
        router.url = found[1]
        until(lambda: router.get("/readyz").status_code == 200, "readiness")
        yield router
        assert "Traceback" not in router.text, router.text
    finally:
        router.close()


def address(router: RouterProcess) -> str:
    found = re.search(r" on (https://[^,\s]+),", router.text)
    assert found is not None
    return found[1]


def ask(router: RouterProcess, context: ssl.SSLContext) -> httpx.Response:
    with httpx.Client(verify=context, trust_env=False, timeout=60) as client:
        return client.post(f"{address(router)}/v1/chat/completions", json=chat())


def serial(router: RouterProcess, context: ssl.SSLContext) -> str:
    """The serial number of the certificate in use."""
    port = int(address(router).rsplit(":", 1)[1])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as secure,
    ):
        shown: Any = secure.getpeercert()
        return str(shown["serialNumber"])


@pytest.mark.parametrize("client_ca", [False, True])
def test_tls_container_check_finds_router_alive(
    tmp_path: Path, authority: Authority, client_ca: bool, monkeypatch: pytest.MonkeyPatch
):
    certificate, key = authority.sign("checked")
    tls = f'certificate = "{certificate}"\nkey = "{key}"\n'
    tls += f'client_ca = "{authority.file}"\n' if client_ca else ""
    with secure_router(["http://127.0.0.1:9"], tmp_path, tls) as router:
        port = int(address(router).rsplit(":", 1)[1])
        with monkeypatch.context() as patient:
            patient.setattr("vllm_router.cli.alive.TIMEOUT", 60.0)
            assert alive("127.0.0.1", port)
            assert alive("127.0.0.1", router.port)  # administration, in plain HTTP
        router.signal(signal.SIGSTOP)
        assert not alive("127.0.0.1", port)
        router.signal(signal.SIGCONT)
    assert not alive("127.0.0.1", port)


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
def test_tls_both_fronts_refuse_plain_http(
    tmp_path: Path, authority: Authority, front: str, monkeypatch: pytest.MonkeyPatch
):
    certificate, key = authority.sign(f"router-{front}")
    tls = f'certificate = "{certificate}"\nkey = "{key}"\nmin_version = "1.3"\n'
    context = trusting(authority)
    with (
        mock_processes(1, "--model", "m") as (mock,),
        secure_router([mock.url], tmp_path, tls, "--front", front) as router,
    ):
        answer = ask(router, context)
        assert answer.status_code == 200
        assert dict(mock.last()["headers"])["x-forwarded-proto"] == "https"
        with httpx.Client(verify=context, trust_env=False) as client:
            assert client.get(f"{address(router)}/v1/models").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(address(router).replace("https", "http") + "/livez", trust_env=False)
        old = trusting(authority)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.ConnectError):
            ask(router, old)
        # The listener on loopback speaks both.
        assert router.get("/livez").status_code == 200
        with httpx.Client(verify=context, trust_env=False) as client:
            secure = router.url.replace("http:", "https:")
            assert client.get(f"{secure}/metrics").status_code == 200
            assert call("status", secure, "--ca", str(authority.file)).returncode == 0
            assert call("status", secure).returncode == 0, "by the router's own socket"
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
            refused = call("status", secure)
            assert refused.returncode == 2
            assert "certificate" in refused.stderr.lower()


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_tls_second_signal_answers_waiting_requests(
    tmp_path: Path, authority: Authority, http2: bool
):
    """The connections were cut before the last messages had left."""
    certificate, key = authority.sign("stopping")
    tls = f'certificate = "{certificate}"\nkey = "{key}"\n'
    answers: list[httpx.Response] = []
    with (
        mock_processes(1, "--model", "m", "--ttft", "600") as (mock,),
        secure_router([mock.url], tmp_path, tls, drain_timeout=300) as router,
        httpx.Client(
            verify=trusting(authority), trust_env=False, timeout=60, http2=http2
        ) as client,
    ):

        def wait() -> None:
            answers.append(client.post(f"{address(router)}/v1/chat/completions", json=chat()))

        threads = [threading.Thread(target=wait) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: mock.stats()["running"] == len(threads), "the requests")
        router.signal(signal.SIGINT)
        until(lambda: "draining" in router.text, "the drain")
        router.signal(signal.SIGINT)
        for thread in threads:
            thread.join(60)
        assert router.process.wait(60) == 0
    codes = {(one.status_code, one.json()["error"]["code"]) for one in answers}
    assert (len(answers), codes) == (len(threads), {(503, "router_stopping")})


def test_tls_renewed_certificate_is_used_without_restart(tmp_path: Path, authority: Authority):
    certificate, key = authority.sign("renewed")
    tls = f'certificate = "{certificate}"\nkey = "{key}"\n'
    context = trusting(authority)
    with (
        mock_processes(1, "--model", "m") as (mock,),
        secure_router([mock.url], tmp_path, tls) as router,
        httpx.Client(verify=context, trust_env=False, timeout=60) as kept,
    ):
        before = serial(router, context)
        assert kept.get(f"{address(router)}/livez").status_code == 200
        authority.sign("renewed")
        until(lambda: serial(router, context) != before, "the new certificate")
        until(lambda: "tls certificate changed" in router.text, "the log line")
        assert kept.get(f"{address(router)}/livez").status_code == 200
        renewed = serial(router, context)
        certificate.write_text("no certificate")
        until(lambda: "configuration refused" in router.text, "the refusal")
        router.wait_for_text("tls.certificate: cannot be used")
        assert serial(router, context) == renewed


def test_tls_clients_without_certificate_are_refused(
    tmp_path: Path, authority: Authority, stranger: Authority
):
    certificate, key = authority.sign("mutual")
    tls = f'certificate = "{certificate}"\nkey = "{key}"\nclient_ca = "{stranger.file}"\n'
    with (
        mock_processes(1, "--model", "m") as (mock,),
        secure_router([mock.url], tmp_path, tls) as router,
    ):
        for pair in (None, authority.sign("client-of-the-wrong-one")):
            with pytest.raises(httpx.TransportError):
                ask(router, trusting(authority, pair))
        assert ask(router, trusting(authority, stranger.sign("client"))).status_code == 200
        assert not mock.log("/v1/chat/completions")[1:]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda pair, other: (pair[0], other[1]), "tls.certificate: cannot be used, key values"),
        (lambda pair, other: (pair[1], pair[1]), "tls.certificate: cannot be used"),
        (lambda pair, other: (pair[0], Path("none.key")), "none.key: cannot be read"),
    ],
    ids=["another's key", "no certificate", "no file"],
)
def test_tls_mismatched_files_are_named_before_start(
    tmp_path: Path, authority: Authority, make: Any, expected: str
):
    certificate, key = make(authority.sign("one"), authority.sign("two"))
    config = tmp_path / "servers.toml"
    config.write_text(
        servers_toml(["http://a.test"]) + f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'
    )
    done = call("check-config", "--config", str(config))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert expected in lines[0]
    assert len(lines) == 3, "the problem, the line of the key that names the file, and a mark"


# -- to servers -------------------------------------------------------------------------------


class TlsInFront:
    """A TLS port before a plain server; records the certificate of each client."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._target, self._context = port, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self._listener.getsockname()[1]}"
        self.names: set[str] = set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as open_ones:
            open_ones.enter_context(sock)
            sock.settimeout(60)
            secure = open_ones.enter_context(self._context.wrap_socket(sock, server_side=True))
            shown: Any = secure.getpeercert()
            if shown:
                self.names.add(shown["subject"][0][0][1])
            server = open_ones.enter_context(
                socket.create_connection(("127.0.0.1", self._target), timeout=60)
            )
            back = threading.Thread(target=_copy, args=(server, secure), daemon=True)
            back.start()
            _copy(secure, server)
            back.join(60)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def secure_server(authority: Authority, stranger: Authority) -> Iterator[TlsInFront]:
    """A server that requires a certificate of the other authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.sign("server"))
    context.load_verify_locations(stranger.file)
    context.verify_mode = ssl.CERT_REQUIRED
    with mock_processes(1, "--model", "m") as (mock,):
        front = TlsInFront(mock.port, context)
        try:
            yield front
        finally:
            front.close()


def test_tls_server_is_verified_and_gets_client_certificate(
    tmp_path: Path, authority: Authority, stranger: Authority, secure_server: TlsInFront
):
    certificate, key = stranger.sign("the-router")
    common = f'ca = "{authority.file}"\nclient_certificate = "{certificate}"\nclient_key = "{key}"'
    config = servers_toml([secure_server.url]) + f"[tls.servers]\n{common}\n"
    with router_process(config, tmp_path) as router:
        until(lambda: router.state(secure_server.url) == "up", "the probes")
        answer = router.post("/v1/chat/completions", chat())
        assert answer.status_code == 200, answer.text
        assert secure_server.names == {"the-router"}
        done = call("check-config", "--probe", "--config", str(tmp_path / "servers.toml"))
        assert done.returncode == 0, done.stdout + done.stderr
        # The renewed certificate is used for new connections and probes.
        stranger.sign("the-router")
        until(lambda: "client_certificate changed" in router.text, "the reload")
        assert router.post("/v1/chat/completions", chat()).status_code == 200


@pytest.mark.parametrize(
    ("keys", "up"),
    [
        ("", False),
        ('ca = "{other}"', False),
        ('ca = "{ca}"', False),
        ('ca = "{ca}"\nclient_certificate = "{pair[0]}"\nclient_key = "{pair[1]}"', True),
        ('verify = false\nclient_certificate = "{pair[0]}"\nclient_key = "{pair[1]}"', True),
    ],
    ids=["system's authorities", "wrong authority", "no certificate", "right", "unverified"],
)
def test_tls_untrusted_server_gets_no_request(
    tmp_path: Path,
    authority: Authority,
    stranger: Authority,
    secure_server: TlsInFront,
    keys: str,
    up: bool,
):
    text = keys.format(ca=authority.file, other=stranger.file, pair=stranger.sign("router"))
    config = f'[[servers.servers]]\nurl = "{secure_server.url}"\n{text}\n'
    config += servers_toml([]).partition("]\n[config]")[2].join(["[config]", ""])
    with router_process(config, tmp_path) as router:
        state = "up" if up else "down"
        until(lambda: router.state(secure_server.url) == state, state)
        answer = router.post("/v1/chat/completions", chat())
        assert answer.status_code == (200 if up else 503)
