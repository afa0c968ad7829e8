"""``serve``: a server, its worker and its model's files, for as long as a ``with`` block lasts."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnsight import __version__ as NNSIGHT
from nnsight.modeling import huggingface
from transformers.utils import logging

from saefeat.errors import ModelError, RemoteError

from .process import Worker
from .server import Server

FAULTS = ("slow", "fail", "die", "vanish", "truncate", "expire")


@contextmanager
def serve(
    model: Any,
    *,
    copies: bool = False,
    faults: Sequence[str | None] = (),
    dtype: str = "auto",
    device_map: str | None = None,
    version: str = NNSIGHT,
    slow: float = 1.0,
    timeout: float = 600.0,
) -> Iterator[Server]:
    """Run a server on this machine that treats requests as NDIF does: to check code before queues.

    Jobs run one after another in a process of their own, on a copy of the model, with nnsight,
    torch and transformers alone: saefeat, sae_lens, transformer_lens, jaxtyping and beartype cannot
    be imported there. A request is code that runs as you, so the server listens on 127.0.0.1 only,
    and answers only those who know its ``url``, which holds a secret; do not pass it on.

    Args:
        model: the nnsight model to serve, whose weights are written to a temporary folder, or a
            folder or repository id from which the worker loads it.
        copies: run each block in a fresh process of its own, with the model in another and every
            value a block reads or writes crossing between them, as NDIF does for ordinary keys.
            Gradients do not cross. ``Server.crossings`` counts what does. Needs ``os.fork``.
        faults: what befalls the first jobs, one each: ``"slow"`` (by ``slow`` seconds), ``"fail"``,
            ``"die"`` (the worker does), ``"vanish"`` (the server forgets the job and hangs up),
            ``"truncate"`` (half the result arrives), ``"expire"`` (no result any more), or None.
        dtype: as in ``from_pretrained``; ``"auto"`` takes the weights as they are.
        device_map: as in ``from_pretrained``.
        version: the nnsight version it claims; clients of another one are refused.
        slow: seconds that a slow job takes longer.
        timeout: seconds after which a job is ended: a block may never end by itself.

    Yields:
        The ``Server``; pass its ``url`` as ``remote=``.

    Raises:
        RemoteError: for an unknown fault, a timeout that is none, or where blocks cannot have
            processes of their own.
        ModelError: for something that is no nnsight model with weights.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]}))
        >>> with loopback.serve(model) as server:
        ...     there = sf.run(model, ["how do i bake bread"], edits, remote=server.url)
        >>> here = sf.run(model, ["how do i bake bread"], edits)
        >>> torch.allclose(here.logits, there.logits, atol=1e-4)
        True
    """
    require_faults(faults)
    require_possible(model, copies, timeout)
    with tempfile.TemporaryDirectory(prefix="saefeat-") as folder, named(model):
        if not isinstance(model, str | Path):
            write(model, folder)
        where = str(model) if isinstance(model, str | Path) else folder
        setup = {"folder": where, "dtype": dtype, "device_map": device_map, "copies": copies}
        worker = Worker({**setup, "threads": torch.get_num_threads()}, timeout)
        server = Server(worker, version=version, slow=slow)
        server.faults += faults
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.close()
            thread.join()


def write(model: Any, folder: str) -> None:
    """The model and its tokenizer in Hugging Face format, without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model._module.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


@contextmanager
def named(model: Any) -> Iterator[None]:
    """Let nnsight name the model in a request without asking the Hub.

    Its key holds the repository's id as the Hub spells it, looked up once in a process and kept in
    a table of nnsight's; a model in memory or in a folder has no entry there.
    """
    name = str(model) if isinstance(model, str | Path) else model.repo_id
    known = huggingface._ID_CACHE
    before = known.get(name)
    known[name] = before or name or "in memory"
    try:
        yield
    finally:
        if before is None:
            known.pop(name, None)


def require_faults(faults: Sequence[str | None]) -> None:
    """Refuse faults that do not exist.

    Raises:
        RemoteError: naming those that do.
    """
    unknown = [fault for fault in faults if fault is not None and fault not in FAULTS]
    if unknown:
        wanted, call = "one of " + ", ".join(FAULTS), 'serve(model, faults=["fail"])'
        raise RemoteError(refusal("faults", repr(unknown[0]), wanted, "a typing error", call))


def require_possible(model: Any, copies: bool, timeout: float) -> None:
    """Refuse what cannot be served.

    Raises:
        ModelError, RemoteError: saying why.
    """
    call = 'serve(TransformersModel(model, tokenizer=tokenizer, task="text-generation"))'
    if not isinstance(model, str | Path):
        module: Any = getattr(model, "_module", None)
        if not hasattr(module, "save_pretrained"):
            got, cause = f"a {type(model).__name__}", "a Hugging Face model that was not wrapped"
            raise ModelError(refusal("model", got, "an nnsight model or a folder", cause, call))
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            cause = "nnsight loads a name's weights at the first trace"
            call = "TransformersModel(..., dispatch=True), or serve(folder)"
            raise ModelError(refusal("model", "without weights", "one with them", cause, call))
    if not timeout > 0:
        wanted, call = "more than 0 seconds", "serve(model, timeout=60)"
        raise RemoteError(refusal("timeout", str(timeout), wanted, "a typing error", call))
    if copies and not hasattr(os, "fork"):
        wanted, cause = "copies=False on this system", "no os.fork, which gives blocks processes"
        raise RemoteError(refusal("copies", "True", wanted, cause, "serve(model)"))


def refusal(parameter: str, got: str, wanted: str, cause: str, call: str) -> str:
    """What is wrong with an argument of ``serve``."""
    return f"serve: `{parameter}` is {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
