"""What holds for every test."""

import signal

# A shell makes what it starts in the background ignore SIGINT, and that is inherited: the
# processes that tests start and interrupt would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)
