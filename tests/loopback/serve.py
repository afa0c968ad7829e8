"""``serve``: a server, its worker and its model's files, for as long as a ``with`` block lasts."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling import huggingface
from transformers.utils import logging

from saefeat.errors import ModelError, RemoteError

from .process import Worker
from .server import Server, listening

FAULTS = ("slow", "fail", "die", "vanish", "truncate", "expire")


@contextmanager
def serve(
    model: Any,
    *,
    sandbox: bool = False,
    fresh: bool = True,
    skeleton: bool = False,
    faults: Sequence[str | None] = (),
    dtype: str = "auto",
    device_map: str | None = None,
    version: str | None = None,
    slow: float = 4.0,
    timeout: float = 600.0,
) -> Iterator[Server]:
    """Run NDIF's own server code on this machine: to check code before queues.

    What runs a request is the released ``ndif`` package: reading it, running it on a deployment of
    the model, answering. It does so in a process of its own, on a copy of the model. The HTTP and
    websockets around it are ours, and speak as NDIF's API does; there is no Ray, Redis or object
    store. saefeat, sae_lens, transformer_lens, jaxtyping and beartype cannot be imported there. A
    request is code that runs as you, so the server listens on 127.0.0.1 only, and answers only
    those who know its ``url``, which holds a secret; do not pass it on.

    Args:
        model: the nnsight model to serve, whose weights are written to a temporary folder, or a
            folder or repository id from which the worker loads it.
        sandbox: run each block in NDIF's sandbox, as it does for ordinary keys: a process apart,
            with the model in another and every value a block reads or writes crossing between
            them. Gradients do not cross. ``Server.crossings`` counts what does. Otherwise blocks
            run beside the model, as for trusted keys.
        fresh: with a sandbox, a new process for each job, as NDIF has it; or one for all jobs,
            which saves some seconds each.
        skeleton: with a sandbox, give it the model's modules without weights, as NDIF means to. Its
            code cannot build them with nnsight 0.8.1 and transformers 5.23, so that blocks find no
            modules there: False, and what runs.
        faults: what befalls the first jobs, one each: ``"slow"`` (by ``slow`` seconds), ``"fail"``,
            ``"die"`` (the worker does), ``"vanish"`` (the server forgets the job and hangs up),
            ``"truncate"`` (half the result arrives), ``"expire"`` (no result any more), or None.
        dtype: as in ``from_pretrained``; ``"auto"`` takes the weights as they are. NDIF's own
            default is bfloat16.
        device_map: as in ``from_pretrained``; the CPU by default.
        version: the nnsight version it claims; older clients are refused. None claims the one
            installed and refuses nobody, which is NDIF's default.
        slow: seconds that a slow job takes longer.
        timeout: seconds after which a job is ended: a block may never end by itself.

    Yields:
        The ``Server``; its ``url`` is what nnsight takes as ``remote=``, and ``sf.remote.Server``.

    Raises:
        RemoteError: for an unknown fault, a timeout that is none, or without the package ndif.
        ModelError: for something that is no nnsight model with weights.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]}))
        >>> with loopback.serve(model) as server:
        ...     on = sf.remote.Server(server.url)
        ...     there = sf.run(model, ["how do i bake bread"], edits, on=on)
        >>> here = sf.run(model, ["how do i bake bread"], edits)
        >>> torch.allclose(here.logits, there.logits, atol=1e-4)
        True
    """
    require_faults(faults)
    require_possible(model, timeout)
    require_ndif()
    with tempfile.TemporaryDirectory(prefix="saefeat-") as folder, named(model):
        bound, url = listening()
        setup = {"folder": str(model), "scratch": folder, "url": url, "timeout": timeout}
        if not isinstance(model, str | Path):
            setup["folder"] = os.path.join(folder, "model")
            write(model, setup["folder"])
        setup |= {"dtype": dtype, "device_map": device_map, "sandbox": sandbox, "fresh": fresh}
        setup["skeleton"] = skeleton
        worker = Worker({**setup, "threads": torch.get_num_threads(), "slow": slow})
        server = Server(bound, url, worker, trusted=not sandbox)
        server.version = version
        server.faults += faults
        try:
            yield server
        finally:
            server.close()


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


def require_possible(model: Any, timeout: float) -> None:
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


def require_ndif() -> None:
    """Refuse to serve without the code that would.

    Raises:
        RemoteError: saying how to install it.
    """
    if importlib.util.find_spec("ndif") is None:
        call = "make test, which installs it into .venv"
        wanted, cause = "NDIF's server code (the package ndif)", "it is no dependency of saefeat"
        raise RemoteError(refusal("model", "given without a server", wanted, cause, call))


def refusal(parameter: str, got: str, wanted: str, cause: str, call: str) -> str:
    """What is wrong with an argument of ``serve``."""
    return f"serve: `{parameter}` is {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
