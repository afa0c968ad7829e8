"""Cases of interventions: verbs x sites x dictionaries x model families x ways of running.

Not the product. ``ROWS`` is a selection in which everything appears at least twice, each time in
other company.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import freeze_names as lib
import torch
from freeze_models import (
    D_MLP,
    FAMILIES,
    LAYERS,
    OTHERS,
    RAGGED,
    D,
    batch_of,
    build,
    generator,
    tokenizer,
    vector,
    weights,
)
from freeze_record import Record
from torch import Tensor

NEW = 4
CHOSEN = [3, 40, 17, 8, 22]
"""The latents that most cases select."""

# ---------------------------------------------------------------- dictionaries


def _sae(architecture: str, site: str, seed: int, **options: Any) -> Any:
    if architecture in ("topk", "abstopk"):
        options.setdefault("k", 7)
    name = f"{architecture}-{seed}"
    return lib.sae(weights(architecture, seed), architecture=architecture, site=site, name=name,
                   **options)  # fmt: skip


def _transcoder(architecture: str, site: str, seed: int) -> Any:
    target = f"mlp_out.{site.rpartition('.')[2]}"
    return _sae(architecture, site, seed, write_site=target, subtract_bias=False)


def _squares(site: str, prefix: bool = False) -> Any:
    matrix = torch.randn(D, 24, generator=generator(70)) / 4
    rows = torch.randn(24, D, generator=generator(71)) / 4

    def encode(x: Tensor) -> Tensor:
        found = (x @ matrix).square()
        if not prefix:
            return found
        count = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]
        return found.cumsum(-2) / count

    return lib.from_function(encode, rows, site=site, width=D, name="squares", prefix=prefix)


def _subspace(site: str, width: int) -> Any:
    return lib.one_direction(torch.randn(2, width, generator=generator(60)), site)


DICTIONARIES: dict[str, Callable[[], Any]] = {
    "standard": lambda: _sae("standard", "resid_post.1", 0),
    "jumprelu": lambda: _sae("jumprelu", "resid_pre.1", 1),
    "gated": lambda: _sae("gated", "attn_out.1", 2),
    "topk": lambda: _sae("topk", "resid_mid.1", 3),
    "topk late": lambda: _sae("topk", "resid_post.1", 4),
    "abstopk": lambda: _sae("abstopk", "mlp_out.1", 5),
    "layer norm": lambda: _sae("standard", "resid_post.1", 6, norm="layer_norm"),
    "constant norm": lambda: _sae("jumprelu", "resid_mid.1", 7, norm="constant_norm_rescale"),
    "rescaled": lambda: _sae("topk", "resid_pre.2", 8, rescale=True),
    "centered": lambda: _sae("standard", "resid_pre.1", 9, centered=True),
    "excluding": lambda: _sae("standard", "resid_post.1", 10, excluded=(5, 11)),
    "transcoder": lambda: _transcoder("transcoder", "mlp_norm.1", 11),
    "skip transcoder": lambda: _transcoder("skip_transcoder", "mlp_in.1", 12),
    "jumprelu transcoder": lambda: _transcoder("jumprelu_transcoder", "mlp_norm.1", 13),
    "direction": lambda: lib.one_direction(vector(1), "resid_post.1"),
    "subspace of z": lambda: _subspace("z.1", D),
    "subspace of mlp": lambda: _subspace("mlp_post.1", D_MLP),
    "everywhere": lambda: lib.direction_at(vector(2), [f"resid_post.{n}" for n in range(LAYERS)]),
    "neurons": lambda: lib.neurons("resid_mid.2", D),
    "error": lambda: lib.error_term(_sae("jumprelu", "resid_post.1", 14)),
    "function": lambda: _squares("resid_post.0"),
    "prefix function": lambda: _squares("resid_post.1", prefix=True),
    "path": lambda: lib.one_direction(vector(3), "model.layers.1.mlp.output"),
    "path neox": lambda: lib.one_direction(vector(3), "gpt_neox.layers.1.mlp.output"),
    "two sites": lambda: lib.together(
        [_sae("standard", "resid_pre.1", 15), _sae("jumprelu", "resid_post.2", 16)]
    ),
}
"""Name → a dictionary, or one a site."""

_WHOLE = (
    *("direction", "subspace of z", "subspace of mlp", "everywhere", "error", "path"),
    "path neox",
)
_NARROW = ("neurons", "function", "prefix function")


@cache
def dictionary(name: str) -> Any:
    """A dictionary, the same object at every call."""
    return DICTIONARIES[name]()


def latents_of(name: str) -> Any:
    """The latents that a row selects: all of a direction, some of the others."""
    if name in _WHOLE:
        return lib.pick(dictionary(name))
    if name == "two sites":
        return lib.pick(dictionary(name), {1: CHOSEN[:3], 2: CHOSEN[2:]})
    return lib.pick(dictionary(name), [i % 24 for i in CHOSEN] if name in _NARROW else CHOSEN)


# ---------------------------------------------------------------- verbs, tokens, conditions


def _numbers(latents: Any, seed: int, *rows: int) -> Tensor:
    return torch.randn(*rows, len(latents), generator=generator(seed)).abs() + 0.5


def _read(model: Any, latents: Any, **options: Any) -> Any:
    """What latents are on other prompts, as long as the ragged ones: patching them is no no-op."""
    return lib.run(model, OTHERS, lib.probe(latents, **options)).readings[0]


Verb = Callable[[Any, Any, dict[str, Any]], Any]
VERBS: dict[str, Verb] = {
    # (model, latents, options) → a verb
    "ablate": lambda m, s, o: lib.ablate(s, **o),
    "ablate values": lambda m, s, o: lib.ablate(s, _numbers(s, 20), **o),
    "ablate number": lambda m, s, o: lib.ablate(s, 1.25, **o),
    "ablate mean": lambda m, s, o: lib.ablate(s, lib.mean_of(_read(m, s, reduce="mean")), **o),
    "ablate span": lambda m, s, o: lib.ablate(s, "orthogonal", **o),
    "ablate patch": lambda m, s, o: lib.ablate(s, lib.patch(_read(m, s)), **o),
    "ablate resample": lambda m, s, o: lib.ablate(s, lib.resample(_read(m, s), 3), **o),
    "resample rows": lambda m, s, o: lib.clamp(s, lib.resample(_numbers(s, 21, 9), 4), **o),
    "ablate reselect": lambda m, s, o: lib.ablate(s, support="reselect", **o),
    "clamp reselect": lambda m, s, o: lib.clamp(s, 2.0, support="reselect", **o),
    "clamp": lambda m, s, o: lib.clamp(s, 3.0, **o),
    "clamp by prompt": lambda m, s, o: lib.clamp(s, _numbers(s, 22, len(RAGGED)), **o),
    "clamp patch": lambda m, s, o: lib.clamp(s, lib.patch(_read(m, s, at=lib.last(2))), **o),
    "scale": lambda m, s, o: lib.clamp(s, scale=-1.5, **o),
    "scale by latent": lambda m, s, o: lib.clamp(s, scale=_numbers(s, 23), **o),
    "add": lambda m, s, o: lib.clamp(s, add=2.5, **o),
    "add schedule": lambda m, s, o: lib.clamp(s, add=lib.schedule([4.0, 2.0, 0.5]), **o),
    "schedule by latent": lambda m, s, o: lib.clamp(
        s, lib.schedule(_numbers(s, 24, 3), prompt=1.0), **o
    ),
    "low": lambda m, s, o: lib.clamp(s, low=0.75, **o),
    "high": lambda m, s, o: lib.clamp(s, high=0.5, **o),
    "bounds": lambda m, s, o: lib.clamp(s, scale=2.0, low=-0.5, high=1.5, **o),
    "active only": lambda m, s, o: lib.clamp(s, 4.0, active_only=True, **o),
    "add where active": lambda m, s, o: lib.clamp(s, add=1.5, active_only=True, **o),
    "probe": lambda m, s, o: lib.probe(s, **o),
    "probe max": lambda m, s, o: lib.probe(s, "max", **o),
    "probe mean": lambda m, s, o: lib.probe(s, "mean", **o),
    "probe last": lambda m, s, o: lib.probe(s, "last", **o),
    "chain": lambda m, s, o: (
        lib.probe(s) | lib.clamp(s, add=1.5, **o) | lib.probe(s, "max") | lib.ablate(s)
    ),
    "probe all ways": lambda m, s, o: (
        lib.probe(s, "max", **o) | lib.probe(s, "mean", **o) | lib.probe(s, "last", **o)
    ),
}


def _odd(ids: Tensor, position: Tensor) -> Tensor:
    return (position % 2 == 1) & (ids != 8)


TOKENS: dict[str, Callable[[], Any]] = {
    "everywhere": lib.everywhere,
    "prompt": lib.in_prompt,
    "first": lambda: lib.first(2),
    "last": lambda: lib.last(2),
    "late": lambda: lib.last(1) | lib.generated(),
    "generated": lambda: lib.generated(1, 3),
    "ids": lambda: lib.with_ids(5, 8, 9, 14, 15),
    "not first": lambda: ~lib.first(1) & lib.in_prompt(),
    "not special": lambda: ~lib.special(),
    "function": lambda: lib.where(_odd),
}


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


CONDITIONS: dict[str, Callable[[], Any]] = {
    "above": lambda: lib.condition(lib.one_direction(vector(4), "resid_post.0"), above=0.1),
    "below": lambda: lib.condition(
        lib.pick(_sae("jumprelu", "resid_pre.1", 17), [1, 2]), below=0.4
    ),
    "between": lambda: lib.condition(
        lib.one_direction(vector(5), "resid_pre.1"), above=-1.0, below=1.0
    ),
    "all": lambda: lib.condition(
        lib.pick(_sae("standard", "resid_pre.0", 18), [4, 5]), match="all"
    ),
    "hold": lambda: lib.condition(
        lib.one_direction(vector(6), "resid_post.0"), above=0.05, hold=True
    ),
    "scorer": lambda: lib.condition(_norm, site="resid_pre.1", above=2.0),
    "scorer hold": lambda: lib.condition(_norm, site="resid_post.0", below=9.0, hold=True),
}

# ---------------------------------------------------------------- the selection

Row = tuple[str, str, str, str, str, str]
ROWS: list[Row] = [
    # family, dictionary, verb, tokens, condition, way
    ("gpt2", "standard", "ablate", "", "", "trace"),
    ("gemma2", "jumprelu", "ablate", "late", "", "run"),
    ("llama", "gated", "ablate values", "prompt", "", "generation"),
    ("qwen3", "transcoder", "ablate values", "", "above", "run"),
    ("gemma3", "topk", "ablate number", "last", "", "edit"),
    ("gpt_neox", "abstopk", "ablate number", "everywhere", "", "hooked"),
    ("gemma2", "standard", "ablate mean", "", "", "run"),
    ("gpt_neox", "gated", "ablate mean", "not first", "", "local"),
    ("llama", "jumprelu transcoder", "ablate span", "", "", "trace"),
    ("gpt2", "two sites", "ablate span", "late", "", "run"),
    ("qwen3", "everywhere", "ablate span", "", "hold", "hooked"),
    ("gemma2", "topk", "ablate patch", "", "", "run"),
    ("gpt2", "skip transcoder", "ablate patch", "first", "", "trace"),
    ("llama", "abstopk", "ablate resample", "", "", "run"),
    ("gemma3", "jumprelu", "ablate resample", "function", "", "local"),
    ("qwen3", "layer norm", "resample rows", "", "below", "run"),
    ("gpt_neox", "subspace of z", "resample rows", "everywhere", "", "generation"),
    ("llama", "topk late", "ablate reselect", "", "", "run"),
    ("gpt2", "abstopk", "ablate reselect", "prompt", "", "hooked"),
    ("gemma2", "rescaled", "clamp reselect", "", "between", "local"),
    ("qwen3", "topk", "clamp reselect", "generated", "", "edit"),
    ("gemma3", "standard", "clamp", "ids", "", "hooked"),
    ("gpt2", "constant norm", "clamp", "", "all", "run"),
    ("gemma2", "transcoder", "clamp", "last", "", "steps"),
    ("llama", "constant norm", "clamp by prompt", "", "", "run"),
    ("gpt_neox", "layer norm", "clamp by prompt", "function", "", "stream"),
    ("gemma3", "subspace of mlp", "clamp patch", "", "", "run"),
    ("qwen3", "neurons", "clamp patch", "everywhere", "", "stream"),
    ("gpt2", "direction", "scale", "", "scorer", "run"),
    ("llama", "error", "scale", "not first", "", "local"),
    ("gemma2", "skip transcoder", "scale by latent", "", "", "edit"),
    ("gpt_neox", "standard", "scale by latent", "late", "above", "run"),
    ("qwen3", "direction", "add", "last", "", "generation"),
    ("gpt2", "centered", "add", "", "scorer hold", "hooked run"),
    ("gemma2", "everywhere", "add", "everywhere", "", "edit"),
    ("llama", "direction", "add schedule", "late", "", "run"),
    ("gpt_neox", "path neox", "add schedule", "", "", "generation"),
    ("gemma3", "two sites", "schedule by latent", "generated", "", "local"),
    ("gpt2", "gated", "schedule by latent", "", "scorer hold", "run"),
    ("gemma2", "function", "low", "", "", "trace"),
    ("qwen3", "jumprelu", "low", "prompt", "", "stream"),
    ("llama", "neurons", "high", "first", "", "hooked"),
    ("gemma3", "gated", "high", "", "below", "run"),
    ("gpt2", "prefix function", "bounds", "", "", "run"),
    ("qwen3", "prefix function", "bounds", "late", "", "hooked"),
    ("gemma2", "excluding", "active only", "", "", "run"),
    ("gpt_neox", "excluding", "active only", "not special", "", "trace"),
    ("llama", "function", "add where active", "ids", "", "run"),
    ("gemma3", "error", "add where active", "", "scorer", "trace"),
    ("gpt2", "subspace of z", "probe", "", "", "generation"),
    ("gemma2", "subspace of mlp", "probe", "not special", "", "steps"),
    ("qwen3", "constant norm", "probe all ways", "late", "", "run"),
    ("gpt_neox", "transcoder", "probe all ways", "", "", "local"),
    ("llama", "rescaled", "probe max", "prompt", "", "hooked"),
    ("gemma3", "layer norm", "probe max", "", "", "edit trace"),
    ("gpt2", "topk late", "probe mean", "first", "", "stream"),
    ("gpt_neox", "centered", "probe last", "generated", "", "run"),
    ("llama", "standard", "chain", "", "", "run"),
    ("qwen3", "two sites", "chain", "last", "between", "local"),
    ("gemma3", "path", "chain", "everywhere", "", "steps"),
    ("llama", "path", "ablate", "", "all", "run"),
    ("gpt_neox", "jumprelu transcoder", "active only", "function", "hold", "run"),
]


def _one_way(way: str, model: Any, module: Any, verb: Any) -> dict[str, Any]:
    """What one way of running gives for the ragged prompts."""
    batch = batch_of(RAGGED)
    if way == "trace":
        return lib.inline_trace(model, batch, verb)
    if way == "generation":
        return lib.inline_generation(model, batch, verb, NEW)
    if way == "steps":
        return lib.inline_steps(model, batch, verb, NEW)
    if way == "edit":
        return lib.edited(model, batch, verb, NEW)
    if way == "hooked":
        return lib.hooked(module, batch, verb, NEW)
    if way == "stream":
        pieces = list(lib.stream(model, RAGGED, verb, new=NEW, batch=2))
        return {f"batch {n}": lib.run_values(piece) for n, piece in enumerate(pieces)}
    on = "local" if way == "local" else None
    return lib.run_values(lib.run(model, RAGGED, verb, new=NEW, batch=2, on=on))


def _row(row: Row) -> Callable[[Record], None]:
    family, name, kind, tokens, condition, ways = row

    def case(record: Record) -> None:
        module = build(family)
        model = lib.wrap(module, tokenizer())
        options: dict[str, Any] = {}
        if tokens:
            options["at"] = TOKENS[tokens]()
        if condition:
            options["when"] = CONDITIONS[condition]()
        verb = VERBS[kind](model, latents_of(name), options)
        for way in ways.split():
            record.put(way, _one_way(way, model, module, verb))

    return case


CASES: dict[str, Callable[[Record], None]] = {
    "run: " + ", ".join(part for part in row if part): _row(row) for row in ROWS
}

# ---------------------------------------------------------------- single cases


def _model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return lib.wrap(build(family, dtype), tokenizer())


def _dictionaries(record: Record) -> None:
    """Every dictionary on the same numbers, without a model."""
    for name in DICTIONARIES:
        if name in ("everywhere", "two sites"):
            continue
        x = 2 * torch.randn(4, dictionary(name).d_in, generator=generator(30))
        few = [0] if name in _WHOLE else [i % 24 for i in CHOSEN[:3]]
        if "prefix" in name:
            x = x[None]
        record.put(name, lib.dictionary_values(dictionary(name), x, few))


def _bare(record: Record) -> None:
    """Every family without an intervention."""
    for family in FAMILIES:
        record.put(family, lib.run_values(lib.run(_model(family), RAGGED, new=NEW)))


def _half(record: Record) -> None:
    """Models in bfloat16, whose edits round."""
    for family, name, kind in (("gemma2", "jumprelu", "clamp"), ("llama", "transcoder", "chain")):
        if kind == "chain":
            verb = lib.clamp(latents_of(name), add=2.0) | lib.probe(latents_of("standard"))
        else:
            verb = lib.clamp(latents_of(name), 3.0)
        model = _model(family, torch.bfloat16)
        record.put(f"{family} run", lib.run_values(lib.run(model, RAGGED, verb, new=NEW)))
        record.put(f"{family} trace", lib.inline_trace(model, batch_of(RAGGED), verb))


def _sampling(record: Record) -> None:
    """Samples of a seed: temperature, nucleus, top-k, batches, a stream, a local request."""
    model = _model("gemma2")
    verb = lib.clamp(latents_of("standard"), add=1.0) | lib.probe(latents_of("jumprelu"), "mean")
    ways: dict[str, dict[str, Any]] = {
        "warm": {"temperature": 0.8, "seed": 0},
        "nucleus": {"temperature": 1.3, "top_p": 0.7, "seed": 1},
        "few": {"temperature": 1.0, "top_k": 5, "seed": 2, "batch": 2},
        "local": {"temperature": 0.8, "seed": 0, "on": "local"},
    }
    for name, options in ways.items():
        result = lib.run(model, RAGGED, verb, new=6, **options)
        record.put(name, lib.run_values(result))
        record.put(f"{name} source", lib.source_values(result))
    pieces = lib.stream(model, RAGGED, verb, new=6, temperature=0.8, seed=0, batch=2)
    record.put("stream", [piece.completions for piece in pieces])


def _beams(record: Record) -> None:
    """Beam search, bare and under edits with values and conditions."""
    for family in ("gpt2", "llama"):
        model = _model(family)
        verbs = {
            "bare": None,
            "add": lib.clamp(latents_of("standard"), add=2.0, at=TOKENS["late"]()),
            "hold": lib.ablate(latents_of("jumprelu"), when=CONDITIONS["hold"]()),
            "by prompt": lib.clamp(latents_of("jumprelu"), _numbers(range(5), 25, 3)),
        }
        for name, verb in verbs.items():
            result = lib.run(model, RAGGED, verb, new=5, beams=3, batch=2)
            record.put(f"{family} {name}", lib.run_values(result))


def _stops(record: Record) -> None:
    """Stop tokens: here the second token that each family's first prompt goes on with."""
    for family in ("gpt2", "gemma3"):
        model = _model(family)
        free = lib.run(model, RAGGED, new=6)
        token = free.completions[0][1]
        verb = lib.probe(latents_of("standard"), at=lib.generated())
        result = lib.run(model, RAGGED, verb, new=6, stop=(token,))
        record.put(family, lib.run_values(result))
        record.put(f"{family} source", lib.source_values(result))


