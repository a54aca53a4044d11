"""The setting of a simulation: servers, routers, and what happens to them."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_router.lab.simulate.hardware import Hardware

NONE, PROMPTS, PROMPTS_QUEUED = "none", "prompts", "prompts,queued"
SHARE_MODES = (NONE, PROMPTS, PROMPTS_QUEUED)


@dataclass(frozen=True, slots=True)
class Scene:
    """The setting of a simulation. Times in seconds, servers by their index.

    speeds: one per server, relative to `hardware`; also their share of `capacity`.
    tuned: without it no server has `max_concurrent_requests`: routers learn it.
    adapters: LoRA adapters, numbered from 1, on all servers but `without_adapters`.
    slow: factors by which servers are slower than their capacity.
    failing: servers that fail every request within 5 ms from `failing_from` on, `/health` green.
    restarting: servers that restart at `failing_from`, and are down for five seconds.
    joining: servers that are down until `joining_at`; `draining`: drained from `draining_at` on.
    plain: the share of responses that are not streamed.
    share: what several routers tell each other every `share_period`, see `sharing.py`.
    sticky: whether all requests of a conversation come to the same router.
    session_idle: of `session_admission`, 0 without it. Waiting sessions wait as long as they must.
    """

    hardware: Hardware
    speeds: tuple[float, ...]
    capacity: int = 32
    routers: int = 1
    scrape_interval: float = 0.5
    seconds: float = 60.0
    warm_up: float = 20.0
    patience: float = 60.0
    tuned: bool = True
    adapters: int = 0
    without_adapters: tuple[int, ...] = ()
    slow: tuple[tuple[int, float], ...] = ()
    failing: tuple[int, ...] = ()
    restarting: tuple[int, ...] = ()
    failing_from: float = 25.0
    joining: tuple[int, ...] = ()
    joining_at: float = 0.0
    draining: tuple[int, ...] = ()
    draining_at: float = 0.0
    plain: float = 0.0
    share: str = NONE
    share_period: float = 0.2
    sticky: bool = False
    session_idle: float = 0.0

    def configured_capacity(self, place: int) -> int | None:
        """`max_concurrent_requests` of a server."""
        return max(1, round(self.capacity * self.speeds[place])) if self.tuned else None
