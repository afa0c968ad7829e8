"""edit and hooked: an intervention that stays on a model, whoever calls the model then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import checked
from ..errors import FiringError, ModelError
from ..kernel.state import Log
from ..model.alone import alone
from ..model.modules import torch_module
from ..model.sharded import require_whole
from ..model.wrappers import chain
from ..shipping.program import Carried
from ..verbs.base import Intervention
from ..verbs.lower import lower
from .hooks import Hooks

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked
def edit(model: TransformersModel, intervention: Intervention) -> Any:
    """A copy of the model that applies the intervention to every token of every run.

    The copy shares the weights; the original is untouched. Several edits stack, in order. The copy
    is used like any nnsight model: ``trace``, ``generate``, ``session``, remotely.

    Args:
        model: an nnsight ``TransformersModel``.
        intervention: what to apply. Readings are not returned this way: use ``run`` or apply the
            probe inside the block.

    Returns:
        The edited copy.

    Raises:
        SiteError: a layer the model lacks, or a dictionary of another width.
        ModelError: an unknown family, or train mode with dropout.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edited = sf.edit(model, sf.Ablate(saes.latents({1: [0, 1]})))
        >>> with edited.trace("how do i bake bread"):
        ...     logits = nnsight.save(edited.output.logits)
        >>> logits.ndim
        3
    """
    carried = Carried(lower(intervention, model), model)
    with model.edit() as (_, edited):
        carried(edited)
    return edited


@checked(own=("model",))
@contextmanager
def hooked(model: nn.Module | TransformersModel, intervention: Intervention) -> Iterator[Log]:
    """Apply an intervention to every forward pass made inside the ``with`` block.

    A text is its key-value cache: passes given one cache go on with one text, any others begin a
    text of their own, as each call of ``generate`` does. A copy of the model that is made in the
    block is not hooked.

    Args:
        model: a Hugging Face module (an nnsight model's module is used if one is passed).
        intervention: what to apply.

    Yields:
        The log, for ``intervention.readings(log)``, of the last sequence run, and
        ``intervention.receipt(log)``, of all. Hooks are gone when the block ends, also after an
        error or Ctrl-C.

    Raises:
        SiteError: a layer the model lacks, a dictionary of another width, or a place that a
            tensor-parallel model has spread over processes.
        ModelError: an unknown family, or train mode with dropout; a forward pass that does not
            reach every site; a part of the model called alone, or by two threads at once; when
            the block ends, for logits that are not finite.
        SaefeatError: for probes, or draws by prompt, in a generation that searches beams.
        FiringError: if no forward pass was made at all: results came from somewhere else.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model, tokenizer = tiny.load("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> batch = tokenizer(["how do i bake bread"], return_tensors="pt")
        >>> probe = sf.Probe(saes.latents({1: [0]}))
        >>> with torch.no_grad(), sf.hooked(model, probe) as log:
        ...     _ = model(**batch)
        >>> probe.readings(log)[0].values.shape[0]
        1
    """
    module = torch_module(model)
    around = chain(getattr(model, "_module", model))
    program = lower(intervention, model)
    for visit in program.visits:
        require_whole(module, visit.path, visit.end)
    hooks = Hooks(around, intervention, program)
    # hooks act on whatever pass comes: a block, or a run, of another thread would be edited too
    with alone(module), ExitStack() as stack:
        hooks.put(stack)
        yield hooks.log
    if not hooks.called:
        raise FiringError(
            "hooked: `model` is never called inside the block, wanted at least one forward pass."
            " Likely cause: results from a cache, or another copy of the model was called. Try:"
            " with hooked(model, intervention): model(...)"
        )
    if hooks.broken is not None and bool(hooks.broken):
        raise ModelError(
            f"hooked: `model`, a {type(module).__name__}, gave logits inside the block that are not"
            " finite, wanted finite logits. Likely cause: a model trained in bfloat16 and run in"
            " float16, an edit whose values its dtype cannot hold, or weights with a NaN. Try: the"
            " same without the intervention, which tells the two apart; dtype=torch.bfloat16"
        )
