"""Numbers of a dictionary that are no numbers: refused when they are read, with their latent.

NaN spreads: one in a column makes every logit behind an edit NaN, and one in a threshold is a
latent that never fires, without a word. Every dictionary's ``columns`` and ``directions`` pass
here, whoever wrote it, so only what is selected is looked at, and a file opens in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DictionaryError
from ..kernel.frozen import plainly

Method = TypeVar("Method", bound=Callable[..., Any])


def guard(kind: type) -> None:
    """Have a class of dictionaries compute plainly, and give finite numbers alone."""
    own = vars(kind)
    for name in {"columns", "directions", "writes"} & set(own):
        setattr(kind, name, only_finite(own[name]))
    if "reconstruct" in own:
        setattr(kind, "reconstruct", computed_plainly(own["reconstruct"]))  # noqa: B010


def computed_plainly(method: Method) -> Method:
    """A method that computes as it does without autocast: it folds biases, and decodes."""

    @wraps(method)
    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        with plainly("cpu"), plainly("cuda"):
            return method(self, *args, **kwargs)

    return compute  # type: ignore[return-value]


def only_finite(method: Method) -> Method:
    """A method that gives tensors of a dictionary's latents, which then are finite or refused."""
    method = computed_plainly(method)

    @wraps(method)
    def read(self: Any, indices: Any = None) -> Any:
        found = method(self, indices)
        named = {"directions": found} if isinstance(found, Tensor) else found
        require_finite(self, named, indices)
        return found

    return read  # type: ignore[return-value]


def require_finite(dictionary: Any, columns: Mapping[str, Any], indices: Any = None) -> None:
    """Refuse columns with a NaN or an infinity.

    Raises:
        DictionaryError: with the name of the tensor, and the latent it belongs to.
    """
    for name, tensor in columns.items():
        # A sum is 30 times as fast as a look at every number, and finite if they all are, but for
        # an overflow.
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not tensor.numel() or bool(tensor.sum().isfinite()):
            continue
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise _broken(dictionary, name, tensor, bad, indices)


def _broken(dictionary: Any, name: str, tensor: Tensor, bad: Tensor, indices: Any) -> Exception:
    place = bad.nonzero()[0]
    value = float(tensor[tuple(place)])
    # The encoder's latents are columns, all others' are rows.
    number = int(place[-1] if name == "encoder" else place[0])
    count = tensor.shape[-1] if name == "encoder" else tensor.shape[0]
    chosen = None if indices is None else torch.as_tensor(indices).reshape(-1)
    number = int(chosen[number]) if chosen is not None and len(chosen) == count else number
    which = "" if name in ("decoder_bias", "W_skip") else f", of latent {number}"
    return DictionaryError(
        f"dictionary {dictionary.name!r} at {dictionary.site}: `{name}` has {value}{which}, wanted"
        " finite numbers. Likely cause: a training run that diverged, a latent that was switched"
        " off by a value that is no number, or a damaged file. Try: the file as its authors"
        " published it, or latents without it"
    )
