"""Every name of saefeat that the freeze uses, behind neutral ones.

The cases call these functions and nothing else of the library, so that this is the only file to
change when a name moves or an argument is spelled another way. What a case is called and what it
records must stay as they are: they are matched with ``frozen.json`` by name.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight import CONFIG
from torch import Tensor, nn

import saefeat as sf
from saefeat.dictionaries.weights import InMemory
from saefeat.generation import Beams, Greedy, Sample
from saefeat.studies.refusal import tiny
from saefeat.studies.refusal.cli import main as study_main
from saefeat.text import prompts as text

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import loopback

CONFIG.APP.REMOTE_LOGGING = False  # else every local request prints its states

Values = dict[str, Any]
"""Name → tensor, plain data, or a mapping of these: what is recorded of a result."""

# ---------------------------------------------------------------- models and prompts


def wrap(module: nn.Module, tokenizer: Any) -> Any:
    """A Hugging Face model as an nnsight model."""
    return nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")


@cache
def chat_model() -> Any:
    """The chat model that the package ships."""
    return tiny.model("chat")


@cache
def chat_saes(kind: str = "resid_post") -> Any:
    """Its dictionaries on one kind of site."""
    return sf.load_saes(tiny.saes_folder("chat"), sites=kind)


@cache
def chat_sae(folder: str, site: str | None = None) -> Any:
    """One of them, by its folder's name, at its own site or a wrong one."""
    return sf.load_sae(tiny.saes_folder("chat") / folder, site=site)


def chat_prompts(split: str, count: int) -> list[Any]:
    """The first requests of a split, as chats."""
    return [[{"role": "user", "content": one.instruction}] for one in tiny.splits()[split][:count]]


def openings() -> tuple[list[str], list[str]]:
    """The words that open an answer, and those that open a refusal."""
    return list(tiny.COMPLY_OPENINGS), list(tiny.REFUSAL_OPENINGS)


def encode_prompts(model: Any, prompts: Any) -> dict[str, Tensor]:
    """Prompts as one left-padded batch."""
    return text.encode_prompts(model.tokenizer, prompts)


# ---------------------------------------------------------------- dictionaries and latents


def sae(tensors: Mapping[str, Tensor], **options: Any) -> Any:
    """An SAE or transcoder from tensors in memory."""
    return sf.SAE(InMemory(dict(tensors)), **options)


def one_direction(rows: Tensor, site: str) -> Any:
    """A direction, or a subspace, at one site."""
    return sf.Direction(rows, site=site)


def random_direction(width: int, site: str, seed: int) -> Any:
    """A direction drawn from the sphere."""
    return sf.Direction.random(width, site=site, seed=seed)


def direction_at(vector: Tensor, sites: Sequence[str]) -> Any:
    """The same direction at several sites."""
    return sf.Direction.at_sites(vector, sites=sites)


def neurons(site: str, width: int) -> Any:
    """The site's own coordinates."""
    return sf.Neurons(site, width)


def error_term(dictionary: Any) -> Any:
    """What an SAE leaves unexplained, as a dictionary."""
    return sf.dictionaries.ErrorTerm(dictionary)


def from_function(encode: Callable[[Tensor], Tensor], rows: Tensor, **options: Any) -> Any:
    """A dictionary from a function and directions."""
    return sf.dictionaries.Function(encode, rows, **options)


def together(dictionaries: Sequence[Any]) -> Any:
    """One dictionary a site."""
    return sf.dictionaries.Dictionaries(dictionaries)


def pick(dictionary: Any, indices: Any = None) -> Any:
    """Latents of a dictionary, or of a mapping of them by site."""
    return dictionary.latents(indices)


def joined(selections: Sequence[Any]) -> tuple[Any, Tensor]:
    """The union of selections, and which of its latents each holds."""
    return sf.values.per_prompt(selections)


def members(latents: Any) -> dict[str, list[int]]:
    """A selection as plain data."""
    return latents.to_dict()


