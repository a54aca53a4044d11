"""The scorecard: scenarios with numeric gates against real processes, for ./scripts/chaos."""
