"""preflight: what a remote run would send, before anything is queued."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import CONFIG
from nnsight import __version__ as NNSIGHT
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from ..errors import RemoteError, explain
from ..kernel.tokens import select, window
from ..prompts import Prompts, encode_prompts, split
from ..sites import torch_module
from ..verbs.base import Chain, Intervention, by_prompt, require_rows
from ..verbs.lower import lower
from ..verbs.steps import numbered
from ..verbs.travel import narrowed
from .batch import backend_of, remote_batch

PAYLOAD_LIMIT = 64 << 20
"""Bytes a batch's request may have, 64 MiB: some twelve times what 20 latents at 26 sites need."""

SERVER_HAS = ("torch", "nnsight", "transformers", "numpy", "accelerate", "einops", "cloudpickle")


@dataclass(frozen=True)
class Preflight:
    """What a remote run would send; printed, it is a table.

    Attributes:
        payload: bytes of the first batch's request as sent, compressed.
        parts: bytes before compression: each place's tensors, the inputs, the code.
        strangers: modules named by reference that a server does not have: the run would fail there.
        batches: how many requests the run makes.
        parks: how often a forward pass stops to hand a value over, each a round trip there.
        passes: forward passes a batch, at most.
        tokens: for each step, how many prompt tokens of the first batch its token rule selects (a
            condition may leave fewer).
        result: bytes of the first batch's result, at most, before compression.
        dtypes: of the tensors sent.
        device: where the model is here; ``"meta"`` if its weights are not loaded.
        nnsight: the version here and the server's, None if it was not asked or did not answer.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> report = sf.preflight(model, ["hello"], sf.Ablate(saes.latents({1: [3, 4]})))
        >>> report.parks, report.strangers
        (3, ())
    """

    payload: int
    parts: dict[str, int]
    strangers: tuple[str, ...]
    batches: int
    parks: int
    passes: int
    tokens: tuple[tuple[str, int], ...]
    result: int
    dtypes: tuple[str, ...]
    device: str
    nnsight: tuple[str, str | None]

    def __str__(self) -> str:
        here, there = self.nnsight
        shown = [
            ("payload", f"{self.payload:,} bytes a batch, {self.batches} in all"),
            *((f"  {name}", f"{size:,} bytes") for name, size in self.parts.items()),
            ("result", f"at most {self.result:,} bytes a batch"),
            ("parks", f"{self.parks} a forward pass, at most {self.passes} passes"),
            ("dtype", ", ".join(self.dtypes) or "no tensors"),
            ("model here", self.device),
            ("nnsight", f"{here} here, {there or 'unknown'} there"),
            ("would fail", ", ".join(self.strangers) or "nothing"),
            *((f"  {step}", f"{count} prompt tokens selected") for step, count in self.tokens),
        ]
        width = min(40, max(len(name) for name, _ in shown))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in shown)


def preflight(
    model: Any,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    remote: bool | str = False,
) -> Preflight:
    """Build the request of a remote run, look at it, and send nothing.

    The request is the real one, made by nnsight and taken apart again here, so that what it names
    by reference is known. The model needs no weights.

    Args:
        model: an nnsight ``TransformersModel``, loaded or not.
        prompts: as in ``run``.
        intervention: as in ``run``.
        max_new_tokens: as in ``run``.
        batch_size: as in ``run``.
        dtype: as in ``run``.
        remote: True or a URL to ask that server for its nnsight version; False asks nobody.

    Returns:
        A ``Preflight``.

    Raises:
        SiteError, ModelError, PromptError, LatentError: as ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> sf.preflight(model, ["hello", "hello"], batch_size=1).batches
        2
    """
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    batches = split(encoded, batch_size)
    rows = slice(0, len(batches[0]["input_ids"])) if by_prompt(chosen) else slice(None)
    program = narrowed(lower(chosen, model, rows), dtype)
    raw = captured(model, program, batches[0], max_new_tokens)
    parts = {f"{v['path']}.{v['end']}": weight(v["actions"]) for v in program["visits"]}
    parts["inputs"] = weight(list(batches[0].values()))
    parts["code"] = len(raw) - sum(parts.values())
    return Preflight(
        payload=compressed(raw),
        parts=parts,
        strangers=strangers(model, raw),
        batches=len(batches),
        parks=parks(program),
        passes=max(max_new_tokens, 1),
        tokens=expected(chosen, program, batches[0]),
        result=result_size(model, chosen, program, batches[0], max_new_tokens),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors(program)})),
        device=str(torch_module(model).device),  # type: ignore[union-attr]
        nnsight=(NNSIGHT, server_version(model, remote)),
    )


