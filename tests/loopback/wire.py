"""The little of HTTP and of websockets that nnsight's clients use, for the server's side.

The standard library has an HTTP server and no websockets; what nnsight needs of them is one
handshake and text frames in one direction.
"""

from __future__ import annotations

import base64
import hashlib
from email.parser import BytesParser
from email.policy import HTTP
from io import BufferedIOBase
from typing import Any

MOST = 1 << 20
"""Bytes of a frame that a client may send; nnsight's send nothing."""

_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def accept_key(key: str) -> str:
    """The answer to a client's ``Sec-WebSocket-Key``."""
    return base64.b64encode(hashlib.sha1((key + _MAGIC).encode()).digest()).decode()


def text_frame(text: str) -> bytes:
    """One unmasked text frame, as a server sends it."""
    data = text.encode()
    if len(data) < 126:
        return bytes([0x81, len(data)]) + data
    if len(data) < 1 << 16:
        return bytes([0x81, 126]) + len(data).to_bytes(2, "big") + data
    return bytes([0x81, 127]) + len(data).to_bytes(8, "big") + data


def wait_closed(stream: BufferedIOBase) -> None:
    """Read and drop what a websocket client sends until it closes or goes away."""
    while head := stream.read(2):
        if len(head) < 2 or head[0] & 0x0F == 8:  # the closing frame
            return
        size = head[1] & 0x7F
        if size >= 126:
            size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
        if size > MOST:
            return
        stream.read(size + (4 if head[1] & 0x80 else 0))


def form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a multipart form, by name."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message: Any = BytesParser(policy=HTTP).parsebytes(head + body)
    found = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        found[str(name)] = part.get_payload(decode=True)
    return found
