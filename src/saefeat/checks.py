"""Checks of arguments that many functions share: one for each kind.

Each names the function and the parameter as the user wrote them, says what came and what was
wanted, and raises the error class it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GradientError, PromptError, SaefeatError


def one_of(
    function: str,
    parameter: str,
    given: object,
    choices: Sequence[object],
    *,
    error: type[SaefeatError] = SaefeatError,
) -> None:
    """Refuse anything but one of a few values.

    Raises:
        SaefeatError: or ``error``, listing the choices.
    """
    if any(type(given) is type(choice) and given == choice for choice in choices):
        return
    wanted = " or ".join(f'"{c}"' if isinstance(c, str) else repr(c) for c in choices)
    raise error(
        f"{function}: `{parameter}` is {given!r}, wanted {wanted}. Try:"
        f" {function}(..., {parameter}={choices[0]!r})"
    )


def whole(
    function: str,
    parameter: str,
    given: Any,
    least: int = 1,
    *,
    error: type[SaefeatError] = SaefeatError,
) -> None:
    """Refuse anything but a whole number from ``least`` on; True and 3.0 are not whole numbers.

    Raises:
        SaefeatError: or ``error``, naming the parameter.
    """
    if type(given) is int and given >= least:
        return
    raise error(
        f"{function}: `{parameter}` is {given!r}, wanted an integer from {least}. Try:"
        f" {function}(..., {parameter}={max(least, 8)})"
    )


def wholes(
    function: str, *, error: type[SaefeatError] = SaefeatError, **given: tuple[Any, int]
) -> None:
    """Refuse anything but whole numbers: parameter → (what was given, the least accepted).

    Raises:
        SaefeatError: or ``error``, naming the first parameter that is not one.
    """
    for parameter, (value, least) in given.items():
        whole(function, parameter, value, least, error=error)


def gradients_on(function: str, model: nn.Module | None = None) -> None:
    """Refuse where nothing has a gradient, which would read as "no effect".

    Raises:
        GradientError: under ``torch.no_grad`` or ``torch.inference_mode``, and for a model without
            weights or of inference tensors.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise GradientError(
            f"{function}: `context` is gradients switched off, wanted torch.is_grad_enabled()."
            " Likely cause: a surrounding torch.no_grad() or torch.inference_mode(), or a"
            f" generation. Try: with torch.enable_grad(): {function}(...)"
        )
    weights = [] if model is None else list(model.parameters())
    if weights and weights[0].is_meta:
        got, cause = "a model without weights", "a model meant for remote runs, or not yet loaded"
        call = "TransformersModel(..., dispatch=True), or method=FiniteDifference()"
    elif any(weight.is_inference() for weight in weights):
        got = "a model of inference tensors"
        cause = "it was loaded or moved under torch.inference_mode()"
        call = "load the model outside torch.inference_mode()"
    else:
        return
    raise GradientError(
        f"{function}: `model` is {got}, wanted weights that gradients can pass. Likely cause:"
        f" {cause}. Try: {call}"
    )


def differentiated(
    function: str, total: Tensor, nodes: Sequence[Tensor], *, keep: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of a number at each node, zero at those that it does not depend on.

    Every kernel on the way must know its gradient. Torch goes on past one that does not, with a
    warning and without that kernel's part (2.13, tried: a model quantized to dynamic int8).

    Raises:
        GradientError: naming the kernel.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        try:
            return torch.autograd.grad(total, nodes, materialize_grads=True, retain_graph=keep)
        except (UserWarning, NotImplementedError, RuntimeError) as error:
            said = str(error)
            known = isinstance(error, NotImplementedError)  # a backward that somebody left out
            if not known and not any(words in said for words in UNDIFFERENTIABLE):
                raise
            raise GradientError(
                f"{function}: `model` is one with a kernel that has no gradient ({said:.100}),"
                " wanted kernels that have one. Likely cause: quantized weights, or a custom or"
                " fused kernel for inference. Try: the model in float32 or bfloat16; or, for few"
                " latents, method=Exact() or FiniteDifference(), which take none"
            ) from error


UNDIFFERENTIABLE = (
    "autograd kernel was not registered",
    "no autograd formula was registered",
    "is not implemented",
)
"""What torch says of a kernel without a gradient: of builtin, custom and unfinished ones."""


def one_a_prompt(function: str, parameter: str, made_for: int | None, prompts: int) -> None:
    """Refuse values made for another number of prompts: they would meet the wrong ones.

    ``made_for`` is None for what fits any prompts.

    Raises:
        PromptError: naming both numbers.
    """
    if made_for in (None, prompts):
        return
    raise PromptError(
        f"{function}: `{parameter}` is made for {made_for} prompts, wanted values for the {prompts}"
        " prompts given. Likely cause: the prompts were filtered, repeated or batched after the"
        " values were made. Try: make the values from the same prompts, in the same order"
    )
