"""Models that a stack serves: each a folder in Hugging Face's format, a dtype, and an isolation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Isolation = Literal["trusted", "sandbox"]
ACTORS = {"trusted": "cpu_actors.Beside", "sandbox": "cpu_actors.Sandboxed"}
CLASS = "nnsight.modeling.transformers.TransformersModel"


@dataclass(frozen=True)
class Deployment:
    """A model as the server has it.

    Args:
        folder: the model's files. Its path is the model's name, for the server and for nnsight, so
            each deployment has a folder of its own.
        dtype: what the weights are loaded in there, "float32" or "bfloat16".
        isolation: "trusted" runs blocks beside the model, "sandbox" in processes of their own.
        timeout: seconds after which the server ends a job.
    """

    folder: Path
    dtype: str = "float32"
    isolation: Isolation = "trusted"
    timeout: float = 120.0

    @property
    def key(self) -> str:
        """The model's key in requests, as nnsight spells it."""
        task = {"repo_id": str(self.folder), "revision": None, "task": "text-generation"}
        return f"{CLASS}:{json.dumps(task)}"

    def spec(self) -> dict[str, Any]:
        """What ``ndif deploy -f`` reads; the size is given, since there is no Hub to ask."""
        return {
            "checkpoint": str(self.folder),
            "model_key": self.key,
            "size_bytes": 1_000_000,
            "dtype": self.dtype,
            "actor_class": ACTORS[self.isolation],
            "execution_timeout_seconds": self.timeout,
        }
