"""Stand-ins for what a deployment of NDIF talks to beside its model: Ray, Redis, an object store.

The released modules for these connect when they are imported. Here modules of the same names hold
what the deployment asks of them, and send on what it publishes and stores, byte by byte as it came.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

Send = Callable[[str, str, bytes], None]
"""Takes ``"publish"`` with a session, or ``"put"`` with a name in the store; and the bytes."""

INLINE = 8 << 20
"""Bytes that go through a stock Redis: ``RedisProvider.max_publish_bytes``."""


class Nothing:
    """Counts, logs and connects to nothing: metrics, Loki, InfluxDB."""

    @classmethod
    def update(cls, **_: Any) -> None:
        """Of a metric."""

    @classmethod
    def connect(cls) -> None:
        """Of a provider."""


class Pipeline:
    """What ``BackendRequestModel.respond`` does with Redis for a result: a key, and a notice."""

    def __init__(self, send: Send) -> None:
        self._send, self._data, self._session = send, b"", ""

    def set(self, key: str, data: bytes, ex: int) -> None:
        self._data = data

    def publish(self, session: str, notice: bytes) -> None:
        self._session = session

    def execute(self) -> list[Any]:
        """Whoever is notified fetches the key, so the client is sent what lies there."""
        self._send("publish", self._session, self._data)
        return [True, 1]


def install(send: Send, url: str) -> None:
    """Put the stand-ins where the released code looks for them, before it is imported."""
    redis = SimpleNamespace(
        publish=lambda session, text: send("publish", session, text.encode()),
        pipeline=lambda: Pipeline(send),
    )
    store = SimpleNamespace(
        put=lambda key, data, content_type=None: send("put", key, data),
        presigned_get=lambda key: f"{url}/result/{key}",
    )
    metrics = "ExecutionTime GPUMem ModelLoadTime RequestResponseSize RequestStatusTime"
    cached = type("CachedActorError", (Exception,), {})
    held = {
        "ray": {
            "remote": lambda **_: lambda actor: actor,
            "get_runtime_context": lambda: SimpleNamespace(current_actor=None),
        },
        "ndif.common.metrics": {f"{name}Metric": Nothing for name in metrics.split()},
        "ndif.common.providers.influx": {"InfluxProvider": Nothing},
        "ndif.common.providers.loki": {"LokiProvider": Nothing},
        "ndif.common.providers.ray": {"CachedActorError": cached},
        "ndif.common.providers.redis": {
            "RedisProvider": SimpleNamespace(sync_client=redis, max_publish_bytes=lambda: INLINE)
        },
        "ndif.common.providers.objectstore": {"ObjectStoreProvider": store},
    }
    for name, values in held.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update(values)
    if not torch.cuda.is_available():  # which the released actor calls after every request
        torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
