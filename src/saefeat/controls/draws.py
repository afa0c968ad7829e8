"""Controls drawn at random: latents like those selected, or the same with other directions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Dictionary, Latents
from ..dictionaries.places import lengths, require_one_site
from ..errors import LatentError
from ..files.hashing import digest
from ..model.sites import Site
from ..results.readings import Readings

Statistic = Readings | Mapping[Site | str, Tensor]


@checked
def matched(
    latents: Latents | Dictionary | Dictionaries,
    statistics: Statistic | Iterable[Statistic] = (),
    *,
    seed: int,
    within: float = 2.0,
) -> Latents:
    """For each latent another one of its dictionary, as long and as active.

    Each control is drawn uniformly from the latents whose decoder norm and whose every statistic
    lie within a factor of the latent's own; the selection itself is excluded, and no control
    is drawn twice. Draw with several seeds, and report the effect beside all of theirs.

    Args:
        latents: the selection to be controlled for.
        statistics: what else must agree. ``Readings`` of a ``Probe`` of the whole dictionary give
            two statistics, how often a latent is active and its mean activation over the tokens
            read; a mapping gives one, site → [d_sae] numbers. Without any, only the decoder norm
            is matched, which is not enough where latents fire unequally. Read without first tokens
            (``where=~Tokens.first(1)``) where these are outliers: ``Readings.first_share``.
        seed: of the draw; the same on every machine.
        within: the factor, at least 1: each statistic of a control lies between the latent's own
            divided by it and times it.

    Returns:
        As many latents of each dictionary, the i-th in place of the selection's i-th.

    Raises:
        LatentError: if a latent has no match left (widen ``within``, or read more tokens), or its
            dictionary has no statistics among those given.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> sae = sf.load_sae(tiny.saes_folder("chat") / "resid_post_1")
        >>> texts = ["how do i bake bread", "how do i poison rivals", "tell me a story"]
        >>> readings = sf.run(model, texts, sf.Probe(sae)).readings[0]
        >>> active = sae.latents(readings.active().topk(4).indices)
        >>> controls = sf.controls.matched(active, readings, seed=0, within=4.0)
        >>> len(controls), len(controls & active)
        (4, 0)
    """
    chosen = as_latents(latents, "matched")
    if not within >= 1:
        raise _unmatched(
            f"asked for within a factor {within}", "a factor of at least 1",
            "a difference in place of a ratio", "matched(..., within=2.0)",
        )  # fmt: skip
    one = isinstance(statistics, Readings | Mapping)
    given: list[Any] = [statistics] if one else list(statistics)
    generator = random.Random(seed)
    parts: list[tuple[Any, tuple[int, ...]]] = []
    for basis, indices in chosen.parts:
        rows = _statistics(basis, given)
        parts.append((basis, _drawn(basis, indices, rows, within, generator)))
    return Latents(tuple(parts))


def _statistics(basis: Dictionary, given: Sequence[Statistic]) -> Tensor:
    """[s, d_sae]: the decoder norm and each statistic; NaN where a latent has none."""
    rows = [lengths(basis)]
    for statistic in given:
        rows += _of_readings(basis, statistic) if isinstance(statistic, Readings) else []
        if isinstance(statistic, Mapping):
            rows += [
                _sized(basis, values)
                for at, values in statistic.items()
                if Site.parse(at) == basis.site
            ]
    if given and len(rows) == 1:
        raise _unmatched(
            f"latents of {basis.site}, of which no statistic was given",
            "a statistic of every dictionary selected from",
            "a probe of other sites",
            "matched(latents, run(model, prompts, Probe(sae)).readings[0], seed=0)",
        )
    return torch.stack(rows)


def _of_readings(basis: Dictionary, readings: Readings) -> list[Tensor]:
    """How often and how strongly each latent fires, where the readings have it."""
    rows, start = [], 0
    for other, indices in readings.latents.parts:
        if other is basis:
            for values in (readings.active(), readings.mean()):
                row = torch.full((basis.d_sae,), torch.nan, dtype=torch.float64)
                row[list(indices)] = values[start : start + len(indices)].double()
                rows.append(row)
        start += len(indices)
    return rows


def _sized(basis: Dictionary, values: Tensor) -> Tensor:
    if values.shape == (basis.d_sae,):
        return values.detach().double().cpu()
    raise _unmatched(
        f"with a statistic of shape {tuple(values.shape)} at {basis.site}",
        f"[{basis.d_sae}], one number a latent",
        "statistics of a selection, or of another width",
        "{site: values} with values of all latents",
    )


def _drawn(
    basis: Any, indices: Sequence[int], rows: Tensor, within: float, generator: random.Random
) -> tuple[int, ...]:
    """One control a latent; those with the fewest candidates draw first."""
    free = torch.ones(basis.d_sae, dtype=torch.bool)
    free[list(indices)] = False
    like = {index: _like(rows, index, within) & free for index in indices}
    chosen: dict[int, int] = {}
    for index in sorted(indices, key=lambda i: (int(like[i].sum()), i)):
        candidates = (like[index] & free).nonzero()[:, 0].tolist()
        if not candidates:
            numbers = ", ".join(f"{value:.3g}" for value in rows[:, index].tolist())
            raise _unmatched(
                f"latent {index} of {basis.site}, with {numbers} and no other like it",
                f"another latent within a factor {within:g} in each of these",
                "a latent unlike the rest, a dead one, or too few tokens read",
                f"matched(..., within={2 * within:g}), or statistics of more text",
            )
        chosen[index] = generator.choice(candidates)
        free[chosen[index]] = False
    return tuple(chosen[index] for index in indices)


def _like(rows: Tensor, index: int, within: float) -> Tensor:
    """[d_sae]: which latents lie within the factor in every statistic; zero is like zero alone."""
    own = rows[:, index : index + 1]
    low, high = own.abs() / within, own.abs() * within
    size = rows.abs() * (rows.sign() == own.sign())
    return ((size >= low) & (size <= high) & (rows.sign() == own.sign())).all(0)


def _unmatched(got: str, wanted: str, cause: str, call: str) -> LatentError:
    return LatentError(
        f"matched: `latents` is {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
    )


@checked
def random_directions(latents: Latents | Dictionary | Dictionaries, *, seed: int) -> Latents:
    """The same latents, read as they are, each writing a random direction of its own length.

    An edit of them moves the site at the same tokens and by the same length as the edit of the
    latents themselves (of one latent exactly, of several on average), elsewhere.

    Args:
        latents: the selection to be controlled for.
        seed: of the directions; a latent's is the same in every selection. The draw is by seed,
            sites, dictionary (its fingerprint) and latent, so that the controls of several sites,
            or of two dictionaries at one, are draws of their own.

    Examples:
        >>> sae = sf.SAE.from_tensors({"W_enc": torch.randn(8, 32), "b_enc": torch.zeros(32),
        ...     "W_dec": torch.randn(32, 8), "b_dec": torch.zeros(8)}, site="resid_post.1")
        >>> control = sf.controls.random_directions(sae.latents([3, 7]), seed=0)
        >>> control
        Latents(2: resid_post.1 [3, 7])
        >>> round(float(control.parts[0][0].directions([3]).norm() / sae.directions([3]).norm()), 4)
        1.0
    """
    chosen = as_latents(latents, "random_directions")
    require_one_site("random_directions", "latents", chosen, reads=True, writes=True)
    return Latents(tuple((_Redirected(basis, seed), ix) for basis, ix in chosen.parts))


@final
class _Redirected(Dictionary):
    """A dictionary with random directions of the same lengths; made by ``random_directions``."""

    def __init__(self, dictionary: Dictionary, seed: int) -> None:
        self._inner, self._seed = dictionary, seed
        self.site, self.write_site = dictionary.site, dictionary.write_site
        self.d_in, self.d_out, self.d_sae = dictionary.d_in, dictionary.d_out, dictionary.d_sae
        self.excluded, self.prefix = dictionary.excluded, dictionary.prefix
        self.centered = getattr(dictionary, "centered", False)
        self.name = f"random directions {seed} of {dictionary.name}"

    def columns(self, indices: Tensor) -> dict[str, Any]:
        columns = self._inner.columns(indices)
        rows = columns["directions"]
        drawn = torch.stack([self._drawn(int(index)) for index in indices]).to(rows)
        drawn = drawn / drawn.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)
        return columns | {"directions": drawn}

    @cached_property
    def _identity(self) -> str:
        """The dictionary's: by latent alone, latent 3 of every site would have one direction."""
        return self._inner.fingerprint()

    def _drawn(self, index: int) -> Tensor:
        """[d_out]: of one latent, whatever else is selected."""
        word = digest(self._seed, str(self.site), str(self.write_site), self._identity, index)
        draw = torch.Generator().manual_seed(int(word, 16) % 2**63)
        return torch.randn(self.d_out, generator=draw, dtype=torch.float32)

    def content(self, indices: Tensor) -> object:
        return self._inner.fingerprint(indices), indices.tolist(), self._seed
