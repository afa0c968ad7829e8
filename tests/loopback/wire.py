"""The endpoints that nnsight's clients call, as NDIF's API has them, under a secret path."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

if TYPE_CHECKING:
    from .server import Server


class Endpoints:
    """What is answered at which path."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def request(self, request: Request) -> Response:
        """Take a request in; its later statuses go to its session, or wait to be polled."""
        from ndif.common.schema.request import BackendRequestModel

        self.require_version(request.headers.get("nnsight-version", ""))
        async with request.form() as form:
            data, blob = form.get("data"), form.get("blob")
            if not isinstance(data, str) or not isinstance(blob, UploadFile):
                raise HTTPException(422, "the form needs the fields `data` and `blob`")
            try:
                wanted = BackendRequestModel.model_validate_json(data)
            except ValidationError as error:
                raise HTTPException(422, str(error)) from error
            wanted.payload = await blob.read()
        received = self.server.accept(wanted)
        return Response(received.model_dump_json(), media_type="application/json")

    def require_version(self, client: str) -> None:
        """Refuse a client older than the version asked for, if one is.

        Raises:
            HTTPException: in the words of NDIF's API.
        """
        least = self.server.version
        if least is None:
            return
        try:
            old = Version(client) < Version(least)
        except InvalidVersion as error:
            raise HTTPException(400, f"Malformed nnsight version '{client}'.") from error
        if old:
            said = f"Client nnsight version {client} is below the minimum supported {least}."
            raise HTTPException(400, f"{said} Please `pip install --upgrade nnsight`.")

    async def response(self, request: Request) -> Response:
        """The latest status of a request that is polled."""
        name = request.path_params["name"]
        told = self.server.store.get(f"responses/{name}.json")
        if told is None:
            raise HTTPException(404, f"No response for request {name}.")
        return Response(told, media_type="application/json")

    async def result(self, request: Request) -> Response:
        """A result, as the object store gives it."""
        data = self.server.store.get(request.path_params["name"])
        if data is None:
            raise HTTPException(404, "NoSuchKey")
        return Response(data, media_type="application/octet-stream")

    async def env(self, _: Request) -> Response:
        """Python's version and the packages of the worker."""
        return JSONResponse(self.server.environment())

    async def status(self, _: Request) -> Response:
        """The deployments; there is one, and any key that is asked for is taken to be its."""
        one = {"deployment_level": "HOT", "application_state": "RUNNING", "replica_id": "0"}
        return JSONResponse({"deployments": {"loopback": one}})

    async def ping(self, _: Request) -> Response:
        """Whether the server is up."""
        return JSONResponse("pong")

    async def subscribe(self, websocket: WebSocket) -> None:
        """Send the session's id, then statuses as text and a result as binary, till one leaves."""
        await websocket.accept()
        name, queue = self.server.sessions.open()

        async def forward() -> None:
            while (data := await queue.get()) is not None:
                if data[:1] == b"{":
                    await websocket.send_text(data.decode())
                else:
                    await websocket.send_bytes(data)

        async def watch() -> None:
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass

        tasks: list[asyncio.Task[None]] = []
        with suppress(WebSocketDisconnect, RuntimeError):  # the client has gone
            await websocket.send_json({"session_id": name})
            tasks += [asyncio.create_task(forward()), asyncio.create_task(watch())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del self.server.sessions.queues[name]


async def refused(_: Request, error: Exception) -> Response:
    """An error as FastAPI words it."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)


def application(server: Server, path: str) -> Starlette:
    """The endpoints under a path; anything else is not found."""
    ends = Endpoints(server)
    routes = [
        Route("/request", ends.request, methods=["POST"]),
        Route("/response/{name}", ends.response),
        Route("/result/{name}", ends.result),
        Route("/env", ends.env),
        Route("/status", ends.status),
        Route("/ping", ends.ping),
        WebSocketRoute("/subscribe", ends.subscribe),
    ]
    handlers = {HTTPException: refused}
    return Starlette(routes=[Mount(path, routes=routes)], exception_handlers=handlers)
