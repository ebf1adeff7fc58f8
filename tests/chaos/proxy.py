"""A TCP proxy in front of an S3 server that does harm: an own process, and the faults that it draws.

It understands as much of HTTP as it takes to do harm at a chosen place of one request or answer. Requests pass as they
are, with their Host header, which signatures cover. One fault at most is done to one request; what is done is counted.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

RATES: Mapping[str, float] = {
    "latency": 0.15,
    "reset": 0.012,
    "stall": 0.006,
    "burst": 0.006,
    "expired": 0.004,
    "truncated": 0.02,
    "corrupted": 0.02,
    "dropped": 0.02,
}
"""Probability of each fault for a request that it can be done to. At these a request still ends within its retries."""
MEANING: Mapping[str, str] = {
    "latency": "an answer that comes 5 to 80 ms late",
    "reset": "a connection reset before the request is passed on",
    "stall": "an answer that pauses in its midst for 0.2 to 1.5 s",
    "burst": "answers of 500, 503 or 429, up to 4 in a row",
    "expired": "403 ExpiredToken",
    "truncated": "a body that ends early",
    "corrupted": "a body with one flipped bit",
    "dropped": "a PUT that succeeds and whose answer never comes",
}
_OF_BODIES = {"truncated", "corrupted"}
_OF_PUTS = {"dropped"}
_BURST = ((500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"))
_REASONS = {500: "Internal Server Error", 503: "Service Unavailable", 429: "Too Many Requests", 403: "Forbidden"}


@dataclass
class Faults:
    """Draws what happens to each request; the same seed and the same order of requests give the same faults."""

    seed: str
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._burst: list[tuple[int, str]] = []

    def draw(self, method: str) -> str | None:
        """The fault for the next request of that method."""
        if self._burst:
            return "burst"
        chance = self.random.random()
        for kind, rate in self.rates.items():
            if (kind in _OF_BODIES and method != "GET") or (kind in _OF_PUTS and method != "PUT"):
                continue
            chance -= rate
            if chance < 0:
                return kind
        return None

    def answer(self) -> tuple[int, str]:
        """Status and code of the next answer of a burst, which begins here if none is going on."""
        if not self._burst:
            self._burst = [self.random.choice(_BURST)] * self.random.randint(1, 4)
        return self._burst.pop()


@dataclass
class Message:
    """A request or an answer: its first line and headers as they came, and its body."""

    head: bytes
    body: bytes

    @property
    def first(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")


class Reset(Exception):
    """Close the client's connection at once."""


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Everything up to the empty line; empty where the other side has closed."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def _without(head: bytes, name: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join([lines[0], *(line for line in lines[1:] if line.partition(b":")[0].strip().lower() != name)])


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
    head = await _head(reader)
    if not head:
        return None
    if (_header(head, b"expect") or b"").lower() == b"100-continue":  # no part of what is signed
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = _without(head, b"expect")
    return Message(head, await reader.readexactly(int(_header(head, b"content-length") or 0)))


async def _answer(reader: asyncio.StreamReader, method: str) -> Message:
    """Raises Reset when the server has closed. A body in chunks is put together and gets a length."""
    head = await _head(reader)
    while head.startswith(b"HTTP/1.1 100"):
        head = await _head(reader)
    if not head:
        raise Reset
    status = int(head.split(b" ", 2)[1])
    if method == "HEAD" or status in (204, 304):
        return Message(head, b"")
    if (_header(head, b"transfer-encoding") or b"").lower() == b"chunked":
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await _trailers(reader)
        head = _without(head, b"transfer-encoding")
        return Message(head[:-2] + f"Content-Length: {len(body)}\r\n\r\n".encode(), body)
    return Message(head, await reader.readexactly(int(_header(head, b"content-length") or 0)))


async def _trailers(reader: asyncio.StreamReader) -> None:
    while (await reader.readline()).strip():
        pass


def _error(status: int, code: str, method: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>chaos</Message></Error>'.encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)


class Proxy:
    """What runs in the proxy's process."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self.faults = Faults("", rates={})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, to the end."""
        upstream = await asyncio.open_connection(*self._upstream)
        try:
            while (request := await _request(reader, writer)) is not None:
                await self._pass(request, writer, upstream)
                await writer.drain()
        except (Reset, OSError, asyncio.IncompleteReadError):
            with contextlib.suppress(OSError, AttributeError):
                linger = struct.pack("ii", 1, 0)  # closed by a reset, not in good order
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        finally:
            writer.close()
            upstream[1].close()

    async def _pass(
        self,
        request: Message,
        writer: asyncio.StreamWriter,
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        faults, method = self.faults, request.first[0]
        fault = faults.draw(method)
        if fault in ("reset", "burst", "expired", "latency"):
            faults.done[fault] += 1
        if fault == "reset":
            raise Reset
        if fault in ("burst", "expired"):
            status, code = faults.answer() if fault == "burst" else (403, "ExpiredToken")
            writer.write(_error(status, code, method))
            return
        upstream[1].write(request.head + request.body)
        answer = await _answer(upstream[0], method)
        if fault == "latency":
            await asyncio.sleep(faults.random.uniform(0.005, 0.08))
        well = 200 <= int(answer.first[1]) < 300
        if fault == "dropped" and well:
            faults.done[fault] += 1
            raise Reset
        if fault == "stall":
            await self._stalled(answer.head + answer.body, writer)
        elif fault in _OF_BODIES and well and answer.body:
            await self._spoilt(answer, writer, fault)
        else:
            writer.write(answer.head + answer.body)

    async def _stalled(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        faults = self.faults
        faults.done["stall"] += 1
        place = faults.random.randrange(len(data))
        writer.write(data[:place])
        await writer.drain()
        await asyncio.sleep(faults.random.uniform(0.2, 1.5))
        writer.write(data[place:])

    async def _spoilt(self, answer: Message, writer: asyncio.StreamWriter, fault: str) -> None:
        """Raises Reset after a body that ends early."""
        faults, body = self.faults, answer.body
        faults.done[fault] += 1
        place = faults.random.randrange(len(body))
        if fault == "truncated":
            writer.write(answer.head + body[:place])
            await writer.drain()
            raise Reset
        flipped = bytes([body[place] ^ (1 << faults.random.randrange(8))])
        writer.write(answer.head + body[:place] + flipped + body[place + 1 :])


async def _serve(upstream: str) -> None:
    """Announce the port, then obey orders from stdin, one JSON document a line, each answered by one."""
    parts = urlsplit(upstream)
    proxy = Proxy((parts.hostname or "", parts.port or 80))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 24)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        done = proxy.faults.done
        order = json.loads(line)
        proxy.faults = Faults(order["seed"], rates=order["rates"])
        print(json.dumps({"done": done}), flush=True)


class Running:
    """The proxy's process, seen from outside."""

    def __init__(self, upstream: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.proxy", upstream],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoint = f"http://127.0.0.1:{self._read()['port']}"

    def begin(self, seed: str, rates: Mapping[str, float] = RATES) -> Counter[str]:
        """From now on draw faults from that seed; returns those done since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"seed": seed, "rates": dict(rates)}) + "\n")
        self._process.stdin.flush()
        return Counter(self._read()["done"])

    def end(self) -> Counter[str]:
        """Do no more harm; returns the faults done since the last call."""
        return self.begin("", {})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
