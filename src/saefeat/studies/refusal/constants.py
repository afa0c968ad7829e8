"""Constants: whose numbers a study uses, and which of them nobody calibrated for its model.

c, v, K0, K* and the skipped positions were found on two models. They carry over to no other, not
even of the same family: activations have another scale, and dictionaries another width. So they
are options, and a study that takes them for another model says so.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from .errors import UsageError
from .lab import Settings

OPTIONS = {
    "candidates": "--candidates",
    "budgets": "--budgets",
    "scales": "--scales",
    "values": "--values",
    "skipped": "--skip",
}
"""Settings that depend on the model → their options."""
_SYMBOLS = {"candidates": "K0", "budgets": "K*", "scales": "c", "values": "v", "skipped": "skip"}


@dataclass(frozen=True)
class Published:
    """A model of the paper, and the paper's numbers for it.

    Attributes:
        name: as people call it.
        shape: model type, layers, width and vocabulary, which tell it from others of its family.
        settings: the study's numbers.
    """

    name: str
    shape: tuple[str, int, int, int]
    settings: Settings


GEMMA = Published("gemma-2-2b-it", ("gemma2", 26, 2304, 256000), Settings())
LLAMA = Published(
    "Llama-3.1-8B-Instruct",
    ("llama", 32, 4096, 128256),
    Settings(scales=(-1.0,), values=(1.0, 2.0, 3.0, 4.0, 5.0), skipped=26),
)


def published(config: Any) -> tuple[Published, bool]:
    """The model of the paper whose numbers a model gets, and whether it is that model.

    Others get those of Gemma.
    """
    shape = tuple(
        getattr(config, name, None)
        for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    )
    found = next((one for one in (GEMMA, LLAMA) if one.shape == shape), None)
    return found or GEMMA, found is not None


def settled(options: Namespace, base: Settings) -> Settings:
    """The numbers of a base, and those that the options give in their place."""
    given = {name: getattr(options, name) for name in (*OPTIONS, *_OTHERS)}
    changed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    return replace(base, **changed)


_OTHERS = (
    *("seed", "limit", "max_new_tokens", "batch_size"),
    *("steps", "layer", "filter", "minimum"),
)


def require_layer(settings: Settings, layers: int) -> None:
    """Refuse a layer the model does not have.

    Raises:
        UsageError: naming the range.
    """
    if settings.layer is not None and settings.layer >= layers:
        raise UsageError(
            f"--layer {settings.layer} is no layer of this model, wanted 0..{layers - 1}, or no "
            "--layer, which chooses it on the val split"
        )


def taken(options: Namespace, settings: Settings, origin: str, calibrated: bool) -> dict[str, Any]:
    """Where the numbers come from, for the results: ``of``, ``calibrated``, ``taken``, ``given``.

    ``taken`` are the numbers of ``of``, ``given`` those of the options.
    """
    own = {name for name in OPTIONS if getattr(options, name) is not None}
    return {
        "of": origin,
        "calibrated": calibrated,
        "taken": {n: getattr(settings, n) for n in OPTIONS if n not in own},
        "given": {n: getattr(settings, n) for n in OPTIONS if n in own},
    }


def warning(found: dict[str, Any], name: str) -> list[str]:
    """A line where numbers of another model are used; none where all fit or were given."""
    if found["calibrated"] or not found["taken"]:
        return []
    numbers = ", ".join(f"{_SYMBOLS[n]} = {_spelled(v)}" for n, v in found["taken"].items())
    options = " ".join(OPTIONS[n] for n in found["taken"])
    return [
        f"constants of {found['of']}, not calibrated for {name}: {numbers}; options: {options} "
        "(several --scales, --budgets or --candidates are chosen between on the val split)"
    ]


def _spelled(value: Any) -> str:
    return " ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"
