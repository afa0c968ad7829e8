"""What a case is, as plain data: ``repr(case)`` is the call that makes it again."""

from __future__ import annotations

from dataclasses import dataclass, fields

Rule = tuple
"""A token rule: ``("last", 2)``, ``("not", rule)``, ``("and", a, b)`` and the like."""

Numbers = float | tuple
"""A number, one a latent (k), or one a prompt and latent ((k), ...)."""


class Short:
    """A repr without what is at its default."""

    def __repr__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        listed = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in given)
        return f"{type(self).__name__}({listed})"


@dataclass(frozen=True, repr=False)
class Basis(Short):
    """A dictionary: an SAE of some architecture, a direction, neurons, or a function."""

    kind: str
    site: str
    seed: int = 0
    write: str | None = None
    norm: str = "none"
    subtract: bool = False
    centered: bool = False
    rescale: bool = False
    k: int = 0
    excluded: Rule = ()


@dataclass(frozen=True, repr=False)
class Schedule(Short):
    values: tuple[float, ...]
    prompt: float | None = None


@dataclass(frozen=True, repr=False)
class Patch(Short):
    """The values of a run of the bare model with so many new tokens, at the tokens of a rule."""

    where: Rule | None = None
    new: int = 0


@dataclass(frozen=True, repr=False)
class Drawn(Short):
    """One of these rows [n, k], drawn for each prompt and position."""

    rows: tuple[tuple[float, ...], ...]
    seed: int = 0


Value = Numbers | Schedule | Patch | Drawn
Parts = tuple[tuple[int, tuple[int, ...]], ...]
"""(number of a dictionary, its latents), ..."""


@dataclass(frozen=True, repr=False)
class When(Short):
    """A condition on latents, or on the score ``scorer`` of a site's value."""

    parts: Parts = ()
    scorer: str | None = None
    site: str | None = None
    above: float | None = None
    below: float | None = None
    match: str = "any"
    hold: bool = False


@dataclass(frozen=True, repr=False)
class Step(Short):
    """One verb: ablate, set, scale, add, bound or probe."""

    verb: str
    parts: Parts
    value: Value = 0.0
    low: float | None = None
    high: float | None = None
    active_only: bool = False
    written: str = "frozen"
    where: Rule | None = None
    when: When | None = None
    reduce: str | None = None


@dataclass(frozen=True, repr=False)
class Case(Short):
    """Joint groups of steps in a chain, on prompts of ids, run in one way."""

    family: str
    bases: tuple[Basis, ...]
    groups: tuple[tuple[Step, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    way: str
    new: int = 0
    stops: tuple[int, ...] = ()
    batch_size: int = 32
    pads: int = 0  # columns of padding beyond those that are needed
    dtype: str = "float64"

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for group in self.groups for step in group)


FORWARD = ("run", "trace", "edit", "hooked", "right", "sweep", "saved")
"""Ways with one forward pass; ``right`` is hooked, padded on the right."""

GENERATE = (
    "run", "inline", "edit", "hooked", "loop", "again", "uncached", "sweep", "saved", "beams",
)  # fmt: skip
"""Ways that decode: ``loop`` by hand in ``hooked``, ``again`` behind another text in one block."""
