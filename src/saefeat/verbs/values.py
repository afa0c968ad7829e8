"""Values that depend on where an edit acts: by step, from a clean run, or drawn from data.

Each is accepted wherever a verb takes a number. A value is plain and holds no model; what it is
at a token is worked out in ``kernel.values``, in the forward pass, from the token's place in its
row's text. So all ways of running, any batching and any padding give the same.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..errors import LatentError, explain
from ..latents import Latents
from ..records import Readings


class Value(ABC):
    """What ``Change`` needs of a value that is no number."""

    numbered: ClassVar[bool] = False
    """Whether it depends on the prompt's number, so that each batch needs its own program."""

    @abstractmethod
    def check(self, where: str, parameter: str, latents: Latents) -> None:
        """Refuse a value that was made for other latents (``LatentError``)."""

    @abstractmethod
    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> dict[str, Any]:
        """The kernel's form, for the latents in ``span`` and the prompts in ``rows``."""

    def prompts(self) -> int | None:
        """How many prompts it is for, or None if it fits any."""
        return None

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash(type(self))


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Schedule(Value):
    """A value that changes from one generated token to the next, for steering that decays.

    Generated token 0 is the first new token, when it is fed back; it takes the first value. Steps
    are counted in each row from the end of its own prompt. The last value is held on.

    Args:
        values: [steps], or [steps, k] with one value a latent.
        prompt: what the prompt's tokens take, a number or [k]; the first value by default, since
            the prompt's last token is what produces the first new one. To leave the prompt alone
            say so with ``where=Tokens.generated()``.

    Raises:
        LatentError: for no steps, or values that are not finite.

    Examples:
        >>> fade = sf.Schedule([8.0, 4.0, 2.0, 0.0])
        >>> sf.Clamp(sf.Direction(torch.ones(8), site="resid_post.1"), add=fade)
        Clamp(Latents(1: resid_post.1 [0]), add=Schedule([8.0, 4.0, 2.0, 0.0]))
    """

    values: Tensor
    prompt: Tensor | None

    def __init__(
        self,
        values: Sequence[Any] | Tensor,
        *,
        prompt: float | Sequence[float] | Tensor | None = None,
    ) -> None:
        steps = numbers("Schedule", "values", values, (1, 2))
        told = None if prompt is None else numbers("Schedule", "prompt", prompt, (0, 1))
        object.__setattr__(self, "values", steps)
        object.__setattr__(self, "prompt", told)

    def check(self, where: str, parameter: str, latents: Latents) -> None:
        for name, least, tensor in (("values", 2, self.values), ("prompt", 1, self.prompt)):
            if tensor is not None and tensor.ndim >= least and tensor.shape[-1] != len(latents):
                raise LatentError(
                    explain(
                        where,
                        parameter,
                        got=f"a Schedule whose {name} are for {tensor.shape[-1]} latents",
                        wanted=f"for {len(latents)}, in the order of the selection",
                        cause="values made for another selection",
                        call="Schedule([8.0, 4.0, 0.0]), the same for all latents",
                    )
                )

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> dict[str, Any]:
        values, told = self.values, self.values[0] if self.prompt is None else self.prompt
        values = values[:, span] if values.ndim == 2 else values[:, None]
        told = told[span] if told.ndim == 1 else told[None]
        return {"kind": "schedule", "values": values.clone(), "prompt": told.clone()}

    def __repr__(self) -> str:
        told = "" if self.prompt is None else f", prompt={self.prompt.tolist()!r}"
        return f"Schedule({self.values.tolist()!r}{told})"


