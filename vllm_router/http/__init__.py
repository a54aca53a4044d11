"""HTTP/1.1 server and client, socket I/O, and the Hypercorn adapter; independent of vLLM."""
