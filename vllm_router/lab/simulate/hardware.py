"""How fast the simulated servers are: constants fitted to published figures, rounded.

A step of the engine takes `base` seconds for reading the weights, more for every prompt token
computed in it (and for the context that token attends to), for every request that gets a token,
and for every token of context that must be read from the KV cache.
"""

from __future__ import annotations

from typing import NamedTuple


class Hardware(NamedTuple):
    """Seconds, per token or request; `kv_tokens` is the room for context.

    One server; where a model needs several cards, they are one server. `adapter_slots` is vLLM's
    `max_loras`, `adapter_swap` the seconds that loading an adapter adds to a step.
    """

    base: float
    per_prompt_token: float
    per_attended: float  # per prompt token and token of context before it
    per_request: float
    per_context_token: float
    kv_tokens: int
    max_running: int = 256
    max_batched_tokens: int = 8192
    adapter_slots: int = 4
    adapter_swap: float = 0.35

    def faster(self, factor: float) -> Hardware:
        return self._replace(
            base=self.base / factor,
            per_prompt_token=self.per_prompt_token / factor,
            per_attended=self.per_attended / factor,
            per_request=self.per_request / factor,
            per_context_token=self.per_context_token / factor,
        )


HARDWARE = {
    # One H100: 16 GB of weights at 2.5 TB/s, 16 GFLOP per token at 450 TFLOP/s, 131 kB of KV.
    "8b": Hardware(0.0065, 36e-6, 1.7e-9, 25e-6, 52e-9, 400_000),
    # One H100, FP8: 33 GB of weights, 66 GFLOP per token at 650 TFLOP/s, 262 kB of KV.
    "32b": Hardware(0.0130, 100e-6, 3.5e-9, 30e-6, 105e-9, 130_000),
    # Four H100: 141 GB of weights, 141 GFLOP per token, 328 kB of KV spread over the cards.
    "70b": Hardware(0.0160, 95e-6, 1.9e-9, 40e-6, 35e-9, 420_000),
}
