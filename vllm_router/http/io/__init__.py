"""Sockets on an event loop hub of our own inside Trio."""
