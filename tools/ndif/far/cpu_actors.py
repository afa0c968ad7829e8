"""The released model actors on a machine without a GPU.

How a request is read, run, saved and answered is the released code's. Two places are replaced:
loading, since there is no GPU to place weights on, and CUDA's synchronization after each request.
"""

from __future__ import annotations

import os
from typing import Any

import crossings
import ray
import torch
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


class OnCPU:
    """Loads the model on the CPU; eviction ends the replica, there being nowhere to park it."""

    CACHEABLE = False

    def load_from_disk(self) -> HuggingFaceModel:
        """The model in the deployment's dtype, without gradients of its weights."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        # nnsight 0.8.1 hands this on to models that do not take it.
        options = {name: value for name, value in self.kwargs.items() if value is not False}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **options
        )
        model._module.requires_grad_(False)
        return model


@ray.remote(num_cpus=0, max_restarts=-1)
class Beside(OnCPU, BaseModelDeployment):
    """Runs a block beside the model, as NDIF does for trusted keys."""


@ray.remote(num_cpus=0, max_restarts=-1)
class Sandboxed(OnCPU, SandboxModelDeployment):
    """Runs a block in a process of its own, as NDIF does for ordinary keys.

    Without authentication the API takes every request for a trusted one.
    """

    def open_pool(self, *args: Any, **options: Any) -> None:
        """Warm the released pool of runners; count what crosses to them if that is asked for."""
        crossings.count()
        super().open_pool(*args, **options)

    async def run(self, request: Any) -> None:
        """Run a request as one of an ordinary key."""
        request.trusted = False
        await super().run(request)
