"""Hot reload: a good file is applied whole, any other changes nothing and is logged once."""

from __future__ import annotations

import builtins
import errno
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from vllm_router.config import source as source_module
from vllm_router.config.changes import changes
from vllm_router.config.reload import SETTLE_TIME, Nudge, Reload, Reloader, watch
from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.config.ssl_contexts import UnusableFile
from vllm_router.config.toml_reader import MAX_FILE_BYTES
from vllm_router.errors import ConfigError

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"

ticks = itertools.count(1_700_000_000_000_000_000, 1_000_000_000)


def toml(*names: str, **settings: object) -> str:
    servers = "".join(f'[[servers.servers]]\nurl = "http://{name}"\n' for name in names)
    return f"{servers}[config]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items())


def write(path: Path, text: str) -> None:
    """Write in place, with a new modification time: real ones change only every few ms."""
    path.write_text(text)
    tick = next(ticks)
    os.utime(path, ns=(tick, tick))


def replace(path: Path, text: str) -> None:
    """Replace atomically, as editors do."""
    fresh = path.with_suffix(".new")
    write(fresh, text)
    fresh.rename(path)


def remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


class Applied:
    """Records applied configurations; raises `fault` instead, if set."""

    def __init__(self) -> None:
        self.diffs: list[str] = []
        self.fault: Exception | None = None

    def __call__(self, old: Config, new: Config) -> None:
        if self.fault is not None:
            raise self.fault
        self.diffs.append(changes(old, new))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "servers.toml"
    write(file, toml("a"))
    return file


@pytest.fixture
def applied() -> Applied:
    return Applied()


@pytest.fixture
def reloader(path: Path, applied: Applied) -> Reloader:
    return make_reloader(path, applied)


async def inline(load: Callable[[], Config]) -> Config:
    """Replaces a thread, during which virtual time would pass."""
    return load()


def make_reloader(path: Path, applied: Applied) -> Reloader:
    source = ConfigSource(path, environ={})
    return Reloader(source, source.load(), applied, run_in_background=inline)


def names(reloader: Reloader) -> list[str]:
    return [server.name for server in reloader.current.servers]


async def test_reload_reads_the_file_in_a_thread_by_default(path: Path, applied: Applied):
    source = ConfigSource(path, environ={})
    reloader = Reloader(source, source.load(), applied)
    write(path, toml("b"))
    assert await reloader.reload(force=True) is Reload.APPLIED
    assert names(reloader) == ["b"]


# -- reading ----------------------------------------------------------------------------------


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10_000_000)


def make_nothing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_nothing, "cannot be read: No such file or directory"),
        (make_directory, "expected a file, got a directory"),
        (make_pipe, "expected a file, got a named pipe"),
        (make_device, "expected a file, got a device"),
        (make_dangling_link, "cannot be read: No such file or directory"),
        (make_link_to_itself, "cannot be read: Too many levels of symbolic links"),
        (make_huge, f"expected a file of at most {MAX_FILE_BYTES} bytes, got more"),
    ],
)
def test_config_source_special_file_is_one_line_and_never_blocks(
    tmp_path: Path, make: Callable[[Path], None], expected: str
):
    path = tmp_path / "x.toml"
    make(path)
    source = ConfigSource(path)
    source.fingerprints()
    with pytest.raises(ConfigError) as caught:
        source.load()
    assert caught.value.problems == (f"{path}: {expected}",)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "servers.toml/x", ""])
def test_config_source_impossible_path_is_one_line(path: Path, name: str):
    source = ConfigSource(f"{path.parent}/{name}")
    source.fingerprints()
    with pytest.raises(ConfigError) as caught:
        source.load()
    assert len(caught.value.problems) == 1


