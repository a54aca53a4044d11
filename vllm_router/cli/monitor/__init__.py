"""The terminal's view of a running router, in a process of its own."""
