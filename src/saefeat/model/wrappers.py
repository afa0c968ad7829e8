"""Wrappers: the language model inside of another module, which is what sites are counted from.

A PEFT model is looked through: adapters that add layers (LoRA and its relatives) stand inside the
language model, under the paths that it has without them. So a dictionary, a file and a receipt say
the same with and without an adapter, and which adapter is active shows in the layers themselves.

What a call begins with differs (PEFT 0.21, tried): the wrapper's own call runs the inner model's
``forward``, past its hooks, and its ``generate`` calls the inner model alone, past the wrapper. So
a block reads the inner model's inputs and outputs, which both reach (``root``), and hooks stand on
each module that a call may begin with (``chain``).

Virtual tokens of prompt, prefix and p-tuning are made by the wrapper: the inner model runs without
them, or cannot tell them from text, so they are refused. A wrapper that runs copies of the model
(DataParallel) is refused as well: what is done to the module it holds is not done to its copies.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ModelError, RemoteError
from ..kernel.program import locate


def chain(module: nn.Module) -> list[nn.Module]:
    """The modules from the outermost wrapper to the language model inside, each around the next.

    Raises:
        ModelError: for a wrapper that puts virtual tokens before the text, or runs copies.
    """
    path = _path_inside(module)
    found = [module]
    for name in path.split(".") if path else ():
        _require_eager(found[-1])
        found.append(found[-1].get_submodule(name))
    return found


def inside(module: nn.Module) -> nn.Module:
    """The language model inside a wrapper; any other module as it is.

    Raises:
        ModelError: as ``chain``.
    """
    return chain(module)[-1]


def root(model: Any) -> Any:
    """The part of an nnsight model that every pass of its language model begins with.

    Args:
        model: an nnsight model, or an edited copy of one, inside a block.
    """
    path = _path_inside(model._module)
    return locate(model, path) if path else model


def is_compiled(part: nn.Module) -> bool:
    """Whether a module's calls run code that torch.compile has made of it."""
    whole = getattr(part, "_compiled_call_impl", None) is not None
    return whole or "_orig_mod" in part._modules or hasattr(part.forward, _TRACED)


_TRACED = "_torchdynamo_orig_callable"


def _require_eager(wrapper: nn.Module) -> None:
    if is_compiled(wrapper):
        raise ModelError(
            f"saefeat: `model` is a {type(wrapper).__name__} that is compiled, wanted a wrapper"
            " outside of compiled code. Likely cause: torch.compile: hooks that come later are not"
            " run. Try: the model as it was before torch.compile"
        )


def _path_inside(module: nn.Module) -> str:
    compiled: Any = module._modules.get("_orig_mod")
    if compiled is not None:  # it answers for what it was made of
        if _path_inside(compiled):
            _require_eager(module)
        return ""
    tuner, get_base = (getattr(module, n, None) for n in ("base_model", "get_base_model"))
    if isinstance(tuner, nn.Module) and tuner is not module and callable(get_base):
        _require_no_virtual_tokens(module)
        inner: Any = get_base()
        return next(name for name, part in module.named_modules() if part is inner)
    held = module._modules.get("module")
    if isinstance(held, nn.Module) and type(module).__module__.startswith("torch."):
        _refuse_copies(module)
    return ""


def _require_no_virtual_tokens(module: nn.Module) -> None:
    # of PEFT's models (0.21, tried): prefix, prompt and p-tuning
    if not getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        return
    raise ModelError(
        f"saefeat: `model` is a {type(module).__name__} that puts virtual tokens before the text,"
        " wanted the text's own tokens: token rules would count the virtual ones. Likely cause:"
        " prefix, prompt or p-tuning. Try: peft_model.get_base_model(), which runs without them,"
        " or an adapter of the weights, such as LoRA"
    )


def _refuse_copies(module: nn.Module) -> None:
    raise ModelError(
        f"saefeat: `model` is a {type(module).__name__}, wanted the module inside it: on several"
        " devices it runs copies, which nothing is done to. Likely cause: a model wrapped for"
        " training. Try: data_parallel.module"
    )


def require_logits(function: str, module: nn.Module) -> None:
    """Refuse a model that gives no logits of next tokens: a body without a head, a classifier.

    Raises:
        ModelError: naming the class, and what reads its sites.
    """
    head: Any = getattr(module, "get_output_embeddings", None)
    generates: Any = getattr(module, "can_generate", None)
    if head is None or generates is None or head() is not None or generates():
        return
    raise ModelError(
        f"{function}: `model` is a {type(module).__name__}, which gives no logits of next tokens,"
        " wanted a language model with its head. Likely cause: AutoModel, or a model with a head"
        " for classification. Try: AutoModelForCausalLM; or hooked(model, intervention) and calls"
        " of your own, which need no logits"
    )


def require_unwrapped(function: str, model: Any) -> None:
    """Refuse a wrapper where a request is made: a server has a model of its own, without it.

    Raises:
        RemoteError: naming how a server's model gets an adapter.
    """
    if not _path_inside(model._module):
        return
    raise RemoteError(
        f"{function}: `model` is a {type(model._module).__name__} in a request, wanted a model that"
        " the server has. Likely cause: a wrapper here is none there, so that results would be"
        " without its adapter. Try: TransformersModel(repository, peft=adapter_repository), whose"
        " adapter goes along, or the adapter merged into a repository of its own"
    )
