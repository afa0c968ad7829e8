"""per_prompt: one selection a prompt, as a union of latents and who holds which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..errors import LatentError


@checked
def per_prompt(selections: Sequence[Latents]) -> tuple[Latents, Tensor]:
    """The union of several selections, and which of its latents each one holds.

    It turns one selection a prompt into values that differ by prompt, so that all prompts run in
    one batch.

    Args:
        selections: n selections.

    Returns:
        The union, k latents, and membership [n, k] bool.

    Raises:
        LatentError: for no selection at all.

    Examples:
        >>> v = sf.Direction(torch.eye(3), site="resid_post.0")
        >>> union, member = sf.values.per_prompt([v.latents([0]), v.latents([2, 0])])
        >>> member
        tensor([[ True, False],
                [ True,  True]])
        >>> sf.Clamp(union, scale=torch.where(member, -1.0, 1.0)).scale.shape
        torch.Size([2, 2])
    """
    if not selections:
        raise LatentError(
            "per_prompt: `selections` is empty, wanted one a prompt. Likely cause: prompts that"
            " were filtered to none. Try: per_prompt(scores.top(8, per='prompt'))"
        )
    union = Latents(())
    for chosen in selections:
        union = union | chosen
    pairs = [(id(basis), index) for basis, indices in union.parts for index in indices]
    rows = []
    for chosen in selections:
        held = {(id(basis), index) for basis, indices in chosen.parts for index in indices}
        rows.append([pair in held for pair in pairs])
    return union, torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(pairs))
