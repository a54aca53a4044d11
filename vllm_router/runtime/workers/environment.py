"""The resources that a leader or worker process has inherited."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_router.config.schema import Config
from vllm_router.http.server.listener import Listener
from vllm_router.observability.log_output import LogOutput
from vllm_router.runtime.serve import take_tls
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.control_channel import ControlChannel
from vllm_router.runtime.workers.queue_board import QueueBoard
from vllm_router.runtime.workers.queue_peers import SharedQueue
from vllm_router.runtime.workers.queue_wakeup import Wakeups
from vllm_router.runtime.workers.shared_counters import CounterView, SharedCounters
from vllm_router.runtime.workers.spawn_spec import SpawnSpec


@dataclass(frozen=True, slots=True)
class Environment:
    """`config` is the configuration in force at the start."""

    spec: SpawnSpec
    config: Config
    snapshot: ConfigSnapshot
    control: ControlChannel
    channels: list[Channel]
    output: LogOutput

    def counters(self) -> CounterView:
        spec = self.spec
        return CounterView(
            SharedCounters(spec.counters, spec.workers + 1, spec.columns), spec.number
        )

    def queue(self) -> SharedQueue:
        spec = self.spec
        board = QueueBoard(spec.queue, spec.workers + 1)
        return SharedQueue(board, spec.number, Wakeups(spec.wakeups, spec.number))

    def adopt_listeners(self, front: Listener) -> None:
        """Accept from the inherited sockets; raises ConfigError if the TLS files are unusable."""
        take_tls(front, self.config)
        for fileno in self.spec.listeners:
            address = front.adopt(fileno, later=self.spec.patient)
            if fileno in self.spec.plain:
                front.allow_plain(address[1])