def _sweep(record: Record) -> None:
    """Many settings in shared batches."""
    for family, name in (("gemma2", "jumprelu"), ("gpt2", "transcoder"), ("llama", "standard")):
        model, latents = _model(family), latents_of(name)
        settings = {
            "bare": None,
            "weak": lib.clamp(latents, scale=0.5),
            "strong": lib.probe(latents) | lib.clamp(latents, 4.0, when=CONDITIONS["above"]()),
            "by prompt": lib.clamp(latents, _numbers(latents, 26, len(RAGGED))),
            "late": lib.ablate(latents, at=TOKENS["late"]()),
        }
        found = lib.sweep(model, RAGGED, settings, new=3, batch=9)
        for setting, result in found.items():
            record.put(f"{family} {setting}", lib.run_values(result))


def _sources(record: Record) -> None:
    """Provenance, event totals and reductions of readings, over batches."""
    for family, name in (("qwen3", "two sites"), ("gpt_neox", "gated")):
        verb = lib.ablate(latents_of(name)) | lib.probe(latents_of(name))
        result = lib.run(_model(family), RAGGED, verb, new=3, batch=2)
        record.put(f"{family} source", lib.source_values(result))
        record.put(f"{family} events", lib.event_totals(result))
        record.put(f"{family} reading", lib.reading_summaries(result.readings[0]))


