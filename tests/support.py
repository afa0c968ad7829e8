"""Write docs/guide/support.md: what runs where, tried out on tiny random models.

    python tests/support.py            # writes the page
    python tests/support.py --check    # says whether it would change

Nothing in the tables is typed by hand: every cell is a run compared with plain forward hooks, or
the error that it raised.
"""

from __future__ import annotations

import sys
from pathlib import Path

import beartype  # noqa: F401  (before nnsight)
import nnsight
import torch

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    RAGGED,
    TRANSCODERS,
    D,
    batch_of,
    build,
    forward,
    make_sae,
    tensors_for,
    wrapped,
)
from saefeat.model.modules import blocks, find, has_site, width_at
from saefeat.model.sites import HOOKS, WHOLE
from zoo import ZOO, model_of
from zoo_checks import clamps, edit_by_hand, logits_of, plain_hook, read_all, seen_by_hand

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "support.md"
FAMILIES = ["gpt2", "gpt_neox", "llama", "gemma2"]
"""Built unlike each other: in these every way of running is tried."""
WAYS = ["trace", "generate", "edit", "run", "hooked"]
NEW = 3
EXACT, DIFFERS = "✓", "✗"

HEAD = """# What runs where

<!-- Written by tests/support.py; `python tests/support.py` writes it again. -->

Every cell was run on a tiny model with random weights, with prompts padded on the left, and
compared with plain forward hooks. ✓ means equal to float32 rounding (1e-4 in the logits; the very
same tokens where tokens are generated), ✗ that it is not. – means that there is no such value. A
name is the error that the case raises: it is refused, and never run wrongly. That the places are
the right ones is held against TransformerLens elsewhere, in `tests/test_sites.py`.
"""


def outcome(act, *wanted: torch.Tensor) -> str:
    """✓ or ✗ for what an act returns, or the class of the error it raises."""
    try:
        found = act()
    except sf.SaefeatError as error:
        return type(error).__name__
    close = [
        torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4)
        for a, b in zip(found, wanted, strict=True)
    ]
    return EXACT if all(close) else DIFFERS


def generated(nn, step=None):
    with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(batch_of()):
            if step is not None:
                step(nn)
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens


def traced(nn, step=None):
    with torch.no_grad(), nn.trace(batch_of()):
        if step is not None:
            step(nn)
        logits = nnsight.save(nn.output.logits[:, -1])
    return logits


def by_way(model, step) -> dict[str, object]:
    """Way → a call that gives (last logits, tokens), or the one of them that the way gives."""
    nn = wrapped(model)

    def hooked():
        with torch.no_grad(), sf.hooked(model, step):
            logits = forward(model, batch_of())[:, -1]
        with sf.hooked(model, step):
            return logits, model.generate(**batch_of(), max_new_tokens=NEW, do_sample=False)

    def run():
        out = sf.run(nn, batch_of(), step, max_new_tokens=NEW)
        tokens = torch.cat([batch_of()["input_ids"], torch.tensor(out.completions)], 1)
        return out.logits, tokens

    def edit():
        edited = sf.edit(nn, step)
        return traced(edited), generated(edited)

    return {
        "trace": lambda: (traced(nn, step),),
        "generate": lambda: (generated(nn, step),),
        "edit": edit,
        "run": run,
        "hooked": hooked,
    }


def wanted_by_hand(model, site, v):
    """Last logits and tokens with a direction set to 3 at a site, by plain hooks."""

    def move(x):
        return x + (3.0 - x @ v)[..., None] * v

    with plain_hook(model, site, move):
        with torch.no_grad():
            logits = forward(model, batch_of())[:, -1]
        return logits, model.generate(**batch_of(), max_new_tokens=NEW, do_sample=False)


def slope_at(model, site) -> tuple[torch.Tensor, torch.Tensor]:
    """The site's value and the metric's gradient there [b, t, d], with the value as a leaf."""
    kept = []

    def look(x):
        kept.append(x.detach().requires_grad_())
        return kept[-1]

    with plain_hook(model, site, look):
        positions = (batch_of()["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**batch_of(), position_ids=positions).logits[:, -1]
        (slope,) = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), kept)
    return kept[0].detach(), slope


def attributed(model, chosen: sf.Latents) -> tuple[torch.Tensor]:
    return (sf.Attribute(chosen, sf.logit_diff(5, 6))(wrapped(model), RAGGED).score,)


def case(family: str, kind: str) -> list[str]:
    """One row: each way of running, and Attribute."""
    model, site = build(family), sf.Site(kind, 1)
    try:
        width = width_at(model, site)
    except sf.errors.SiteError:
        return ["–"] * (len(WAYS) + 1)
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(width), dim=0)
    basis = sf.Direction(v, site=str(site))
    ways = by_way(model, sf.Clamp(basis, 3.0))
    if find(model, site).transform is not None:  # a computed value: read, never written
        refused = [outcome(act) for act in ways.values()]
        return [*refused, outcome(lambda: attributed(model, basis.latents()))]
    logits, tokens = wanted_by_hand(model, str(site), v)
    each = {"trace": (logits,), "generate": (tokens,)}
    found = [outcome(act, *each.get(way, (logits, tokens))) for way, act in ways.items()]
    x, slope = slope_at(model, str(site))
    wanted = -((slope @ v) * (x @ v))[batch_of()["attention_mask"].bool()]
    return [*found, outcome(lambda: attributed(model, basis.latents()), wanted)]


