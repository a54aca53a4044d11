"""Routing: policies, prompts, the prefix index and the order of waiting requests. Pure."""
