"""Does a dictionary of your own keep the promises the verbs rely on?

``check_dictionary`` is the contract in executable form, in the manner of scikit-learn's
``check_estimator``: call it in your own tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import DictionaryError, LatentError
from ..kernel.edit import moved
from .latents import Dictionary, cast


@checked
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
    x = torch.randn(2, 5, dictionary.d_in, generator=generator, dtype=torch.float32)
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
        _require(False, dictionary, f"latents({bad}) is refused")


def _shapes(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    f, directions = dictionary.encode(x, index), dictionary.directions(index)
    fits = f.shape == (*x.shape[:-1], len(index))
    _require(fits, dictionary, f"encode gives [..., k], not {tuple(f.shape)}")
    fits = directions.shape == (len(index), dictionary.d_out)
    _require(fits, dictionary, f"directions gives [k, d_out], not {tuple(directions.shape)}")
    writes = dictionary.writes(index)
    fits = tuple(writes) == dictionary.write_sites and dictionary.site == dictionary.read_sites[-1]
    fits = fits and torch.equal(writes[dictionary.write_site], directions)
    fits = fits and all(rows.shape == directions.shape for rows in writes.values())
    _require(fits, dictionary, "writes gives [k, d_out] a write site, directions first")


def _selection(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    same = torch.allclose(dictionary.encode(x, index), dictionary.encode(x)[..., index], atol=1e-5)
    _require(same, dictionary, "encoding a selection equals encoding all and selecting")
    rows = dictionary.directions(index)
    same = torch.allclose(dictionary.directions()[index], rows, atol=1e-6)
    _require(same, dictionary, "directions of a selection are rows of all directions")


def _stateless(dictionary: Dictionary, x: Tensor) -> None:
    before, first = x.clone(), dictionary.encode(x)
    dictionary.encode(torch.roll(x, 1, 0) * 3)
    same = torch.equal(first, dictionary.encode(x))
    _require(same, dictionary, "encode keeps no state between calls")
    if dictionary.prefix:
        same = torch.allclose(first[:, :3], dictionary.encode(x[:, :3]), atol=1e-5)
        _require(same, dictionary, "encode does not look ahead")
    else:
        same = torch.allclose(first[:, 1:3], dictionary.encode(x[:, 1:3]), atol=1e-5)
        _require(same, dictionary, "encode does not mix positions")
    _require(torch.equal(x, before), dictionary, "encode leaves its input untouched")


def _storage(dictionary: Dictionary, index: Tensor) -> None:
    """A view would carry its whole matrix to a server."""
    for name, value in dictionary.columns(index).items():
        if isinstance(value, Tensor):
            small = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
            _require(small, dictionary, f"columns()[{name!r}] has a storage of its own")


def _zero_step(dictionary: Dictionary, x: Tensor, index: Tensor) -> None:
    columns = cast(dictionary.columns(index), x.dtype, x.device)
    draw = torch.Generator().manual_seed(1)
    y = torch.randn(2, 5, dictionary.d_out, generator=draw, dtype=torch.float32)
    step = torch.zeros(2, 5, len(index), dtype=torch.float32)
    same = torch.equal(moved(y, step, columns["directions"], None, None), y)
    _require(same, dictionary, "a zero step leaves the site as it was")


def _require(holds: bool, dictionary: Dictionary, promise: str) -> None:
    if holds:
        return
    raise DictionaryError(
        f"check_dictionary: `dictionary` is {dictionary!r}, for which this does not hold:"
        f" {promise}, wanted a dictionary that keeps the contract. Likely cause: columns() or"
        " encode() of the subclass. Try: compare with saefeat.Direction, the smallest that does"
    )
