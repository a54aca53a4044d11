"""Shared state of several routers before the same servers (`[shared]`).

    RedisTask (task.py) ── one task: a turn every PERIOD
      ├─ sends    its Outbox, levels and drains      ─►  Store (store.py): Redis, or a bus in tests
      └─ applies  the batches of the other routers   ◄─  by Peers and RouterEffects (effects.py)

Requests never wait for it: what it has heard is in plain attributes that routing reads anyway.
With `--workers` the leader runs the task, see `workers/shared_prompts.py`.
"""
