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

from .edit import changed, moved, reselected
from .encode import encode
from .prefix import encode_prefix
from .tokens import narrowed, select
from .values import require_batch, resolve

MOST_LATENTS = 64
"""Latents of one dictionary up to which an edit's receipt lists its changes."""

PAIRS = 1 << 22
"""(token, latent) pairs of a log whose values are kept for the receipt: 32 MiB of float32."""


def new_log() -> dict[str, Any]:
    """An empty record of a run: how many passes, what was read, how often edits fired."""
    names = ("readings", "masks", "fired", "events", "directions", "kept", "nodes", "shown")
    return {"passes": 0, "pairs": 0, "view": None, **{name: {} for name in names}}


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

    Under autocast, as some servers run blocks, a product of float32 would be one of bfloat16: other
    latents would fire. So it is switched off here; the meta device, for one, knows nothing of it.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return visit(actions, x, view, held, log)
    new = before = by_token(x, view)
    own = False
    for action in actions:
        if action.get("rows") is None:
            new = act(action, new, view, held, log)
            continue
        start, stop = action["rows"]  # one of several interventions that share the batch
        part = new[start:stop]
        found = act(action, part, narrowed(view, start, stop), held, log)
        if found is not part:
            new, own = new if own else new.clone(), True  # one copy, however many write
            new[start:stop] = found
    return x if new is before else new.reshape(x.shape)


def act(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    view: dict[str, Any],
    held: dict[Any, Any],
    log: dict[str, Any] | None,
) -> Float[Tensor, "b t d"]:
    """One action on the value x."""
    if action["do"] == "read":
        read(action, x, view, held, log)
    elif action["do"] == "write":
        x = write(action, x, view, held, log)
    elif action["do"] == "test":
        test(action, x, view, held)
    elif action["do"] == "stash":
        held[action["id"]] = x
    elif action["do"] == "show":
        show(action, x, held, log or new_log())
    else:
        x = keep(action, x, held, log or new_log())
    return x


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
    if action["varying"]:
        tensors = resolve(tensors, action["varying"], view, f)
        if tensors["known"] is not None:
            mask, everywhere = mask & tensors["known"].any(-1, keepdim=True), False
    if "top" in tensors:
        f, step, written = reselected(tensors, f)  # the edit's latents, and all of them
    else:
        step = written = changed(tensors, f) - f  # [b, t, k]
    if log is not None:
        steps = (f.detach(), step.detach(), written.detach())
        note(log, number, *steps, mask, view, tensors["directions"], scale)
    return moved(x, written, tensors["directions"], scale, None if everywhere else mask)


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
    """Hold where a condition is met: any or all of its latents within its bounds, at a real token.

    A condition may read several dictionaries, one test each. With ``hold`` it stays met for the
    rest of the sequence, later passes included, once all of its tests have been made.
    """
    f = latents(action, x, view, held)[0].detach()
    within = torch.ones_like(f, dtype=torch.bool)
    if action["above"] is not None:
        within = within & (f > action["above"])
    if action["below"] is not None:
        within = within & (f < action["below"])
    every, key = action["match"] == "all", action["id"]
    hit = within.all(-1, keepdim=True) if every else within.any(-1, keepdim=True)
    hit = hit & view["real"].unsqueeze(-1).to(f.device)
    made, before = held.get(("tests", key), 0) + 1, held.get(key)
    if before is not None:
        before = before.to(f.device)
        hit = hit & before if every else hit | before
    if action["hold"] and made == action["of"]:
        hit = hit.int().cummax(1).values.bool()
        if key in view["memory"] and not view["whole"]:  # what is shown again is tested again
            hit = hit | view["memory"][key].to(f.device)
        view["memory"][key] = hit[:, -1:]
    held[key], held["tests", key] = hit, made


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


def show(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    held: dict[Any, Any],
    log: dict[str, Any],
) -> None:
    """Hand out the site's whole value with its graph, for a metric or a later action to read."""
    log["shown"][action["id"]] = held[action["id"]] = whole(action, x, held)


def keep(
    action: dict[str, Any],
    x: Float[Tensor, "b t d"],
    held: dict[Any, Any],
    log: dict[str, Any],
) -> Float[Tensor, "b t d"]:
    """Keep the site's value for attribution, move it, and let a gradient be taken there.

    Where ``target`` is given the site's value becomes it, to the bit, or a ``share`` [b, 1, 1] of
    the way there from where this pass has it, and gradients pass as if a constant had been added.
    With ``gradient`` the value returned is a node of the graph for the metric to be differentiated
    at. The ``first`` site starts the graph: nothing before it is differentiated, and frozen models
    work. ``through`` replaces how gradients pass backward from here. A copy is kept if ``copy``;
    without any of these x is returned untouched.
    """
    before = 0.0 if action["plus"] is None else held[action["plus"]].to(x.device)
    target = None if action["target"] is None else action["target"].to(x.device) - before
    if target is not None and action["share"] is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        share = action["share"].to(x.device, dtype)
        target = torch.lerp(x.detach().to(dtype), target.to(dtype), share).to(x.dtype)
    if action["gradient"]:
        x = x.detach() if action["first"] else x
        # Adding even zero makes a node of its own: later in-place edits must not reach it. And in
        # half precision x + (target - x) is not the target: 9984 + (3.7 - 9984) is 0 in bfloat16.
        x = x + 0.0 if target is None else target + (x - x.detach())
        if action["through"] is not None:
            x = action["through"](x + before, held.get(action["source"])) - before
        x = x if x.requires_grad else x.requires_grad_()
        log["nodes"][action["id"]] = x
    elif target is not None:
        x = target
    if action["copy"]:
        log["kept"][action["id"]] = (x + before).detach().clone()
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
        placed[x.device, dtype] = to(action["tensors"], x.device, dtype)
    return placed[x.device, dtype]


def to(tensors: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on a device, floating ones in a dtype; what is no tensor as it is."""
    found = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            value = to(value, device, dtype)
        elif isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        found[name] = value
    return found


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


def note(
    log: dict[str, Any],
    number: int,
    f: Float[Tensor, "b t k"],
    step: Float[Tensor, "b t k"],
    written: Float[Tensor, "b t n"],
    mask: Bool[Tensor, "b t 1"],
    view: dict[str, Any],
    directions: Float[Tensor, "n d_out"],
    scale: Float[Tensor, "b t _"] | None,
) -> None:
    """Keep what a receipt needs, by reference: counting and norms wait until the run is over.

    Where that is too much (more than 64 latents, or a long run) it is counted at once, and the
    receipt then has counts alone.
    """
    entries = log["fired"].setdefault(number, [])
    log["pairs"] += written.numel()
    if step.shape[-1] > MOST_LATENTS or log["pairs"] > PAIRS:
        entries.append(fired(step, mask))
        return
    entries.append((step, mask))
    seen = {name: view[name] for name in ("ids", "position", "lengths", "begins")}
    log["events"].setdefault(number, []).append(
        {**seen, "before": f, "written": written, "scale": scale}
    )
    log["directions"][number] = directions


def fired(step: Float[Tensor, "b t k"], mask: Bool[Tensor, "b t 1"]) -> Float[Tensor, "3"]:
    """Tokens selected, (token, latent) pairs changed, largest change of a latent."""
    change = torch.where(mask, step, 0.0)
    counts = torch.stack([mask.sum(), (change != 0).sum()])
    return torch.cat([counts.to(change.dtype), change.abs().amax()[None]])