def test_config_source_unreadable_file_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch):
    # Tests may run as root, which no mode keeps from reading.
    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    source = ConfigSource(path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        source.load()


def test_config_source_keys_come_from_its_environment(path: Path):
    write(path, '[[servers.servers]]\nurl = "http://a"\napi_key_env = "K"\n')
    (server,) = ConfigSource(path, environ={"K": "secret"}).load().servers
    assert server.api_key == "secret"


def test_config_source_leaves_no_descriptor_open(path: Path, tmp_path: Path):
    before = set(os.listdir("/proc/self/fd"))
    ConfigSource(path).load()
    with pytest.raises(ConfigError):
        ConfigSource(tmp_path).load()
    assert set(os.listdir("/proc/self/fd")) == before


# -- deciding ---------------------------------------------------------------------------------


async def test_config_source_unchanged_file_is_not_read(
    reloader: Reloader, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reloader.source, "load", lambda: pytest.fail("read without need"))
    assert await reloader.poll() is Reload.UNCHANGED
    assert await reloader.reload(force=False) is Reload.UNCHANGED
    assert reloader.settled


async def test_reload_changed_file_is_applied_as_one_diff(
    reloader: Reloader, path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    write(path, toml("b", "c", max_retries=1))
    assert await reloader.reload(force=False) is Reload.APPLIED
    assert applied.diffs == ["+2 servers, -1, max_retries 3 → 1"]
    assert names(reloader) == ["b", "c"]
    assert (reloader.generation, reloader.applied_total, reloader.refused_total) == (2, 1, 0)
    assert caplog.messages == [f"configuration applied, {path}: +2 servers, -1, max_retries 3 → 1"]


async def test_reload_poll_waits_until_write_is_complete(
    reloader: Reloader, path: Path, applied: Applied
):
    write(path, toml("a", "b"))  # valid, but incomplete
    assert await reloader.poll() is Reload.UNCHANGED
    assert not reloader.settled
    write(path, toml("a", "b", "c"))
    assert await reloader.poll() is Reload.UNCHANGED
    assert await reloader.poll() is Reload.APPLIED
    assert reloader.settled
    assert applied.diffs == ["+2 servers"]


async def test_reload_change_reverted_in_time_is_ignored(reloader: Reloader, path: Path):
    aside = path.with_suffix(".aside")
    path.rename(aside)
    assert await reloader.poll() is Reload.UNCHANGED
    aside.rename(path)
    for _ in range(3):
        assert await reloader.poll() is Reload.UNCHANGED
    assert (reloader.refused_total, reloader.last_error) == (0, None)


async def test_reload_comment_changes_nothing(reloader: Reloader, path: Path, applied: Applied):
    write(path, toml("a") + "# a remark\n")
    assert await reloader.reload(force=False) is Reload.UNCHANGED
    assert (applied.diffs, reloader.generation) == ([], 1)


async def test_reload_bad_file_keeps_configuration_and_is_logged_once(
    reloader: Reloader, path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
):
    write(path, toml("b", max_retrys=1))
    results = [await reloader.poll() for _ in range(10)]
    assert results.count(Reload.REFUSED) == reloader.refused_total == 1
    assert names(reloader) == ["a"]
    assert (applied.diffs, reloader.generation) == ([], 1)
    problem = reloader.last_error
    assert problem is not None
    assert re.fullmatch(
        rf"{re.escape(str(path))}:\d+:1: config\.max_retrys: unknown key "
        r'"max_retrys", did you mean "max_retries"\?',
        problem,
    )
    (message,) = caplog.messages
    assert message == f"configuration refused, keeping the current one: {problem}"


async def test_reload_log_line_of_very_bad_file_is_short(
    reloader: Reloader, path: Path, caplog: pytest.LogCaptureFixture
):
    write(path, toml("a", **{f"k{n}": 1 for n in range(50)}))
    assert await reloader.reload(force=False) is Reload.REFUSED
    (message,) = caplog.messages
    assert message.endswith("; and 45 more")
    assert reloader.last_error is not None
    assert len(reloader.last_error.splitlines()) == 50


async def test_reload_each_bad_file_is_counted(reloader: Reloader, path: Path):
    for n in range(1, 4):
        write(path, "broken " * n)
        assert await reloader.reload(force=False) is Reload.REFUSED
        assert reloader.refused_total == n


async def test_reload_repaired_file_clears_error(reloader: Reloader, path: Path, applied: Applied):
    write(path, "broken")
    await reloader.reload(force=False)
    write(path, toml("a"))
    assert await reloader.reload(force=False) is Reload.UNCHANGED
    assert reloader.last_error is None
    write(path, "broken")
    await reloader.reload(force=False)
    write(path, toml("a", "b"))
    assert await reloader.reload(force=False) is Reload.APPLIED
    assert reloader.last_error is None
    assert applied.diffs == ["+1 server"]


async def test_reload_vanished_file_is_reported_and_may_return(reloader: Reloader, path: Path):
    path.unlink()
    assert [await reloader.poll() for _ in range(3)].count(Reload.REFUSED) == 1
    assert reloader.last_error == f"{path}: cannot be read: No such file or directory"
    assert names(reloader) == ["a"]
    write(path, toml("a"))
    assert [await reloader.poll() for _ in range(3)] == [Reload.UNCHANGED] * 3
    assert reloader.last_error is None


async def test_reload_atomic_replacement_is_detected(reloader: Reloader, path: Path):
    replace(path, toml("b"))
    assert await reloader.reload(force=False) is Reload.APPLIED
    assert names(reloader) == ["b"]


async def test_reload_new_file_of_same_size_and_time_is_detected(reloader: Reloader, path: Path):
    stamp = path.stat().st_mtime_ns
    replace(path, toml("b"))
    os.utime(path, ns=(stamp, stamp))
    assert await reloader.reload(force=False) is Reload.APPLIED


def test_reload_file_made_readable_is_read(reloader: Reloader, path: Path):
    """A change of mode leaves size and modification time as they were."""
    before = reloader.source.fingerprints()
    for _ in range(1_000_000):  # wait for the next tick of the file system's clock, some ms
        path.chmod(0o600)
        if reloader.source.fingerprints() != before:
            return
    pytest.fail("a change of mode is not seen")


async def test_reload_symlink_swap_of_kubernetes_config_map_is_detected(
    tmp_path: Path, applied: Applied
):
    for version, server in (("v1", "a"), ("v2", "b")):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "servers.toml", toml(server))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "servers.toml").symlink_to("..data/servers.toml")
    reloader = make_reloader(tmp_path / "servers.toml", applied)

    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert [await reloader.poll(), await reloader.poll()] == [Reload.UNCHANGED, Reload.APPLIED]
    assert names(reloader) == ["b"]


