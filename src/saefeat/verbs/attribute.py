"""Attribute: which latents carry a metric, at the price of the bare model's passes.

The dictionary is never in the graph. With the error term kept and a linear decoder,
∂m/∂f_i = (∂m/∂x) · direction_i, so the model runs bare, gradients are taken at the sites'
values [b, t, d_model], averaged over the path, and only then read through the dictionary, a chunk
of latents at a time, into a sparse result. Memory does not grow with the dictionary's width.

Gradients pass through: a site's gradient holds everything downstream of it, other watched
sites included (Marks et al. 2024; PAPER.md 2.4 verified the authors' code to do the same).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution import Attribution, join_attributions
from ..dictionaries.base import Dictionaries, Dictionary, cast
from ..errors import GradientError, explain
from ..kernel.encode import encode
from ..kernel.program import lift, new_log
from ..kernel.tokens import select
from ..kernel.trace import whole_run
from ..latents import Latents, as_latents, index_tensor
from ..prompts import Prompts, encode_prompts, split
from ..records import Receipt
from ..sites import Place, check_width, find, find_writable, torch_module
from ..tokens import Tokens
from .base import Chain, Intervention, require_fired, require_rows
from .lower import add_stash, add_visit, default_rule, in_order, lower, plain
from .methods import AtP, Method
from .metrics import Metric, Scorer

CHUNK = 4096
"""Latents scored at a time: bounds memory at tokens x CHUNK numbers."""


@final
@dataclass(frozen=True)
class Attribute:
    """Score latents by how much the metric moves when each goes to its baseline value.

    Scores are first-order estimates, not effects: verify the few that matter by ablating them
    (``run`` with ``Ablate``).

    Args:
        target: ``Dictionaries`` (all their latents), a dictionary, or ``Latents`` (only these).
        metric: what to explain; ``logit_diff``, ``logit`` or ``metric``.
        baseline: what latents are moved to: None for zero, or an intervention, whose run on
            the same prompt gives the values (so ``Ablate(direction)`` is the paper's corrupt run).
            Its values are encoded anew: latents it ablates may read above zero there, so to remove
            the very latents that are scored, use None.
        method: ``AtP()`` or ``IG(steps, rule)``.
        where: which tokens are scored; every real token by default.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> attribute = sf.Attribute(saes, sf.logit_diff(5, 6), method=sf.IG(steps=2))
        >>> isinstance(attribute(model, ["hello"]).top(3), sf.Latents)
        True
    """

    target: Dictionaries | Dictionary | Latents
    metric: Metric
    baseline: Intervention | None = None
    method: Method = field(default_factory=AtP)
    where: Tokens | None = None

    def __call__(
        self, model: Any, prompts: Prompts, *, batch_size: int = 16, progress: bool = False
    ) -> Attribution:
        """Attribute over prompts, a batch at a time.

        Args:
            model: an nnsight ``TransformersModel``.
            prompts: strings, chats or token ids.
            batch_size: prompts a batch; each node of the method runs the batch once.
            progress: show a progress bar.

        Returns:
            An ``Attribution``, on the CPU.

        Raises:
            GradientError: under ``torch.no_grad``, or if the metric has no gradient.
            SiteError, ModelError, PromptError: as in ``run``.
        """
        _require_gradients()
        latents = as_latents(self.target, "Attribute")
        scorer = self.metric.bind(getattr(model, "tokenizer", None))
        encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
        if self.baseline is not None:
            require_rows(self.baseline, len(encoded["input_ids"]))
        pieces, receipts, start = [], [], 0
        batches = split(encoded, batch_size)
        for batch in tqdm(batches, disable=not progress, desc="attribute", unit="batch"):
            rows = slice(start, start + len(batch["input_ids"]))
            start = rows.stop
            piece, receipt = _attribute(self, latents, scorer, model, batch, rows)
            pieces.append(piece)
            receipts.append(receipt)
        require_fired(sum(receipts[1:], receipts[0]), "Attribute")  # over all of the data set
        return join_attributions(pieces)


def _attribute(
    job: Attribute,
    latents: Latents,
    scorer: Scorer,
    model: Any,
    batch: dict[str, Tensor],
    rows: slice,
) -> tuple[Attribution, Receipt]:
    """One batch: baseline run, gradients along the path, scores; what the baseline's edits did."""
    watch = Watch(latents, model)
    base = None if job.baseline is None else watch.run(model, batch, job.baseline, rows=rows)
    starts = job.method.nodes()[0][0] == 0.0  # then the clean pass is the first node too
    clean = watch.run(model, batch, Chain(()), gradient=starts)
    rules = [job.where or default_rule(part.dictionary, model) for part in watch.parts]
    scored = [select(plain(rule.rule, model), clean.view) for rule in rules]
    if base is None:
        base = watch.run(model, batch, Chain(()), targets=watch.zeroed(clean.values, scored))
    top = base.logits.argmax(-1)
    gradients = _mean_gradients(job.method, watch, scorer, model, batch, clean, base)
    with torch.no_grad():
        zero = job.baseline is None
        scores = [
            _score(part, mask, clean, base, gradients, zero)
            for part, mask in zip(watch.parts, scored, strict=True)
        ]
        numbered = [
            (*row[:1], torch.full_like(row[0], n), *row[1:]) for n, row in enumerate(scores)
        ]
        found = Attribution(
            tuple(part.dictionary for part in watch.parts),
            *(torch.cat(column).cpu() for column in zip(*numbered, strict=True)),
            clean=scorer(clean.logits.detach(), top).float().cpu(),
            baseline=scorer(base.logits, top).float().cpu(),
            tokens=torch.stack(scored).any(0).sum(1).cpu(),
        )
    return found, base.receipt


class Pass(NamedTuple):
    """One forward pass: values at watched sites [b, t, d], graph nodes, last logits [b, v]."""

    values: dict[int, Tensor]
    nodes: dict[int, Tensor]
    logits: Tensor
    view: dict[str, Any]
    receipt: Receipt


class Part(NamedTuple):
    """One dictionary's latents, and the numbers of the places it reads and writes."""

    dictionary: Dictionary
    indices: tuple[int, ...]
    read: int
    write: int
    transform: dict[str, Any]


class Watch:
    """The places to watch in one model, for some latents."""

    def __init__(self, latents: Latents, model: Any) -> None:
        module = torch_module(model)
        self._places: dict[Place, tuple[int, tuple[int, int]]] = {}
        self.parts: list[Part] = []
        for basis, indices in latents.parts:
            dictionary: Dictionary = basis  # type: ignore[assignment]
            check_width(module, dictionary.site, dictionary.d_in, "dictionary")
            check_width(module, dictionary.write_site, dictionary.d_out, "dictionary")
            place = find(module, dictionary.site)
            read = self._number(place, dictionary.site.order)
            written = find_writable(module, dictionary.write_site, "Attribute")
            write = self._number(written, dictionary.write_site.order)
            transform = {"transform": place.transform, "eps": place.eps}
            self.parts.append(Part(dictionary, indices, read, write, transform))
        self.written = {part.write for part in self.parts}
        in_order = sorted(self._places.values(), key=lambda entry: entry[1])
        self.first = next(number for number, _ in in_order if number in self.written)
        accepted = inspect.signature(module.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def _number(self, place: Place, order: tuple[int, int]) -> int:
        key = Place(place.path, place.end, plus=place.plus)
        return self._places.setdefault(key, (len(self._places), order))[0]

    def run(
        self,
        model: Any,
        batch: dict[str, Tensor],
        intervention: Intervention,
        *,
        gradient: bool = False,
        targets: dict[int, Tensor] | None = None,
        rows: slice = slice(None),
    ) -> Pass:
        """One forward pass; with ``gradient``, values are nodes of the graph.

        The values are kept as the intervention left them; ``targets`` are put there first.
        """
        program = lower(intervention, model, rows)
        self._add(program, gradient or targets is not None, targets or {})
        with torch.set_grad_enabled(gradient), model.trace(**self.options) as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(new_log())
                whole_run(model, program, log)
            with tracer.invoke():
                logits = nnsight.save(model.output.logits[:, -1])
        return Pass(log["kept"], log["nodes"], logits, log["view"], intervention.receipt(log))

    def _add(self, program: dict[str, Any], gradient: bool, targets: dict[int, Tensor]) -> None:
        """A keep action at the end of each watched visit."""
        visits = {Place(visit["path"], visit["end"]): visit for visit in program["visits"]}
        for place, (number, order) in self._places.items():
            if place.plus is not None:
                add_stash(visits, place.plus, order[0])
            action = {"do": "keep", "id": number, "target": targets.get(number)}
            action["gradient"] = gradient and number in self.written
            action["first"] = number == self.first
            action["plus"] = place.plus
            add_visit(visits, place, order)["actions"].append(action)
        program["visits"] = in_order(visits)

    def zeroed(self, values: dict[int, Tensor], masks: Sequence[Tensor]) -> dict[int, Tensor]:
        """What each written place holds with the watched latents zero where they are scored.

        ``masks`` [b, t], one a part: tokens that are not scored keep their latents.
        """
        found = {}
        with torch.no_grad():
            for part, mask in zip(self.parts, masks, strict=True):
                x = lift(values[part.read][mask], part.transform)  # [n, d_in]
                out = found.get(part.write, values[part.write]).clone()
                for columns, _ in chunks(part, x):
                    f, scale = encode(columns, x)
                    step = f @ columns["directions"]  # [n, d_out]
                    out[mask] -= (step if scale is None else step * scale).to(out.dtype)
                found[part.write] = out
        return found


def chunks(part: Part, like: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The part's columns, CHUNK latents at a time, with the latents' indices [k]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    for start in range(0, len(part.indices), CHUNK):
        index = index_tensor(part.indices[start : start + CHUNK])
        yield cast(part.dictionary.columns(index), dtype, like.device), index


def _mean_gradients(
    method: Method,
    watch: Watch,
    scorer: Scorer,
    model: Any,
    batch: dict[str, Tensor],
    clean: Pass,
    base: Pass,
) -> dict[int, Tensor]:
    """The metric's gradient at each written place [b, t, d], averaged over the path."""
    top = base.logits.argmax(-1)
    total: dict[int, Tensor] = {}
    for alpha, weight in method.nodes():
        here = clean
        if alpha != 0.0:  # the clean pass is the node at zero
            targets = {n: torch.lerp(clean.values[n], base.values[n], alpha) for n in watch.written}
            here = watch.run(model, batch, Chain(()), gradient=True, targets=targets)
        for number, gradient in _gradients(scorer(here.logits, top), here, watch.written).items():
            total[number] = total.get(number, 0.0) + weight * gradient
        here.nodes.clear()  # one graph at a time
    return total


def _gradients(values: Tensor, here: Pass, numbers: set[int]) -> dict[int, Tensor]:
    """∂(Σ metric)/∂x at each place; prompts do not mix, so rows are the prompts' own."""
    if values.shape != here.logits.shape[:1] or not values.requires_grad:
        raise GradientError(
            explain(
                "Attribute",
                "metric",
                got=f"of shape {tuple(values.shape)}, requires_grad={values.requires_grad}",
                wanted="one differentiable number a prompt, [batch]",
                cause="an argmax, a detach or a mean over prompts inside the metric",
                call="metric(lambda logits: logits[:, 5])",
            )
        )
    order = sorted(numbers)
    nodes = [here.nodes[number] for number in order]
    found = torch.autograd.grad(values.sum(), nodes, materialize_grads=True)
    return dict(zip(order, found, strict=True))


def _score(
    part: Part,
    mask: Tensor,
    clean: Pass,
    base: Pass,
    gradients: dict[int, Tensor],
    zero: bool,
) -> tuple[Tensor, ...]:
    """One dictionary's rows: prompt, position, latent, score, activation, change.

    ``mask`` [b, t] says which tokens are scored.
    """
    prompt = mask.nonzero()[:, 0]  # [n]
    before = lift(clean.values[part.read][mask], part.transform)  # [n, d_in]
    after = None if zero else lift(base.values[part.read][mask], part.transform)
    gradient = gradients[part.write][mask].to(before.dtype)  # [n, d_out]
    found = []
    for columns, index in chunks(part, before):
        f, scale = encode(columns, before)
        # At the zero baseline the latent is zero, though x − f · directions may encode to more.
        other, scale_then = (
            (torch.zeros_like(f), scale) if after is None else encode(columns, after)
        )
        moved = other != f if scale is None else (other != 0) | (f != 0)
        token, latent = moved.nonzero(as_tuple=True)  # [m], [m]
        was, will = f[token, latent], other[token, latent]
        if scale is None or scale_then is None:
            score = (will - was) * _dot(gradient, columns["directions"], token, latent)
        else:  # the direction itself moves: the difference of two contributions
            score = will * _dot(gradient * scale_then, columns["directions"], token, latent)
            score = score - was * _dot(gradient * scale, columns["directions"], token, latent)
        found.append((token, index.to(latent.device)[latent], score, was, will - was))
    token, latent, score, activation, step = (torch.cat(c) for c in zip(*found, strict=True))
    position = clean.view["position"][mask][token]
    return prompt[token], position, latent, score.float(), activation.float(), step.float()


def _dot(slope: Tensor, directions: Tensor, token: Tensor, latent: Tensor) -> Tensor:
    """[m]: slope[token] · directions[latent], gathering only the pairs that are wanted.

    Dense unless fewer than one pair in 64 is wanted: until then a matrix product of all pairs is
    cheaper than moving rows about.
    """
    if len(token) * 64 > len(slope) * len(directions):
        return (slope @ directions.T)[token, latent]
    step = max(1, (1 << 21) // slope.shape[1])  # 8 MiB of float32 at a time
    pieces = [
        (slope[token[i : i + step]] * directions[latent[i : i + step]]).sum(-1)
        for i in range(0, max(len(token), 1), step)
    ]
    return torch.cat(pieces)


def _require_gradients() -> None:
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return
    raise GradientError(
        explain(
            "Attribute",
            "context",
            got="gradients switched off",
            wanted="torch.is_grad_enabled()",
            cause="a surrounding torch.no_grad() or torch.inference_mode()",
            call="with torch.enable_grad(): attribute(model, prompts)",
        )
    )
