"""What came back from a server, held against what was asked: a result that does not fit is no
result.

A server may be of another version, out of memory half-way, or not a server at all. Readings of the
wrong tokens would look like readings, so shapes, dtypes and indices are all checked here, and that
the tokens begin with the prompts.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import RemoteError
from ..kernel.log import Log
from ..kernel.pack import unpack
from ..verbs.base import Intervention
from ..verbs.steps import numbered

Piece = tuple[Log, Tensor, Tensor]
"""A batch's log, all its token ids, and the logits after the prompt."""

CHANGES = ("row", "latent", "before", "after", "norm", "position", "step", "token")


def received(
    saved: Any, intervention: Intervention, batch: dict[str, Tensor], new: int, where: str = "run"
) -> Piece:
    """What came back, as a local batch would have left it.

    Raises:
        RemoteError: naming what does not fit.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("log"), dict):
        wrong(where, f"{type(saved).__name__}", "a log, tokens and logits")
    rows = len(batch["input_ids"])
    tokens = _tokens(where, saved.get("tokens"), batch["input_ids"], max(new, 1))
    logits = saved.get("logits")
    if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 2):
        wrong(where, f"logits {_of(logits)}", "a number for each prompt and token")
    if len(logits) != rows or not logits.shape[1]:
        wrong(where, f"logits {_of(logits)}", f"{rows} rows, one a prompt")
    log = saved["log"]
    passes = log.get("passes")
    if type(passes) is not int or not 1 <= passes <= max(new, 1):
        wrong(where, f"a log of {passes!r} passes", f"one of at most {max(new, 1)}")
    _view(where, log.get("view"), rows)
    columns = batch["input_ids"].shape[1] + passes - 1
    wanted: dict[str, set[int]] = {"readings": set(), "masks": set(), "fired": set()}
    for step, numbers in numbered(intervention.parts()):
        for number, (_, indices) in zip(numbers, step.latents.parts, strict=True):
            if step.change is None:
                wanted["readings"].add(number)
                wanted["masks"].add(number)
                _reading(where, log, number, step.reduction, (rows, columns, len(indices)))
            else:
                wanted["fired"].add(number)
                _fired(where, log, number, (rows, passes, len(indices)))
    for group, numbers in wanted.items():
        if set(log[group]) != numbers:
            wrong(where, f"{group} of steps {sorted(log[group])}", f"of {sorted(numbers)}")
    return unpack(log), tokens if new else batch["input_ids"], logits.float().cpu()


def _tokens(where: str, tokens: Any, prompts: Tensor, new: int) -> Tensor:
    """[rows, columns]: the prompts, and at most ``new`` tokens behind them."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
        wrong(where, f"tokens {_of(tokens)}", "ids [prompts, tokens]")
    rows, width = prompts.shape
    if len(tokens) != rows or not width < tokens.shape[1] <= width + new:
        wrong(where, f"tokens {_of(tokens)}", f"{rows} rows of {width + 1}..{width + new}")
    tokens = tokens.cpu()
    if not torch.equal(tokens[:, :width], prompts.cpu()) or bool((tokens < 0).any()):
        wrong(where, "tokens that do not begin with the prompts", "the prompts, continued")
    return tokens


def _view(where: str, view: Any, rows: int) -> None:
    position = view.get("position") if isinstance(view, dict) else None
    if (
        not isinstance(position, Tensor)
        or position.shape != (rows, 1)
        or position.dtype != torch.int64
    ):
        wrong(where, f"positions {_of(position)}", f"whole numbers [{rows}, 1]")


def _reading(
    where: str, log: dict[str, Any], number: int, reduce: str | None, shape: tuple[int, int, int]
) -> None:
    """Masks [rows, columns] (or counts [rows, 1]), and as many values [n, k] as they select."""
    rows, columns, k = shape
    f, mask = (log[name].get(number) if name in log else None for name in ("readings", "masks"))
    wanted = (rows, 1 if reduce else columns)
    kind = torch.int64 if reduce else torch.bool
    if not isinstance(mask, Tensor) or mask.shape != wanted or mask.dtype != kind:
        wrong(where, f"a mask {_of(mask)} of step {number}", f"{list(wanted)}")
    chosen = int((mask > 0).sum())
    fits = isinstance(f, Tensor) and f.is_floating_point() and f.shape == (chosen, k)
    if not fits:
        wrong(where, f"readings {_of(f)} of step {number}", f"[{chosen}, {k}], as its mask says")


def _fired(where: str, log: dict[str, Any], number: int, shape: tuple[int, int, int]) -> None:
    """Counts [passes, 3], and the changes of each pass, if they were kept."""
    rows, passes, k = shape
    counts = log["fired"].get(number)
    fits = isinstance(counts, Tensor) and counts.is_floating_point()
    if not fits or counts.shape != (passes, 3) or not bool((counts[:, :2] >= 0).all()):
        wrong(where, f"counts {_of(counts)} of step {number}", f"[{passes}, 3]")
    for seen in log["events"].get(number, []):
        changes = seen.get("changes", {})
        sizes = {tuple(column.shape) for column in changes.values()}
        if set(changes) != set(CHANGES) or len(sizes) != 1 or len(next(iter(sizes))) != 1:
            wrong(
                where, f"changes of step {number} that are ragged", "a column each, of one length"
            )
        inside = (changes["row"] >= 0) & (changes["row"] < rows)
        inside &= (changes["latent"] >= 0) & (changes["latent"] < k)
        if not bool(inside.all()):
            wrong(where, f"changes of step {number} outside", f"{rows} rows and {k} latents")


def _of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def wrong(where: str, got: str, wanted: str) -> NoReturn:
    """The error for a result that does not fit its request.

    Raises:
        RemoteError: always.
    """
    raise RemoteError(
        f"{where}: `remote` is a server whose result has {got}, wanted {wanted}. Likely cause: a"
        " server of another version, or one that is none. Try: preflight(model, prompts,"
        " remote=...), which shows the server's nnsight"
    )
