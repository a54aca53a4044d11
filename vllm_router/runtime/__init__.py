"""The supervisor nursery, probes, signals and worker processes."""
