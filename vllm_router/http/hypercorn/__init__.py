"""Hypercorn behind the listener, with the cures of its defects."""
