"""Side-by-side measurements of proxies for vLLM servers; see docs/performance.md.

Runs on any Python ≥ 3.11 without further packages: contestants live in environments of their own.
"""
