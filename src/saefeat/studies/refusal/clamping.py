"""Clamps: what a set of latents, or one set a prompt, does to the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import saefeat as sf


def scaled(latents: sf.Latents, factor: float, where: sf.Tokens) -> sf.Intervention | None:
    """f ← c · f for one set at these tokens; None, which edits nothing, for an empty set."""
    return sf.Clamp(latents, scale=factor, where=where) if len(latents) else None


def scaled_per_prompt(
    sets: Sequence[sf.Latents], factor: float, where: sf.Tokens
) -> sf.Intervention | None:
    """f ← c · f for one set a prompt, all prompts in one run: latents of others are scaled by 1."""
    latents, member = sf.values.per_prompt(list(sets))
    if not len(latents):
        return None
    return sf.Clamp(latents, scale=torch.where(member, factor, 1.0), where=where)


def held(latents: sf.Latents, value: float, where: sf.Tokens) -> sf.Intervention | None:
    """f ← v for one set at these tokens."""
    return sf.Clamp(latents, value, where=where) if len(latents) else None
