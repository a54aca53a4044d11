"""The order in which requests wait for a server."""