def shown(row: list[str]) -> str:
    """One cell: what all ways give, or each that differs from the first."""
    if len(set(row)) == 1:
        return row[0]
    odd = [f"{way} {cell}" for way, cell in zip([*WAYS, "Attribute"], row, strict=True)]
    return ", ".join(odd)


def sites_table(families) -> str:
    kinds = list(HOOKS)
    rows = [f"| model type | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for family in families:
        rows.append(f"| {family} | {' | '.join(shown(case(family, kind)) for kind in kinds)} |")
    return "\n".join(rows)


KINDS = [*HOOKS, *WHOLE]
READ, NONE = "read", "–"


def families_table(names) -> str:
    """Family x point: what a reading and an edit are, each against a plain hook's."""
    rows = [f"| model type | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name in names:
        model = model_of(name)
        rows.append(f"| {name} | {' | '.join(point(model, kind) for kind in KINDS)} |")
    return "\n".join(rows)


def point(model, kind: str) -> str:
    """One kind in one model: at the last layer that has it, and at which layers, if not at all."""
    every = [sf.Site(kind)] if kind in WHOLE else []
    layers = range(len(blocks(model)))
    every = every or [sf.Site(kind, layer) for layer in layers]
    have = [site for site in every if has_site(model, site)]
    if not have:
        return NONE
    site, place, batch = str(have[-1]), find(model, have[-1]), batch_of()
    where = "" if len(have) == len(every) else f" in {', '.join(str(one.layer) for one in have)}"
    real = batch["attention_mask"].bool()
    if place.transform is not None:
        return READ + where
    read = read_all(model, batch, [site])[site][real], seen_by_hand(model, batch, site)[real]
    found = outcome(lambda: read[:1], read[1])
    if place.aside:
        return READ + where if found == EXACT else found
    with torch.no_grad(), sf.hooked(model, clamps(model, site)):
        edited = logits_of(model, batch)
    both = {found, outcome(lambda: (edited,), edit_by_hand(model, batch, site))}
    return (EXACT if both == {EXACT} else DIFFERS) + where


def dictionary(architecture: str):
    if architecture == "direction":
        return sf.Direction(torch.eye(D)[:8], site="resid_post.1")
    if architecture == "neurons":
        return sf.Neurons("resid_post.1", D)
    if architecture == "generic":
        sae = make_sae()
        return sf.dictionaries.Function(sae.encode, sae.directions(), site="resid_post.1", width=D)
    if architecture == "error term":
        return make_sae().error()
    return make_sae(architecture)


def dictionary_row(name: str) -> list[str]:
    """Edit, probe, attribute, reconstruct; each from x, the gradient and the dictionary's rows."""
    model, basis = build("llama"), dictionary(name)
    index = [0] if basis.d_sae == 1 else [0, 3, 5]
    read, write = str(basis.site), str(basis.write_site)
    real = batch_of()["attention_mask"].bool()

    def values(step):
        chain = step | sf.Probe(sf.Neurons(read, D)) | sf.Probe(sf.Neurons(write, D))
        with torch.no_grad(), sf.hooked(model, chain) as log:
            forward(model, batch_of())
        return [reading.values[real] for reading in chain.readings(log)]

    x, out = values(sf.verbs.base.Chain(()))
    f = basis.encode(x, index)  # [n, k]
    rows = basis.directions(index).expand(len(x), -1, -1)  # [n, k, d]
    if name == "error term":
        rows = (x - make_sae().reconstruct(x))[:, None]
    change = (f[..., None] * rows).sum(1)
    slope = slope_at(model, write)[1][real]
    scores = -(f * (slope[:, None] * rows).sum(-1))[f != 0]
    chosen = basis.latents(index)
    found = [
        outcome(lambda: values(sf.Ablate(chosen))[1:], out - change),
        outcome(lambda: values(sf.Probe(chosen))[:1], f),
        outcome(lambda: attributed(model, chosen), scores),
    ]
    return [*found, rebuilt(name, basis, x)]


def rebuilt(name: str, basis, x: torch.Tensor) -> str:
    """The reconstruction against decoder and bias, from the tensors the SAE was made of."""
    if not isinstance(basis, sf.SAE):
        return "–"
    tensors = tensors_for(name)
    wanted = basis.encode(x) @ tensors["W_dec"] + tensors["b_dec"]
    if "W_skip" in tensors:
        wanted = wanted + x @ tensors["W_skip"].T
    return outcome(lambda: (basis.reconstruct(x),), wanted)


DICTIONARIES = [*ARCHITECTURES, *TRANSCODERS, "direction", "neurons", "generic", "error term"]


def dictionaries_table(names) -> str:
    rows = ["| dictionary | edit | probe | attribute | reconstruct |", "|---|---|---|---|---|"]
    rows += [f"| {name} | {' | '.join(dictionary_row(name))} |" for name in names]
    return "\n".join(rows)


def decoding_table() -> str:
    """Ways of decoding: what an edit of every token gives, and one that counts from the end."""
    rows = ["| generate with | every token | `Tokens.last(1)` |", "|---|---|---|"]
    for name, options in DECODING.items():
        cells = [decoded(options, where) for where in (None, sf.Tokens.last(1))]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def decoded(options: dict, where: sf.Tokens | None) -> str:
    """An edit under these options of generate, against a plain hook on block 1."""
    model, v = build("llama"), torch.nn.functional.normalize(torch.ones(D), dim=0)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if "assistant_model" in options:
        options["assistant_model"] = build("llama")
    batch = batch_of(["w1 w2 w3 w4 w2 w3 w4 w5 w6"])
    width = batch["input_ids"].shape[1]

    def move(x):
        new = x + (9.0 - x @ v)[..., None] * v
        if where is None:
            return new
        if x.shape[1] == 1:  # a decode step: the prompt's last token is in the cache
            return x
        return torch.cat([x[:, : width - 1], new[:, width - 1 : width], x[:, width:]], 1)

    step = sf.Clamp(sf.Direction(v, site="resid_post.1"), 9.0, where=where)
    torch.manual_seed(0)
    try:
        with sf.hooked(model, step):
            found = model.generate(**batch, **options)
    except ValueError as error:
        return "refused" if str(error).startswith("saefeat") else type(error).__name__
    torch.manual_seed(0)
    with plain_hook(model, "resid_post.1", move):
        wanted = model.generate(**batch, **options)
    return EXACT if torch.equal(found, wanted) else DIFFERS


DECODING = {
    "greedy": {},
    "a seed": {"do_sample": True},
    "`num_beams=3`": {"num_beams": 3},
    "`num_return_sequences=2`": {"do_sample": True, "num_return_sequences": 2},
    "`use_cache=False`": {"use_cache": False},
    "`prefill_chunk_size=4`": {"prefill_chunk_size": 4},
    '`cache_implementation="static"`': {"cache_implementation": "static"},
    "`prompt_lookup_num_tokens=2`": {"prompt_lookup_num_tokens": 2},
    "`assistant_model=`": {"assistant_model": None},
}

SITES = """
## Sites

Each cell holds all five ways of running (inline in a trace and in `generate`, `edit`, `run`,
`hooked`) and `Attribute`, whose scores are compared with the gradient of the model's own graph.
`attn_norm` and `mlp_norm` are computed and not passed on: they are read (by probes and
transcoders), and refused where something would be written.
"""

POINTS = """
## Families

Each cell holds a reading and an edit in a model of two layers (four for gemma3n), held against
plain hooks; `tests/test_families.py` holds generations, with and without a cache, and scores
against the gradient at the same sites. "read" is a value that the model does not go on with: a
norm's value without its weight, or a router's logits beside the experts already chosen; an edit
there is a SiteError that says so. "in 0" names the layers that have it, where layers differ. A
name in two parts says which setting of the family was tried.

Not offered, and why: q, k and v of deepseek are one compressed value (`k`, `v`); what attention
adds is beside other summands in gemma3n and falcon_h1 (`resid_mid`); zamba2 calls its attention
several times in a pass, from one module; post-norm models of opt and bloom add to another stream
than the block's (`attn_out`, `mlp_out`, `resid_mid`); the logits of gemma2 are capped behind the
last module. In `generate`, `logits` is refused at the prompt's pass, of which a model computes the
last token's alone. Attention scores and patterns are no site: they are not [batch, tokens, width];
read them with `output_attentions=True` and `attn_implementation="eager"`.
rwkv is not in the table: its cache does not say how many tokens it holds, its first block begins
with a norm of the stream, and it halves the stream every six layers.
"""

BASES = """
## Dictionaries

Edits, readings and scores of three latents on a Llama-type model. All edits keep the other latents'
part of the value as it is, TopK kinds too unless `latents.reselect()` asks for more. What no one
can reconstruct from (a direction has no decoder) is marked –.
"""

DECODES = """
## Decoding

`hooked` on a Llama-type model. Refused means an error that names the cause: guessed tokens that are
taken back, a static cache's mask, a prompt in chunks for a rule that needs its length.
"""


def page(families=FAMILIES, names=DICTIONARIES, zoo=ZOO) -> str:
    parts = [HEAD, SITES, sites_table(families), POINTS, families_table(zoo)]
    parts += [BASES, dictionaries_table(names)]
    return "\n".join([*parts, DECODES, decoding_table(), ""]).replace("\n\n\n", "\n\n")


def main() -> int:
    torch.set_num_threads(1)
    text = page()
    if "--check" in sys.argv:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
