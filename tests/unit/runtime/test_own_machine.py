"""Unix sockets that prove the user on the router's machine: their places, and finding them."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vllm_router.runtime import own_machine
from vllm_router.runtime.local_listener import LocalSockets
from vllm_router.runtime.own_machine import NoDirectory, directories, find_socket, open_directory

UID = os.geteuid()


def sockets_in(directory: Path, *addresses: tuple[str, int]) -> LocalSockets:
    """Open sockets whose files are below a directory."""
    local = LocalSockets({"XDG_RUNTIME_DIR": str(directory)})
    local.open(addresses)
    return local


def found(directory: Path, url: str) -> str | None:
    return find_socket(url, {"XDG_RUNTIME_DIR": str(directory)})


def test_own_machine_socket_and_directory_are_private(tmp_path: Path):
    local = sockets_in(tmp_path, ("127.0.0.1", 8888))
    folder = tmp_path / "vllm-router"
    file = folder / "127.0.0.1:8888.sock"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(file.stat().st_mode)
    local.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "url", "is_found"),
    [
        (("127.0.0.1", 8888), "http://127.0.0.1:8888", True),
        (("127.0.0.1", 8888), "127.0.0.1:8888", False),  # no URL
        (("127.0.0.1", 8888), "http://localhost:8888/prefix", True),
        (("127.0.0.1", 8888), "https://127.0.0.1:8888", True),
        (("127.0.0.1", 8888), "http://127.0.0.2:8888", False),
        (("127.0.0.1", 8888), "http://127.0.0.1:8889", False),
        (("127.0.0.1", 80), "http://127.0.0.1", True),
        (("127.0.0.1", 443), "https://127.0.0.1", True),
        (("0.0.0.0", 8888), "http://127.0.0.1:8888", True),
        (("0.0.0.0", 8888), "http://0.0.0.0:8888", True),
        (("::", 8888), "http://127.0.0.1:8888", True),
        # Addresses of other machines do not match a local router of the same port.
        (("0.0.0.0", 8888), "http://192.0.2.1:8888", False),
        (("0.0.0.0", 8888), "http://host.invalid:8888", False),
        (("0.0.0.0", 8888), "http://[::1", False),
        (("0.0.0.0", 8888), "http://127.0.0.1:x", False),
    ],
)
def test_find_socket_matches_router_of_url_only(
    tmp_path: Path, address: tuple[str, int], url: str, is_found: bool
):
    local = sockets_in(tmp_path, address)
    assert (found(tmp_path, url) is not None) == is_found
    local.close()


def test_find_socket_of_killed_router_is_none(tmp_path: Path):
    local = sockets_in(tmp_path, ("127.0.0.1", 8888))
    for sock in local.sockets:
        sock.close()
    assert found(tmp_path, "http://127.0.0.1:8888") is None


def test_own_machine_open_removes_files_of_dead_routers_only(tmp_path: Path):
    dead = sockets_in(tmp_path, ("127.0.0.1", 1))
    dead.sockets[0].close()
    alive = sockets_in(tmp_path, ("127.0.0.1", 2))
    folder = tmp_path / "vllm-router"
    (folder / "notes").write_text("")
    next_one = sockets_in(tmp_path, ("127.0.0.1", 3))
    names = {file.name for file in folder.iterdir()}
    assert names == {"notes", "127.0.0.1:2.sock", "127.0.0.1:3.sock"}
    alive.close()
    next_one.close()


def test_own_machine_successor_keeps_socket_when_first_ends(tmp_path: Path):
    first = sockets_in(tmp_path, ("127.0.0.1", 8888))
    second = sockets_in(tmp_path, ("127.0.0.1", 8888))
    first.close()
    assert found(tmp_path, "http://127.0.0.1:8888") is not None
    second.close()
    assert found(tmp_path, "http://127.0.0.1:8888") is None


def test_own_machine_deep_directory_fits_socket_path(tmp_path: Path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    local = sockets_in(deep, ("127.0.0.1", 8888))
    assert found(deep, "http://127.0.0.1:8888") is not None
    local.close()


def test_own_machine_directory_open_to_others_is_closed(tmp_path: Path):
    (tmp_path / "vllm-router").mkdir(mode=0o755)
    local = sockets_in(tmp_path, ("127.0.0.1", 8888))
    assert stat.S_IMODE((tmp_path / "vllm-router").stat().st_mode) == 0o700
    local.close()


def test_own_machine_symlinked_directory_is_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "vllm-router").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"directory|symbolic"):
        own_machine._private(tmp_path / "vllm-router", UID)


@pytest.mark.skipif(UID != 0, reason="only root can give a directory away")
def test_own_machine_directory_of_other_user_is_not_used(tmp_path: Path):
    folder = tmp_path / "vllm-router"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError):
        own_machine._private(folder, UID)
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(PermissionError):
        own_machine._private(tmp_path / "new", UID)
    # A socket in it may be a trap, for root too, unless its owner owns the port.
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(str(folder / "127.0.0.1:8888.sock"))
        trap.listen()
        assert found(tmp_path, "http://127.0.0.1:8888") is None


def test_own_machine_without_directory_logs_attempts_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(own_machine, "directories", lambda uid, environ: [Path("/proc/none/x")])
    with pytest.raises(NoDirectory, match="/proc/none/x: No such file"):
        open_directory(UID, {})
    local = LocalSockets({})
    local.open([("127.0.0.1", 8888)])
    assert local.sockets == []
    assert "auth.admin_key" in caplog.text
    local.close()


@pytest.mark.parametrize("given", ["", "relative/path"])
def test_own_machine_relative_runtime_directory_is_ignored(given: str):
    assert directories(7, {"XDG_RUNTIME_DIR": given}) == directories(7, {})
    assert [str(one) for one in directories(7, {})] == [
        "/run/user/7/vllm-router",
        "/run/vllm-router",
        "/tmp/vllm-router-7",
    ]
