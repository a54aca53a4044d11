"""Code shared by tests: harnesses, scripted servers, real processes, oracles."""
