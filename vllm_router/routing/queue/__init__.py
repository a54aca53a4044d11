"""The order in which waiting requests are given servers."""
