"""Errors that say what to do next.

Every error of the library names the function, the parameter, what came and what was wanted, the
likely cause, and the call to make. A few classes say what kind of thing is wrong, so that callers
can catch it; ``saefeat.checks`` holds the checks that many functions share.
"""

from __future__ import annotations

from .kernel.errors import SaefeatError

__all__ = [
    "CheckpointError",
    "ConvergenceWarning",
    "DictionaryError",
    "FileError",
    "FiringError",
    "GradientError",
    "InferredSitesWarning",
    "LatentError",
    "ModelError",
    "PromptError",
    "RemoteError",
    "SaefeatError",
    "SiteError",
]


class SiteError(SaefeatError):
    """A site does not exist in this model, or has another width than the dictionary.

    Examples:
        >>> try:
        ...     sf.Site.parse("blocks.3.hook_nothing")
        ... except sf.errors.SiteError as error:
        ...     "hook_resid_post" in str(error)
        True
    """


class DictionaryError(SaefeatError):
    """A dictionary's files or tensors are missing, truncated or inconsistent.

    Examples:
        >>> try:
        ...     sf.load_sae("no/such/folder")
        ... except sf.errors.DictionaryError as error:
        ...     "no/such/folder" in str(error)
        True
    """


class LatentError(SaefeatError):
    """A latent index is negative, out of range, repeated, or not whole.

    Examples:
        >>> dictionary = sf.Direction(torch.ones(4), site="resid_post.0")
        >>> try:
        ...     dictionary.latents([7])
        ... except sf.errors.LatentError as error:
        ...     "0..0" in str(error)
        True
    """


class PromptError(SaefeatError):
    """The prompts are empty, of mixed kinds, or cannot be tokenized.

    Examples:
        >>> issubclass(sf.errors.PromptError, ValueError)
        True
    """


class ModelError(SaefeatError):
    """The model is in a state in which results would be wrong (train mode, unknown family).

    Examples:
        >>> issubclass(sf.errors.ModelError, ValueError)
        True
    """


class GradientError(SaefeatError):
    """A metric without a gradient, or gradients asked for where there are none.

    Examples:
        >>> issubclass(sf.errors.GradientError, ValueError)
        True
    """


class FiringError(SaefeatError):
    """An edit that was asked for never acted on any token.

    Examples:
        >>> issubclass(sf.errors.FiringError, ValueError)
        True
    """


class CheckpointError(SaefeatError):
    """A checkpoint folder belongs to another job, or cannot be read.

    Examples:
        >>> issubclass(sf.errors.CheckpointError, ValueError)
        True
    """


class RemoteError(SaefeatError):
    """A request that must not or cannot travel, or a remote job that failed, expired or was lost.

    Examples:
        >>> issubclass(sf.errors.RemoteError, ValueError)
        True
    """


class FileError(SaefeatError):
    """A file of this library's own is broken, of another kind, too large, or from a newer version.

    Also raised for what such a file cannot hold.

    Examples:
        >>> try:
        ...     sf.load("no/such/file.safetensors")
        ... except sf.errors.FileError as error:
        ...     "no/such/file.safetensors" in str(error)
        True
    """


class ConvergenceWarning(UserWarning):
    """Integrated gradients whose error dwarfs what they are to explain: a warning, not an error.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", sf.errors.ConvergenceWarning)  # stop instead
    """


class InferredSitesWarning(UserWarning):
    """A model type of which no table tells where sites lie: they were found by running it.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", sf.errors.InferredSitesWarning)  # stop instead
    """
