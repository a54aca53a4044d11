"""The LoRA adapters that a simulated engine has in memory (`--max-loras`).

An adapter stays until its slot is needed for another one, the least recently used first; a slot
whose adapter has running requests cannot be taken.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm_router.lab.mock.options import MockOptions


class AdapterSlots:
    """Running requests by loaded adapter. Without a limit every adapter is always loaded."""

    def __init__(self, options: MockOptions) -> None:
        self._slots = options.max_loras
        self._swap_seconds = options.lora_swap
        self._bases = frozenset(options.models)
        self._loaded: OrderedDict[str, int] = OrderedDict()

    def _limited(self, model: str) -> bool:
        return self._slots > 0 and model not in self._bases

    def fits(self, model: str) -> bool:
        """Whether a request for this model can run now."""
        return (
            not self._limited(model)
            or model in self._loaded
            or len(self._loaded) < self._slots
            or not all(self._loaded.values())
        )

    def take(self, model: str) -> float:
        """A request for it begins to run: the seconds that loading it takes. Only if it fits."""
        if not self._limited(model):
            return 0.0
        seconds = 0.0
        if model not in self._loaded:
            if len(self._loaded) >= self._slots:
                unused = next(name for name, running in self._loaded.items() if not running)
                del self._loaded[unused]
            self._loaded[model] = 0
            seconds = self._swap_seconds
        self._loaded[model] += 1
        self._loaded.move_to_end(model)
        return seconds

    def release(self, model: str) -> None:
        """A request for it has ended, or was preempted."""
        if self._limited(model):
            self._loaded[model] -= 1
