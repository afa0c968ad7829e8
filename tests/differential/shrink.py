"""A smaller case that still differs: parts are dropped one at a time for as long as it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .cases import Basis, Case, Step, When


def shrunk(case: Case, fails: Callable[[Case], bool], tries: int = 400) -> Case:
    """The smallest case that is found to fail as well, by at most so many tries."""
    left = tries
    progress = True
    while progress and left > 0:
        progress = False
        for smaller in _smaller(case):
            left -= 1
            if _fails(fails, smaller):
                case, progress = smaller, True
                break
            if left <= 0:
                break
    return case


def _fails(fails: Callable[[Case], bool], case: Case) -> bool:
    """A case that cannot be run at all is another fault, or none."""
    try:
        return fails(case)
    except Exception:  # whatever it is, it is not the difference that is looked for
        return False


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect, those that leave most out first."""
    for n in range(len(case.groups)):
        if len(case.groups) > 1:
            yield _without_bases(replace(case, groups=_cut(case.groups, n)))
    for g, group in enumerate(case.groups):
        for n in range(len(group)):
            if len(group) > 1:
                yield _without_bases(_with_group(case, g, _cut(group, n)))
    for n in range(len(case.prompts)):
        if len(case.prompts) > 1:
            yield _without_prompt(case, n)
    for n, prompt in enumerate(case.prompts):
        if len(prompt) > 1:
            for shorter in (prompt[: len(prompt) // 2], prompt[1:], prompt[:-1]):
                yield replace(case, prompts=_put(case.prompts, n, shorter))
    yield from _simpler_running(case)
    for g, group in enumerate(case.groups):
        for n, step in enumerate(group):
            for simpler in _simpler_steps(step):
                yield _without_bases(_with_group(case, g, _put(group, n, simpler)))
    for n, basis in enumerate(case.bases):
        for simpler in _simpler_bases(basis):
            yield replace(case, bases=_put(case.bases, n, simpler))


def _simpler_running(case: Case) -> Iterator[Case]:
    if case.new > 1:
        yield replace(case, new=case.new - 1)
    if case.stops:
        yield replace(case, stops=())
    if case.pads:
        yield replace(case, pads=0)
    if case.batch_size != 32:
        yield replace(case, batch_size=32)
    if case.way not in ("run", "hooked"):
        yield replace(case, way="run")
        yield replace(case, way="hooked")
    if case.family != "llama":
        yield replace(case, family="llama")
    if case.dtype != "float64" and case.family != "gemma2":
        yield replace(case, dtype="float64")


def _simpler_steps(step: Step) -> Iterator[Step]:
    if len(step.parts) > 1:
        for n in range(len(step.parts)):
            yield replace(step, parts=_cut(step.parts, n), value=_number(step))
    for n, (basis, indices) in enumerate(step.parts):
        if len(indices) > 1:
            yield replace(
                step, parts=_put(step.parts, n, (basis, indices[:1])), value=_number(step)
            )
    plain = Step(step.verb, step.parts)
    for name in ("where", "when", "low", "high", "active_only", "written", "reduce"):
        default = getattr(plain, name)
        if getattr(step, name) != default:
            yield replace(step, **{name: default})
    if step.where is not None and step.where[0] in ("and", "or", "not"):
        yield from (replace(step, where=part) for part in step.where[1:])
    if step.when is not None:
        yield from (replace(step, when=when) for when in _simpler_conditions(step.when))
    if not isinstance(step.value, float):
        yield replace(step, value=_number(step))


def _number(step: Step) -> float:
    return 0.0 if step.verb in ("ablate", "bound", "probe") else 2.0


def _simpler_conditions(when: When) -> Iterator[When]:
    if when.hold:
        yield replace(when, hold=False)
    for n in range(len(when.parts)):
        if len(when.parts) > 1:
            yield replace(when, parts=_cut(when.parts, n))
        basis, indices = when.parts[n]
        if len(indices) > 1:
            yield replace(when, parts=_put(when.parts, n, (basis, indices[:1])))
    if when.above is not None and when.below is not None:
        yield replace(when, below=None)


def _simpler_bases(basis: Basis) -> Iterator[Basis]:
    plain = Basis(basis.kind, basis.site)
    for name in ("norm", "subtract", "centered", "rescale", "excluded"):
        if getattr(basis, name) != getattr(plain, name):
            yield replace(basis, **{name: getattr(plain, name)})
    if basis.kind != "direction":
        yield Basis("direction", basis.write or basis.site)
        if basis.write is None and basis.kind != "standard":
            yield Basis("standard", basis.site)
    if basis.write is None and basis.site != "resid_post.1":
        yield replace(basis, site="resid_post.1")


# ---------------------------------------------------------------- tuples


def _cut(items: tuple, n: int) -> tuple:
    return (*items[:n], *items[n + 1 :])


def _put(items: tuple, n: int, item: object) -> tuple:
    return (*items[:n], item, *items[n + 1 :])


def _with_group(case: Case, n: int, group: tuple[Step, ...]) -> Case:
    return replace(case, groups=_put(case.groups, n, group))


def _without_prompt(case: Case, n: int) -> Case:
    """Without a prompt, and without what is its own in values by prompt."""

    def fewer(step: Step) -> Step:
        value = step.value
        if isinstance(value, tuple) and isinstance(value[0], tuple):
            return replace(step, value=_cut(value, n))
        return step

    groups = tuple(tuple(map(fewer, group)) for group in case.groups)
    return replace(case, groups=groups, prompts=_cut(case.prompts, n))


def _without_bases(case: Case) -> Case:
    """Without dictionaries that nothing names any more."""
    parts = [part for step in case.steps for part in step.parts]
    parts += [part for step in case.steps if step.when is not None for part in step.when.parts]
    used = sorted({number for number, _ in parts})
    place = {number: n for n, number in enumerate(used)}

    def moved(step: Step) -> Step:
        renumbered = tuple((place[number], indices) for number, indices in step.parts)
        when = step.when
        if when is not None:
            when = replace(when, parts=tuple((place[number], i) for number, i in when.parts))
        return replace(step, parts=renumbered, when=when)

    groups = tuple(tuple(map(moved, group)) for group in case.groups)
    return replace(case, groups=groups, bases=tuple(case.bases[number] for number in used))
