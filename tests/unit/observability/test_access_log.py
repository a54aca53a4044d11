"""The access log: one line per exchange; no line is lost, forged or waited for."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.proxy_harness import lab
from support.scripted_server import DONE, answering, event, ok, streaming
from support.web_harness import make_record
from vllm_router.config.log import LogSettings
from vllm_router.lab.simulate.replay import read_log
from vllm_router.observability import access_log
from vllm_router.observability import background_writer as gatherer
from vllm_router.observability import line_writer as log_writer
from vllm_router.observability.access_log import AccessLog, Ended, fields, json_line, text_line
from vllm_router.observability.line_writer import FileTarget, LineWriter, StreamTarget
from vllm_router.observability.log_output import LogOutput, Overrides
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.prompt.body_reader import read_routing_info
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.prompt.session import session_hint

FORGED = "m\n2026-01-01T00:00:00.000Z INFO    access: GET /\x1b[2K\u2028 x=1"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is global: restore the previous set-up."""
    root, ours = logging.getLogger(), logging.getLogger("vllm_router")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(record: Record, info: RoutingInfo | None = None) -> Ended:
    return Ended(1_000_000.0, record, info)


# -- contents of a line -------------------------------------------------------------------------


def test_access_log_json_line_has_facts_of_exchange():
    record = make_record(
        50.0,
        retries=[Outcome.CONNECT_FAILED],
        attempts=2,
        prompt_tokens=12,
        cached_tokens=8,
        completion_tokens=30,
    )
    assert json.loads(json_line(ended(record))) == {
        "time": "1970-01-12T13:46:40.000Z",
        "level": "info",
        "logger": "vllm_router.access",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "answered",
        "model": "m",
        "stream": True,
        "attempts": 2,
        "retries": ["connect_failed"],
        "ttft": 0.1,
        "started": "1970-01-12T13:46:39.000Z",
        "duration": 1.0,
        "bytes_in": 100,
        "bytes_out": 1000,
        "chunks": 10,
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "completion_tokens": 30,
        "client": "192.0.2.7",
        "request_id": "id-1",
    }


def test_access_log_text_line_is_readable():
    record = make_record(50.0, retries=[Outcome.CONNECTION_LOST, Outcome.FULL], prompt_tokens=12)
    assert text_line(ended(record)) == (
        "1970-01-12T13:46:40.000Z INFO    access: POST /v1/chat/completions 200 answered model=m "
        "stream=yes attempts=0 retries=lost,full ttft=0.100 "
        "started=1970-01-12T13:46:39.000Z duration=1.000 bytes_in=100 bytes_out=1000 "
        "prompt_tokens=12 client=192.0.2.7 request_id=id-1"
    )


def test_access_log_text_line_has_fields_except_chunks_and_prefix():
    record = make_record(
        50.0,
        retries=[Outcome.CONNECTION_LOST],
        attempts=2,
        code="c",
        served_model="served",
        policy="adaptive",
        waited=0.5,
        prompt_tokens=12,
        cached_tokens=8,
        completion_tokens=30,
    )
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    info = read_routing_info(
        b"/v1/chat/completions",
        b"application/json",
        body,
        session_hint({b"x-session-id": b"session-1"}),
        with_prompt=True,
    )
    whole = Ended(1_000_000.0, record, info, "trace")
    written = [pair.partition("=")[0] for pair in text_line(whole).split() if "=" in pair]
    in_front = {"time", "level", "logger", "method", "path", "status", "outcome"}
    assert written == [key for key in fields(whole) if key not in in_front | {"chunks", "prefix"}]


def test_access_log_failed_exchange_is_warning_with_code():
    record = make_record(50.0, status=502, code="server_error", outcome=Outcome.SERVER_ERROR)
    values = fields(ended(record))
    assert (values["level"], values["outcome"], values["code"]) == (
        "warning",
        "server_error",
        "server_error",
    )


@pytest.mark.parametrize("make", [json_line, text_line])
def test_access_log_client_text_forges_no_line_or_field(make: Callable[[Ended], str]):
    record = make_record(50.0, model=FORGED, path=b"/v1/\xff\x85x", request_id=b"id")
    line = make(ended(record))
    assert line.isprintable()
    assert "\n" not in line
    if make is text_line:
        assert " x=1" in line.split('model="')[1].split('"')[0]


@pytest.mark.parametrize("make", [json_line, text_line])
def test_access_log_long_names_are_shortened(make: Callable[[Ended], str]):
    record = make_record(50.0, model="m" * 100_000, path=b"/" * 100_000)
    assert len(make(ended(record))) < 1500


