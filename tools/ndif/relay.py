"""Passes TCP connections on: into another network namespace, or with faults on the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

Fault = Callable[[bytes], bytes | None]
"""What becomes of bytes on their way back to the client; None ends the connection."""


class Relay:
    """Listens on 127.0.0.1 and passes each connection on to another port there.

    The listening socket stays in the network namespace it was opened in; the connections behind it
    are made in that of the thread that calls ``start``.

    Args:
        port: to listen on; 0 is any free one.
        fault: what becomes of the server's bytes, asked for each piece of them as it comes.
    """

    def __init__(self, port: int = 0, fault: Fault = lambda data: data) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault = fault

    def start(self, target: int) -> Relay:
        """Pass connections on to a port, from now on."""
        threading.Thread(target=self._accept, args=(target,), daemon=True).start()
        return self

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else accept goes on waiting
        self._listener.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, target: int) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", target))
            except OSError:  # nobody listens there at the moment
                client.close()
                continue
            args = (client, server)
            threading.Thread(target=self._connect, args=args, daemon=True).start()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        """Pass one connection's bytes on in both directions until either side ends it."""
        with client, server:
            there = threading.Thread(target=pass_on, args=(client, server, None), daemon=True)
            there.start()
            pass_on(server, client, lambda data: self.fault(data))
            there.join()


def pass_on(one: socket.socket, other: socket.socket, fault: Fault | None) -> None:
    """Pass bytes on in one direction until it ends, and end the connection."""
    with suppress(OSError):
        while data := one.recv(1 << 16):
            changed = data if fault is None else fault(data)
            if changed is None:
                break
            other.sendall(changed)
    for side in (one, other):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
