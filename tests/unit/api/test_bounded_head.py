"""A real server on loopback: heads and trailers without end are cut, of whatever kind; bodies and later requests are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from api.bounded_head import MAX_HEAD_BYTES, BoundedHead

# The server reads in pieces and the kernel buffers; without a bound all of this would be taken.
FAR_TOO_MUCH = 64 * 1024 * 1024
PIECE = b"x" * 65_536
CHUNKED = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(app, port=0, http=BoundedHead, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", PIECE),
        (b"GET / HTTP/1.1\r\nx: ", PIECE),
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 10_000),
        (b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nx: ", PIECE),
        (CHUNKED + b"0\r\nx: ", PIECE),
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"x: y\r\n" * 10_000),
    ],
    ids=["address", "one header", "many headers", "second request", "one trailer", "many trailers"],
)
async def test_head_without_end_is_cut(
    port: int, begin: bytes, piece: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    refused = asyncio.create_task(reader.readuntil(b"HTTP/1.1 400 "))
    writer.write(begin)
    sent = 0
    while sent < FAR_TOO_MUCH and not refused.done():
        writer.write(piece)
        sent += len(piece)
        await writer.drain()
        await asyncio.sleep(0.001)  # whatever is answered arrives
    writer.close()
    await refused
    assert sent < FAR_TOO_MUCH
    [record] = caplog.records
    assert f"at most {MAX_HEAD_BYTES} bytes" in record.message


async def test_bodies_and_the_requests_after_them_are_taken(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    size = 20 * MAX_HEAD_BYTES
    for _ in range(3):
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(len(str(size))) == str(size).encode()
    writer.close()


async def test_head_of_ordinary_length_is_taken_in_small_pieces(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(b"GET / HTTP/1.1\r\n")
        for number in range(40):
            writer.write(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
            await writer.drain()
        writer.write(b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readexactly(1)
    writer.close()


async def test_trailers_of_ordinary_length_are_taken_and_so_is_the_next_request(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(CHUNKED + b"3\r\nabc\r\n0\r\n")
        for number in range(40):
            writer.write(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
            await writer.drain()
        writer.write(b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(1) == b"3"
    writer.close()
