"""The slots of an engine for LoRA adapters (`max_loras` of vLLM).

An adapter stays loaded until its slot is needed for another one, the least recently used first. A
slot whose adapter has running requests cannot be taken.
"""

from __future__ import annotations

from collections import OrderedDict


class AdapterSlots:
    """`loaded` are the adapters in slots, the least recently used first; 0 is the base model."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.loaded: OrderedDict[int, int] = OrderedDict()
        """Running requests by adapter."""
        self.swaps = 0

    def fits(self, adapter: int) -> bool:
        """Whether a request for it can run now."""
        return (
            adapter == 0
            or adapter in self.loaded
            or len(self.loaded) < self.slots
            or not all(self.loaded.values())
        )

    def holds(self, adapter: int) -> bool:
        """Whether it is loaded; the base model always is."""
        return adapter == 0 or adapter in self.loaded

    def take(self, adapter: int) -> None:
        """A request for it begins to run; load it if it is not loaded. Only if it fits."""
        if adapter not in self.loaded:
            if len(self.loaded) >= self.slots:
                unused = next(one for one, running in self.loaded.items() if not running)
                del self.loaded[unused]
            self.loaded[adapter] = 0
            self.swaps += 1
        self.loaded[adapter] += 1
        self.loaded.move_to_end(adapter)

    def release(self, adapter: int) -> None:
        """A request for it has ended, or was preempted."""
        self.loaded[adapter] -= 1
