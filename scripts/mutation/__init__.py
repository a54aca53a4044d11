"""A small mutation tester for the modules that decide; see scripts/mutants."""
