"""The simulated server as a program: command line, real sockets, signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error

import httpx
import pytest
from click.testing import CliRunner

from support.mock_process import MockProcess, mock_processes, restarted
from vllm_router.cli.main import cli

FAST = ("--model", "m", "--ttft", "0", "--token-delay", "0")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def mock():
    with mock_processes(1, *FAST, "--name", "one") as mocks:
        yield mocks[0]


@pytest.fixture(autouse=True)
def _unspoilt(request):
    if "mock" in request.fixturenames:
        request.getfixturevalue("mock").reset()


def exchange(mock: MockProcess, payload: bytes) -> bytes:
    """Sends raw bytes and reads until the server closes; raises the socket's errors."""
    with socket.create_connection(("127.0.0.1", mock.port), timeout=60) as connection:
        connection.sendall(payload)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-type: application/json\r\n"
    b"content-length: 40\r\n\r\n" + b'{"prompt":"x","max_tokens":8,"stream":1}'
)


def test_mock_process_answers_and_reports_its_address(mock):
    answer = mock.post(PATH, CHAT)
    assert answer["usage"]["completion_tokens"] == 3
    assert (mock.name, mock.stats()["name"], mock.stats()["total"]) == ("one", "one", 1)
    assert mock.last()["path"] == PATH


def test_mock_process_reset_differs_from_close(mock):
    mock.set(mode="reset")
    with pytest.raises(ConnectionResetError):
        exchange(mock, REQUEST)
    mock.set(mode="close")
    assert exchange(mock, REQUEST) == b""


def test_mock_process_reset_in_stream_follows_earlier_bytes(mock):
    mock.set(mode="midreset", after=2)
    with socket.create_connection(("127.0.0.1", mock.port), timeout=60) as connection:
        connection.sendall(
            REQUEST.replace(b'"stream":1', b'"stream":true').replace(b": 40", b": 43")
        )
        received = b""
        with pytest.raises(ConnectionResetError):
            while True:
                data = connection.recv(100)
                assert data
                received += data
    assert received.count(b"data: {") == 2


def test_mock_process_slow_reader_gets_everything(mock):
    body = b'{"prompt":"x","max_tokens":30000,"stream":true}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", mock.port))
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        received = bytearray()
        while data := connection.recv(65536):
            received += data
    assert received.count(b'"text":') == 30000
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_mock_process_sigterm_finishes_running_answer():
    with mock_processes(1, "--model", "m", "--token-delay", "0.05") as [mock]:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(mock.post(PATH, CHAT | {"max_tokens": 1000}))
        )
        asking.start()
        mock.wait_for(running=1)
        mock.terminate()
        asking.join(60)
        assert answers[0]["choices"][0]["finish_reason"] == "abort"
        assert mock.process.wait(60) == 0


def test_mock_process_count_serves_on_several_ports():
    with mock_processes(1, *FAST, "--count", "3", "--name", "many") as (mock,):
        urls = mock.urls(3)
        names = [httpx.get(url + "/mock/stats", trust_env=False).json()["name"] for url in urls]
        assert names == ["many-1", "many-2", "many-3"]
        httpx.post(urls[0] + PATH, json=CHAT, trust_env=False).raise_for_status()
        totals = [httpx.get(url + "/mock/stats", trust_env=False).json()["total"] for url in urls]
        assert totals == [1, 0, 0]
        mock.terminate()
        assert mock.process.wait(60) == 0


def test_mock_process_killed_refuses_and_can_reuse_port():
    with mock_processes(1, *FAST) as [mock]:
        mock.kill()
        with pytest.raises(urllib.error.URLError):
            mock.stats()
        again = restarted(mock, *FAST)
        try:
            assert (again.url, again.stats()["total"]) == (mock.url, 0)
        finally:
            again.close()


def test_mock_process_sigint_ends_at_once():
    with mock_processes(1, *FAST, "--set", '{"mode":"hang"}') as [mock]:
        with socket.create_connection(("127.0.0.1", mock.port)) as connection:
            connection.sendall(REQUEST)
            mock.process.send_signal(signal.SIGINT)
            assert mock.process.wait(60) == 0


@pytest.mark.parametrize("mode", ["die", "engine_death"])
def test_mock_process_can_die_of_a_request(mode):
    switches = json.dumps({"mode": mode, "only_body": "crash"})
    with mock_processes(1, *FAST, "--set", switches) as [mock]:
        assert httpx.post(mock.url + PATH, json=CHAT, trust_env=False).status_code == 200
        crash = CHAT | {"user": "crash"}
        if mode == "die":
            with pytest.raises(httpx.TransportError):
                httpx.post(mock.url + PATH, json=crash, trust_env=False)
        else:
            assert httpx.post(mock.url + PATH, json=crash, trust_env=False).status_code == 500
            assert httpx.get(mock.url + "/health", trust_env=False).status_code == 503
        assert mock.process.wait(60) == 0


def test_mock_process_port_in_use_is_one_line_and_exit_code_2(mock):
    ended = subprocess.run(
        [sys.executable, "-m", "vllm_router.lab.mock", "--port", str(mock.port)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.decode().splitlines() == [
        f"cannot listen on 127.0.0.1:{mock.port}: Address already in use"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--set", '{"mode":"nonsense"}'],
            ["--set", "{"],
            ["--speed", "0"],
            ["--sigterm", "maybe"],
        ),
        ["--port", "65535", "--count", "2"],
    ],
)
def test_mock_process_wrong_arguments_are_refused(arguments):
    assert CliRunner().invoke(cli, ["mock", *arguments]).exit_code == 2
