"""One visit to one site: read latents, edit them, write the site back, record what happened.

A program is plain data. ``program["visits"]`` lists the places a forward pass reaches, in the
order it reaches them; each visit has a module ``path``, an ``end`` (input or output) and a list of
``actions``. An edit is one *read* action, where its latents are encoded, and one *write* action,
where the change is added: at the same visit for an SAE, at a later one for a transcoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

from .edit import changed, moved
from .encode import encode
from .prefix import encode_prefix
from .tokens import select


def new_log() -> dict[str, Any]:
    """An empty record of a run: how many passes, what was read, how often edits fired."""
    names = ("readings", "masks", "fired", "kept", "nodes")
    return {"passes": 0, "view": None, **{name: {} for name in names}}


def visit(
    actions: list[dict[str, Any]],
    x: Float[Tensor, "*batch d"],
    view: dict[str, Any],
    held: dict[Any, Any],
    log: dict[str, Any] | None,
) -> Float[Tensor, "*batch d"]:
    """Apply a visit's actions to the value x found there; return the value to leave behind.

    ``held`` carries what was read to where it is written, within one forward pass. The same
    object x comes back when nothing was written, so that the caller need not write either.
    """
    new = by_token(x, view)
    before = new
    for action in actions:
        if action["do"] == "read":
            read(action, new, view, held, log)
        elif action["do"] == "write":
            new = write(action, new, view, held, log)
        elif action["do"] == "test":
            test(action, new, view, held)
        elif action["do"] == "stash":
            held[action["id"]] = new
        else:
            new = keep(action, new, held, log or new_log())
    return x if new is before else new.reshape(x.shape)


def read(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    view: dict[str, Any],
    held: dict[Any, Any],
    log: dict[str, Any] | None,
) -> None:
    """Encode the action's latents and hold them for its write; record them if it is a probe."""
    number = action["id"]
    f, scale = latents(action, x, view, held)
    mask, everywhere = selected(action["rule"], view, x.device)
    held[number] = (f, scale, mask, everywhere)
    if log is not None and action["record"]:
        if view["whole"]:  # a run begins, or shows its whole sequence once more
            log["readings"][number], log["masks"][number] = [], []
        record(log, number, action["reduce"], f.detach(), mask)


def write(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    view: dict[str, Any],
    held: dict[Any, Any],
    log: dict[str, Any] | None,
) -> Float[Tensor, "b t d"]:
    """Add the change of the latents that were read; a transcoder may write on another device."""
    number, tensors = action["id"], place(action, x)
    f, scale, mask, everywhere = held[number]
    f, mask = f.to(x.device), mask.to(x.device)
    scale = None if scale is None else scale.to(x.device)
    if action["when"] is not None:
        mask, everywhere = mask & held[action["when"]].to(x.device), False
    require_batch(tensors, x.shape[0])
    step = changed(tensors, f) - f  # [b, t, k]
    if log is not None:
        note(log, number, f.detach(), step.detach(), mask, view)
    return moved(x, step, tensors["directions"], scale, None if everywhere else mask)


def latents(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    view: dict[str, Any],
    held: dict[Any, Any],
) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t _"] | None]:
    """What the action's dictionary reads at the site, and the scale of its directions."""
    columns, value = place(action, x), lift(whole(action, x, held), action)
    if columns.get("prefix"):
        return encode_prefix(columns, value, view, ("prefix", action["number"]))
    return encode(columns, value)


def whole(
    action: dict[str, Any], x: Float[Tensor, "b t d"], held: dict[Any, Any]
) -> Float[Tensor, "b t d"]:
    """The site's value: x, and for resid_mid the block's input as well."""
    return x if action["plus"] is None else held[action["plus"]].to(x.device) + x


def test(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    view: dict[str, Any],
    held: dict[Any, Any],
) -> None:
    """Hold where a condition is met: any of its latents above the threshold, at a real token.

    With ``hold`` it stays met for the rest of the sequence, later passes included.
    """
    f = latents(action, x, view, held)[0].detach()
    key = action["id"]
    hit = (f > action["above"]).any(-1, keepdim=True) & view["real"].unsqueeze(-1).to(f.device)
    if key in held:  # the condition reads several dictionaries: any of them will do
        hit = hit | held[key].to(f.device)
    if action["hold"]:
        hit = hit.int().cummax(1).values.bool()
        if key in view["memory"]:
            hit = hit | view["memory"][key].to(f.device)
        view["memory"][key] = hit[:, -1:]
    held[key] = hit


def selected(
    rule: tuple, view: dict[str, Any], device: torch.device
) -> tuple[Bool[Tensor, "b t 1"], bool]:
    """Which tokens a rule selects, and whether that is all of them: once a pass for each rule.

    Most edits of a chain share a rule, and most rules select every token of a decode step.
    """
    if rule not in view["selected"]:
        mask = select(rule, view).unsqueeze(-1)
        view["selected"][rule] = (mask.to(device), bool(mask.all()))
    mask, everywhere = view["selected"][rule]
    return mask.to(device), everywhere