def require_light(report: Preflight, limit: int) -> None:
    """Refuse a request that would fail, or is larger than wanted.

    Raises:
        RemoteError: naming the module, or the largest part.
    """
    if report.strangers:
        raise RemoteError(
            explain(
                "run",
                "intervention",
                got=f"in need of {', '.join(report.strangers)}",
                wanted="nothing but torch, nnsight and what travels as source",
                cause="a function of a Generic dictionary, or of Tokens.where, that uses an"
                " installed package",
                call='nnsight.register("the_package"), if it is plain Python, or plain torch',
            )
        )
    if report.payload > limit:
        largest = max(report.parts, key=lambda name: report.parts[name])
        raise RemoteError(
            explain(
                "run",
                "payload_limit",
                got=f"{limit:,} bytes, and the request has {report.payload:,}",
                wanted=f"at least that; {largest} alone is {report.parts[largest]:,}",
                cause="a topk dictionary or an error term, which need all of a dictionary, or too"
                " many latents",
                call="dtype=torch.bfloat16, fewer latents, or a higher payload_limit",
            )
        )


class Capture(Backend):
    """Keeps the request instead of sending it."""

    raw = b""

    def __call__(self, tracer: Any) -> None:
        self.raw = RequestModel.serialize(tracer)


def captured(model: Any, program: dict[str, Any], batch: dict[str, Tensor], new: int) -> bytes:
    """A batch's request, before compression."""
    backend = Capture()
    remote_batch(model, program, batch, new, backend=backend)
    return backend.raw


def compressed(raw: bytes) -> int:
    """Bytes of a request as nnsight sends it."""
    import zstandard  # as late as nnsight imports it

    return len(zstandard.ZstdCompressor(level=6).compress(raw)) if CONFIG.API.COMPRESS else len(raw)


class Inspector(CustomCloudUnpickler):
    """Rebuilds a request and notes the modules that it takes from where it runs."""

    def find_class(self, module: str, name: str, /) -> Any:
        named = self.persistent_objects["saefeat"]
        named.add(module)
        found = super().find_class(module, name)
        if name != "subimport":
            return found
        return lambda wanted: named.add(wanted) or found(wanted)


def strangers(model: Any, raw: bytes) -> tuple[str, ...]:
    """Modules that a request names and a server does not have."""
    named: set[str] = set()
    objects = {**model._remoteable_persistent_objects(), "saefeat": named}
    RequestModel.deserialize(raw, objects, unpickler=Inspector)
    roots = {name.partition(".")[0] for name in named}
    return tuple(sorted(roots - set(SERVER_HAS) - set(sys.stdlib_module_names)))


def tensors(data: Any) -> Iterator[Tensor]:
    """Every tensor in nested plain data."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, dict):
        yield from (t for value in data.values() for t in tensors(value))
    elif isinstance(data, (list, tuple)):
        yield from (t for value in data for t in tensors(value))


def weight(data: Any) -> int:
    """Bytes of every tensor's storage in nested plain data, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(data)}
    return sum(storage.nbytes() for storage in storages.values())


def parks(program: dict[str, Any]) -> int:
    """How often a forward pass hands a value to the block or takes one: inputs, reads, writes."""
    writes = sum(any(a["do"] == "write" for a in v["actions"]) for v in program["visits"])
    return 1 + len(program["visits"]) + writes


def expected(
    intervention: Intervention, program: dict[str, Any], batch: dict[str, Tensor]
) -> tuple[tuple[str, int], ...]:
    """For each step, how many prompt tokens its rule selects."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shape = (ids.shape[0], ids.shape[1])
    view = window(ids, mask, shape, 0, None, program["ends"])
    actions = [action for visit in program["visits"] for action in visit["actions"]]
    rules = {action["id"]: action["rule"] for action in actions if "rule" in action}
    return tuple(
        (repr(step), max(int(select(rules[n], view).sum()) for n in numbers))
        for step, numbers in numbered(intervention.parts())
    )


def result_size(
    model: Any,
    intervention: Intervention,
    program: dict[str, Any],
    batch: dict[str, Tensor],
    new: int,
) -> int:
    """Bytes that come back: readings, one row of logits a prompt, token ids."""
    module: Any = torch_module(model)
    rows, columns = batch["input_ids"].shape
    counts = [count for _, count in expected(intervention, program, batch)]
    total = rows * module.config.get_text_config().vocab_size * module.dtype.itemsize
    for step, selected in zip(intervention.parts(), counts, strict=True):
        if step.change is None:
            kept = rows if step.reduction else selected + rows * max(new - 1, 0)
            total += 4 * kept * len(step.latents) + rows * (columns + new)
    return total + 8 * rows * (columns + new)


def server_version(model: Any, remote: bool | str) -> str | None:
    """The nnsight that a server runs, or None."""
    if not remote or remote == "local":
        return None
    import httpx  # as late as nnsight imports it

    try:
        answer = httpx.get(f"{backend_of(model, remote).host}/env", timeout=10.0)
        return answer.raise_for_status().json()["packages"].get("nnsight")
    except (httpx.HTTPError, ValueError, KeyError):
        return None
