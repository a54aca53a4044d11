"""The workloads of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of load. Times in milliseconds, sizes in bytes; `rate` 0 is a closed loop.

    With several `messages`, a connection sends conversations: each request repeats the last one,
    and has two messages more.
    """

    name: str
    title: str
    connections: int = 32
    rate: float = 0
    prompt: int = 400
    messages: int = 1
    answer: int = 400
    stream: bool = False
    tokens: int = 0
    ttft: float = 0
    interval: float = 0
    new_connection: bool = False
    spread: float = 0
    servers: int = 3
    most_repeats: int = 1000
    by_name_only: bool = False
    """Whether it is run only if it is named: it takes long, and much of the machine."""
    ladder: tuple[float, ...] = ()
    """Intervals to try one after the other, until one is too short."""

    @property
    def per_chunk(self) -> bool:
        """Whether chunks, not requests, are the main cost."""
        return self.stream and self.tokens > 100

    @property
    def paced(self) -> bool:
        """Whether the load is fixed rather than a contestant's maximum."""
        return self.rate > 0 or self.interval > 0

    @property
    def unloaded(self) -> bool:
        """Whether latencies can be compared with the direct contestant."""
        return self.paced or self.connections == 1


_LONG = 100_000  # chunks: these streams outlast the run

_ALL = [
    Workload(name="idle", title="Nothing but the feed and the scrapes", connections=0),
    Workload(name="json", title="JSON, 400 B prompt, 32 connections"),
    Workload(name="json1", title="JSON, 400 B prompt, 1 connection", connections=1),
    Workload(name="json256", title="JSON, 400 B prompt, 256 connections", connections=256),
    Workload(
        name="open",
        title="JSON, 400 B prompt, 500 requests/s at random times",
        rate=500,
        connections=64,
    ),
    Workload(
        name="prompt", title="JSON, 200 KB prompt, 8 connections", prompt=200_000, connections=8
    ),
    Workload(
        name="prompt-open",
        title="JSON, 200 KB prompt, 50 requests/s at random times",
        prompt=200_000,
        rate=50,
    ),
    Workload(
        name="agents",
        title="JSON, conversations of 300 messages and 1 MB, 8 connections, 20 requests/s",
        prompt=1_000_000,
        messages=300,
        connections=8,
        rate=20,
    ),
    Workload(name="answer", title="JSON, 64 KB answer, 32 connections", answer=65536),
    Workload(name="new", title="JSON, a new connection for every request", new_connection=True),
    Workload(
        name="ttft",
        title="Short streams: first chunk after 20 ms, 10 chunks 5 ms apart, 32 connections",
        stream=True,
        tokens=10,
        ttft=20,
        interval=5,
        spread=65,
    ),
    Workload(
        name="sse",
        title="128 streams, a chunk per 20 ms on each",
        stream=True,
        tokens=_LONG,
        interval=20,
        connections=128,
        spread=200,
    ),
    Workload(
        name="sse1000",
        title="1000 streams, a chunk per 20 ms on each",
        stream=True,
        tokens=_LONG,
        interval=20,
        connections=1000,
        spread=1500,
    ),
    Workload(
        name="sse10000",
        title="9 900 streams, a chunk per second on each",
        stream=True,
        tokens=_LONG,
        interval=1000,
        connections=9_900,
        spread=60_000,
        most_repeats=1,
        by_name_only=True,
    ),
    Workload(
        name="hold",
        title="1000 streams, chunks as often as all of them arrive in time",
        stream=True,
        tokens=_LONG,
        connections=1000,
        spread=1500,
        ladder=(200, 100, 67, 50, 40, 33, 28, 24, 20, 17, 14),
        most_repeats=2,
    ),
    Workload(
        name="sse-fast",
        title="32 streams of 500 chunks, as fast as they go",
        stream=True,
        tokens=500,
    ),
    Workload(
        name="servers100",
        title="JSON, 400 B prompt, 32 connections, 100 servers",
        servers=100,
    ),
    Workload(
        name="idle100",
        title="Nothing but the feed and the scrapes, 100 servers",
        connections=0,
        servers=100,
    ),
]

WORKLOADS = {workload.name: workload for workload in _ALL}


def tiny(workload: Workload) -> Workload:
    """The same with at most four connections, for a test of the harness."""
    return replace(
        workload,
        connections=min(workload.connections, 4),
        rate=min(workload.rate, 50),
        spread=min(workload.spread, 50),
        servers=min(workload.servers, 5),
        ladder=workload.ladder[:2],
    )
