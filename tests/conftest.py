"""What holds for every test."""

import atexit
import os
import shutil
import signal
import tempfile

import hypothesis

# A busy machine is no failure.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# The routers of the tests have their Unix sockets here, and the commands look for them here.
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="vllm-router-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)

# A shell makes what it starts in the background ignore SIGINT, and that is inherited: the
# processes that tests start and interrupt would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)