def test_access_log_users_are_distinguished_but_anonymous():
    def session(name: str) -> str:
        return fields(ended(make_record(50.0), RoutingInfo(session=name)))["session"]

    assert session("ann@example.org") == session("ann@example.org") != session("bob@example.org")
    assert "ann" not in session("ann@example.org")


# -- fields of an exchange ----------------------------------------------------------------------


class Kept(LineWriter):
    """Formats the lines at once."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def put(self, entry: Any) -> None:
        make, of = entry
        self.lines.append(json.loads(make(of)))


def listen(rig: Any, *, prompts: bool = False) -> list[dict[str, Any]]:
    """The access lines of a proxy, in order."""
    kept = Kept()
    log = AccessLog()
    log.writer, log.form = kept, "json"
    rig.context.recorder.recorders += (log,)
    rig.context.wants_prompt = prompts
    return kept.lines


USAGE = b'"usage":{"prompt_tokens":12,"total_tokens":42,"completion_tokens":30}'


async def test_access_log_tokens_equal_usage_of_response(autojump_clock):
    async with lab(answering(ok(b'{"id":"x",' + USAGE + b"}"))) as rig:
        lines = listen(rig)
        await rig.post({"model": "m"})
    (line,) = lines
    assert (line["prompt_tokens"], line["completion_tokens"]) == (12, 30)
    assert "cached_tokens" not in line


async def test_access_log_tokens_of_stream_equal_last_usage(autojump_clock):
    last = b'data: {"choices":[],' + USAGE + b"}\n\n"
    async with lab(streaming(event("hi"), last, DONE)) as rig:
        lines = listen(rig)
        await rig.stream()
    (line,) = lines
    assert (line["prompt_tokens"], line["completion_tokens"]) == (12, 30)


async def test_access_log_response_without_usage_has_no_tokens(autojump_clock):
    async with lab(streaming(event("hi"), DONE)) as rig:
        lines = listen(rig)
        await rig.stream()
    assert "prompt_tokens" not in lines[0]


async def test_access_log_contains_neither_prompt_nor_key(autojump_clock):
    async with lab(answering(ok(b'{"text":"SECRET-answer"}'))) as rig:
        lines = listen(rig, prompts=True)
        await rig.post(
            {"model": "m", "messages": [{"role": "user", "content": "SECRET " * 1000}]},
            headers=(
                (b"authorization", b"Bearer SECRET"),
                (b"content-type", b"application/json"),
                (b"cookie", b"SECRET"),
            ),
            query=b"api_key=SECRET",
        )
    assert "SECRET" not in json.dumps(lines)
    assert lines[0]["prompt_bytes"] > 7000


async def test_access_log_with_prompts_can_be_replayed(autojump_clock):
    async with lab(answering(ok(b"{" + USAGE + b"}"))) as rig:
        lines = listen(rig, prompts=True)
        for number in range(2):
            text = f"{'shared ' * 1000}{number}"
            await rig.post({"model": "m", "messages": [{"role": "user", "content": text}]})
    first, second = read_log([json.dumps(line).encode() for line in lines])
    assert next(first.turns).output == 30
    assert first.text.chain(1000) == second.text.chain(1000)


async def test_access_log_prompts_are_not_kept_in_records(autojump_clock):
    async with lab(answering(ok(b"{}"))) as rig:
        rig.context.wants_prompt = True
        await rig.post({"model": "m", "messages": [{"role": "user", "content": "x" * 9000}]})
        assert rig.recorder.last.info is None


# -- the writer ---------------------------------------------------------------------------------


class Target:
    """Accepts writes while `open` is set."""

    name = "target"

    def __init__(self) -> None:
        self.text = ""
        self.writes = 0
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | None = None

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def write(self, text: str) -> None:
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.text += text
        self.writes += 1

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def writer(target: Target) -> Iterator[LineWriter]:
    writer = LineWriter(target, lambda count: f"{count} lost")
    yield writer
    target.open.set()
    writer.close()


def test_line_writer_keeps_order(writer: LineWriter, target: Target):
    for number in range(5000):
        writer.put(str(number) if number % 2 else (str, number))
    assert writer.close()
    assert target.lines == [str(number) for number in range(5000)]
    assert writer.dropped == 0


def test_line_writer_writes_line_without_waiting_for_more(writer: LineWriter, target: Target):
    for number in range(3):
        writer.put("line")
        until(lambda expected=number + 1: len(target.lines) == expected)


def test_line_writer_stalled_reader_blocks_no_task_and_losses_are_logged(
    writer: LineWriter, target: Target
):
    target.open.clear()
    writer.put("first")
    until(lambda: not writer._gatherer._waiting)  # the stalled target has it
    for _ in range(log_writer.LIMIT + 7):
        writer.put("line")
    assert writer.dropped == 7
    target.open.set()
    assert writer.close()
    assert len(target.lines) == log_writer.LIMIT + 2
    assert [line for line in target.lines if "lost" in line] == ["7 lost"]


def test_line_writer_failing_line_costs_only_itself(writer: LineWriter, target: Target, caplog):
    writer.put((lambda _: 1 / 0, None))
    writer.put("next")
    until(lambda: target.lines == ["next"])
    assert "a line could not be formatted" in caplog.text


def test_line_writer_failed_writes_are_counted_and_logged_once(
    writer: LineWriter, target: Target, caplog
):
    target.error = OSError(28, "No space left on device")
    for _ in range(3):
        dropped = writer.dropped
        writer.put("line")
        until(lambda before=dropped: writer.dropped > before)
    assert caplog.text.count("No space left on device") == 1
    target.error = None
    writer.put("again")
    until(lambda: target.lines == ["again"])


def test_line_writer_stuck_thread_does_not_delay_exit(
    writer: LineWriter, target: Target, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gatherer, "CLOSE_TIME", 0.05)
    target.open.clear()
    writer.put("line")
    assert not writer.close()


def test_log_file_moved_away_is_reopened(tmp_path: Path):
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    writer = LineWriter(FileTarget(path), str)
    writer.put("before")
    until(lambda: path.read_text() == "before\n")
    path.rename(moved)
    writer.put("after")
    until(path.exists)
    assert writer.close()
    assert (moved.read_text(), path.read_text()) == ("before\n", "after\n")


def test_log_file_directory_is_created_for_own_path_only(tmp_path: Path):
    path = tmp_path / "typo" / "access.log"
    with pytest.raises(FileNotFoundError):
        FileTarget(path)
    assert not path.parent.exists()
    FileTarget(path, own=True).close()
    assert path.exists()


def test_log_file_reopened_on_request_before_next_line(tmp_path: Path):
    path = tmp_path / "access.log"
    writer = LineWriter(FileTarget(path), str)
    path.rename(tmp_path / "moved")
    writer.reopen()
    until(path.exists)
    assert writer.close()


def test_log_non_blocking_stream_gets_every_line():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as stream:
        writer = LineWriter(StreamTarget(stream), str)
        for number in range(2000):
            writer.put(f"{number:0100}")
        lines = [reader.readline() for _ in range(2000)]
        assert writer.close()
    assert [int(line) for line in lines] == list(range(2000))


# -- the output as a whole ----------------------------------------------------------------------


def output(stream: io.StringIO, **overrides: Any) -> LogOutput:
    return LogOutput(Overrides(**overrides), stream=stream)


def logged(settings: LogSettings, **overrides: Any) -> list[str]:
    """The log output of a log line, a successful exchange and a failed one."""
    stream = io.StringIO()
    under_test = output(stream, **overrides)
    under_test.apply(settings)
    logging.getLogger("vllm_router.test").info("hello")
    under_test.access.exchange_ended(make_record(50.0))
    under_test.access.exchange_ended(
        make_record(50.0, outcome=Outcome.TRUNCATED, phase=Phase.STREAM)
    )
    under_test.close()
    return stream.getvalue().splitlines()


def test_access_log_lines_share_format_of_log_lines():
    hello, good, failed = logged(LogSettings())
    assert "INFO    test: hello" in hello
    assert "INFO    access: POST" in good
    assert "WARNING access: POST" in failed
    lines = [json.loads(line) for line in logged(LogSettings(format="json"))]
    assert [line["logger"] for line in lines] == ["vllm_router.test"] + ["vllm_router.access"] * 2


@pytest.mark.parametrize(("level", "count"), [("info", 3), ("warning", 1), ("error", 0)])
def test_access_log_follows_log_level(level: str, count: int):
    assert len(logged(LogSettings(level=level))) == count


def test_access_log_can_be_disabled():
    (hello,) = logged(LogSettings(access=False))
    assert "hello" in hello


def test_access_log_may_have_its_own_file_at_any_level(tmp_path: Path):
    path = tmp_path / "access.log"
    assert logged(LogSettings(level="error", access=str(path))) == []
    assert path.read_text().count("access: POST") == 2
    assert path.stat().st_mode & 0o777 in (0o640, 0o600)


def test_access_log_command_line_overrides_file(tmp_path: Path):
    settings = LogSettings(level="error", format="json", access=str(tmp_path / "never"))
    lines = logged(settings, level="info", form="text", access=False)
    assert [line.split(": ")[-1] for line in lines] == ["hello"]
    assert not (tmp_path / "never").exists()


def test_access_log_moves_on_reload(tmp_path: Path):
    stream = io.StringIO()
    under_test = output(stream)
    under_test.apply(LogSettings())
    under_test.access.exchange_ended(make_record(50.0))
    under_test.follow(LogSettings(access=str(tmp_path / "a.log"), format="json"))
    under_test.access.exchange_ended(make_record(50.0))
    under_test.follow(LogSettings(access=True))
    under_test.access.exchange_ended(make_record(50.0))
    under_test.close()
    assert stream.getvalue().count("access: POST") == 2
    assert json.loads((tmp_path / "a.log").read_text())["path"] == "/v1/chat/completions"


def test_access_log_reload_with_unwritable_file_keeps_old_output(tmp_path: Path):
    stream = io.StringIO()
    under_test = output(stream)
    under_test.apply(LogSettings())
    under_test.follow(LogSettings(access=str(tmp_path)))
    under_test.access.exchange_ended(make_record(50.0))
    under_test.close()
    assert "the previous one stays in use" in stream.getvalue()
    assert "access: POST" in stream.getvalue()


def test_log_lines_after_shutdown_are_not_lost(capsys: pytest.CaptureFixture[str]):
    under_test = output(io.StringIO())
    under_test.apply(LogSettings())
    under_test.close()
    logging.getLogger("vllm_router.test").warning("late")
    assert "late" in capsys.readouterr().err


def test_log_handlers_of_application_stay():
    logging.getLogger().handlers[:] = [mine := logging.NullHandler()]
    stream = io.StringIO()
    under_test = LogOutput(stream=stream, with_log=False)
    under_test.apply(LogSettings())
    logging.getLogger("vllm_router.test").warning("not ours")
    under_test.access.exchange_ended(make_record(50.0))
    under_test.close()
    assert logging.getLogger().handlers == [mine]
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["access:"]


def test_log_notice_of_lost_lines_has_log_format():
    under_test = output(io.StringIO(), form="json")
    under_test.apply(LogSettings())
    assert json.loads(under_test._notice(3))["message"].startswith("3 log lines were dropped")
    under_test.close()


def test_access_log_line_costs_the_loop_a_few_calls():
    """It is written, and as JSON also made, by another thread. Counted, as times depend on load."""
    log = AccessLog()
    log.writer = LineWriter(Target(), str)
    record = make_record(50.0)
    log.exchange_ended(record)
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)  # of this thread alone
    try:
        log.exchange_ended(record)
    finally:
        sys.setprofile(None)
    log.writer.close()
    assert 0 < calls < 40


def test_access_log_hashes_prompts_off_the_loop(monkeypatch: pytest.MonkeyPatch):
    threads: set[int] = set()

    def make(of: Ended) -> str:
        threads.add(threading.get_ident())
        return "line"

    monkeypatch.setattr(access_log, "json_line", make)
    log = AccessLog()
    log.form = "json"
    log.writer = LineWriter(Target(), str)
    log.exchange_ended(make_record(50.0))
    log.writer.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("after", [0.0, 1.5 * gatherer.HURRY, 1.5 * gatherer.GATHER])
def test_log_file_is_reopened_in_every_state_of_the_thread(tmp_path: Path, after: float):
    path = tmp_path / "log"
    writer = LineWriter(FileTarget(path), lambda count: f"{count} lost")
    try:
        writer.put("first")
        until(lambda: path.read_text() == "first\n")
        time.sleep(after)
        path.rename(tmp_path / "moved")
        writer.reopen()
        until(path.exists)
    finally:
        writer.close()


def test_log_urgent_lines_are_written_sooner(
    writer: LineWriter, target: Target, monkeypatch: pytest.MonkeyPatch
):
    """On a busy router access lines are batched; the router's own log lines are not delayed."""
    monkeypatch.setattr(gatherer, "GATHER", 60.0)
    writer.put("first")
    until(lambda: target.lines == ["first"])
    for number in range(100):
        writer.put(str(number))
        writer.hurry()
    until(lambda: len(target.lines) == 101)
    assert writer._gatherer._bell.qsize() <= 1


def test_line_writer_flush_waits_for_earlier_lines(writer: LineWriter, target: Target):
    for number in range(3000):
        writer.put(str(number))
    assert writer.flush()
    assert len(target.lines) == 3000


def test_log_reload_leaves_foreign_handlers():
    under_test = output(io.StringIO())
    under_test.apply(LogSettings())
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    under_test.follow(LogSettings(level="debug", format="json"))
    assert other in logging.getLogger().handlers
    assert logging.getLogger("vllm_router").level == logging.DEBUG
    under_test.close()
