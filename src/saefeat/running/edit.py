"""edit: an nnsight model that carries an intervention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..shipping.program import Carried
from ..verbs.base import Intervention
from ..verbs.lower import lower

if TYPE_CHECKING:
    from nnsight import TransformersModel


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