def _pieces(record: Record) -> None:
    """Selections as sets and samples, stacked selections, random directions."""
    a = lib.pick(dictionary("two sites"), {1: [1, 2, 3], 2: [4]})
    first = a.singles()[0]
    record.put("difference", lib.members(a - first))
    record.put("sample", lib.members(a.sample(2, seed=5)))
    union, member = lib.joined([first, a - first, a])
    record.put("union", lib.members(union))
    record.put("member", member)
    for seed in (0, 7):
        direction = lib.random_direction(D, "resid_post.1", seed)
        record.put(f"random {seed}", lib.dictionary_values(direction, torch.ones(2, D), [0]))


def _resumed(record: Record) -> None:
    """A run that stopped after a batch and goes on from its folder, greedy and sampled."""
    for family, sampling in (("gemma2", {}), ("gpt2", {"temperature": 0.9, "seed": 3})):
        model = _model(family)
        verb = lib.clamp(latents_of("standard"), add=1.5) | lib.probe(latents_of("jumprelu"))
        options: dict[str, Any] = {"new": 3, "batch": 1, **sampling}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "job"
            started = lib.stream(model, RAGGED, verb, folder=folder, **options)
            next(started)
            started.close()
            rest = lib.stream(model, RAGGED, verb, folder=folder, **options)
            pieces = {f"batch {n}": lib.run_values(piece) for n, piece in enumerate(rest)}
            record.put(f"{family} stream", pieces)
            run = Path(name) / "run"
            for _ in range(2):  # the second is read back
                result = lib.run(model, RAGGED, verb, folder=run, **options)
            record.put(f"{family} run", lib.run_values(result))
            record.size(f"{family} files", len([p for p in run.rglob("*") if p.is_file()]))


