"""Judgement of servers' answers: one table of events per API, read by relay, retry and mock.

    signs.py    the signs of one event or body: it opens, proves, finishes, ends, aborts or fails
    tables.py   the tables: the signs of each API's events
    faults.py   the party at fault for an error that an answer reports
    events.py   server-sent events: cut into blocks, decoded
    opening.py  the first events of a stream: held until they prove that the engine has answered
    ending.py   the last events of a stream: complete or failed, and its token counts
    whole.py    the same for a plain JSON answer
    quick.py    the common cases of these three, for a quarter of the cost
    stored.py   the id of a stored response
    usage.py    token counts

Sources: vLLM 0.32 (`vllm/entrypoints`), the WHATWG specification of event streams, the API
references of OpenAI and Anthropic. Everything here is pure.
"""
