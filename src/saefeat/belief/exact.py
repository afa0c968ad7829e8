"""The exact counterpart of a score: a latent moved alone, where and as far as it was scored.

A score at (prompt, position, latent) is the estimated effect of adding ``change`` to that latent
there. So a prompt's sum over positions is the estimate of one edit, and the record of the
attribution holds all that is needed to make it: the baseline need not be run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.attribute import Attribute
from ..attribution.record import Attribution
from ..errors import SaefeatError, explain
from ..kernel.encode import encode
from ..latents import Latents
from ..prompts import split
from ..tokens import Tokens
from ..verbs.edits import Clamp
from ..verbs.lower import lower
from .bench import Bench, last_logits
from .ranking import selection


def effects(
    bench: Bench,
    scores: Attribution,
    keys: Tensor,
    place: Tensor,
    clean: Tensor,
    *,
    progress: bool,
) -> Tensor:
    """[k, prompts] float64: the metric's exact change when a latent moves alone.

    Latents that did not move in a prompt have no row in the batch: their effect is exactly zero.

    Args:
        bench: prompts and metric, in the attribution's order.
        scores: the attribution.
        keys: [k, 2], (dictionary, latent).
        place: [n], which key each of the attribution's rows is of, or −1.
        clean: [prompts], the metric in the clean run.
        progress: show a progress bar.
    """
    moves = (place >= 0).nonzero().squeeze(1)
    edits, edit = torch.unique(  # [edits, 2] (key, prompt), and the edit each move belongs to
        torch.stack([place[moves], scores.prompt[moves]], 1), dim=0, return_inverse=True
    )
    found = torch.zeros(len(keys), len(bench), dtype=torch.float64)
    starts = range(0, len(edits), bench.batch_size)
    for start in tqdm(starts, disable=not progress, desc=bench.where, unit="batch"):
        rows = edits[start : start + bench.batch_size]
        here = (edit >= start) & (edit < start + len(rows))
        values = _moved(bench, scores, keys, rows, moves[here], edit[here] - start)
        found[rows[:, 0], rows[:, 1]] = values.double() - clean[rows[:, 1]].double()
    return found


def _moved(
    bench: Bench, scores: Attribution, keys: Tensor, rows: Tensor, moves: Tensor, edit: Tensor
) -> Tensor:
    """[b]: the metric of one batch, whose row r moves latent rows[r, 0] in prompt rows[r, 1].

    ``moves`` [n] are the attribution's rows, ``edit`` [n] the batch's row each belongs to.
    """
    (batch,) = split(bench.rows(rows[:, 1]), len(rows))
    pads = (batch["attention_mask"] == 0).sum(1)  # [b]
    used = rows[:, 0].unique()
    latents = selection(scores.dictionaries, keys[used])
    column = {key: n for n, key in enumerate(_pairs(latents, scores))}
    shift = torch.zeros(*batch["input_ids"].shape, len(latents))  # [b, t, k]
    places = torch.tensor([column[tuple(key)] for key in keys[rows[edit, 0]].tolist()])
    shift[edit, scores.position[moves] + pads[edit], places] = scores.change[moves]
    return bench.measure(_logits(bench.model, latents, shift, batch), rows[:, 1])


def _pairs(latents: Latents, scores: Attribution) -> list[tuple[int, int]]:
    """(dictionary, latent) in the selection's order."""
    number = {id(dictionary): n for n, dictionary in enumerate(scores.dictionaries)}
    return [(number[id(basis)], i) for basis, indices in latents.parts for i in indices]


def _logits(model: Any, latents: Latents, shift: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Last logits [b, v] with ``shift`` [b, t, k] added to the latents."""
    program = lower(Clamp(latents, add=0.0, where=Tokens.all()), model)
    spans, start = [], 0
    for _, indices in latents.parts:
        spans.append(slice(start, start + len(indices)))
        start += len(indices)
    for stop in program["visits"]:
        for action in stop["actions"]:
            if action["do"] == "write":
                action["tensors"]["shift"] = shift[..., spans[action["id"]]].clone()
    return last_logits(model, program, batch)[0]


def require_fixed_directions(attribute: Attribute, scores: Attribution, where: str) -> None:
    """Refuse a baseline for dictionaries whose directions depend on the input.

    There a score is the difference of two contributions, and no change of the activation alone
    has that effect. At the zero baseline one of the two is zero.
    """
    if attribute.baseline is None:
        return
    for dictionary in scores.dictionaries:
        columns = dictionary.columns(torch.zeros(1, dtype=torch.long))
        if encode(columns, torch.ones(1, dictionary.d_in))[1] is not None:
            raise SaefeatError(
                explain(
                    where,
                    "attribute",
                    got=f"with a baseline, on {dictionary!r}, whose directions move with the input",
                    wanted="the zero baseline for such a dictionary",
                    cause="an SAE that normalizes its input, or the error term",
                    call="Attribute(..., baseline=None)",
                )
            )
