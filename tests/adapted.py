"""A stand-in for PEFT: a few lines that call a model as PEFT's own classes do (0.21, compared).

* The wrapper's call goes to the tuner's call, which runs the inner model's ``forward``: hooks on
  the inner model itself do not run. It passes on ``return_dict=None``.
* ``generate`` is the inner model's, which calls the inner model alone: hooks on the wrapper do not
  run.
* Layers hold what they replaced as ``base_layer``, and say which adapters are active.
"""

from __future__ import annotations

import types

import torch
from torch import nn

from helpers import build

NAMES = ("careful", "loud")
TARGETS = ("q_proj", "o_proj", "down_proj", "c_attn")


class AdaptedLayer(nn.Module):
    """A projection plus a product of two thin matrices, one pair for each adapter."""

    def __init__(self, base: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        width = base.weight.shape  # nn.Linear's [out, in], Conv1D's [in, out]
        self.in_features, self.out_features = width if hasattr(base, "nf") else width[::-1]
        self.base_layer, self.disable_adapters = base, False
        self._active_adapter, self.merged_adapters = [NAMES[0]], []
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in NAMES:
            down, up = ((n, 2) for n in (self.in_features, self.out_features))
            self.down[name] = torch.randn(down, generator=generator) * 0.2
            self.up[name] = torch.randn(up, generator=generator) * 0.2

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    def update(self, name: str) -> torch.Tensor:
        return self.down[name] @ self.up[name].T  # [in, out]

    def merge(self, sign: int = 1) -> None:
        for name in self._active_adapter:
            change = sign * self.update(name).detach()
            self.base_layer.weight.data += change if hasattr(self.base_layer, "nf") else change.T
        self.merged_adapters = list(self._active_adapter) if sign > 0 else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.disable_adapters or self.merged_adapters:
            return y
        return y + sum(x @ self.update(name) for name in self._active_adapter)


class Tuner(nn.Module):
    """As LoraModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(4)
        for part in list(model.modules()):
            for name, child in list(part.named_children()):
                if name in TARGETS:
                    setattr(part, name, AdaptedLayer(child, generator))

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class PeftModel(nn.Module):
    """As PeftModelForCausalLM."""

    active_peft_config = types.SimpleNamespace(is_prompt_learning=False)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config = Tuner(model), model.config
        self.generation_config = getattr(model, "generation_config", None)

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs):
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.base_model(**given, return_dict=return_dict, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def layers(self) -> list[AdaptedLayer]:
        return [part for part in self.modules() if isinstance(part, AdaptedLayer)]

    def set_adapter(self, *names: str) -> None:
        for layer in self.layers():
            layer._active_adapter = list(names)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def adapted(family: str = "llama", model: nn.Module | None = None) -> PeftModel:
    """A tiny model with two adapters, the first of them active."""
    return PeftModel(build(family) if model is None else model).eval()
