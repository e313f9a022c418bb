"""uvicorn's HTTP protocol with a bound on what comes before a body; without one, headers without end fill the memory."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# As much as h11 and most proxies take.
MAX_HEAD_BYTES = 65_536


class BoundedHead(HttpToolsProtocol):
    """For ``uvicorn --http api.bounded_head:BoundedHead``: a longer head is answered 400 and the connection closed.

    Counted are the bytes as they arrive, in pieces of what the socket gives: the parser keeps a header that has not ended yet
    to itself. A piece that ends a request is not counted, so a head may be longer than the bound by one piece.
    """

    _is_in_head = True
    _requests_ended = 0
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request."""
        was_in_head, before = self._is_in_head, self._requests_ended
        super().data_received(data)
        if not (was_in_head and self._is_in_head and before == self._requests_ended):
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"expected at most {MAX_HEAD_BYTES} bytes before the body")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole; the next bytes are another head."""
        self._is_in_head = True
        self._requests_ended += 1
        super().on_message_complete()
