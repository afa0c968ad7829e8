"""Devices that are not there: CPU tensors with a home, in operations that refuse to mix homes.

What fake tensors cannot, since what depends on data is run here for real. ``mps:0`` and ``mps:1``
are only names, which torch lets a device have without the hardware. A tensor without a home (one
made where the mode does not see, as in the engine's backward) goes with any other, and so do
scalars and, as indices, tensors on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

HERE, THERE = torch.device("mps:0"), torch.device("mps:1")
CPU = torch.device("cpu")


class TwoDevices(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.homes = WeakTensorKeyDictionary()
        self.checked = 0

    def put(self, module: torch.nn.Module, home: torch.device) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.homes[tensor] = home

    def bring(self, home: torch.device):
        """A pre-hook that moves a block's inputs, as device_map has it."""

        def moved(_, args, kwargs):
            return tree_map_only(torch.Tensor, lambda t: t.to(home), (args, kwargs))

        return moved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.homes.get(args[0], CPU)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._to(func, args, kwargs)
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if wanted is not None:
            kwargs["device"] = CPU
        if func is torch.autograd.grad:  # each gradient is where what it belongs to is
            out = func(*args, **kwargs)
            inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
            inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
            for slope, leaf in zip(out, inputs, strict=True):
                self._settle(slope, self.homes.get(leaf))
            return out
        home = wanted or self._one(func, args, kwargs)
        out = func(*args, **kwargs)
        tree_map_only(torch.Tensor, lambda t: self._settle(t, home), out)
        return out

    def _to(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        x = args[0]
        if func is torch.Tensor.cpu:
            device, dtype = CPU, None
        elif len(args) > 1 and isinstance(args[1], torch.Tensor):
            device, dtype = self.homes.get(args[1], CPU), args[1].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        here = self.homes.get(x)
        out = x if dtype is None else func(x, dtype)
        if device is None or device == here:
            return self._settle(out, here)
        out = out.clone() if out is x else out
        self.homes.pop(out, None)
        return self._settle(out, None if device == CPU else device)

    def _settle(self, tensor: Any, home: torch.device | None) -> Any:
        if isinstance(tensor, torch.Tensor) and home is not None and home != CPU:
            self.homes.setdefault(tensor, home)
        return tensor

    def _one(self, func: Any, args: tuple, kwargs: dict) -> torch.device | None:
        """The home of an operation's tensors, if they have one and the same."""
        self.checked += 1
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_):
            index = [t for t in tree_flatten(args[1])[0] if isinstance(t, torch.Tensor)]
            self._same(func, [args[0], *(t for t in index if t in self.homes)])
            return self.homes.get(args[0])
        return self._same(func, tree_flatten((args, kwargs))[0])

    def _same(self, func: Any, values: list) -> torch.device | None:
        tensors = [t for t in values if isinstance(t, torch.Tensor) and t.dim() > 0]
        homes = {self.homes[t] for t in tensors if t in self.homes}
        if len(homes) > 1:
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name} of tensors on {' and '.join(sorted(map(str, homes)))}")
        return next(iter(homes), None)