def _saved(record: Record) -> None:
    """Interventions as files: what is read back, and that it runs alike."""
    model = _model("gemma2")
    patched = _read(model, latents_of("jumprelu"))
    verbs = {
        "ablate": lib.ablate(latents_of("jumprelu"), at=TOKENS["late"]()),
        "values": lib.clamp(latents_of("gated"), _numbers(range(5), 27), when=CONDITIONS["all"]()),
        "patch": lib.ablate(latents_of("jumprelu"), lib.patch(patched)),
        "resample": lib.ablate(latents_of("standard"), lib.resample(_numbers(range(5), 28, 6), 2)),
        "schedule": lib.clamp(latents_of("direction"), add=lib.schedule([3.0, 1.0])),
        "chain": lib.clamp(latents_of("transcoder"), 2.0, when=CONDITIONS["hold"]())
        | lib.probe(latents_of("two sites"), "max")
        | lib.ablate(latents_of("everywhere"), "orthogonal"),
        "topk": lib.clamp(latents_of("topk"), scale=2.0, active_only=True),
        "error": lib.clamp(latents_of("error"), scale=0.5),
    }
    for name, verb in verbs.items():
        with tempfile.TemporaryDirectory() as folder:
            file = lib.save(verb, Path(folder) / "verb.safetensors", model)
            data = file.read_bytes()
            found = lib.load(file, model)
        record.put(name, lib.intervention_values(found))
        record.put(f"{name} runs", lib.run_values(lib.run(model, RAGGED, found, new=2)))
        record.put(f"{name} is equal", found == verb)
        record.size(f"{name} bytes", len(data))
        record.size(f"{name} hash", hashlib.sha256(data).hexdigest()[:16])
    steer = lib.clamp(latents_of("everywhere"), add=3.0)
    record.put("steering", lib.steering_vectors(steer))


