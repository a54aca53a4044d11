"""State that routers of one fleet, and workers of one router, share by messages. Pure.

    outbox.py    collects what this process has to tell   ─►  Batch (messages.py)
    peers.py     merges the batches of other processes    ◄─  Batch

A batch is soft state: a lost one costs routing some precision and no request. Levels (queued
tokens, requests in flight) are absolute, so the next batch repairs a lost one; what a key has used
is a total since the start of its router for the same reason.
"""
