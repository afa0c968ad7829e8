"""The released deployment of a model: what of it differs where it runs alone, and on a CPU.

How a request is read, run, timed, saved and answered is NDIF's own, and so are the runners of
sandboxed blocks and what crosses to them. Ours: where the weights are placed, faults that tests ask
for, more patience with a busy machine, and counting.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ndif.services.ray.sandbox.host import Connection, Pool, Sandbox, spawn
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from ndif.services.ray.sandbox.protocol import unpack
from nnsight import TransformersModel
from nnsight.intervention.interleaver import Pending
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.util import to_import_path
from transformers import AutoConfig
from transformers.utils import logging

STARTING = 600.0
"""Seconds a runner may take to start: a busy machine is slow, and not wrong. NDIF waits 30."""


class Counted(Connection):
    """The connection to a runner, with what crosses it counted; the request itself is not."""

    parks = trips = sent = received = 0
    _begun = False

    def send_raw(self, data: bytes) -> None:
        """Of the messages after the request, each lets the block run on."""
        if self._begun:
            self.trips += 1
            self.sent += len(data)
        self._begun = True
        super().send_raw(data)

    def recv(self, timeout: float | None = None) -> Any:
        """Blocks park as ``Pending``; what they have read is sent back as a plain tuple."""
        data = self.recv_raw(timeout)
        values, named = unpack(data, self.map_location)
        kind, *rest = values
        if kind != "END":
            self.received += len(data)
        parks = {"INTERLEAVE": lambda: rest[1], "PARK": lambda: rest[1:2]}.get(kind, list)()
        self.parks += sum(isinstance(park, Pending) for park in parks)
        return values, named


class Box(Sandbox):
    """A runner whose connections are counted; the last one is kept."""

    last: Counted | None = None

    def connection(self, timeout: float = 60.0) -> Connection:
        self.last = Counted.open(self.path, timeout)  # type: ignore[assignment]
        return self.last  # type: ignore[return-value]


class Runners(Pool):
    """Fresh runners, started ahead; or one that serves every request, where that is asked for."""

    def __init__(self, fresh: bool, **options: Any) -> None:
        self._fresh, self._kept = fresh, None
        super().__init__(size=2 if fresh else 1, **options)

    def _spawn(self) -> Box:
        box = spawn(self.python, self.quiet, STARTING, self.peers, self.model_key)
        return Box(box.path, box.process)

    def warm(self) -> None:
        """Wait until one is ready: a job's time is counted from before it has a runner."""
        self.ready.put(self.ready.get(timeout=STARTING))

    def acquire(self, timeout: float = STARTING) -> Any:
        """A runner; it is the caller's to stop unless it is kept."""
        if self._fresh:
            return super().acquire(timeout)
        if self._kept is None or self._kept.process.poll() is not None:
            self._kept = self.ready.get() if self.ready.qsize() or self.spawning else self._spawn()
        return self._kept


class Deployment(SandboxModelDeployment):
    """The actor that runs requests; see ``loopback.serve`` for the set-up."""

    def __init__(self, setup: dict[str, Any], crossed: Callable[[list[int]], None]) -> None:
        self._setup, self._crossed = setup, crossed
        self.fault: str | None = None
        self.late = False
        torch.set_num_threads(setup["threads"])
        logging.disable_progress_bar()
        where = {"repo_id": setup["folder"], "revision": None, "task": "text-generation"}
        dtype = setup["dtype"]
        if dtype == "auto":
            dtype = str(AutoConfig.from_pretrained(setup["folder"]).dtype or torch.float32)
        super().__init__(
            f"{to_import_path(TransformersModel)}:{json.dumps(where)}",
            execution_timeout=setup["timeout"],
            dtype=dtype.removeprefix("torch."),
        )

    def load_from_disk(self) -> HuggingFaceModel:
        """As the released one does it, where the assigned devices need not be GPUs."""
        placement = {"device_map": self._setup["device_map"] or "cpu"}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, **placement
        )
        model._module.requires_grad_(False)
        return model

    def open_pool(self, pool_size: int | None = None, peers: int = 1) -> None:
        """Start runners at the first request that needs one, or now if all will."""
        self.pool: Any = None
        self.execution_sandbox: Any = None
        if self._setup["sandbox"]:
            self.start_runners()
            self.pool.warm()

    def start_runners(self) -> None:
        """Runners start as ``far/runner.py``, which blocks our packages and ends with us."""
        os.environ["OMP_NUM_THREADS"] = str(self._setup["threads"])  # runners inherit it
        script = Path(self._setup["scratch"]) / "runner"
        file, skeleton = Path(__file__).with_name("runner.py"), self._setup["skeleton"]
        first = [sys.executable, "-sP", str(file), str(os.getpid()), "skeleton" if skeleton else ""]
        script.write_text(f'#!/bin/sh\nexec {shlex.join(first)} "$@"\n')
        script.chmod(0o700)
        self.pool = Runners(self._setup["fresh"], python=str(script), model_key=self.model_key)

    def execute(self, request: Any) -> Any:
        """The released one, and the fault that was asked for."""
        if self.fault == "slow":
            time.sleep(self._setup["slow"])
        if self.fault == "fail":
            raise RuntimeError("CUDA out of memory (the fault that was asked for)")
        if not request.trusted and self.pool is None:
            self.start_runners()
        done = super().execute(request)
        if self.fault == "die":
            os._exit(9)
        return done

    def prepare_result(self, request: Any, data: bytes) -> bytes:
        """The released one; half of it if that fault was asked for."""
        whole = super().prepare_result(request, data)
        return whole[: len(whole) // 2] if self.fault == "truncate" else whole

    def report(self, request: Any, status: str, *rest: Any, **more: Any) -> None:
        """Note a job that was ended: the thread it ran in may still be told so in the next one."""
        self.late = self.late or status == "timeout"
        super().report(request, status, *rest, **more)

    def discard_sandbox(self) -> None:
        """Tell what crossed, before the client hears of the end; stop the runner unless kept."""
        box = self.execution_sandbox
        if box is not None and box.last is not None:
            seen = box.last
            self._crossed([seen.parks, seen.trips, seen.sent, seen.received])
        if self._setup["fresh"]:
            super().discard_sandbox()
        self.execution_sandbox = None
