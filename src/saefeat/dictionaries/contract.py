"""Does a dictionary of your own keep the promises the verbs rely on?

``check_dictionary`` is the contract in executable form, in the manner of scikit-learn's
``check_estimator``: call it in your own tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DictionaryError, LatentError
from ..kernel.edit import moved
from .latents import Dictionary, cast


def check_dictionary(dictionary: Dictionary, *, seed: int = 0) -> None:
    """Hold a dictionary against the contract.

    Shapes of encoding and directions; a selection equals the same latents of the whole, in any
    order; encoding is deterministic, keeps no state between calls and does not mix positions (or,
    where ``prefix`` says that it does, does not look ahead);
    nothing handed out shares storage with the whole dictionary; the input is left untouched; a
    zero step leaves the site bit for bit; bad indices are refused.

    Args:
        dictionary: the dictionary to check.
        seed: of the random inputs.

    Raises:
        DictionaryError: naming the first promise that does not hold.

    Examples:
        >>> from saefeat.dictionaries.contract import check_dictionary
        >>> check_dictionary(sf.Direction(torch.randn(8), site="resid_post.0"))
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, dictionary.d_in, generator=generator)
    shuffled = torch.randperm(dictionary.d_sae, generator=generator)[:7]
    _shapes(dictionary, x, shuffled)
    _stateless(dictionary, x)
    _selection(dictionary, x, shuffled)
    _storage(dictionary, shuffled)
    _zero_step(dictionary, x, shuffled)
    for bad in ([-1], [dictionary.d_sae], [0, 0]):
        try:
            dictionary.latents(bad)
        except LatentError:
            continue
        raise _broken(dictionary, f"latents({bad}) is refused")


def _shapes(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    f, directions = dictionary.encode(x, index), dictionary.directions(index)
    if f.shape != (*x.shape[:-1], len(index)):
        raise _broken(dictionary, f"encode gives [..., k], not {tuple(f.shape)}")
    if directions.shape != (len(index), dictionary.d_out):
        raise _broken(dictionary, f"directions gives [k, d_out], not {tuple(directions.shape)}")


def _selection(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    whole = dictionary.encode(x)[..., index]
    if not torch.allclose(dictionary.encode(x, index), whole, atol=1e-5):
        raise _broken(dictionary, "encoding a selection equals encoding all and selecting")
    if not torch.allclose(dictionary.directions()[index], dictionary.directions(index), atol=1e-6):
        raise _broken(dictionary, "directions of a selection are rows of all directions")


def _stateless(dictionary: Dictionary, x: Tensor) -> None:
    before, first = x.clone(), dictionary.encode(x)
    dictionary.encode(torch.roll(x, 1, 0) * 3)
    if not torch.equal(first, dictionary.encode(x)):
        raise _broken(dictionary, "encode keeps no state between calls")
    if dictionary.prefix:
        if not torch.allclose(first[:, :3], dictionary.encode(x[:, :3]), atol=1e-5):
            raise _broken(dictionary, "encode does not look ahead")
    elif not torch.allclose(first[:, 1:3], dictionary.encode(x[:, 1:3]), atol=1e-5):
        raise _broken(dictionary, "encode does not mix positions")
    if not torch.equal(x, before):
        raise _broken(dictionary, "encode leaves its input untouched")


def _storage(dictionary: Dictionary, index: Tensor) -> None:
    """A view would carry its whole matrix to a server."""
    for name, value in dictionary.columns(index).items():
        if isinstance(value, Tensor):
            held = value.untyped_storage().nbytes()
            if held > value.numel() * value.element_size():
                raise _broken(dictionary, f"columns()[{name!r}] has a storage of its own")


def _zero_step(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    columns = cast(dictionary.columns(index), x.dtype, x.device)
    y = torch.randn(2, 5, dictionary.d_out, generator=torch.Generator().manual_seed(1))
    step = torch.zeros(2, 5, len(index))
    if not torch.equal(moved(y, step, columns["directions"], None, None), y):
        raise _broken(dictionary, "a zero step leaves the site as it was")


def _broken(dictionary: Dictionary, promise: str) -> DictionaryError:
    return DictionaryError(
        f"check_dictionary: `dictionary` is {dictionary!r}, for which this does not hold:"
        f" {promise}, wanted a dictionary that keeps the contract. Likely cause: columns() or"
        " encode() of the subclass. Try: compare with saefeat.Direction, the smallest that does"
    )
