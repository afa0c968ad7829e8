"""Messages between the process with the model and the process with the block.

A message is eight bytes with a length, big-endian, then a pickle: both ends run one request's
code anyway. Tensors leave without a graph and without the rest of the storage they look into.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from nnsight.intervention.serialization import dumps, loads
from nnsight.util import apply


class Gone(Exception):
    """The process at the other end has ended."""


class Pipe:
    """Both directions of a connection, unbuffered, with the bytes counted.

    Attributes:
        sent, received: bytes of messages so far.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self.sent = self.received = 0

    def send(self, *message: Any) -> None:
        """Send one message; its first part says what it is."""
        data = dumps(apply(message, alone, torch.Tensor))
        self.sent += len(data)
        whole = memoryview(len(data).to_bytes(8, "big") + data)
        while whole:
            whole = whole[os.write(self._sink, whole) :]

    def receive(self) -> tuple[Any, ...]:
        """The next message.

        Raises:
            Gone: if the other end is.
        """
        size = int.from_bytes(self._read(8), "big")
        self.received += size
        return loads(self._read(size))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._source, min(size - len(data), 1 << 20))
            if not part:
                raise Gone("the other process has ended")
            data += part
        return bytes(data)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without history, and without a larger storage behind it."""
    tensor = tensor.detach()
    own = tensor.is_sparse or tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if own else tensor.clone()
