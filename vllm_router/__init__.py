"""One OpenAI-compatible entry point for a fleet of vLLM servers."""

__version__ = "0.1.0"