@final
@dataclass(frozen=True, repr=False, eq=False)
class Pin(Value):
    """What latents were at the same token of the same prompt in a clean run.

    Tokens are matched by prompt and by position in the prompt's text, whatever the padding. Where
    the readings hold no value (tokens behind the clean run, tokens its probe did not select)
    nothing is edited.

    Args:
        readings: what a ``Probe`` read in the clean run, of the same prompts in the same order;
            of all latents of the edit, in any order, and of others if you like.

    Raises:
        LatentError: for readings that were reduced, or hold values that are not finite.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> some = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post").latents({1: [3, 4]})
        >>> clean = sf.run(model, ["how do i bake bread"], sf.Probe(some)).readings[0]
        >>> out = sf.run(model, ["how do i bake bread"], sf.Ablate(some, to=sf.Pin(clean)))
        >>> out.receipt.rows[0].tokens
        6
    """

    readings: Readings

    numbered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_readings("Pin", self.readings)
        if self.readings.starts is None:
            raise LatentError(
                explain(
                    "Pin",
                    "readings",
                    got="without starts, the column at which each prompt begins",
                    wanted="one value a token, as Probe(latents) without reduce= reads them",
                    cause="a reduced probe, or Readings made by hand",
                    call="Ablate(latents, to=values), which takes [k] or [prompts, k]",
                )
            )

    def check(self, where: str, parameter: str, latents: Latents) -> None:
        columns_of(self.readings, latents, f"{where}, {parameter}=Pin")

    def prompts(self) -> int:
        return self.readings.values.shape[0]

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> dict[str, Any]:
        index = columns_of(self.readings, latents, "Pin")[span]
        values, known = (t[rows][..., index] for t in (self.readings.values, self.readings.mask))
        assert self.readings.starts is not None
        return {
            "kind": "pin",
            "values": torch.where(known, values, 0.0),  # [b, s, k]
            "known": known,
            "starts": self.readings.starts[rows, None].clone(),  # [b, 1]
        }

    def __repr__(self) -> str:
        return f"Pin({_brief(self.readings)})"


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Resample(Value):
    """At each token, what the latents were at a token drawn from given activations.

    Resample ablation: what is specific to the prompt goes, what is typical of the data stays. All
    latents of an edit take their values from one drawn token, so that they stay as they occur
    together. The draw is a function of the seed, the prompt's number in the data set and the
    token's position, and of nothing else: batches, padding and caches do not change it.

    Args:
        activations: ``Readings`` of at least the edit's latents, whose selected tokens are drawn
            from, or a tensor [n, k].
        seed: of the draw, 0 ≤ seed < 2³².

    Raises:
        LatentError: for activations without a token, or values that are not finite.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> seen = torch.tensor([[0.5], [2.0], [3.5]])
        >>> sf.Resample(seen, seed=1) == sf.Resample(seen.clone(), seed=1)
        True
        >>> edit = sf.Ablate(v, to=sf.Resample(seen, seed=1))
    """

    activations: Readings | Tensor
    seed: int

    numbered: ClassVar[bool] = True

    def __init__(self, activations: Readings | Tensor, *, seed: int = 0) -> None:
        if isinstance(activations, Tensor):
            dtype = torch.promote_types(activations.dtype, torch.float32)
            held: Readings | Tensor = numbers("Resample", "activations", activations, (2,))
            held = held.to(dtype)
        else:
            _require_readings("Resample", activations)
            held = activations
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise LatentError(
                explain(
                    "Resample",
                    "seed",
                    got=repr(seed),
                    wanted="an integer from 0 to 2³² − 1",
                    cause="a generator, or a seed of another library",
                    call="Resample(readings, seed=0)",
                )
            )
        object.__setattr__(self, "activations", held)
        object.__setattr__(self, "seed", seed)

    def check(self, where: str, parameter: str, latents: Latents) -> None:
        rows = self._rows(latents)
        if rows.shape[0] == 0 or rows.shape[1] != len(latents):
            raise LatentError(
                explain(
                    where,
                    parameter,
                    got=f"Resample from {list(rows.shape)}",
                    wanted=f"[n, {len(latents)}] with at least one row",
                    cause="activations of another selection, or no token at which all were read",
                    call="Resample(run(model, data, Probe(latents)).readings[0])",
                )
            )

    def _rows(self, latents: Latents) -> Tensor:
        """[n, k]: what is drawn from, the tokens at which all of the latents were selected."""
        if isinstance(self.activations, Tensor):
            return self.activations
        index = columns_of(self.activations, latents, "Resample")
        return self.activations.values[..., index][self.activations.mask[..., index].all(-1)]

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> dict[str, Any]:
        values = self._rows(latents)[:, span].clone()
        first = rows.start or 0 if isinstance(rows, slice) else int(rows[0])
        return {"kind": "resample", "values": values, "seed": self.seed, "first": first}

    def __repr__(self) -> str:
        return f"Resample({_brief(self.activations)}, seed={self.seed})"


