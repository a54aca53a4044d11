"""A small mutation tester for the decision modules; see scripts/mutants."""
