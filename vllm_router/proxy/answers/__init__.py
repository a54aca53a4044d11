"""What a server's answer says, for every API: one table per API, read by relay, retry and mock.

    signs.py    what one event or body says: it opens, proves, finishes, ends, aborts or fails
    tables.py   the tables: which event of which API says what
    faults.py   whose fault a failure is that an answer reports
    events.py   server-sent events: cut into blocks, decoded
    opening.py  the first events of a stream: held until they prove that the engine has answered
    ending.py   the last events of a stream: was it whole, did it fail, how many tokens were used
    whole.py    the same for a plain JSON answer
    usage.py    token counts

Sources: vLLM 0.32 (`vllm/entrypoints`), the WHATWG specification of event streams, the API
references of OpenAI and Anthropic. Everything here is pure.
"""
