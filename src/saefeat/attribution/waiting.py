"""A request that is waited for, up to a limit.

nnsight's own wait has none (0.8.1), and a connection that was lost is websocket's error there.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nnsight.intervention.backends.remote import RemoteError as Refused
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status

from ..errors import RemoteError
from ..shipping.client import Client, Deadline

if TYPE_CHECKING:
    from nnsight import TransformersModel

REFRESH = 0.1
"""Seconds between two looks of nnsight's display of statuses, if that is on."""


class Waiting(Client):
    """nnsight's blocking backend, which ends with the deadline of the call that sends requests."""

    def __init__(self, model: TransformersModel, remote: bool | str, deadline: Deadline) -> None:
        super().__init__(model.to_model_key(), remote, deadline)

    def request(self, request: RequestModel, tracer: Any) -> Any:
        """The saved values of one request, statuses and LOG lines shown as nnsight shows them.

        Raises:
            RemoteError: if the time is over, the connection is lost, or an answer is not NDIF's.
        """
        import websocket  # as late as nnsight imports it

        blob = self._serialize(tracer)
        header = {"ndif-api-key": self.api_key} if self.api_key else None
        if self.deadline.over:
            raise self._late()
        try:
            connection = websocket.create_connection(
                f"{self.ws_host}/subscribe", header=header, timeout=self.deadline.left
            )
            try:
                request.session_id = json.loads(connection.recv())["session_id"]
                self.send(request, blob)
                return self._await(connection)
            finally:
                connection.close()
        except (RemoteError, Refused):
            raise
        except (websocket.WebSocketException, OSError) as error:
            if self.deadline.over:
                raise self._late() from error
            raise RemoteError(
                f"Attribute: `on` is {self.host}, whose connection was lost ({error!r:.200}),"
                " wanted a result. Likely cause: the network, or a server that was stopped. Try:"
                " the same call again; with checkpoint= finished batches are kept"
            ) from error
        except Exception as error:  # what json, pydantic, zstd or torch make of another's answer
            raise RemoteError(
                f"Attribute: `on` is {self.host}, whose answer cannot be read ({error!r:.200}),"
                " wanted NDIF's protocol. Likely cause: an answer that was cut short, or an address"
                " where no NDIF server is. Try: the same call again, or Server(url) with the API's"
                " own address"
            ) from error

    def _late(self) -> RemoteError:
        return RemoteError(
            f"Attribute: `on` is {self.host}, without a result after {self.deadline.seconds:g} s,"
            " wanted all within Server(timeout=...). Likely cause: a queue. Try: a longer timeout;"
            " with checkpoint= finished batches are kept"
        )

    def _await(self, connection: Any) -> Any:
        from websocket import WebSocketTimeoutException

        while True:
            left = self.deadline.left
            if left == 0:
                raise self._late()
            wait = [s for s in (left, REFRESH if self.display.enabled else None) if s is not None]
            connection.settimeout(min(wait, default=None))
            try:
                message = connection.recv()
            except WebSocketTimeoutException:
                self.display.refresh()
                continue
            response = self.parse(message)
            result = self.handle(response)
            if response.status == Status.COMPLETED:
                return result


def refused(error: Refused) -> RemoteError:
    """What a server said of a request, as an error of this library."""
    return RemoteError(
        f"Attribute: `on` is a server that gave no result: {error}. Likely cause: the request, the"
        " server or its limits. Try: preflight(model, prompts, on=...), and the same call again"
    )
