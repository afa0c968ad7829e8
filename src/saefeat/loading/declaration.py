"""What a folder declares of its SAE before a tensor is read, and the SAE made from it.

What is declared of its training is held against the model by ``notes`` and against what was
measured by ``missed``. None of it is certain: a name differs between hubs, an L0 between texts. So
a difference is a note or a doubt in ``verify``'s table and no error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..dictionaries.exclusion import Excluded
from ..dictionaries.sae import SAE
from ..dictionaries.weights import Weights
from ..errors import DictionaryError
from ..model.sites import Site
from ..text.tokens import Tokens

_UNCENTERED = ("q", "k", "v", "z", "mlp_norm", "mlp_in", "mlp_post")
"""Sites that TransformerLens's center_writing_weights leaves alone: nothing there is written to
the residual stream, or a LayerNorm has taken the mean out already."""


@dataclass(frozen=True)
class Source:
    """One SAE's folder, and what a release says of it beside the files.

    Attributes:
        folder: where the files are.
        path: what site and width are deduced from where no file declares them; the folder's own
            unless a release says otherwise.
        overrides: configuration entries the release corrects.
        scale: the release's activation norm factor, where it lists one.
    """

    folder: Path
    path: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path or self.folder.absolute().as_posix())


@dataclass(frozen=True)
class Declared:
    """What a dictionary's files or release say of its training; ``verify`` holds it to them.

    Attributes:
        model: the model, as TransformerLens or the hub names it.
        width: number of latents.
        l0: active latents a token.
        explained: share of variance explained.
        prepend_bos: whether texts had BOS in front.
    """

    model: str | None = None
    width: int | None = None
    l0: float | None = None
    explained: float | None = None
    prepend_bos: bool | None = None


@dataclass(frozen=True)
class Facts:
    """What is declared: how the SAE computes, where it reads and writes, how wide it is.

    Attributes:
        layout: the library whose files these are.
        hook: TransformerLens name of the read site; None where nothing declares it.
        hook_out: of the write site, for a transcoder that declares it.
        transcoder: whether a write site is needed although none is declared.
        sizes: ``d_in``, ``d_sae`` and ``d_out``, where the configuration has them; the tensors must
            agree.
        width: latents, where declared.
        l0: active latents a token, where declared.
        model: the model it was trained on, as TransformerLens or the hub names it.
        prepend_bos: whether it was trained on texts with BOS in front.
    """

    layout: str
    hook: str | None
    hook_out: str | None = None
    transcoder: bool = False
    architecture: str = "standard"
    norm: str = "none"
    subtract_bias: bool = False
    centered: bool = False
    k: int | None = None
    rescale: bool = False
    excluded: Excluded = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    width: int | None = None
    l0: float | None = None
    model: str | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        """Refuse entries of another type: a file is whatever somebody wrote."""
        for names, kinds in _TYPES:
            for name in names:
                value = getattr(self, name)
                if type(value) not in kinds:
                    raise TypeError(f"{name} is {value!r}")

    @property
    def declared(self) -> Declared:
        """What the file says of its SAE's training."""
        return Declared(self.model, self.width, self.l0, None, self.prepend_bos)


_TYPES = (
    (("architecture", "norm"), (str,)),
    (("hook", "hook_out", "model"), (str, type(None))),
    (("k", "width"), (int, type(None))),
    (("l0",), (float, int, type(None))),
    (("prepend_bos",), (bool, type(None))),
    (("excluded",), (tuple, str, Tokens)),
)
"""Facts → the types they may have."""


@dataclass(frozen=True)
class Origin:
    """Where a loaded dictionary comes from; ``dictionary.origin`` after loading.

    Attributes:
        layout: the library whose files these are.
        file: the weights, or the folder they lie in.
        release: sae-lens's name, for a release.
        id: the id in the release, or the folder's name.
        repo: the Hugging Face repository.
        revision: the commit the file belongs to, where the cache says so.
    """

    layout: str
    file: str
    id: str
    release: str | None = None
    repo: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.repo is None:
            return f"{self.file} ({self.layout})"
        return f"{self.release}/{self.id} ({self.repo}@{self.revision or 'unknown'}, {self.layout})"


