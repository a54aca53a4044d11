"""Several processes behind one port: `vllm-router run --workers N`.

    parent ── starts and replaces processes; owns port, channels, shared memory (parent.py)
      ├─ leader ── probes, configuration file, control plane (leader.py, run_leader.py)
      ├─ worker 1 ── accepts connections, serves inference (worker.py, run_worker.py)
      └─ worker N

They share:

* `SharedCounters` (shared_counters.py): shared memory with a row per process, which only its owner
  writes: leases per server, requests per key. Every routing decision reads all rows, so that N
  workers spread a burst as one process would.
* `QueueBoard` (queue_board.py): shared memory with a page per process that lists its requests that
  wait for a server (`[limits]`). All processes read all pages and serve one common order
  (queue_peers.py). An event descriptor per process wakes it (queue_wakeup.py).
* `ConfigSnapshot` (config_snapshot.py): the configuration in force, written by the leader and read
  by each process that starts.
* A `Channel` per worker to the leader (channel.py, messages.py). The worker sends `Hello`, the
  leader its whole state and then `Welcome`. Afterwards the leader sends changed `ServerStates` and
  announces new configurations (`Configured`); the worker sends a `Report` of its exchanges and
  attempts, `WorkerStats`, and every `Connection` that is not for inference.
* A `ControlChannel` from the parent to each process, for orders. End of file is the order to drain.

Only the leader decides whether a server is up, ejected or draining. A failed attempt is reported to
it at once, and its decision reaches all workers with the next message.

A process that dies is replaced. The connections of a worker end with it; the parent clears its
row, which releases its leases. Without a leader, workers serve with the last known state, and the
connections they hand over wait in the channel. If the parent dies, all processes drain and end.
"""