def twenty(record: Record) -> Any:
    """A verb on 20 latents at four sites, which the record keeps."""
    parts = [
        lib.pick(_sae("jumprelu", "resid_post.0", 40), range(5)),
        lib.pick(_sae("standard", "resid_mid.1", 41), range(10, 15)),
        lib.pick(_sae("gated", "attn_out.1", 42), range(20, 25)),
        lib.pick(_transcoder("transcoder", "mlp_norm.2", 43), range(30, 35)),
    ]
    latents = lib.joined(parts)[0]
    record.put("latents", lib.members(latents))
    return lib.probe(latents, "max") | lib.ablate(latents, at=TOKENS["late"]())


def _request(record: Record) -> None:
    """A request of 20 latents at four sites, and of other verbs: what it does, and its size."""
    model, some = _model("gemma2"), latents_of("jumprelu")
    verbs = {
        "twenty": twenty(record),
        "topk": lib.clamp(latents_of("topk"), 2.0, support="reselect"),
        "patch": lib.ablate(some, lib.patch(_read(model, some))),
        "hold": lib.clamp(latents_of("error"), scale=0.5, when=CONDITIONS["hold"]()),
    }
    for name, verb in verbs.items():
        does, sizes = lib.request_report(model, RAGGED, verb, max_new_tokens=3, batch_size=2)
        record.put(name, does)
        for part, size in sizes.items():
            record.size(f"{name} {part}", size)
    record.put("twenty here", lib.run_values(lib.run(model, RAGGED, verbs["twenty"], new=3)))
    local = lib.run(model, RAGGED, verbs["twenty"], new=3, on="local", dtype=torch.bfloat16)
    record.put("twenty in half precision", lib.run_values(local))


