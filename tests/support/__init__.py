"""Code that several tests share: harnesses, scripted servers, real processes, oracles."""
