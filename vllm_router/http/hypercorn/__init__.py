"""Hypercorn 0.18 in the router's nursery, with its defects cured.

Names that Hypercorn and quart-trio do not promise are used in this package alone.
tests/integration/test_hypercorn_bridge.py fails when one of them changes; tests without a file name
are in it. Issue numbers are of pgjones/hypercorn; "-" has no upstream issue.

=====================================================  ========  ===================================
cure                                                   upstream  test
=====================================================  ========  ===================================
An exception in one connection ended the server:       #225      failing_application
guarded (tcp_server).
HTTP/2 requests with a non-ASCII method or path,       #225      malformed_http2_request
CONNECT without a path, DATA after the response,                 http2_body_after_an_early
PRIORITY floods raised one: answered or ignored (h2).            flood_of_priorities
Rapid reset (CVE-2023-44487) started a handler per     -         rapid_reset
stream: never started, too many end the connection.
Floods of small HTTP/2 frames blocked the loop:        -         test_http2_frames.py
handled in slices and limited (h2, h2_frames).
A client that had stopped reading could not be timed   -         http2_stream_that_is_not_taken
out: TCP_USER_TIMEOUT (tcp_server); over HTTP/2 it                http2_answer_that_is_not_taken
slows the application down, then its stream is reset.
GOAWAY aborted running requests: they finish (h2).     -         test_front_connections.py: goaway
A truncated response over HTTP/2 never ended: reset;   -         http2_answer_that_is_broken_off
a drain cut the last bytes: it waits for them (h2).               http2_streams_end_whole
Pipelining and leaving leaked a task: a failed send    -         test_front.py
ends the connection's scope (tcp_server, tasks).
`Upgrade: h2c` was followed: ignored. HTTP/2 with      -         upgrade_to_http2
prior knowledge is served (h11).
Ambiguous framing, malformed Host, unknown versions,   -         suspicious_request
CONNECT, TRACE were accepted: refused (h11).
100 Continue was sent before the application saw the   -         test_front.py
request: when it receives the body (tasks, h11).
Folded lines, bare CR and LF, chunks: as strict as     -         test_e2e_smuggling.py
the lane (strict_h11).
Websockets buffered without limit and blocked the      -         test_websocket_guard.py
loop: limited (websocket).
Request heads and silent bodies had no time limit of   -         test_front.py
their own (tcp_server).
Responses had no reason phrase (h11); a client that    -         test_front.py
still sends lost an early response (tcp_server).
The final message recycled a connection inside the     -         connection_close_is_honoured
application's task (final_message).                               keep_alive_expires
=====================================================  ========  ===================================

`vllm-router run` uses `HypercornHandler` (handler) and patches nothing. Hypercorn alone serves the
application through `patch.install`, which only `vllm_router/asgi.py` calls.
"""
