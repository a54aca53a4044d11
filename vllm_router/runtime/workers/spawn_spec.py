"""The specification of a process that the parent starts, passed in an inherited descriptor."""

from __future__ import annotations

import os

import msgspec


class SpawnSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers are file descriptors, unless said otherwise.

    number: 0 for the leader, otherwise the worker's number.
    workers: the number of workers.
    control: the channel to the parent.
    channels: of the leader: to every worker; of a worker: to the leader.
    counters, snapshot: shared memory of SharedCounters and ConfigSnapshot.
    columns: the number of columns of the counters.
    queue: shared memory with the waiting requests of each process. wakeups: an event descriptor
        per process, the leader's first.
    listeners: the sockets from which this process accepts.
    plain: listeners that accept plain HTTP even if the others require TLS.
    local: listening Unix sockets for the commands on this machine; served by the leader.
    admin_port: port of the administration listener.
    monitor: port of the monitor's listener, and the digest of its key.
    source: path of the configuration file; the leader follows it.
    patient: another process serves the port until this one has probed the servers.
    log: path of the log file, None for stderr; level, form, access: as in log_output.Overrides.
    """

    number: int
    workers: int
    control: int
    channels: tuple[int, ...]
    counters: int
    columns: int
    snapshot: int
    queue: int
    wakeups: tuple[int, ...]
    listeners: tuple[int, ...]
    plain: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    admin_port: int | None = None
    monitor: tuple[int, str] | None = None
    source: str | None = None
    demo: int = 0
    demo_traffic: bool = False
    patient: bool = False
    log: str | None = None
    level: str | None = None
    form: str | None = None
    access: bool | str | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that the process inherits."""
        return (
            self.control,
            self.counters,
            self.snapshot,
            self.queue,
            *self.wakeups,
            *self.channels,
            *self.listeners,
            *self.local,
        )

    @property
    def name(self) -> str:
        return f"worker {self.number}" if self.number else "leader"


def write(spec: SpawnSpec) -> int:
    """Create an inheritable descriptor with the specification; the caller closes it."""
    fileno = os.memfd_create("vllm-router process")
    os.pwrite(fileno, msgspec.json.encode(spec), 0)
    return fileno


def read(fileno: int) -> SpawnSpec:
    """Read a specification and close the descriptor."""
    with open(fileno, "rb") as file:
        file.seek(0)
        return msgspec.json.decode(file.read(), type=SpawnSpec)
