"""Set-up: a lab from the embedded tiny model, or from a real model, its SAEs and a data folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnsight import TransformersModel
from torch import nn

import saefeat as sf

from .constants import published, require_layer, settled, taken, warning
from .data import Prompt, PromptSets, load_folder
from .errors import UsageError
from .identity import code, model_identity
from .judges import AnswerOnly, substring_judge
from .lab import Lab, Settings
from .openings import shortened
from .stages import Say, Stages, fingerprint

if TYPE_CHECKING:
    from argparse import Namespace

TINY = Settings(
    candidates=(2, 4, 8),
    budgets=(2, 4, 8),
    scales=(0.0, -1.0, -2.0),
    values=(2.0, 4.0, 6.0, 8.0, 10.0),
    max_new_tokens=24,
    batch_size=128,
)
"""The paper's constants scaled to 512 latents a layer; choices are made on the val split."""


def tiny_sets(seed: int = 0) -> PromptSets:
    """The embedded prompts; the seed chooses the samples."""
    from . import tiny

    names = PromptSets.__dataclass_fields__
    return PromptSets(
        **{
            name: tuple(Prompt(request.instruction, request.category) for request in requests)
            for name, requests in tiny.splits(seed).items()
            if name in names
        }
    )


def tiny_lab(output: Path, settings: Settings, say: Say, quiet: bool = False) -> Lab:
    """The embedded chat model, its SAEs on the residual stream, its prompts and its judge."""
    from . import tiny

    model = tiny.model("chat")
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    require_layer(settings, model.config.num_hidden_layers)
    return Lab(
        model=model,
        saes=saes,
        sets=tiny_sets(settings.seed),
        judge=AnswerOnly(tiny.judge),
        refusals=tuple(tiny.REFUSAL_OPENINGS),
        answers=tuple(tiny.COMPLY_OPENINGS),
        settings=settings,
        stages=_stages(output, model, saes, say),
        name="the embedded tiny model",
        quiet=quiet,
        constants={"of": "the embedded tiny model", "calibrated": True},
    )


def real_lab(output: Path, options: Namespace, say: Say) -> Lab:
    """A Hugging Face chat model with SAEs and prompts from the command line.

    Raises:
        UsageError: if ``--saes`` or ``--data`` is missing, or the model cannot be loaded.
        DataError, DictionaryError: for what the folders hold.
    """
    missing = [name for name in ("saes", "data") if getattr(options, name) is None]
    if missing:
        raise UsageError(f"--model {options.model} also needs --{' and --'.join(missing)}")
    sets = load_folder(options.data)
    saes = _load_saes(options.saes, options.sae_ids)
    module, tokenizer = _load(options.model, options.dtype or "bfloat16", options.device or "cpu")
    model = TransformersModel(module, tokenizer=tokenizer, task="text-generation")
    origin, calibrated = published(model.config)
    settings = settled(options, origin.settings)
    require_layer(settings, model.config.num_hidden_layers)
    constants = taken(options, settings, origin.name, calibrated)
    lab = Lab(
        model=model,
        saes=saes,
        sets=sets,
        judge=substring_judge,
        refusals=tuple(options.refusal_tokens or ["I"]),
        answers=tuple(options.answer_tokens or ["Here"]),
        settings=settings,
        stages=_stages(output, model, saes, say),
        name=options.model,
        quiet=options.quiet,
        constants=constants,
        warnings=tuple(warning(constants, options.model)),
    )
    for line in (
        *shortened(tokenizer, lab.refusals, "--refusal-tokens"),
        *shortened(tokenizer, lab.answers, "--answer-tokens"),
    ):
        say(line)
    return lab


def _load(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Raises:
        UsageError: if either cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"--model {name} has no chat template; wanted a chat model")
    module: Any = model.eval()  # its annotations misname self
    try:
        return module.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        raise UsageError(f"--device {device} cannot be used: {error}") from error


def _load_saes(source: str, ids: list[str] | None) -> sf.dictionaries.Dictionaries:
    """The SAEs on the residual stream, of a folder or a release.

    Raises:
        UsageError: for an unknown release or id, or an unreadable folder.
    """
    try:
        return sf.load_saes(source, sites="resid_post", ids=ids)
    except (ValueError, KeyError, OSError) as error:  # sae-lens raises all of them
        raise UsageError(f"--saes {source} cannot be loaded: {error}") from error


def _stages(output: Path, model: Any, saes: sf.dictionaries.Dictionaries, say: Say) -> Stages:
    """Stages keyed by model, dictionaries and code; the lab adds what it asks (``Lab.stage``)."""
    base = {
        "model": model_identity(model),
        "dictionaries": {str(site): one.fingerprint() for site, one in saes.items()},
        "versions": sf.results.versions(),
        "code": code(),
    }
    return Stages(output / "stages", fingerprint(base), say)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, then as before.

    The tiny model's operations are so small that threads mostly wait for one another: on a busy
    machine one is ten times as fast as two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def loading_silently(quiet: bool) -> Iterator[None]:
    """Without transformers' own progress bars, if quiet; afterwards as before."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and before:
            logging.enable_progress_bar()
