"""Where a run takes place, if not here: a server, and what its requests may be."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from urllib.parse import urlsplit

import torch

from ..arguments import checked
from ..checks import whole
from ..errors import RemoteError
from .narrow import require_floating
from .payload import PAYLOAD_LIMIT


@checked(own=("url", "dtype", "payload_limit", "requests"))
@dataclass(frozen=True)
class Server:
    """A server to run on: NDIF, another one, or this process by way of a request.

    Args:
        url: a server's address, with http:// or https://; None is the NDIF host that nnsight is
            set to; ``"local"`` makes requests and runs them here, one after another.
        dtype: of the matrices that are sent; None sends each in the narrowest dtype that holds it
            exactly.
        payload_limit: the most bytes a request may have.
        requests: how many requests may be queued or running at once.
        timeout: seconds that a call waits for the server's results; None waits as long as it takes.
            When they are over the call is a ``RemoteError``. With ``checkpoint=``, ``folder=`` or
            ``file=`` the same call takes up what was under way; without, requests go on unheard.

    Raises:
        RemoteError: for an address without its scheme, a dtype that is not a floating one, a
            count below 1, or a timeout that is not above 0.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> here = sf.run(model, "hello", max_new_tokens=2)
        >>> there = sf.run(model, "hello", max_new_tokens=2, on=sf.remote.Server("local"))
        >>> here.texts == there.texts
        True
    """

    url: str | None = None
    _: KW_ONLY
    dtype: torch.dtype | None = None
    payload_limit: int = PAYLOAD_LIMIT
    requests: int = 4
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not (self.url is None or self.is_local):
            if not _address(self.url):
                raise RemoteError(
                    f"Server: `url` is {self.url!r}, wanted an address with http:// or https://,"
                    ' "local", or None for NDIF. Try: Server("http://127.0.0.1:8001")'
                )
            object.__setattr__(self, "url", self.url.rstrip("/"))
        require_floating(self.dtype)
        for name in ("payload_limit", "requests"):
            whole("Server", name, getattr(self, name), error=RemoteError)
        require_seconds("Server", self.timeout)

    @property
    def is_local(self) -> bool:
        """Whether requests are made and run in this process."""
        return self.url == "local"

    @property
    def remote(self) -> bool | str:
        """The same for nnsight's ``remote=``."""
        return True if self.url is None else self.url


def require_seconds(where: str, timeout: float | None) -> None:
    """Refuse a time limit that is none.

    Raises:
        RemoteError: for anything but seconds above 0 and at most a year, or None.
    """
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is None or (number and 0 < timeout <= 366 * 24 * 3600):
        return
    raise RemoteError(
        f"{where}: `timeout` is {timeout!r}, wanted seconds above 0, or None for no limit. Likely"
        " cause: 0 or infinity for no limit. Try: timeout=600.0"
    )


def _address(url: object) -> bool:
    """Whether a text names a host, and a port only if there is such a one."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        return (
            parts is not None
            and parts.scheme in ("http", "https")
            and bool(parts.hostname and (parts.port is None or parts.port > 0))
        )
    except ValueError:  # a port above 65,535, brackets that do not match
        return False


NDIF = Server()
"""The host that nnsight is set to."""
