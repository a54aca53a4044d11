"""The full-screen monitor of a running router, in its own process."""
