"""Metrics, access log, tracing, decision history, and stalls of the event loop."""
