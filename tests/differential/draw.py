"""A case from a seed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from helpers import FAMILIES

from . import places
from .cases import (
    FORWARD,
    GENERATE,
    Basis,
    Case,
    Drawn,
    Parts,
    Patch,
    Rule,
    Schedule,
    Step,
    Value,
    When,
)
from .rules import FUNCTIONS, SCORES
from .weights import LATENTS, SAES, TRANSCODERS, latents_of


def case_of(seed: int) -> Case:
    """The case of a seed, the same on every machine."""
    r = Random(seed)
    family = r.choice(FAMILIES)
    new = r.choice([0, 0, 0, 1, 2, 3, 4, 5])
    way = r.choice(GENERATE if new else FORWARD)
    case = Case(
        family=family,
        bases=tuple(_basis(r, family) for _ in range(r.choice([1, 1, 2, 2, 3]))),
        groups=(),
        prompts=tuple(_prompt(r) for _ in range(r.choice([1, 2, 2, 3, 3, 4]))),
        way=way,
        new=new,
        stops=tuple(r.sample(range(4, 100), 25)) if _stops(r, way, new) else (),
        batch_size=r.choice([1, 2, 32]),
        pads=r.choice([0, 0, 0, 2]),
        # transformers' Gemma 2 gives NaN at padding in float64: its mask overflows in float32
        dtype=r.choices(["float64", "float32"], [6, 1])[0] if family != "gemma2" else "float32",
    )
    if not any(map(_writable, case.bases)) and case.way == "beams":
        case = replace(case, way="run")  # which takes probes
    case = _with_steps(r, case)
    return replace(case, way="run") if way == "saved" and _holds_code(case) else case


def _stops(r: Random, way: str, new: int) -> bool:
    return bool(new) and way not in ("loop", "sweep") and r.random() < 0.3


def _holds_code(case: Case) -> bool:
    """Whether it holds a Python function, which no file does."""
    kinds = {basis.kind for basis in case.bases}
    return (
        bool(kinds & {"function", "prefix"}) or "'where'" in repr(case) or "scorer=" in repr(case)
    )


def _prompt(r: Random) -> tuple[int, ...]:
    ids = [r.randrange(4, 100) for _ in range(r.randint(1, 7))]
    if r.random() < 0.3:
        ids[0] = 2
    for n in range(1, len(ids)):
        if r.random() < 0.08:
            ids[n] = r.choice([0, 1, 2] if n > 1 else [0, 1])  # BOS twice is refused
    return tuple(ids)


# ---------------------------------------------------------------- dictionaries


def _basis(r: Random, family: str) -> Basis:
    kind = r.choice([*SAES, "direction", "direction", "neurons", "function", "prefix", "error of"])
    site, write = r.choice(places.sites(family)), None
    can_norm = "mlp_norm" not in site
    if kind in TRANSCODERS or (kind in ("function", "prefix") and r.random() < 0.3):
        layer, reads = r.randrange(3), ["mlp_norm", "mlp_in", "resid_pre"]
        reads = [name for name in reads if f"{name}.{layer}" in places.sites(family)]
        site, write, can_norm = f"{r.choice(reads)}.{layer}", f"mlp_out.{layer}", False
    elif kind == "error of":
        kind = f"error of {r.choice(['standard', 'gated', 'jumprelu', 'topk', 'abstopk'])}"
    plain = kind not in ("direction", "neurons", "function", "prefix")
    topk = kind.endswith("topk")
    layernorm = family in places.WITH_LAYERNORM
    return Basis(
        kind,
        site,
        seed=r.randrange(1000),
        write=write,
        norm=r.choice(["none", "none", "layer_norm", "constant_norm_rescale"])
        if plain and can_norm
        else "none",
        subtract=plain and r.random() < 0.5,
        centered=plain and layernorm and write is None and r.random() < 0.3,
        rescale=topk and r.random() < 0.4,
        k=r.choice([1, 4, 7, LATENTS]) if topk else 0,
        excluded=r.choice([(), (), (), ("ids", (2,)), ("special",), ("positions", 0, 1), EITHER]),
    )


EITHER: Rule = ("or", ("positions", 0, 1), ("ids", (2,)))


# ---------------------------------------------------------------- steps


def _with_steps(r: Random, case: Case) -> Case:
    groups, done = [], set()
    for _ in range(r.choice([1, 1, 2, 2, 3])):
        group = _apart(tuple(_step(r, case) for _ in range(r.choice([1, 1, 1, 2, 3]))))
        # what is read upstream of its own edit cannot be read again behind it
        group = tuple(s for s in group if s.written == "span" or not done & {n for n, _ in s.parts})
        groups += [group] if group else []
        edited = [n for s in group if s.verb != "probe" for n, _ in s.parts]
        done |= {n for n in edited if case.bases[n].write not in (None, case.bases[n].site)}
    return replace(case, groups=tuple(groups)) if groups else _with_steps(r, case)


def _apart(group: tuple[Step, ...]) -> tuple[Step, ...]:
    """Only edits of latents of their own may be joint, none of them written otherwise."""
    kept: list[Step] = []
    taken: set[tuple[int, int]] = set()
    for step in group:
        own = {(number, i) for number, indices in step.parts for i in indices}
        joint = len(group) == 1 or step.written == "frozen"
        if step.verb == "probe" or (joint and not own & taken):
            kept.append(step)
            taken |= own if step.verb != "probe" else set()
    return tuple(kept)


def _step(r: Random, case: Case) -> Step:
    probe = r.random() < (0.1 if case.way == "edit" else 0 if case.way == "beams" else 0.3)
    verb = "probe" if probe else r.choice(["ablate", "set", "scale", "add", "bound"])
    if not any(map(_writable, case.bases)):
        verb, probe = "probe", True
    parts = _parts(r, case, read_only=probe)
    where = _rule(r, 2) if r.random() < 0.6 else None
    if probe:
        return Step(
            "probe", parts, where=where, reduce=r.choice([None, None, "max", "mean", "last"])
        )
    written = _written(r, case, parts, verb)
    clamp = verb != "ablate"
    low, high = sorted(round(r.uniform(-1, 1), 3) for _ in range(2))
    bounds = verb == "bound" or (clamp and r.random() < 0.15)
    return Step(
        verb,
        parts,
        value=0.0 if written == "span" or verb == "bound" else _value(r, case, parts, verb),
        low=low if bounds and r.random() < 0.7 else None,
        high=high if bounds else None,
        active_only=clamp and r.random() < 0.2,
        written=written,
        where=where,
        when=_when(r, case, parts) if r.random() < 0.3 else None,
    )


def _written(r: Random, case: Case, parts: Parts, verb: str) -> str:
    kinds = {case.bases[number].kind for number, _ in parts}
    if kinds <= {"topk", "abstopk"} and case.way != "saved" and r.random() < 0.5:
        return "reselect"
    spans = verb == "ablate" and not any("error" in kind for kind in kinds)
    rules = {case.bases[number].excluded for number, _ in parts}
    return "span" if spans and len(rules) == 1 and r.random() < 0.3 else "frozen"


def _parts(r: Random, case: Case, read_only: bool = False) -> Parts:
    usable = [
        n for n, basis in enumerate(case.bases)
        if read_only or _writable(basis)
    ]  # fmt: skip
    chosen = r.sample(usable, min(len(usable), r.choice([1, 1, 1, 2])))
    return tuple((n, _indices(r, case, n)) for n in chosen)


def _writable(basis: Basis) -> bool:
    return not (basis.write or basis.site).startswith("mlp_norm")


def _indices(r: Random, case: Case, number: int) -> tuple[int, ...]:
    count = latents_of(case.bases[number], case.family)
    return tuple(r.sample(range(count), min(count, r.randint(1, 3))))


def _value(r: Random, case: Case, parts: Parts, verb: str) -> Value:
    k = sum(len(indices) for _, indices in parts)

    def number() -> float:
        return round(r.choice([0.0, r.uniform(-4, 4), r.uniform(-4, 4), r.uniform(-4, 4)]), 3)

    kind = r.choice(["one", "one", "zero", "each", "prompt", "schedule", "patch", "drawn"])
    if kind == "patch" and verb in ("ablate", "set", "scale", "add"):
        return Patch(
            where=_rule(r, 1) if r.random() < 0.5 else None, new=r.choice([0, 1, case.new])
        )
    if kind == "schedule":
        prompt = number() if r.random() < 0.5 else None
        return Schedule(tuple(number() for _ in range(r.randint(1, 4))), prompt=prompt)
    if kind == "drawn" and case.way != "beams":
        rows = tuple(tuple(number() for _ in range(k)) for _ in range(3))
        return Drawn(rows, seed=r.randrange(3))
    if kind == "each":
        return tuple(number() for _ in range(k))
    if kind == "prompt":
        return tuple(tuple(number() for _ in range(k)) for _ in case.prompts)
    return 0.0 if kind == "zero" else number()


def _when(r: Random, case: Case, parts: Parts) -> When:
    """A condition that the model reaches no later than the edit's first write."""
    bases = [case.bases[number] for number, _ in parts]
    first = min(places.rank(case.family, basis.write or basis.site) for basis in bases)
    above, below = r.choice([(round(r.uniform(-0.5, 1), 3), None), (None, 0.6), (-0.3, 0.8)])
    how = {"above": above, "below": below, "hold": r.random() < 0.5}
    how["match"] = r.choice(["any", "all"])
    early = [
        n for n, basis in enumerate(case.bases) if places.rank(case.family, basis.site) <= first
    ]
    if early and r.random() < 0.7:
        chosen = r.sample(early, min(len(early), r.choice([1, 1, 2])))
        return When(parts=tuple((n, _indices(r, case, n)) for n in chosen), **how)
    sites = [s for s in places.sites(case.family) if places.rank(case.family, s) <= first]
    return When(scorer=r.choice(list(SCORES)), site=r.choice(sites), **how)


# ---------------------------------------------------------------- rules


def _rule(r: Random, depth: int) -> Rule:
    if depth and r.random() < 0.4:
        kind = r.choice(["and", "or", "not"])
        return (kind, *(_rule(r, depth - 1) for _ in range(1 if kind == "not" else 2)))
    start = r.randrange(3)
    return r.choice(
        [
            ("all",),
            ("prompt",),
            ("first", r.randint(1, 3)),
            ("last", r.randint(1, 3)),
            ("positions", start, r.choice([None, start + r.randint(1, 4)])),
            ("generated", start, r.choice([None, start + r.randint(1, 3)])),
            ("ids", tuple(r.sample(range(100), 40))),
            ("special",),
            ("where", r.choice(list(FUNCTIONS))),
        ]
    )
