"""A model of a vLLM fleet under the router's own policies: try a change before making it."""
