"""A name for a model that the Hub does not list, or that nobody should ask it for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nnsight.modeling import huggingface

from ..arguments import checked
from ..errors import RemoteError

if TYPE_CHECKING:
    from nnsight import TransformersModel

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


@checked
def named(
    model: TransformersModel, repository: str, revision: str | None = None
) -> TransformersModel:
    """Say under which name servers know a model, without asking the Hub.

    nnsight names a model in a request by its repository, spelled as the Hub spells it: it asks the
    Hub once, which fails without a network, for a private repository and for a model in memory.

    Args:
        model: an nnsight ``TransformersModel``; its name is changed, nothing else.
        repository: the model's name as the server has it, such as "organization/model", or the
            folder from which a server of your own has loaded it.
        revision: the revision that was deployed, None for the repository's own default.

    Returns:
        The same model.

    Raises:
        RemoteError: for something that is no such name.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.remote.named(tiny.model("chat"), "my-lab/tiny-chat")
        >>> "my-lab/tiny-chat" in model.to_model_key()
        True
    """
    folder = repository.startswith("/") and repository.isprintable() and len(repository) < 4096
    if not (folder or _ID.fullmatch(repository)) or ".." in repository.split("/"):
        raise RemoteError(
            f"named: `repository` is {repository!r:.100}, wanted an id such as"
            ' "organization/model", or a whole path from /. Likely cause: a server\'s address, or a'
            " typing error. Try: the name under which the model was deployed, as nnsight.status()"
            " lists it"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise RemoteError(
            f"named: `revision` is {revision!r:.100}, wanted a branch, a tag or a commit, or None"
            " for the repository's own default. Try: revision=None"
        )
    model.repo_id, model.revision = repository, revision
    # nnsight (0.8.1) keeps what the Hub has told it here, and has no other way to be told
    huggingface._ID_CACHE[repository] = repository
    return model