async def test_reload_change_between_load_and_watch_is_detected(path: Path, applied: Applied):
    source = ConfigSource(path)
    current = source.load()
    write(path, toml("b"))
    assert (
        await Reloader(source, current, applied, run_in_background=inline).reload(force=False)
        is Reload.APPLIED
    )


async def test_reload_forced_reads_unchanged_file(
    path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    environ = {"K": "old"}
    write(path, '[[servers.servers]]\nurl = "http://a"\napi_key_env = "K"\n')
    source = ConfigSource(path, environ)
    reloader = Reloader(source, source.load(), applied, run_in_background=inline)
    assert await reloader.reload(force=True) is Reload.UNCHANGED
    environ["K"] = "new"
    assert await reloader.reload(force=False) is Reload.UNCHANGED
    assert await reloader.reload(force=True) is Reload.APPLIED
    assert caplog.messages == [
        f"configuration unchanged after a reload of {path}",
        f"configuration applied, {path}: a api_key changed",
    ]


async def test_reload_forced_does_not_wait_for_settling(reloader: Reloader, path: Path):
    write(path, toml("b"))
    assert await reloader.reload(force=True) is Reload.APPLIED
    assert reloader.settled


async def test_reload_refused_by_applier_keeps_configuration(
    reloader: Reloader, path: Path, applied: Applied
):
    applied.fault = ConfigError(["no"])
    write(path, toml("b"))
    assert await reloader.reload(force=False) is Reload.REFUSED
    assert reloader.last_error == "no"
    assert names(reloader) == ["a"]


async def test_reload_defect_in_applier_is_logged_and_survived(
    reloader: Reloader, path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
):
    applied.fault = RuntimeError("defect")
    write(path, toml("b"))
    assert await reloader.reload(force=False) is Reload.REFUSED
    assert "RuntimeError: defect" in caplog.text
    assert names(reloader) == ["a"]
    applied.fault = None
    assert await reloader.reload(force=True) is Reload.APPLIED
    assert reloader.last_error is None


@contextmanager
def no_descriptors_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with EMFILE: `stat` works, no file can be opened."""

    def refuse(*args: object, **options: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(builtins, "open", refuse)
        yield


async def test_reload_file_that_was_unreadable_for_a_moment_is_read_without_a_change(
    reloader: Reloader,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    write(path, toml("b"))
    with no_descriptors_left(monkeypatch):
        polls = [await reloader.poll() for _ in range(5)]
    assert polls.count(Reload.REFUSED) == reloader.refused_total == 1
    assert reloader.last_error == f"{path}: cannot be read: Too many open files"
    assert len(caplog.messages) == 1, "logged once, however often it is tried"
    assert await reloader.poll() is Reload.APPLIED
    assert names(reloader) == ["b"]
    assert reloader.last_error is None


async def test_reload_file_of_another_user_is_not_read_every_second(
    reloader: Reloader, path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A change of its owner or mode changes the fingerprint."""

    def refuse(*args: object, **options: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    write(path, toml("b"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert await reloader.reload(force=False) is Reload.REFUSED
    assert [await reloader.poll() for _ in range(3)] == [Reload.UNCHANGED] * 3


async def test_reload_certificate_that_was_unreadable_for_a_moment_is_read_without_a_change(
    reloader: Reloader, path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(path, f'{toml("b")}[tls]\ncertificate = "{PEM}"\nkey = "{PEM}"\n')
    real = builtins.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).endswith(".pem"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        assert await reloader.reload(force=False) is Reload.REFUSED
    assert [await reloader.poll() for _ in range(2)] == [Reload.UNCHANGED, Reload.APPLIED]


async def test_reload_emptied_certificate_is_not_said_to_hold_keys(
    reloader: Reloader, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A writer that truncates the file first leaves it empty for a moment."""
    certificate = tmp_path / "cert.pem"
    certificate.touch(0o644)
    write(path, f'{toml("b")}[tls]\ncertificate = "{certificate}"\nkey = "{certificate}"\n')
    assert await reloader.reload(force=False) is Reload.REFUSED
    assert "holds keys" not in caplog.text


async def test_reload_server_whose_certificate_was_unreadable_for_a_moment_is_applied(
    reloader: Reloader, path: Path, applied: Applied
):
    """The files are read once more when the new servers are prepared."""
    applied.fault = UnusableFile("server b: ", "ca", "too many open files: ca.pem", passing=True)
    write(path, toml("b"))
    assert await reloader.reload(force=False) is Reload.REFUSED
    assert await reloader.poll() is Reload.UNCHANGED
    assert reloader.refused_total == 1
    applied.fault = None
    assert await reloader.poll() is Reload.APPLIED


async def test_reload_file_changed_between_two_reads_of_it_is_read_again(
    tmp_path: Path, applied: Applied, monkeypatch: pytest.MonkeyPatch
):
    """Two servers with one authority: the first one must not keep the digest of the old file."""
    authority = tmp_path / "ca.pem"
    write(authority, PEM.read_text())
    path = tmp_path / "servers.toml"
    one = '[[servers.servers]]\nurl = "https://{}"\nca = "ca.pem"\n'
    write(path, one.format("a") + one.format("b"))
    reads = itertools.count()
    real = source_module._read

    def read_and_change(name: str | Path) -> bytes:
        data = real(name)
        if str(name) == str(authority) and next(reads) == 0:
            write(authority, PEM.read_text() + "\n")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(source_module, "_read", read_and_change)
        reloader = make_reloader(path, applied)
    assert await reloader.reload(force=False) is Reload.APPLIED
    first, second = reloader.current.servers
    assert first.ca == second.ca


# -- acting -----------------------------------------------------------------------------------


async def test_watch_applies_change_within_interval_and_settling_time(
    reloader: Reloader, path: Path, nursery: trio.Nursery, autojump_clock: MockClock
):
    nursery.start_soon(watch, reloader, Nudge())
    await trio.sleep(10.5)
    write(path, toml("b"))
    await trio.sleep(1 + SETTLE_TIME)
    assert names(reloader) == ["b"]


async def test_watch_follows_changed_interval(
    reloader: Reloader, path: Path, nursery: trio.Nursery, autojump_clock: MockClock
):
    nursery.start_soon(watch, reloader, Nudge())
    write(path, toml("a", config_reload_interval=60))
    await trio.sleep(2)
    assert reloader.generation == 2
    write(path, toml("b", config_reload_interval=1))
    await trio.sleep(50)
    assert names(reloader) == ["a"]
    await trio.sleep(20)
    assert names(reloader) == ["b"]


async def test_watch_nudges_cause_one_read_even_of_unchanged_file(
    path: Path,
    applied: Applied,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    write(path, toml("a", config_reload_interval=3600))
    reloader = make_reloader(path, applied)
    nudge = Nudge()
    nursery.start_soon(watch, reloader, nudge)
    await trio.sleep(1)
    nudge()
    nudge()
    await trio.sleep(0.01)
    assert caplog.messages == [f"configuration unchanged after a reload of {path}"]
    write(path, toml("b"))
    nudge()
    await trio.sleep(0.01)
    assert names(reloader) == ["b"]


async def test_watch_nudge_before_first_wait_is_kept(
    reloader: Reloader, path: Path, nursery: trio.Nursery, autojump_clock: MockClock
):
    nudge = Nudge()
    write(path, toml("b"))
    nudge()
    nursery.start_soon(watch, reloader, nudge)
    await trio.sleep(0.01)
    assert names(reloader) == ["b"]


async def test_watch_survives_every_kind_of_broken_file(
    reloader: Reloader, path: Path, nursery: trio.Nursery, autojump_clock: MockClock
):
    nursery.start_soon(watch, reloader, Nudge())
    for n, (make, _) in enumerate(
        [
            (make_nothing, 0),
            (make_directory, 0),
            (make_pipe, 0),
            (make_dangling_link, 0),
            (make_link_to_itself, 0),
            (make_huge, 0),
            (lambda p: write(p, ""), 0),
            (lambda p: p.write_bytes(toml("b").encode("utf-16")), 0),
            (lambda p: write(p, toml("b")[:-20]), 0),
        ]
    ):
        remove(path)
        make(path)
        await trio.sleep(2)
        assert names(reloader) == ["a"]
        assert reloader.refused_total == n + 1
    remove(path)
    write(path, toml("b"))
    await trio.sleep(2)
    assert names(reloader) == ["b"]
    assert reloader.last_error is None
