"""Simulated servers and fleets; for the commands `mock`, `simulate`, `run --demo` and tests."""
