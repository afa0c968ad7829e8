"""What of a model a prompt must fit: its vocabulary, its positions, and ids with a meaning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import PromptError
from ..model.modules import text_config, torch_module

_LEARNED = ("wpe", "embed_positions", "position_embeddings")
"""What model families call a table of learned positions. Rotary positions have no end."""


@final
@dataclass(frozen=True)
class Limits:
    """What a model can read; None and () where that is not known.

    Attributes:
        vocabulary: rows of its embedding. A tokenizer may know more ids, or fewer.
        positions: how many positions its table of learned positions holds.
        pad: the id its configuration pads with.
        marks: ids its configuration gives a meaning: BOS, and those that end a text.
        media: ids that stand for an image, a video or a sound, which no prompt here brings along.
        new: how many tokens are to be generated behind each prompt.
    """

    vocabulary: int | None = None
    positions: int | None = None
    pad: int | None = None
    marks: tuple[int, ...] = ()
    media: tuple[int, ...] = ()
    new: int = 0


def limits_of(model: object, new: int = 0) -> Limits:
    """What a model can read, ``new`` tokens to be generated included."""
    module = torch_module(model)
    configs = [text_config(module), getattr(module, "generation_config", None)]
    return Limits(
        vocabulary=_vocabulary(module, configs[0]),
        positions=_positions(module),
        pad=next(iter(_ids(configs, ("pad",))), None),
        marks=tuple(_ids(configs, ("bos", "eos"))),
        media=tuple(_ids([getattr(module, "config", None)], ("image", "video", "audio"))),
        new=new,
    )


def require_fits(ids: Tensor, mask: Tensor, limits: Limits) -> None:
    """Refuse ids outside the vocabulary, places of images, and more tokens than positions.

    Padding has to be in the vocabulary as well: the model embeds it, and masks it only then.

    Raises:
        PromptError: naming the row.
    """
    top = limits.vocabulary
    outside = ids < 0 if top is None else (ids < 0) | (ids >= top)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        wanted = "an id from 0" if top is None else f"ids in 0..{top - 1}, the model's vocabulary"
        raise PromptError(
            f"prompts: `prompts` is id {int(ids[row, column])} in prompt {row}, wanted {wanted}."
            " Likely cause: the tokenizer of another model, tokens added without"
            " model.resize_token_embeddings, or labels in place of ids. Try: the tokenizer the"
            " model was trained with"
        )
    _require_words(ids, mask, limits.media)
    longest = mask.sum(1).max() + max(limits.new, 1) - 1  # the last new token is not fed back
    if limits.positions is not None and longest > limits.positions:
        raise PromptError(
            f"prompts: `prompts` is {int(mask.sum(1).max())} tokens at the longest, with"
            f" {limits.new} to generate, wanted at most {limits.positions} together, the positions"
            " this model has learned. Likely cause: a text meant for a model with a longer context."
            " Try: shorter prompts, or fewer max_new_tokens"
        )


def _require_words(ids: Tensor, mask: Tensor, media: tuple[int, ...]) -> None:
    """Refuse places of images and the like: without them the model reads the bare place."""
    places = torch.tensor(media, dtype=ids.dtype, device=ids.device)
    held = torch.isin(ids, places) & (mask > 0)
    if bool(held.any()):
        row, column = held.nonzero()[0].tolist()
        raise PromptError(
            f"prompts: `prompts` is id {int(ids[row, column])} in prompt {row}, which stands for an"
            " image, a video or a sound, wanted text alone. Likely cause: a processor's input_ids"
            " without its pixel_values. Try: the text without the image"
        )


def _vocabulary(module: nn.Module, config: Any) -> int | None:
    """Rows of the embedding; the configuration's number for a model that does not name one."""
    try:
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        return int(table.num_embeddings)
    except (AttributeError, NotImplementedError):
        return getattr(config, "vocab_size", None)


def _positions(module: nn.Module) -> int | None:
    """Rows of the table of learned positions, less those OPT sets apart in front (``offset``)."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in _LEARNED:
            return part.num_embeddings - int(getattr(part, "offset", 0))
    return None


def _ids(configs: Iterable[Any], names: Iterable[str]) -> Iterable[int]:
    """Token ids that configurations name."""
    for config in configs:
        for name in names:
            found = getattr(config, f"{name}_token_id", None)
            if found is None:  # older multimodal configurations say "index"
                found = getattr(config, f"{name}_token_index", None)
            listed = [found] if isinstance(found, int) else found
            yield from listed.tolist() if isinstance(listed, Tensor) else listed or ()
