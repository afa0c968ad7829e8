"""Batches of an attribution as one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .scores import Attribution


def join_attributions(pieces: Sequence[Attribution]) -> Attribution:
    """Batches of prompts as one result; prompts are renumbered in order."""
    offsets = torch.tensor([0] + [len(piece.tokens) for piece in pieces]).cumsum(0)
    prompt = torch.cat([p.prompt + o for p, o in zip(pieces, offsets[:-1], strict=True)])
    names = ("dictionary", "position", "latent", "score", "activation", "change")
    scores = {name: torch.cat([getattr(p, name) for p in pieces]) for name in names}
    prompts = {
        name: torch.cat([getattr(p, name) for p in pieces])
        for name in ("clean", "baseline", "tokens")
    }
    for name in ("ends", "dropped"):  # all pieces have them, or none
        if getattr(pieces[0], name) is not None:
            prompts[name] = torch.cat([getattr(p, name) for p in pieces])
    known = [piece.scored for piece in pieces if piece.scored is not None]
    scored = torch.cat(known) if len(known) == len(pieces) else None
    found: dict[str, Any] = {**scores, **prompts, "scored": scored}
    return Attribution(pieces[0].dictionaries, prompt, **found)
