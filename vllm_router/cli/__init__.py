"""Commands of `vllm-router`, and the full-screen terminal monitor."""
