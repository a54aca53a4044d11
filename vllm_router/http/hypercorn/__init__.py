"""Hypercorn 0.18 in the router's nursery, with its defects cured.

`vllm-router run` uses `HypercornHandler` (handler) and patches nothing. Hypercorn alone serves the
application through `patch.install`, which only `vllm_router/asgi.py` calls. Names that Hypercorn
and quart-trio do not promise are used in this package alone;
`test_hypercorn_private_name_exists_with_its_parameters` fails when one of them changes.

The cures: defect and cure (module) | issue of pgjones/hypercorn, - if there is none | test

An exception in one connection ended the server: it is caught (tcp_server)
    | #225 | test_hypercorn_failing_application_is_logged_and_isolated
HTTP/2 with a non-ASCII method or path, or CONNECT without a path, raised one: reset (h2)
    | #225 | test_http2_malformed_request_costs_at_most_its_connection
HTTP/2 with a space or control character in its path, method or fields was accepted, and broke the
HTTP/1.1 to a server: reset (h2)
    | - | test_http2_field_that_http1_cannot_carry_is_refused
        test_http2_malformed_request_costs_at_most_its_connection
HTTP/2 DATA after the response raised one: dropped (h2_buffers)
    | #225 | test_http2_body_after_early_response_is_ignored
Floods of HTTP/2 PRIORITY raised one: ignored (h2)
    | #225 | test_http2_priority_flood_is_ignored
Rapid reset (CVE-2023-44487) started a handler per stream: none is started, too many resets end the
connection (h2)
    | - | test_http2_rapid_reset_starts_almost_nothing test_http2_slow_rapid_reset_is_ended
Floods of small HTTP/2 frames blocked the loop: handled in slices, and limited (h2, h2_frames)
    | - | test_goaway_flood_is_harmless
An HTTP/2 client without a window had all of the response buffered: backpressure (h2_buffers)
    | - | test_http2_unread_response_applies_backpressure
An HTTP/2 client that stopped reading stayed for ever: its stream is reset in time (h2)
    | - | test_http2_unread_stream_is_reset_in_time
An HTTP/1.1 client that stopped reading could not be timed out: TCP_USER_TIMEOUT (tcp_server)
    | - | test_front_stalled_reader_is_cut_off_with_bounded_memory
        test_hypercorn_stalled_reader_does_not_delay_shutdown
GOAWAY aborted running requests: they finish, then the connection ends (h2)
    | - | test_goaway_lets_running_requests_finish_then_closes
A truncated response over HTTP/2 never ended: the stream is reset after its last byte (h2)
    | - | test_http2_truncated_response_is_reset_after_last_byte
A drain cut off the ends of HTTP/2 streams: the connection ends after them (h2)
    | - | test_http2_streams_finish_while_server_drains
A client that pipelined and left leaked a task: a failed send ends the connection (tcp_server)
    | - | test_front_hundred_pipelining_clients_disconnecting_leak_nothing
`Upgrade: h2c` was followed: ignored; HTTP/2 with prior knowledge is served (h11)
    | - | test_http2_upgrade_is_declined test_http2_with_prior_knowledge_is_served
Ambiguous framing, malformed Host, unknown versions and expectations, CONNECT and TRACE were
accepted: rejected (h11)
    | - | test_hypercorn_suspicious_request_is_refused_with_close
100 Continue was sent before the application saw the request: when it receives (tasks, h11)
    | - | test_front_continue_is_sent_when_body_is_read
Folded lines, bare CR and LF, and chunks were read leniently: as strict as the lane (strict_h11)
    | - | test_front_refusal_before_application_is_logged
Bytes after the last request of a connection rejected that request: dropped (strict_h11)
    | - | test_front_last_request_with_bytes_after_it_is_answered
Websockets buffered without limit and blocked the loop: limited (websocket)
    | - | test_websocket_flood_is_closed_with_its_code test_websocket_message_size_limit_is_exact
Request heads and silent bodies had no time limit: they have (tcp_server)
    | - | test_front_slow_head_is_timed_out test_front_silent_body_is_timed_out
A client that still sends lost an early response: the connection lingers (tcp_server)
    | - | test_front_early_response_reaches_client_still_sending
The final message recycled the connection inside quart-trio's task: sent after it (final_message)
    | - | test_hypercorn_connection_close_after_quart_route_is_honoured
        test_hypercorn_keep_alive_expires_after_quart_route
"""