def assemble(
    facts: Facts,
    weights: Weights,
    origin: Origin,
    *,
    name: str,
    site: Site | str | None = None,
    write_site: Site | str | None = None,
) -> SAE:
    """The SAE; a site given by the caller wins over the declared one."""
    hook = site if site is not None else facts.hook
    output = write_site if write_site is not None else facts.hook_out
    if hook is None:
        raise no_site(origin.file)
    if facts.transcoder and output is None:
        got = "a transcoder that does not say where it writes"
        cause = "a layout that leaves the output to the folder's name"
        call = 'load_sae(folder, site="mlp_norm.3", write_site="mlp_out.3")'
        raise refuse(origin.file, got, "write_site=", cause, call)
    sae = SAE(
        weights,
        architecture=facts.architecture,
        site=hook,
        write_site=output,
        norm=facts.norm,
        subtract_bias=facts.subtract_bias,
        centered=facts.centered and Site.parse(hook).kind not in _UNCENTERED,
        k=facts.k,
        rescale=facts.rescale,
        excluded=facts.excluded,
        name=name,
    )
    _require_sizes(facts, sae, origin)
    sae.origin, sae.declared = origin, facts.declared
    return sae


def _require_sizes(facts: Facts, sae: SAE, origin: Origin) -> None:
    """Refuse a configuration of other widths than the tensors: one of the two is another SAE's."""
    for name, declared in facts.sizes.items():
        held = getattr(sae, name)
        if declared is not None and declared != held:
            got = f"whose configuration has {name} = {declared!r}, and whose tensors have {held:,}"
            cause = "the configuration of another SAE, or one of two files fetched"
            raise refuse(origin.file, got, "the two to agree", cause, "fetch both files again")


def no_site(path: object) -> DictionaryError:
    """The error for a dictionary of which nothing says where it reads."""
    return DictionaryError(
        f"load_sae: `site` is not declared by {path}, wanted a hook name in the file, or site=."
        " Likely cause: a layout or a folder name that does not say where the SAE reads. Try:"
        ' load_sae(folder, site="resid_post.3"), or load_saes(parent, ids={"resid_post.3":'
        ' "subfolder"})'
    )