def numbers(where: str, parameter: str, given: Any, dims: tuple[int, ...]) -> Tensor:
    """Finite numbers as a tensor of its own, float64 so that 0.7 stays 0.7 in any model.

    Raises:
        LatentError: for another number of dimensions, none at all, NaN or infinity.
    """
    try:
        found = torch.as_tensor(given, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim in dims and found.numel() and bool(torch.isfinite(found).all()):
        return found
    raise LatentError(
        explain(
            where,
            parameter,
            got=f"{type(given).__name__} of shape {tuple(getattr(given, 'shape', found.shape))}"
            + ("" if torch.isfinite(found).all() else ", not finite"),
            wanted=f"finite numbers of {' or '.join(map(str, dims))} dimensions, at least one",
            cause="an empty list, ragged rows, or a mean over nothing",
            call="Schedule([8.0, 4.0, 0.0]), Resample(values[mask])",
        )
    )


def columns_of(readings: Readings, latents: Latents, where: str) -> list[int]:
    """Which columns of the readings hold these latents, in their order.

    Raises:
        LatentError: naming the first latent that was not read.
    """
    place = {key: column for column, key in enumerate(_keys(readings.latents))}
    wanted = _keys(latents)
    missing = [key for key in wanted if key not in place]
    if not missing:
        return [place[key] for key in wanted]
    _, site, index = missing[0]
    raise LatentError(
        explain(
            where,
            "readings",
            got=f"of {readings.latents!r}, without latent {index} of {site}",
            wanted="readings of all latents of the edit",
            cause="another selection, or another dictionary of the same site",
            call="run(model, prompts, Probe(latents)).readings[0], with the edit's own latents",
        )
    )


def _keys(latents: Latents) -> list[tuple[Any, Any, int]]:
    """One key a latent; a dictionary loaded twice from one place is the same dictionary."""
    return [
        (getattr(basis, "origin", None) or id(basis), basis.site, index)
        for basis, indices in latents.parts
        for index in indices
    ]


def _require_readings(where: str, given: object) -> None:
    """Refuse what is no ``Readings``, or holds no number where it says it does."""
    finite = isinstance(given, Readings) and bool(torch.isfinite(given.values[given.mask]).all())
    if not finite:
        raise LatentError(
            explain(
                where,
                "readings" if where == "Pin" else "activations",
                got="Readings that are not finite"
                if isinstance(given, Readings)
                else type(given).__name__,
                wanted="the Readings of a Probe, finite"
                + ("" if where == "Pin" else ", or a tensor [n, k]"),
                cause="a tensor without its tokens, or a model whose activations overflow",
                call=f"{where}(run(model, prompts, Probe(latents)).readings[0])",
            )
        )


def _brief(given: Readings | Tensor) -> str:
    """Too much to print: the shape and a hash of the content, so that provenance tells apart."""
    tensors = (given.values, given.mask) if isinstance(given, Readings) else (given,)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    of = f" of {given.latents!r}" if isinstance(given, Readings) else ""
    return f"<{list(tensors[0].shape)}{of}, {digest.hexdigest()[:8]}>"


def same(a: Any, b: Any) -> bool:
    """Equal, where tensors are equal in every element and dataclasses in every field."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is type(b) and isinstance(a, (Value, Readings)) and is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b