def matched(latents: Any, statistics: Any, *, seed: int, within: float) -> Any:
    """Controls: other latents, as long and as active."""
    return sf.controls.matched(latents, statistics, seed=seed, within=within)


def random_directions(latents: Any, *, seed: int) -> Any:
    """Controls: the same latents, writing random directions."""
    return sf.controls.random_directions(latents, seed=seed)


def dictionary_values(dictionary: Any, x: Tensor, indices: Sequence[int]) -> Values:
    """What a dictionary makes of values [n, d]."""
    found = {
        "all": dictionary.encode(x),
        "some": dictionary.encode(x, indices),
        "directions": dictionary.directions(indices),
        "fingerprint": dictionary.fingerprint(),
        "widths": [dictionary.d_in, dictionary.d_sae, dictionary.d_out],
        "sites": [str(dictionary.site), str(dictionary.write_site)],
    }
    if hasattr(dictionary, "reconstruct"):
        found["reconstruct"] = dictionary.reconstruct(x)
    return found


# ---------------------------------------------------------------- token rules


def everywhere() -> Any:
    """All real tokens."""
    return sf.Tokens.all()


def in_prompt() -> Any:
    """The prompt's tokens."""
    return sf.Tokens.prompt()


def first(n: int) -> Any:
    """The prompt's first tokens."""
    return sf.Tokens.first(n)


def last(n: int) -> Any:
    """The prompt's last tokens."""
    return sf.Tokens.last(n)


def generated(start: int = 0, stop: int | None = None) -> Any:
    """Generated tokens."""
    return sf.Tokens.generated(start, stop)


def with_ids(*ids: int) -> Any:
    """Tokens by their ids."""
    return sf.Tokens.ids(*ids)


def special() -> Any:
    """The tokenizer's special tokens."""
    return sf.Tokens.special()


def role(name: str) -> Any:
    """What one side of a chat says."""
    return sf.Tokens.role(name)


