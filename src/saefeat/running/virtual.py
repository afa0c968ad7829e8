"""Virtual tokens that a wrapper puts before the text: a model called through it cannot see them.

Prefix tuning fills the cache, as an earlier text would, and prompt tuning gives embeddings: in a
forward pass of the model inside nothing tells a virtual token from a real one. Its callers do.
"""

from __future__ import annotations

import sys

from torch import nn

from ..errors import ModelError


def require_real_tokens(module: nn.Module) -> None:
    """Refuse a forward pass that a PEFT model with virtual tokens has asked for.

    Raises:
        ModelError: naming the wrapper.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not module:
            # of PEFT's models (0.21, tried): prefix, prompt and p-tuning, and adaption prompts
            tuned = getattr(caller, "active_peft_config", None)
            if getattr(tuned, "is_prompt_learning", False):
                _refuse(module, caller)
        frame = frame.f_back


def _refuse(module: nn.Module, caller: nn.Module) -> None:
    raise ModelError(
        f"hooked: `model` is a {type(module).__name__} called through a {type(caller).__name__}"
        " that puts virtual tokens before the text, wanted the text's own tokens: token rules"
        " would count the virtual ones. Likely cause: prefix, prompt or p-tuning. Try: call the"
        " model that hooked was given, or an adapter such as LoRA, merged into the weights"
    )
