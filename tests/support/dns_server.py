"""A small DNS server on loopback, for UDP and TCP."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import trio


class DnsServer:
    """Answers with `records`, by name and type; others do not exist.

    rcode: answers all questions with this code instead. silent: answers nothing. truncate: answers
    over UDP have no room, so clients must come by TCP. trim: records that an answer over UDP has at
    most, without a word about the others, as Consul's. no_tcp: connections are closed at once.
    additional: sent beside every answer. failing: names whose questions are answered with SERVFAIL.
    held: names whose questions are answered only when `together` of them wait.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.ttl = 30
        self.rcode: dns.rcode.Rcode | None = None
        self.silent = False
        self.truncate = False
        self.trim: int | None = None
        self.no_tcp = False
        self.held: set[str] = set()
        self.together = 0
        self.most_held = 0
        self._waiting: list[tuple[bytes, Any]] = []
        self.failing: set[str] = set()
        self.additional: dict[tuple[str, str], list[str]] = {}
        self.questions: list[str] = []
        self.port = 0

    def reply(self, query: bytes, *, tcp: bool) -> bytes | None:
        message = dns.message.from_wire(query)
        (question,) = message.question
        name, kind = question.name.to_text(), dns.rdatatype.to_text(question.rdtype)
        self.questions.append(f"{name} {kind}{' tcp' if tcp else ''}")
        if self.silent:
            return None
        response = dns.message.make_response(message)
        if self.rcode is not None:
            response.set_rcode(self.rcode)
        elif name in self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif (name, kind) in self.records:
            texts = self.records[name, kind]
            if not tcp:
                texts = texts[: self.trim]
            if self.truncate and not tcp:
                response.flags |= dns.flags.TC
            elif texts:
                response.answer.append(dns.rrset.from_text(name, self.ttl, "IN", kind, *texts))
                response.additional += [
                    dns.rrset.from_text(about, self.ttl, "IN", also, *values)
                    for (about, also), values in self.additional.items()
                ]
        elif not any(known == name for known, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire(max_size=65535)

    async def _udp(self, sock: trio.socket.SocketType) -> None:
        while True:
            query, client = await sock.recvfrom(65535)
            for waiting, sender in self._due(query, client):
                answer = self.reply(waiting, tcp=False)
                if answer is not None:
                    await sock.sendto(answer, sender)

    def _due(self, query: bytes, client: Any) -> list[tuple[bytes, Any]]:
        """The questions to answer now, with their senders."""
        if dns.message.from_wire(query).question[0].name.to_text() not in self.held:
            return [(query, client)]
        self._waiting.append((query, client))
        self.most_held = max(self.most_held, len(self._waiting))
        if len(self._waiting) < self.together:
            return []
        due, self._waiting = self._waiting, []
        return due

    async def _tcp(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self.no_tcp:
                return
            data = b""
            while len(data) < 2 or len(data) < 2 + struct.unpack("!H", data[:2])[0]:
                more = await stream.receive_some()
                if not more:
                    return
                data += more
            answer = self.reply(data[2:], tcp=True)
            if answer is not None:
                await stream.send_all(struct.pack("!H", len(answer)) + answer)


async def _listen() -> tuple[trio.socket.SocketType, list[trio.SocketListener]]:
    """Sockets for UDP and TCP on one port."""
    while True:
        udp = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        try:
            return udp, await trio.open_tcp_listeners(udp.getsockname()[1], host="127.0.0.1")
        except OSError:  # another program has the port for TCP
            udp.close()


@asynccontextmanager
async def dns_server() -> AsyncIterator[DnsServer]:
    server = DnsServer()
    udp, listeners = await _listen()
    server.port = udp.getsockname()[1]
    with udp:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server._udp, udp)
            nursery.start_soon(trio.serve_listeners, server._tcp, listeners)
            yield server
            nursery.cancel_scope.cancel()
