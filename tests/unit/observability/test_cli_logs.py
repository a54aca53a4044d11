"""Log lines: one record each, for any contents."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from vllm_router.observability import formatting as logs

FORGED = "a\n2026-01-01T00:00:00.000Z INFO    supervisor: all is well\r\x1b[2K\x00\u2028\x85b"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is global: restore the previous set-up."""
    root, ours = logging.getLogger(), logging.getLogger("vllm_router")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before


def forget() -> None:
    """Remove pytest's handlers for this test, without closing them."""
    logging.getLogger().handlers.clear()


def written(form: str, log: object, level: str = "info") -> str:
    stream = io.StringIO()
    forget()
    logs.configure(level, form, stream)
    assert callable(log)
    log(logging.getLogger("vllm_router.runtime.probe"))
    return stream.getvalue()


def fail(log: logging.Logger) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("probe of %s failed", FORGED)


def test_log_text_line_has_time_level_and_origin():
    text = written("text", lambda log: log.warning("server %s is %s", "a", "down"))
    time, level, origin, message = text.split(maxsplit=3)
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000Z")
    assert (level, origin, message) == ("WARNING", "probe:", "server a is down\n")


def test_log_value_cannot_forge_a_line():
    text = written("text", lambda log: log.info("name %s", FORGED))
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert r"\r\x1b[2K\x00\u2028\x85b" in text


def test_log_traceback_cannot_forge_a_line():
    first, *rest = written("text", fail).rstrip("\n").split("\n")
    assert "ERROR" in first
    assert any("raise ValueError" in line for line in rest)
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_log_non_ascii_text_stays_readable():
    assert "request_timeout 120 → 60, 模型" in written(
        "text", lambda log: log.info("%s", "request_timeout 120 → 60, 模型")
    )


def test_log_json_is_one_object_per_record():
    text = written("json", fail)
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    record = json.loads(text)
    assert record["level"] == "error"
    assert record["logger"] == "vllm_router.runtime.probe"
    assert record["message"] == f"probe of {FORGED} failed"
    assert record["traceback"].startswith("Traceback")


def test_log_json_without_traceback_has_no_such_field():
    record = json.loads(written("json", lambda log: log.info("a\x7fb")))
    assert record.keys() == {"time", "level", "logger", "message"}
    assert record["message"] == "a\x7fb"


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("error", 0)])
def test_log_level_applies_to_router_only(level: str, count: int):
    def log(ours: logging.Logger) -> None:
        ours.debug("1")
        ours.info("2")
        ours.warning("3")
        logging.getLogger("httpx").info("HTTP Request: GET http://server/metrics")

    assert written("text", log, level).count("\n") == count


def test_logging_configured_by_application_stays():
    forget()
    mine = logging.NullHandler()
    logging.getLogger().addHandler(mine)
    logs.configure_if_unset()
    assert logging.getLogger().handlers == [mine]


def test_logging_unconfigured_gets_defaults():
    forget()
    logs.configure_if_unset()
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler.formatter, logs.TextFormatter)
    assert logging.getLogger("vllm_router").level == logging.INFO
