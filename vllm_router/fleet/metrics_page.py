"""Reading the same server's metrics page again and again, at little cost.

Of the 600 lines of a page, 20 matter, and from one scrape to the next they hardly move. They are
looked for where they were the last time, and parsed only if one of them has changed. From time to
time, and when the page looks different, the whole page is read.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_router.fleet.engine_metrics import MAX_NUMBER, EngineMetrics, MetricsReader

WHOLE_EVERY = 10
"""Every so many scrapes the whole page is read: samples may have been added."""

SLACK = 128
"""Bytes by which a page may grow or shrink before it is read as a whole."""

ADAPTER_SLACK = 64
"""The same for a page with LoRA adapters: every set of adapters that run together is a new sample,
of 90 bytes at least, and the last one counts."""

_ADAPTERS = b"vllm:lora_requests_info"

WINDOW = 256
"""Bytes by which a line may have moved since the last scrape."""

MAX_MARKS = 256
"""Samples that are looked up by position: twelve names for each of 20 engines. Pages with more are
always read as a whole."""

MAX_MARK_BYTES = 131_072
"""Bytes of all names and labels that are looked up by position; vLLM 0.32 has 150 per sample."""

MAX_KNOWN_PAGE = 2 << 20
"""Bytes of a page whose samples are looked up by position: twenty engines have 1 MB."""

STEP = 32_768
"""Bytes of a page that are parsed in one step: 0.1 ms."""


class MetricsPage:
    """The pages of one server. Holds the positions of its samples, and no page."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        """Line breaks, names and labels of the samples, with the space before the value."""
        self._places: list[int] = []
        self._cut = b""
        """The lines of the samples, as they were last."""
        self._metrics = EngineMetrics()
        self._length = 0
        self._slack = SLACK
        self._left = 0
        """Scrapes until the whole page is read."""

    def read(self, page: bytes) -> Iterator[EngineMetrics | None]:
        """Parse a page in steps; the last yielded value is the result.

        The caller may let other tasks run between two steps. Raises UnusablePage.
        """
        known = self._read_known(page)
        if known is not None:
            yield known
            return
        self._left = 0
        reader = MetricsReader()
        for start in range(0, len(page), STEP):
            reader.feed(page[start : start + STEP])
            yield None
        metrics = reader.result()
        self._remember(page, reader.keys, metrics)
        yield metrics

    def _read_known(self, page: bytes) -> EngineMetrics | None:
        """The figures, by the known positions; None if the page must be read as a whole."""
        if self._left <= 0 or abs(len(page) - self._length) > self._slack:
            return None
        self._left -= 1
        cut = self._cut_out(page)
        if cut is None:
            return None
        if cut != self._cut:
            self._cut, self._metrics = cut, _parsed(cut)
        return self._metrics

    def _cut_out(self, page: bytes) -> bytes | None:
        """The lines of the samples; None if one is not where it was."""
        find, places, lines = page.find, self._places, []
        for number, key in enumerate(self._keys):
            place = places[number]
            begin = find(key, place - WINDOW if place > WINDOW else 0, place + WINDOW + len(key))
            if begin < 0:
                return None
            end = begin + len(key)
            end = find(b"\n", end, end + MAX_NUMBER)
            if end < 0:
                return None
            places[number] = begin
            lines.append(page[begin:end])
        return b"".join(lines)

    def _remember(self, page: bytes, keys: list[str], metrics: EngineMetrics) -> None:
        """Note where the samples are, unless reading them from there gives other figures."""
        self._metrics = metrics
        if not 0 < len(keys) <= MAX_MARKS or len(page) > MAX_KNOWN_PAGE:
            return
        if sum(map(len, keys)) > MAX_MARK_BYTES:
            return
        self._keys, self._places = [key.encode("latin-1") for key in keys], []
        place = 0
        for key in self._keys:  # in the order of the page: one pass
            place = page.find(key, place)
            if place < 0:
                return
            self._places.append(place)
            place += len(key)
        cut = self._cut_out(page)
        if cut is None or _parsed(cut) != metrics:
            return
        self._cut, self._length, self._left = cut, len(page), WHOLE_EVERY - 1
        self._slack = ADAPTER_SLACK if _ADAPTERS in page else SLACK


def _parsed(lines: bytes) -> EngineMetrics:
    """The figures of at most MAX_MARKS lines."""
    reader = MetricsReader()
    reader.feed(lines)
    return reader.result()
