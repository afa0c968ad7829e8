"""An attribution that is asked for, as plain data, and one from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from helpers import FAMILIES

from . import places
from .cases import Basis, Parts, Rule, Short, Step
from .weights import LATENTS, SAES, TRANSCODERS, latents_of


@dataclass(frozen=True, repr=False)
class Asked(Short):
    """Scores of some latents: metric, baseline and method by name.

    ``metric`` is ("logit_diff", a, b), ("logit", a) or ("mass",). ``baseline`` is None for zero, a
    number or one a latent, an edit, or ``others``, as many prompts of the same lengths.
    """

    family: str
    bases: tuple[Basis, ...]
    target: Parts
    prompts: tuple[tuple[int, ...], ...]
    metric: tuple = ("mass",)
    baseline: float | tuple | Step | None = None
    others: tuple[tuple[int, ...], ...] = ()
    steps: int = 0  # of integrated gradients; 0 for the gradient at the clean run
    rule: str = "left"
    where: Rule | None = None
    one_site: bool = False
    batch_size: int = 16
    at_once: int | str = "auto"


def asked_of(seed: int) -> Asked:
    """The attribution of a seed."""
    r = Random(f"asked {seed}")
    family = r.choice(FAMILIES)
    # transformers' Gemma 2 takes no padding in float64, as in draw
    sizes = [r.randint(1, 4) for _ in range(r.choice([1, 2, 2, 3]))]
    sizes = sizes[:1] * len(sizes) if family == "gemma2" else sizes
    bases = _apart(r, family)
    target = tuple((n, _indices(r, family, basis)) for n, basis in enumerate(bases))
    steps = r.choice([0, 0, 1, 2, 3])
    kind = r.choice(["zero", "zero", "one", "each", "edit", "pair"])
    return Asked(
        family,
        bases,
        target,
        prompts=_prompts(r, sizes),
        metric=r.choice([("mass",), ("logit", 9), ("logit_diff", 5, 60)]),
        baseline=_baseline(r, kind, bases, target),
        others=_prompts(r, sizes) if kind == "pair" else (),
        steps=steps,
        rule=r.choice(["left", "midpoint", "gauss"]),
        where=r.choice([None, None, ("last", 2), ("not", ("first", 1)), ("ids", tuple(range(50)))]),
        one_site=steps > 0 and r.random() < 0.4,
        batch_size=r.choice([1, 16]),
        at_once=r.choice(["auto", 1, 2]),
    )


def _prompts(r: Random, sizes: list[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(r.randrange(4, 100) for _ in range(size)) for size in sizes)


def _indices(r: Random, family: str, basis: Basis) -> tuple[int, ...]:
    count = latents_of(basis, family)
    return tuple(r.sample(range(count), min(count, r.randint(1, 4))))


def _apart(r: Random, family: str) -> tuple[Basis, ...]:
    """Dictionaries that write at modules of their own."""
    bases, taken = [], set()
    for _ in range(r.choice([1, 2, 2, 3])):
        basis = _basis(r, family)
        where = places.place(family, basis.write or basis.site)
        if (where.path, where.end) not in taken:
            bases.append(basis)
            taken.add((where.path, where.end))
    return tuple(bases)


def _basis(r: Random, family: str) -> Basis:
    kind = r.choice([*SAES, "direction", "neurons", "function"])
    sites = [site for site in places.sites(family) if not site.startswith("mlp_norm")]
    site, write = r.choice(sites), None
    if kind in TRANSCODERS:
        layer = r.randrange(3)
        reads = [f"{name}.{layer}" for name in ("mlp_norm", "mlp_in", "resid_pre")]
        site = r.choice([name for name in reads if name in places.sites(family)])
        write = f"mlp_out.{layer}"
    sae = kind not in ("direction", "neurons", "function")
    norms = ["none", "none", "layer_norm", "constant_norm_rescale"]
    return Basis(
        kind,
        site,
        seed=r.randrange(1000),
        write=write,
        norm=r.choice(norms) if sae and write is None else "none",
        subtract=sae and r.random() < 0.5,
        rescale=kind.endswith("topk") and r.random() < 0.4,
        k=r.choice([4, LATENTS]) if kind.endswith("topk") else 0,
        excluded=r.choice([(), (), ("ids", tuple(range(60, 80))), ("positions", 0, 1)]),
    )


def _baseline(r: Random, kind: str, bases: tuple[Basis, ...], target: Parts) -> object:
    k = sum(len(indices) for _, indices in target)
    if kind == "one":
        return round(r.uniform(-2, 2), 3)
    if kind == "each":
        return tuple(round(r.uniform(-2, 2), 3) for _ in range(k))
    if kind == "edit":
        return Step("set", target[:1], value=round(r.uniform(-2, 2), 3))
    return None
