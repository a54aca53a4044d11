"""`python -m vllm_router.workers DESCRIPTOR NAME`: a leader or a worker, started by the parent.

The name is for those who list processes.
"""

from __future__ import annotations

import signal
import sys

# A terminal, systemd or a script may send signals to all processes at once; what is to be done
# about them the parent says.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(_number, signal.SIG_IGN)

from vllm_router.workers.life import live  # noqa: E402

if __name__ == "__main__":
    sys.exit(live(int(sys.argv[1])))
