"""Entry point of a leader or worker process."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError, RouterError
from vllm_router.observability.log_output import LogOutput, Overrides
from vllm_router.runtime.serve import IDLE_GRACE, LINGER
from vllm_router.runtime.workers import control_channel, run_leader, run_worker, spawn_spec
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.clock import SharedClock
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.control_channel import ControlChannel
from vllm_router.runtime.workers.environment import Environment
from vllm_router.runtime.workers.orphan import end_when_orphaned
from vllm_router.runtime.workers.run_worker import LAST_REPORT
from vllm_router.runtime.workers.spawn_spec import SpawnSpec


def main(fileno: int) -> int:
    """Run the process that the specification in this descriptor describes; returns its exit code.

    A process that cannot start sends the reason to the parent.
    """
    spec = spawn_spec.read(fileno)
    control = ControlChannel(spec.control)
    channels = [Channel(socket.socket(fileno=end)) for end in spec.channels]
    try:
        _run(spec, control, channels)
    except (RouterError, ConfigError, OSError) as error:
        control.send(control_channel.FAILED + str(error).encode())
        return 2
    finally:
        control.close()
        for channel in channels:
            channel.close()
    return 0


def _run(spec: SpawnSpec, control: ControlChannel, channels: list[Channel]) -> None:
    snapshot = ConfigSnapshot(spec.snapshot)
    log = Path(spec.log) if spec.log is not None else None
    overrides = Overrides(level=spec.level, form=spec.form, access=spec.access)
    output = LogOutput(overrides, file=log, tag=spec.name)
    try:
        config = snapshot.read()
        if config is None:
            raise ConfigError(["the configuration snapshot in shared memory is not readable"])
        started_with = config
        end_when_orphaned(spec.control, lambda: _longest_end(snapshot.read() or started_with))
        output.apply(config.log)
        environment = Environment(spec, config, snapshot, control, channels, output)
        run = run_worker.run if spec.number else run_leader.run
        trio.run(run, environment, clock=SharedClock())
    finally:
        output.close()


def _longest_end(config: Config) -> float:
    """Seconds that an orderly shutdown may take."""
    settings = config.settings
    return settings.drain_grace + settings.drain_timeout + IDLE_GRACE + LINGER + LAST_REPORT
