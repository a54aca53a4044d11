"""HTTP/1.1 on both sides, sockets, and the adapter for Hypercorn. Knows nothing of vLLM."""