def _served(record: Record) -> None:
    """A server in a process of its own: a run, a job in two batches, exact attribution."""
    model = _model("gemma2")
    verb = lib.clamp(latents_of("jumprelu"), 3.0, at=TOKENS["late"]()) | lib.probe(
        latents_of("standard"), "max"
    )
    with lib.server(model) as url:
        record.put("run", lib.run_values(lib.run(model, RAGGED, verb, new=3, on=url)))
        job = lib.submitted(model, RAGGED, verb, url=url, new=3, batch=2)
        record.put("job", lib.run_values(job))
        few = lib.attribute(latents_of("jumprelu"), lib.logit_diff(5, 6), method=lib.exact())
        found = lib.scores(few, model, RAGGED, on=url)
        record.put("exact", lib.attribution_values(found))


def _chat(record: Record) -> None:
    """The shipped chat model: roles, special tokens, texts, a trace of its SAEs."""
    model, prompts = lib.chat_model(), lib.chat_prompts("harmful_val", 4)
    latents = lib.pick(lib.chat_saes(), {0: [362, 484], 2: [42, 352, 373], 3: [29, 123]})
    verbs = {
        "bare": None,
        "user": lib.ablate(latents, at=lib.role("user")),
        "answer": lib.clamp(latents, add=1.0, at=lib.role("assistant")),
        "special": lib.ablate(latents, at=lib.special()),
        "plain": lib.ablate(latents, at=~lib.special() | lib.last(1)) | lib.probe(latents),
        "all": lib.ablate(latents),
        "transcoder": lib.ablate(lib.pick(lib.chat_sae("transcoder_2"))),
        "mlp": lib.probe(lib.pick(lib.chat_sae("mlp_out_2")), "max"),
    }
    for name, verb in verbs.items():
        result = lib.run(model, prompts, verb, new=12, batch=3)
        record.put(name, lib.run_values(result))
    batch = lib.encode_prompts(model, prompts)
    record.put("edited", lib.edited(model, batch, verbs["user"], 6))
    record.put("traced", lib.inline_trace(model, batch, verbs["plain"]))


CASES |= {
    "dictionaries": _dictionaries,
    "bare models": _bare,
    "half precision": _half,
    "sampling": _sampling,
    "beams": _beams,
    "stops": _stops,
    "sweep": _sweep,
    "sources": _sources,
    "selections": _pieces,
    "resumed runs": _resumed,
    "saved interventions": _saved,
    "requests": _request,
    "server": _served,
    "chat runs": _chat,
}
