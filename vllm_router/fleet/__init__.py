"""What is known about the servers. Pure: no I/O, no clock; time is an argument, in seconds."""
