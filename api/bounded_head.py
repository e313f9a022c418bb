"""uvicorn's HTTP protocol with a bound on headers and trailers; without one, those without end fill the memory."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# As much as h11 and most proxies take.
MAX_HEAD_BYTES = 65_536


class BoundedHead(HttpToolsProtocol):
    """For ``uvicorn --http api.bounded_head:BoundedHead``: a longer head is answered 400 and the connection closed.

    So are longer trailers, the headers behind a chunked body. Counted are the bytes as they arrive, in pieces of what the
    socket gives: the parser keeps a header that has not ended yet to itself. A piece with a byte of a body, or with the end of a
    head or of a request, begins the count anew, so a head may be longer than the bound by one piece.
    """

    _has_advanced = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request."""
        self._has_advanced = False
        super().data_received(data)
        self._head_bytes = 0 if self._has_advanced else self._head_bytes + len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            said = f"expected at most {MAX_HEAD_BYTES} bytes of headers or trailers"
            self.logger.warning("a request is refused: %s", said)
            self.send_400_response(said)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._has_advanced = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body; more may follow, or trailers."""
        self._has_advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; the next bytes are another head."""
        self._has_advanced = True
        super().on_message_complete()