def refuse(path: object, got: str, wanted: str, cause: str, call: str) -> DictionaryError:
    """The error for a file that is whole, but that this library must not compute with."""
    return DictionaryError(
        f"load_sae: `folder` is {path}, {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file."""
    wanted = f"the configuration that belongs in {path.name}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        cause = "an interrupted copy, or a Git LFS pointer"
        got = f"which is not JSON ({error})"
        raise refuse(path, got, wanted, cause, "fetch the file again") from error
    if isinstance(config, dict):
        return config
    raise refuse(path, "which holds no JSON object", wanted, "another file", "check it")


def width_in(text: str) -> int | None:
    """The number of latents a path or a release name tells, or None.

    Examples:
        >>> from saefeat.loading.declaration import width_in
        >>> width_in("layer_12/width_65k/average_l0_72"), width_in("topk_width-2pow14")
        (65536, 16384)
    """
    for pattern, value in _WIDTHS:
        if match := re.search(pattern, text, re.IGNORECASE):
            return value(match[1])
    return None


def width_of(label: int | str) -> int:
    """A width as a number: 65536 or ``"65536"`` as they are, ``"65k"`` and ``"64k"`` as 65,536.

    Labels count in thousands or in 1,024s, as releases do: a label that is a power of two in
    thousands means that power.
    """
    if isinstance(label, int):
        return label
    match = re.fullmatch(r"(\d+)([km]?)", label.strip().lower())
    if match is None:
        raise DictionaryError(
            f'load_saes: `width` is {label!r}, wanted a number of latents, or a label such as "16k"'
            ' or "1m". Try: load_saes(release, width="16k")'
        )
    count, units = int(match[1]), {"": (1, 1), "k": (1000, 1024), "m": (10**6, 2**20)}
    unit, binary = units[match[2]]
    if unit == 1:
        return count
    # 65k is 2¹⁶ = 65,536, and 131k is 2¹⁷; 64k is 64 · 1,024.
    powers = [2**n for n in range(8, 31) if 2**n // unit == count]
    return powers[0] if powers else count * binary


_WIDTHS = (
    (r"width_(\d+[km])", width_of),
    (r"width-2pow(\d+)", lambda n: 2 ** int(n)),
    (r"\bw-?(\d+k)\b", width_of),
    (r"[-_](\d+k)(?:[-_/ ]|$)", width_of),
    (r"[-_](\d+)x(?:[/ ]|$)", lambda n: 4096 * int(n)),  # Llama Scope: times d_model
    (r"_ds(\d{3,})_", int),
    (r"hook_[a-z_]+_(\d{3,})\b", int),
    (r"hook_[a-z_]+_(\d{3,})(?:_|$)", int),
)


def l0_in(text: str) -> float | None:
    """The L0 a path tells (``average_l0_72``), or None."""
    match = re.search(r"(?:average_l0|l0)[_-](\d+(?:\.\d+)?)", text, re.IGNORECASE)
    return float(match[1]) if match else None


_TUNED = re.compile(r"-(it|instruct|chat|sft|dpo|base|pt)$")
_SAME = {"gpt2-small": "gpt2"}
"""TransformerLens's name → the hub's, where they are no part of each other."""


def notes(
    sae: Any, module: nn.Module, prompts: Sequence[Sequence[int]], bos: int | None
) -> tuple[str, ...]:
    """Everything in which a dictionary's declarations differ from the model and the prompts.

    Args:
        sae: the dictionary.
        module: the model.
        prompts: token ids of each prompt measured.
        bos: the id of BOS, if the tokenizer has one.
    """
    declared: Declared | None = getattr(sae, "declared", None)
    if declared is None:
        return ()
    noted = [_model_note(declared.model, module)]
    if declared.width is not None and declared.width != sae.d_sae:
        noted.append(f"declares {declared.width:,} latents and holds {sae.d_sae:,}")
    noted.append(None if bos is None else _bos_note(declared.prepend_bos, prompts, bos))
    return tuple(note for note in noted if note)


def missed(declared: Declared | None, l0: float, fvu: float) -> tuple[str, ...]:
    """What is declared of the reconstruction and missed by what was measured.

    Texts differ, so only a factor of two in the L0 and 20 points of the variance are worth a word.
    """
    found = []
    if declared is None:
        return ()
    if declared.l0 and not declared.l0 / 2 <= l0 <= declared.l0 * 2:
        found.append(f"declares an L0 of {declared.l0:g}, and {l0:.1f} latents are active here")
    if declared.explained is not None and 1 - fvu < declared.explained - 0.2:
        found.append(
            f"declares {declared.explained:.0%} of the variance explained, and explains"
            f" {1 - fvu:.0%} here"
        )
    return tuple(found)


def _model_note(declared: str | None, module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "name_or_path", "") or ""
    if not declared or not name or Path(name).is_dir():  # a folder may be called anything
        return None
    short = [text.rsplit("/", 1)[-1].lower() for text in (declared, name)]
    trained, loaded = [_SAME.get(text, text) for text in short]
    if trained == loaded:
        return None
    if _TUNED.sub("", trained) == _TUNED.sub("", loaded):
        return f"trained on {declared}, and this is {name}: one of them is tuned further"
    return f"trained on {declared}, and this model is called {name}"


def _bos_note(declared: bool | None, prompts: Sequence[Sequence[int]], bos: int) -> str | None:
    heads = [tuple(prompt[:2]) for prompt in prompts]
    twice = sum(head == (bos, bos) for head in heads)
    if twice:
        return f"{twice} of {len(heads)} prompts begin with two BOS tokens"
    without = sum(head[:1] != (bos,) for head in heads)
    if declared and without:
        return f"trained with BOS in front, and {without} of {len(heads)} prompts have none"
    if declared is False and without < len(heads):
        with_bos = len(heads) - without
        return f"trained without BOS, and {with_bos} of {len(heads)} prompts begin with it"
    return None
