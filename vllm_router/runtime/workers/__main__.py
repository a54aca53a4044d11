"""`python -m vllm_router.runtime.workers DESCRIPTOR NAME`: one process of `--workers N`.

The parent starts it; NAME (leader, worker-1, …) shows in lists of processes.
"""

from __future__ import annotations

import ctypes
import signal
import sys

# A terminal, systemd or a script may signal all processes at once. The parent sends orders instead.
for _number in (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),
):
    signal.signal(_number, signal.SIG_IGN)

# If the parent dies, this process drains and releases the port. Continue it if it is stopped:
# prctl(2), for the death of the parent's main thread, which has started it.
_PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)

from vllm_router.runtime.workers.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
