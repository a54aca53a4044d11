"""Socket I/O: non-blocking sockets on an event loop hub inside Trio, and on Trio alone."""
