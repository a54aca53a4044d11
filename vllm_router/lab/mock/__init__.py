"""A simulated vLLM 0.32 server: for the demo, for tests and as an upstream under load.

It answers what the captured real server answered, byte for byte where it matters, simulates the
engine's batching, queue and prefix cache in the time of trio's clock, and misbehaves on request.
"""

from vllm_router.lab.mock.options import MockOptions, Switches
from vllm_router.lab.mock.server import MockServer, serve_mock

__all__ = ["MockOptions", "MockServer", "Switches", "serve_mock"]
