"""What a value is at each token, where it is no plain number.

=============  ==================================================================================
``kind``       keys
=============  ==================================================================================
``schedule``   ``values`` [steps, k or 1] by generated token, ``prompt`` [k or 1] before them
``pin``        ``values`` [b, s, k] and ``known`` [b, s, k] of another run of the same prompts,
               ``starts`` [b, 1]: the column of each prompt's first token
``resample``   ``values`` [n, k] to draw rows from, ``seed``, ``first``: the number of the batch's
               first prompt in the data set
=============  ==================================================================================

All three look at nothing but the token's place in its row's text, so that a value does not depend
on padding, on the batch, or on how many tokens a pass shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tokens import whole_prompt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

WORD = 0xFFFFFFFF


def resolve(
    edit: dict[str, Any],
    names: tuple[str, ...],
    view: dict[str, Any],
    f: Float[Tensor, "b t k"],
) -> dict[str, Any]:
    """The edit with numbers [b, t, k or 1] in place of the values that ``names`` lists.

    ``known`` is where all of them have a value for a latent, or None if they have one everywhere.
    """
    position, lengths = view["position"].to(f.device), view["lengths"].to(f.device)
    found: dict[str, Any] = {**edit, "known": None}
    for name in names:
        value = edit[name]
        require_batch(value, f.shape[0])
        if value["kind"] == "schedule":
            whole_prompt(view)
            found[name] = scheduled(value["values"], value["prompt"], position - lengths)
        elif value["kind"] == "resample":
            rows = drawn(value["seed"], value["first"], position, len(value["values"]))
            found[name] = value["values"][rows]
        else:
            found[name], known = pinned(value, position)
            found["known"] = known if found["known"] is None else found["known"] & known
    return found


def scheduled(
    values: Float[Tensor, "steps _"], prompt: Float[Tensor, "_"], step: Int[Tensor, "b t"]
) -> Float[Tensor, "b t _"]:
    """By generated token, the first at step 0; the last value is held on."""
    now = values[step.clamp(0, len(values) - 1)]
    return torch.where(step.unsqueeze(-1) < 0, prompt, now)


def pinned(
    value: dict[str, Any], position: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, "b t k"], Bool[Tensor, "b t k"]]:
    """What another run gave at the same position, and where it gave anything."""
    column = position + value["starts"]
    inside = (position >= 0) & (column >= 0) & (column < value["values"].shape[1])
    column = torch.where(inside, column, 0)
    row = torch.arange(len(column), device=column.device)[:, None]
    return value["values"][row, column], value["known"][row, column] & inside.unsqueeze(-1)


def drawn(seed: int, first: int, position: Int[Tensor, "b t"], n: int) -> Int[Tensor, "b t"]:
    """A row of n for each (seed, prompt, position): the same wherever and whenever it is asked."""
    prompt = first + torch.arange(len(position), device=position.device)[:, None]
    return mixed(mixed(mixed(torch.full_like(prompt, seed)) ^ prompt) ^ position) % n


def mixed(word: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 bits stirred so that neighbors are far apart: shifts and odd factors, as hashes do it.

    The factors lie below 2³¹, so that every product fits int64 and is the same on any device.
    """
    word = (word + 0x9E3779B9) & WORD  # or zero would stay zero
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)


def require_batch(edit: dict[str, Any], rows: int) -> None:
    """Values made for other prompts would broadcast into other rows without a word."""
    for name, value in edit.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] != rows:
            raise ValueError(
                f"saefeat: `{name}` holds values for {value.shape[0]} prompts, and the batch has"
                f" {rows}. Likely cause: the prompts were filtered or split after the values were"
                " made. Try: run, which splits both together."
            )