def where(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Tokens by a function of ids and positions."""
    return sf.Tokens.where(function)


# ---------------------------------------------------------------- verbs


def ablate(latents: Any, to: Any = "zero", **options: Any) -> Any:
    """Set latents to zero or to values, or take out their span; at, when and support as options."""
    latents, to = (latents.span(), 0.0) if to == "orthogonal" else (latents, to)
    return sf.Ablate(_written(latents, options), to=to, **_verb(options))


def clamp(latents: Any, value: Any = None, **options: Any) -> Any:
    """Set, scale, shift or bound latents."""
    return sf.Clamp(_written(latents, options), value, **_verb(options))


def _written(latents: Any, options: dict[str, Any]) -> Any:
    """``support`` is a property of the selection."""
    return latents.reselect() if options.pop("support", "frozen") == "reselect" else latents


def probe(latents: Any, reduce: str | None = None, **options: Any) -> Any:
    """Read latents."""
    return sf.Probe(latents, reduce=reduce, **_verb(options))


def _verb(options: dict[str, Any]) -> dict[str, Any]:
    """``at`` is the token rule."""
    return {"where" if name == "at" else name: value for name, value in options.items()}


def condition(subject: Any, **options: Any) -> Any:
    """A condition on latents or on a score of a site."""
    return sf.When(subject, **options)


def patch(readings: Any) -> Any:
    """What latents were in a clean run."""
    return sf.values.Patch(readings)


def resample(activations: Any, seed: int) -> Any:
    """What latents were at a token drawn from data."""
    return sf.values.Resample(activations, seed=seed)


def schedule(values: Any, prompt: Any = None) -> Any:
    """Values by generated token."""
    return sf.values.Schedule(values, prompt=prompt)


def mean_of(readings: Any) -> Tensor:
    """[k]: the mean over what was read."""
    return readings.mean()


# ---------------------------------------------------------------- ways of running


def run(
    model: Any,
    prompts: Any,
    verb: Any = None,
    *,
    new: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    beams: int = 1,
    stop: Sequence[int] = (),
    batch: int = 32,
    folder: Path | None = None,
    on: str | None = None,
    dtype: torch.dtype | None = None,
    unfired: bool = True,
) -> Any:
    """Prompts in; text, logits, readings and a receipt out. ``on`` is None, "local" or a URL."""
    if temperature is not None:
        decode = Sample(
            temperature, top_p=top_p, top_k=top_k, seed=seed, num_beams=beams, stop=stop
        )
    else:
        decode = Beams(beams, stop=stop) if beams > 1 else Greedy(stop)
    return sf.run(
        model, prompts, verb, max_new_tokens=new, decode=decode, batch_size=batch,
        checkpoint=folder, on=on and sf.remote.Server(on, dtype=dtype), allow_unfired=unfired,
    )  # fmt: skip


def stream(
    model: Any,
    prompts: Any,
    verb: Any = None,
    *,
    new: int = 0,
    temperature: float | None = None,
    seed: int | None = None,
    batch: int = 32,
    folder: Path | None = None,
    unfired: bool = True,
) -> Iterator[Any]:
    """A run's results, batch by batch."""
    decode = None if temperature is None else Sample(temperature, seed=seed)
    return sf.run(
        model, prompts, verb, max_new_tokens=new, decode=decode, batch_size=batch,
        checkpoint=folder, allow_unfired=unfired, stream=True,
    )  # fmt: skip


def sweep(
    model: Any, prompts: Any, settings: Mapping[str, Any], *, new: int = 0, batch: int = 32
) -> dict[str, Any]:
    """Several interventions on the same prompts, in shared batches."""
    return sf.sweep(
        model, prompts, settings, max_new_tokens=new, batch_size=batch, allow_unfired=True
    )


def submitted(model: Any, prompts: Any, verb: Any, *, url: str, new: int, batch: int) -> Any:
    """A run left with a server, and waited for."""
    job = sf.remote.submit(
        model, prompts, verb, max_new_tokens=new, batch_size=batch, allow_unfired=True,
        on=sf.remote.Server(url),
    )  # fmt: skip
    return job.wait()


@contextmanager
def server(model: Any) -> Iterator[str]:
    """A server on this machine; its URL."""
    with loopback.serve(model) as server:
        yield server.url


def inline_trace(model: Any, batch: dict[str, Tensor], verb: Any) -> Values:
    """The verb called in a trace: all logits, and its log."""
    with torch.no_grad(), model.trace(batch):
        log = nnsight.save(verb(model))
        logits = nnsight.save(model.output.logits)
    return {"logits": logits, **log_values(verb, log)}


def inline_generation(model: Any, batch: dict[str, Tensor], verb: Any, new: int) -> Values:
    """The verb called in a generation: tokens, and its log."""
    with model.generate(max_new_tokens=new, do_sample=False) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(verb(model))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return {"tokens": tokens.tolist(), **log_values(verb, log)}


def inline_steps(model: Any, batch: dict[str, Tensor], verb: Any, new: int) -> Values:
    """The verb called at each step of a loop over a generation's passes."""
    with model.generate(max_new_tokens=new, do_sample=False) as tracer:
        with tracer.invoke(batch):
            logs = nnsight.save([])
            for number in tracer.iter[:]:
                logs.append(verb(model, step=number))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    found = {f"pass {n}": log_values(verb, log) for n, log in enumerate(logs)}
    return {"tokens": tokens.tolist(), **found}


def edited(model: Any, batch: dict[str, Tensor], verb: Any, new: int) -> Values:
    """An edited copy of the model, traced and generating."""
    copy = sf.edit(model, verb)
    with torch.no_grad(), copy.trace(batch):
        logits = nnsight.save(copy.output.logits)
    with copy.generate(max_new_tokens=new, do_sample=False) as tracer:
        with tracer.invoke(batch):
            pass
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return {"logits": logits, "tokens": tokens.tolist()}


def hooked(module: nn.Module, batch: dict[str, Tensor], verb: Any, new: int) -> Values:
    """The verb as hooks on a plain model: a pass, and a generation."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sf.hooked(module, verb) as log:
        logits = module(**batch, position_ids=positions).logits
    found = {"logits": logits, **log_values(verb, log)}
    with sf.hooked(module, verb) as log:
        tokens = module.generate(**batch, max_new_tokens=new, do_sample=False)
    return {**found, "tokens": tokens.tolist(), "generation": log_values(verb, log)}


# ---------------------------------------------------------------- what a run gives


def log_values(verb: Any, log: Any) -> Values:
    """A log's readings and receipt."""
    return {**readings_values(verb.readings(log)), **receipt_values(verb.receipt(log))}


def readings_values(readings: Sequence[Any]) -> Values:
    """What probes read, zero where nothing was selected."""
    found: Values = {}
    for n, one in enumerate(readings):
        table: Values = {
            "values": torch.where(one.mask, one.values, 0.0),
            "mask": one.mask,
            "latents": members(one.latents),
        }
        table |= {} if one.starts is None else {"starts": one.starts}
        table |= {} if one.counts is None else {"counts": one.counts}
        found[f"reading {n}"] = table
    return found


def reading_summaries(reading: Any) -> Values:
    """A reading's reductions."""
    return {
        "mean": reading.mean(),
        "max": reading.max(),
        "last": reading.last(),
        "active": reading.active(),
        "kept": reading.kept(),
    }


def receipt_values(receipt: Any) -> Values:
    """What each edit did; events as whole-number and number columns."""
    found: Values = {"passes": receipt.passes}
    for n, row in enumerate(receipt.rows):
        table: Values = {"counts": [row.tokens, row.changed], "largest": float(row.largest)}
        if row.events is not None:
            columns = row.events.columns()
            whole = [c for c in columns.values() if not c.is_floating_point()]
            table["places"] = torch.stack(whole, 1)
            table |= {name: c for name, c in columns.items() if c.is_floating_point()}
            table["prompts"] = row.events.prompts
            table["sites"] = [str(site) for site in row.events.sites]
        found[f"edit {n}"] = table
    return found


def run_values(result: Any) -> Values:
    """All of a run but where it comes from."""
    return {
        "prompts": result.prompts,
        "completions": result.completions,
        "texts": result.texts,
        "logits": result.logits,
        **readings_values(result.readings),
        **receipt_values(result.receipt),
    }


def source_values(result: Any) -> Values:
    """Where a run comes from, but for dates, versions, and how interventions print."""
    source = result.provenance
    return {
        "model": source.model,
        "dtype": source.dtype,
        "device": source.device,
        "dictionaries": source.dictionaries,
        "latents": list(source.latents),
        "generation": source.generation,
    }


def event_totals(result: Any) -> Values:
    """‖Δ‖ by token, of each edit with events."""
    found: Values = {}
    for n, row in enumerate(result.receipt.rows):
        keys, norm = row.events.norms()
        found[f"edit {n}"] = {"keys": keys, "norm": norm}
    return found


# ---------------------------------------------------------------- requests


def request_report(model: Any, prompts: Any, verb: Any, **options: Any) -> tuple[Values, Values]:
    """What a request would do, and how large it is."""
    report = sf.remote.preflight(model, prompts, verb, **options)
    does = {
        "batches": report.batches,
        "parks": report.parks,
        "passes": report.passes,
        "selected": [count for _, count in report.tokens],
        "expected": [[one.prompt, one.generated] for one in report.expected],
        "dtypes": report.dtypes,
        "would fail": bool(report.strangers or report.fails),
        "untried": bool(report.untried),
    }
    parts = sorted(report.parts.values())
    return does, {"payload": report.payload, "parts": parts, "result": report.result}


# ---------------------------------------------------------------- metrics and measuring


def logit_diff(positive: Any, negative: Any) -> Any:
    """The log-odds of one token or group against another."""
    return sf.logit_diff(positive, negative)


def logit(token: Any) -> Any:
    """A token's logit."""
    return sf.metrics.logit(token)


def log_prob(continuation: Any) -> Any:
    """The log-probability of a continuation."""
    return sf.metrics.log_prob(continuation)


def kl(to: Any = "clean") -> Any:
    """The divergence from a reference."""
    return sf.metrics.kl(to)


def activation(latents: Any, at: Any = None) -> Any:
    """The activation of later latents."""
    return sf.metrics.activation(latents, at)


def metric(function: Any, tokens: str = "last") -> Any:
    """Any function of logits."""
    return sf.metrics.custom(function, "own", tokens=tokens)


def site_metric(site: str, function: Any) -> Any:
    """Any function of a site's value."""
    return sf.metrics.at_site(site, function, "own")


def baseline_top() -> Any:
    """The baseline run's most likely token."""
    return sf.metrics.BASELINE_TOP


def per_prompt(values: Sequence[Any]) -> Any:
    """One value a prompt."""
    return sf.metrics.PerPrompt(values)


def measure(model: Any, prompts: Any, what: Any, verb: Any = None, *, batch: int = 32) -> Tensor:
    """[prompts]: a metric of a run."""
    return sf.metrics.measure(model, prompts, what, verb, batch_size=batch)


def continuation_loss(model: Any, result: Any, verb: Any, *, batch: int) -> Tensor:
    """[prompts]: nats a token of a run's own completions, under a verb."""
    log_prob = sf.metrics.log_prob(sf.metrics.PerPrompt(result.completions))
    total = sf.metrics.measure(model, result.prompts, log_prob, verb, batch_size=batch)
    return -total / torch.tensor([len(tokens) for tokens in result.completions])


# ---------------------------------------------------------------- attribution


def one_gradient() -> Any:
    """Attribution patching."""
    return sf.attribution.AtP()


def path(steps: int, rule: str = "left", published: bool = False) -> Any:
    """Integrated gradients."""
    return sf.IG(steps, rule, endpoint="as_published" if published else "corrected")


def exact(per: str = "latent") -> Any:
    """Each latent moved for real."""
    return sf.attribution.Exact(per=per)


def small_steps(step: float, per: str = "latent") -> Any:
    """Finite differences."""
    return sf.attribution.FiniteDifference(step, per=per)


def fixed(latents: Any, values: Any) -> Any:
    """Baseline: given values."""
    return sf.attribution.Fixed(latents, values)


def paired(prompts: Any, align: Any = None) -> Any:
    """Baseline: other prompts."""
    return sf.attribution.Paired(prompts, align=align)


def relevance() -> Any:
    """Relevance propagation in place of the gradient."""
    return sf.attribution.RelP()


def dropped_layers() -> Any:
    """Gradients with one layer left out at a time."""
    return sf.attribution.GradDrop()


def attribute(target: Any, what: Any, *, at: Any = None, **options: Any) -> Any:
    """The verb that scores; options are baseline, method, semantics, one_site, backward, keep."""
    return sf.Attribute(target, what, where=at, **options)


def scores(verb: Any, model: Any, prompts: Any, *, batch: int = 16, **options: Any) -> Any:
    """Scores over prompts; options are ``on``, ``folder`` and ``at_once``."""
    names = {"on": "on", "folder": "checkpoint", "at_once": "steps_at_once"}
    given = {names[name]: value for name, value in options.items() if value is not None}
    if "on" in given:
        given["on"] = sf.remote.Server(given["on"])
    return verb(model, prompts, batch_size=batch, **given)


def scores_in_trace(verb: Any, model: Any, batch: dict[str, Tensor], edit: Any = None) -> Any:
    """Scores of the verb's own metric inside a trace."""
    with model.trace(batch):
        watching = verb.watch(model, edit)
        found = nnsight.save(watching.scores(model.output.logits))
    return found


def entropy_scores_in_trace(verb: Any, model: Any, batch: dict[str, Tensor]) -> Any:
    """Scores of a metric made in the trace."""
    with model.trace(batch):
        watching = verb.watch(model)
        last = model.output.logits[:, -1].log_softmax(-1)
        found = nnsight.save(watching.scores(-(last.exp() * last).sum(-1)))
    return found


def attribution_values(found: Any) -> Values:
    """An attribution's columns, and what is derived from them."""
    keys, values, _ = found.totals()
    table: Values = {
        "places": torch.stack([found.prompt, found.dictionary, found.position, found.latent], 1),
        "score": found.score,
        "activation": found.activation,
        "change": found.change,
        "clean": found.clean,
        "baseline": found.baseline,
        "tokens": found.tokens.tolist(),
        "totals": values,
        "total keys": keys,
        "by site": {str(site): value for site, value in found.by_site().items()},
        "top": members(found.top(8)),
        "degenerate": found.degenerate.tolist(),
        "signed": found.signed,
    }
    optional = {"ends": found.ends, "dropped": found.dropped, "scored": found.scored}
    table |= {name: value for name, value in optional.items() if value is not None}
    return table


def attribution_gaps(found: Any) -> Values:
    """How far scores are from adding up."""
    gaps: Values = {} if not found.signed else {"gap": found.gap}
    if found.ends is not None and found.dropped is None and found.signed:
        gaps["gap by site"] = found.gap_by_site
    return gaps


def attribution_views(found: Any, latents: Any, rule: Any) -> Values:
    """An attribution looked at in other ways."""
    _, values, rows = found.totals(per="prompt", where=rule)
    return {
        "by prompt": values,
        "rows": rows,
        "slope": found.slope,
        "by position": {str(p): v for p, v in found.by_position().items()},
        "from the end": {str(p): v for p, v in found.by_position(origin="end").items()},
        "top by prompt": [members(one) for one in found.top(3, per="prompt")],
        "top within": members(found.top(3, within=latents)),
        "top at": members(found.top(3, where=rule)),
        "scores of": found.scores_of(latents),
        "ranking": [[members(one), score] for one, score in found.ranking(4)],
    }


def top(found: Any, k: int) -> Any:
    """The best latents."""
    return found.top(k)


def attribution_saved(found: Any, file: Path, dictionaries: Any) -> Any:
    """Written to a file and read back."""
    return type(found).load(found.save(file), saes=dictionaries)


# ---------------------------------------------------------------- validation


def audit(verb: Any, model: Any, prompts: Any, found: Any, **options: Any) -> Values:
    """Estimates beside exact effects."""
    result = sf.audit(verb, model, prompts, found, **options)
    return {
        "keys": result.keys,
        "stratum": result.stratum,
        "sizes": result.sizes,
        "estimates": result.estimates,
        "effects": result.effects,
        "change": result.change,
        "error": result.error,
        "top": list(result.top),
        "tail": list(result.tail),
        "by prompt": [list(one) for one in result.by_prompt],
        "missed": list(result.missed),
        "outranked": list(result.outranked),
        "degenerate": result.degenerate,
        "dropped": result.dropped,
    }


def stability(found: Any, k: int, **options: Any) -> Values:
    """The top set under prompts drawn again."""
    result = sf.validation.stability(found, k, **options)
    return {
        "keys": result.keys,
        "mean": result.mean,
        "low": result.low,
        "high": result.high,
        "inclusion": result.inclusion,
        "overlap": result.overlap,
        "outsiders": result.outsiders,
        "core": members(result.core(0.5)),
    }


def faithfulness(verb: Any, model: Any, prompts: Any, found: Any, **options: Any) -> Values:
    """Sets kept and removed, beside controls."""
    result = sf.validation.faithfulness(verb, model, prompts, found, **options)
    curves = {
        f"{measure} of {of}": [list(point) for point in result.curve(measure, of)]
        for measure in ("faithfulness", "completeness")
        for of in result.sets
    }
    curves["minimality of top"] = [list(point) for point in result.curve("minimality")]
    return {
        "sizes": list(result.sizes),
        "sets": dict(result.sets),
        "clean": result.clean,
        "empty": result.empty,
        "kept": dict(result.kept),
        "removed": dict(result.removed),
        "marginals": {str(n): one for n, one in enumerate(result.marginals)},
        "mass": dict(result.mass),
        "curves": curves,
        "balance": {of: list(result.balance(of)) for of in result.mass if of != "top"},
    }


def minimal_set(model: Any, prompts: Any, latents: Any, what: Any, **options: Any) -> Values:
    """What is left of a set when nothing more can be dropped."""
    result = sf.validation.minimal_set(model, prompts, latents, what, **options)
    return {
        "left": members(result.latents),
        "removed": [members(one) for one in result.removed],
        "metric": result.metric,
        "held": result.held,
        "without": result.without,
        "clean": result.clean,
    }


def interactions(model: Any, prompts: Any, latents: Any, what: Any, **options: Any) -> Values:
    """Second differences."""
    result = sf.validation.interactions(model, prompts, latents, what, **options)
    return {
        "clean": result.clean,
        "alone": result.alone,
        "pairs": result.pairs,
        "top": [members(pair) for pair, _ in result.top(3)],
        "values": [value for _, value in result.top(3)],
    }


def edges(model: Any, prompts: Any, up: Any, down: Any, **options: Any) -> Values:
    """Which latents drive which."""
    result = sf.validation.edges(model, prompts, up, down, **options)
    found = {
        "ordered": result.ordered,
        "by prompt": result.by_prompt,
        "exact": result.exact,
        "rank": result.rank,
        "top": [[members(a), members(b), value] for a, b, value in result.top(4)],
        "unseen": [[members(a), members(b), value] for a, b, value in result.unseen(2)],
    }
    return found | ({} if result.ablated is None else {"ablated": result.ablated})


def verified(model: Any, dictionaries: Any, prompts: Any) -> Values:
    """Whether dictionaries are where they should be."""
    result = sf.verify(model, dictionaries, prompts, strict=False)
    return {
        "right": result.right,
        "tokens": result.tokens,
        "checks": {
            f"{check.name} at {check.site}": {
                "fvu": check.fvu,
                "l0": check.l0,
                "best": str(check.best),
                "best fvu": check.best_fvu,
                "declared": check.declared,
                "right": check.right,
                "notes": len(check.notes),
            }
            for check in result.checks
        },
    }


# ---------------------------------------------------------------- files


def save(verb: Any, file: Path, model: Any = None) -> Path:
    """An intervention as a file."""
    return sf.save(verb, file, model=model)


def load(file: Path, model: Any = None) -> Any:
    """An intervention from a file."""
    return sf.load(file, model=model)


def intervention_values(verb: Any) -> Values:
    """What an intervention holds: its latents' rows and its numbers, step by step."""
    found: Values = {}
    for n, step in enumerate(verb.parts()):
        table: Values = {"latents": members(step.latents)}
        for m, (basis, indices) in enumerate(step.latents.parts):
            table[f"rows {m}"] = basis.directions(indices)
            columns = basis.columns(torch.tensor(list(indices)))
            if isinstance(columns.get("encoder"), Tensor):
                table[f"encoder {m}"] = columns["encoder"]
                table[f"bias {m}"] = columns["bias"]
        change = step.change
        for name in () if change is None else ("scale", "shift", "low", "high", "active_only"):
            value = getattr(change, name)
            plain = value is None or isinstance(value, (Tensor, float, int, bool))
            table |= {name.replace("_", " "): value} if plain else {}
        found[f"step {n}"] = table
    return found


def steering_vectors(verb: Any) -> Values:
    """What a verb adds to each site."""
    return {str(site): vector for site, vector in sf.hub.steering_vector(verb).items()}


# ---------------------------------------------------------------- the study


def study_results(folder: Path, limit: int) -> dict[str, Any]:
    """The refusal study's results on the shipped model, quietly, with few prompts a split."""
    heard = io.StringIO()
    options = ["--quiet", "--limit", str(limit), "--output", str(folder)]
    with contextlib.redirect_stdout(heard):
        status = study_main(options)
    if status:
        raise RuntimeError(f"the study ended with {status}: {heard.getvalue()[-500:]}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
