"""Several processes behind one port: `vllm-router run --workers N`.

    parent ── starts and replaces, holds port, channels and shared memory (parent.py)
      ├─ leader ── probes, follows the file, answers everything but inference (leader.py)
      ├─ worker 1 ── accepts connections, serves inference (worker.py)
      └─ worker N

What they share:

* The *board* (board.py): shared memory with a row of leases for each process, which only its owner
  writes. Every pick reads all rows, so that a burst over N workers spreads as over one.
* The *queue board* (queue_board.py): shared memory with a page for each process, which holds its
  requests that wait for a server (`[limits]`). All read all pages and keep one order (peers.py); an
  event descriptor for each process is the *bell* that wakes it (bells.py).
* The *configuration in force* (in_force.py): written by the leader, read by whoever is started.
* A *channel* for each worker (channel.py), to the leader. The worker says `Hello` and the leader
  `Welcome`; then the leader tells the `States` of servers as it learns of them, and that a new
  configuration is to be read (`Configured`); the worker sends `Report`s of its exchanges and
  attempts, `Figures` of what there is now, and every `Connection` that is not for the lane.
* A *line* from the parent to each process (birth.py), for orders. Its end is the order to drain.

The leader alone decides: which server is up, ejected or draining. A failed attempt reaches it in
a report at once, and its verdict all workers with the next message.

Who dies is replaced. A worker takes its connections along, and the parent clears its row, so that
its leases are gone. While there is no leader, workers serve with what they know; what they hand
over waits in the channel. When the parent dies, all drain and end.
"""
