"""The exact counterpart of a score: a latent moved alone, where and as far as it was scored.

A score at (prompt, position, latent) is the estimated effect of adding ``change`` to that latent
there. So a prompt's sum over positions is the estimate of one edit, and the record of the
attribution holds all that is needed to make it: the baseline need not be run again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.columns import require
from ..attribution.scores import Attribution
from ..dictionaries.latents import Latents
from ..errors import SaefeatError
from ..kernel.encode import encode
from ..results.readings import Readings
from ..text.tokens import Tokens
from ..values.patch import Patch
from ..verbs.edits import Clamp
from .experiment import Experiment
from .ranking import selection


def effects(
    experiment: Experiment,
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
        experiment: prompts and metric, in the attribution's order.
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
    effect = torch.zeros(len(keys), len(experiment), dtype=torch.float64)
    starts = range(0, len(edits), experiment.batch_size)
    for start in tqdm(starts, disable=not progress, desc=experiment.function, unit="batch"):
        rows = edits[start : start + experiment.batch_size]
        here = (edit >= start) & (edit < start + len(rows))
        shifted = _shifted(scores, keys, rows, moves[here], edit[here] - start)
        values = experiment.under(shifted, rows[:, 1])
        effect[rows[:, 0], rows[:, 1]] = values.double() - clean[rows[:, 1]].double()
    return effect


def _shifted(scores: Attribution, keys: Tensor, rows: Tensor, moves: Tensor, edit: Tensor) -> Clamp:
    """The edit of one batch, whose row r moves latent rows[r, 0] in prompt rows[r, 1].

    ``moves`` [n] are the attribution's rows, ``edit`` [n] the batch's row each belongs to. Values
    are by position in the text, so that padding and batching do not matter.
    """
    latents = selection(scores.dictionaries, keys[rows[:, 0].unique()])
    column = {key: n for n, key in enumerate(_pairs(latents, scores))}
    places = torch.tensor([column[tuple(key)] for key in keys[rows[edit, 0]].tolist()])
    position = scores.position[moves]
    shift = torch.zeros(len(rows), int(position.max()) + 1, len(latents))  # [b, t, k]
    shift[edit, position, places] = scores.change[moves].cpu()
    every = torch.ones_like(shift, dtype=torch.bool)
    values = Readings(latents, shift, every, torch.zeros(len(rows), dtype=torch.long))
    return Clamp(latents, add=Patch(values), where=Tokens.all())


def _pairs(latents: Latents, scores: Attribution) -> list[tuple[int, int]]:
    """(dictionary, latent) in the selection's order."""
    number = {id(dictionary): n for n, dictionary in enumerate(scores.dictionaries)}
    return [(number[id(basis)], i) for basis, indices in latents.parts for i in indices]


def require_movable(scores: Attribution, function: str) -> None:
    """Refuse scores that do not say at which tokens, and how far, each latent is to be moved.

    Raises:
        SaefeatError: for scores of ``per="latent"``, and for a baseline of dictionaries whose
            directions depend on the input: there a score is the difference of two contributions,
            and no change of the activation alone has that effect. At the zero baseline one of the
            two is zero.
    """
    require(scores, function, "positions")  # an exact score of a whole prompt is no estimate
    if torch.equal(scores.change, -scores.activation):
        return
    for dictionary in scores.dictionaries:
        columns = dictionary.columns(torch.zeros(1, dtype=torch.long))
        if encode(columns, torch.ones(1, dictionary.d_in))[1] is not None:
            raise SaefeatError(
                f"{function}: `attribute` is with a baseline, on {dictionary!r}, whose directions"
                " move with the input, wanted the zero baseline there. Likely cause:"
                " an SAE that normalizes its input, or the error term. Try: Attribute(...,"
                " baseline=None)"
            )
