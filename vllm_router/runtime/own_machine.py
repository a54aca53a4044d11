"""The Unix socket that proves that a client is on the router's own machine.

Each router listens on one Unix socket per TCP address, in a directory that only its user can enter.
The kernel reports the user of the process at the other end (SO_PEERCRED). A proxy or a port forward
that reaches the TCP port has no such proof.

This module has the paths, and the search for a router by commands; `local_listener` serves.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from vllm_router.errors import RouterError

FOLDER = "vllm-router"
SUFFIX = ".sock"

ROOT = 0

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user and group id

_NO_CONNECTION_S = 2.0
"""Seconds for a local connection, which the kernel completes without delay."""


class NoDirectory(RouterError):
    """No candidate directory is private to this user."""


def directories(uid: int, environ: Mapping[str, str]) -> list[Path]:
    """The candidate directories for the sockets of a user's routers, in order of preference."""
    found = []
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        found.append(Path(runtime, FOLDER))
    found += [Path(f"/run/user/{uid}", FOLDER), Path("/run", FOLDER), Path(f"/tmp/{FOLDER}-{uid}")]
    return list(dict.fromkeys(found))


def open_directory(uid: int, environ: Mapping[str, str]) -> tuple[int, Path]:
    """Open the first private directory, creating it if necessary; the caller closes the descriptor.

    Raises NoDirectory.
    """
    problems = []
    for path in directories(uid, environ):
        try:
            return _private(path, uid), path
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    raise NoDirectory("; ".join(problems))


def _private(path: Path, uid: int) -> int:
    """Open a directory that only this user can enter, creating it if necessary. Raises OSError."""
    above = path.parent.stat()
    if above.st_uid not in (uid, ROOT):
        raise PermissionError(0, "its parent directory belongs to another user")
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if found.st_uid != uid:
            raise PermissionError(0, "it belongs to another user")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(directory, 0o700)  # systemd's RuntimeDirectory has mode 0755
        if not os.access(path, os.W_OK):
            raise PermissionError(0, "it cannot be written")
    except BaseException:
        os.close(directory)
        raise
    return directory


def socket_name(address: tuple[str, int]) -> str:
    """The file name of the socket for a TCP address."""
    host, port = address
    return f"{host}:{port}{SUFFIX}"


def path_in(directory: int, name: str) -> str:
    """A path that fits into a Unix socket address (107 bytes), however deep the directory is."""
    return f"/proc/self/fd/{directory}/{name}"


def user_of(sock: socket.socket) -> int:
    """The user id of the process that connected, or listened, at the other end (unix(7))."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(data)
    return int(uid)


# -- for the commands -------------------------------------------------------------------------


def find_socket(url: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The path of the Unix socket of the router at `url`; None if this user has no access to one.

    The caller's own directories cannot contain another user's socket. Root searches the directories
    of all users, and accepts a socket only if its owner also owns the TCP port.
    """
    names = _names(url)
    if not names:
        return None
    uid = os.geteuid()
    places = directories(uid, environ)
    if uid == ROOT:
        places += [Path(one, FOLDER) for one in sorted(Path("/run/user").glob("*"))]
        places += sorted(Path("/tmp").glob(f"{FOLDER}-*"))
    for place in dict.fromkeys(places):
        for name in names:
            if _answers(place, name, uid):
                return str(place / name)
    return None


def _answers(place: Path, name: str, uid: int) -> bool:
    """True if a router of this user listens there; for root: a router of the owner of its port."""
    with contextlib.suppress(OSError), _entered(place) as directory:
        owner = os.fstat(directory).st_uid
        if owner != uid and uid != ROOT:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_NO_CONNECTION_S)
            sock.connect(path_in(directory, name))
            listener = user_of(sock)
        if listener != owner:
            return False
        port = int(name.removesuffix(SUFFIX).rpartition(":")[2])
        return owner == uid or _owners_of_port(port) == {owner}
    return False


@contextlib.contextmanager
def _entered(place: Path) -> Iterator[int]:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A path of the same socket that is short enough, valid within the block. Raises OSError."""
    place = Path(path)
    with _entered(place.parent) as directory:
        yield path_in(directory, place.name)


def _names(url: str) -> list[str]:
    """The candidate socket names for a URL; empty unless the URL points to this machine."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme in ("https", "wss") else 80)
        host = parts.hostname or ""
    except ValueError:
        return []
    hosts = [address for address in _addresses(host, port) if _is_own(address)]
    wildcards = ["0.0.0.0", "::"] if hosts else []
    return [socket_name((one, port)) for one in dict.fromkeys([*hosts, *wildcards])]


def _addresses(host: str, port: int) -> list[str]:
    if host == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]


def _is_own(address: str) -> bool:
    """True for an address of this machine: only such addresses can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def _owners_of_port(port: int) -> set[int]:
    """The users whose processes listen at a TCP port of this machine (proc(5), /proc/net/tcp)."""
    owners = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                owners.add(int(words[7]))
    return owners