def record(
    log: dict[str, Any],
    number: int,
    reduce: str | None,
    f: Float[Tensor, "b t k"],
    mask: Bool[Tensor, "b t 1"],
) -> None:
    """Keep a reading: every token of this pass, or one running value a prompt.

    A reduced reading is one tensor [b, 1, k] (for ``mean`` also a count) however long the run, so
    that reading all latents of a dictionary does not need [b, t, d_sae] of memory.
    """
    values, masks = log["readings"].setdefault(number, []), log["masks"].setdefault(number, [])
    if reduce is None:
        values.append(f.clone())
        masks.append(mask.squeeze(-1).clone())
        return
    seen = mask.sum(1, keepdim=True)  # [b, 1, 1]
    if reduce == "max":
        now = torch.where(mask, f, -torch.inf).amax(1, keepdim=True)
        now = torch.maximum(values[0], now) if values else now
    elif reduce == "mean":  # a sum until the run is over
        now = torch.where(mask, f, 0.0).sum(1, keepdim=True)
        now = values[0] + now if values else now
    else:
        column = torch.arange(f.shape[1], device=f.device)[None, :, None]
        last = torch.where(mask, column, 0).amax(1, keepdim=True).expand(-1, 1, f.shape[2])
        now = f.gather(1, last)
        now = torch.where(seen > 0, now, values[0]) if values else now
    seen = masks[0] + seen.squeeze(-1) if masks else seen.squeeze(-1)
    values[:], masks[:] = [now], [seen]


def keep(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    held: dict[Any, Any],
    log: dict[str, Any],
) -> Float[Tensor, "b t d"]:
    """Keep the site's value for attribution, and let a gradient be taken there.

    Without ``gradient`` a copy is kept and x is returned untouched. With it, the node returned is
    kept too, for the metric to be differentiated at: moved so that the site's value is ``target``
    where one is given, by a constant, so that the gradient passes through as if nothing had been
    added. The ``first`` site starts the graph: nothing before it is differentiated, and frozen
    models work.
    """
    before = 0.0 if action["plus"] is None else held[action["plus"]].to(x.device)
    if action["gradient"]:
        target = action["target"]
        shift = 0.0 if target is None else (target.to(x.device) - before - x).detach()
        # Adding even zero makes a node of its own: later in-place edits must not reach it.
        x = (x.detach() + shift).requires_grad_() if action["first"] else x + shift
        log["nodes"][action["id"]] = x
    log["kept"][action["id"]] = (x.detach() + before).clone()
    return x


def lift(x: Float[Tensor, "*batch d"], action: dict[str, Any]) -> Float[Tensor, "*batch d"]:
    """X in the compute dtype, through the site's own transform (a norm that is no module)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = action["eps"]
    if action["transform"] == "rms":  # a norm without its weight: TransformerLens's ln2
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if action["transform"] == "layer":
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x


def place(action: dict[str, Any], x: Float[Tensor, "b t d"]) -> dict[str, Any]:
    """The action's tensors on the value's device in the compute dtype, moved once and kept."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    placed = action.setdefault("placed", {})
    if (x.device, dtype) not in placed:
        placed[x.device, dtype] = {
            name: value.to(x.device, dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in action["tensors"].items()
        }
    return placed[x.device, dtype]


def by_token(x: Float[Tensor, "*batch d"], view: dict[str, Any]) -> Float[Tensor, "b t d"]:
    """The value with a row for each sequence: some modules are given all tokens in one row.

    A value of fewer tokens than the pass has would broadcast against their mask.
    """
    rows, tokens = view["real"].shape
    if x.ndim == 3 and tuple(x.shape[:2]) == (rows, tokens):
        return x
    if x.ndim == 2 and x.shape[0] == rows * tokens:
        return x.reshape(rows, tokens, -1)
    raise ValueError(
        f"saefeat: a site's value is of shape {tuple(x.shape)}, and this pass has {rows} rows of"
        f" {tokens} tokens. Likely cause: a module that sees only part of them, as the unembedding"
        " does in generate, or that is given all invokes' tokens in one row. Try: the input or"
        " output of another module, or one invoke."
    )


def require_batch(edit: dict[str, Any], rows: int) -> None:
    """Values made for other prompts would broadcast into other rows without a word."""
    for name, value in edit.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] != rows:
            raise ValueError(
                f"saefeat: `{name}` holds values for {value.shape[0]} prompts, and the batch has"
                f" {rows}. Likely cause: the prompts were filtered or split after the values were"
                " made. Try: run, which splits both together."
            )


def note(
    log: dict[str, Any],
    number: int,
    f: Float[Tensor, "b t k"],
    step: Float[Tensor, "b t k"],
    mask: Bool[Tensor, "b t 1"],
    view: dict[str, Any],
) -> None:
    """Keep what a receipt needs. Counting waits until the run is over, unless there is too much."""
    entries = log["fired"].setdefault(number, [])
    entries.append((step, mask) if step.shape[-1] <= 64 else fired(step, mask))


def fired(step: Float[Tensor, "b t k"], mask: Bool[Tensor, "b t 1"]) -> Float[Tensor, "3"]:
    """Tokens selected, (token, latent) pairs changed, largest change of a latent."""
    change = torch.where(mask, step, 0.0)
    counts = torch.stack([mask.sum(), (change != 0).sum()])
    return torch.cat([counts.to(change.dtype), change.abs().amax()[None]])
