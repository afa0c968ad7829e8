"""Chats: messages checked, rendered by the tokenizer's template, and made into ids.

A template is a program of the model's publisher. It may drop what it does not know, trim what it
does, or fail in its own words. So a chat is held against what was rendered of it: everything it
says must make a difference, and a turn to be continued must stand at the end as it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ..errors import PromptError

ANSWERS = ("assistant", "model")
"""What templates call the turns that the model itself wrote."""

_ROLES = ("system", "developer", "user", "tool", "function", *ANSWERS)

Turn = dict[str, Any]
_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def is_chat(prompt: object) -> bool:
    """A sequence of mappings, whatever they hold."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(turn, Mapping) for turn in prompt)
    )


def chat_ids(tokenizer: Any, chat: Sequence[Mapping[str, Any]]) -> list[int]:
    """A chat's ids, up to where the assistant's answer begins, or goes on.

    A last turn of the assistant is continued: it is neither closed nor followed by a second one.

    Raises:
        PromptError: for a chat the template cannot render, or would render without part of it.
    """
    turns = _as_read(tokenizer, [_turn(tokenizer, n, turn) for n, turn in enumerate(chat)])
    if turns[-1]["role"] not in ANSWERS:
        return _opened(tokenizer, turns)
    if len(turns) > 1 and not _text(turns[-1]) and set(turns[-1]) == {"role", "content"}:
        return _opened(tokenizer, turns[:-1])  # nothing is said yet
    return _continued(tokenizer, turns)


def knows(tokenizer: Any, role: object) -> bool:
    """Whether a role is a usual one, or named in the template. Many templates write any word."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return isinstance(role, str) and (role in _ROLES or (bool(role) and role in template))


def apply(tokenizer: Any, turns: Sequence[Turn], *, tokenize: bool = False, opened: bool) -> Any:
    """The template's text, or its ids; ``opened``: with the start of the assistant's turn.

    Raises:
        PromptError: with the template's own words, whatever kind of error it has.
    """
    options = {"add_generation_prompt": opened, "tokenize": tokenize}
    try:
        if tokenize:
            options["return_dict"] = False
        return tokenizer.apply_chat_template([dict(turn) for turn in turns], **options)
    # A template is code: it indexes, adds and compares whatever a message holds.
    except (
        TemplateError,
        ArithmeticError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        cause = "a role, an order of turns or a content that this template does not know"
        call = "turns of user and assistant in turn, with contents of text"
        if not getattr(tokenizer, "chat_template", None):
            cause = "a base model, which has no chat template"
            call = "the text itself as a string, or tokenizer.chat_template = ..."
        raise PromptError(
            f"prompts: `prompts` is a chat that cannot be rendered ({error!s:.200}), wanted turns"
            f" that the tokenizer's chat template renders. Likely cause: {cause}. Try: {call}"
        ) from error


def _turn(tokenizer: Any, number: int, turn: Mapping[str, Any]) -> Turn:
    """One message, its content as one text; keys without a value are left out."""
    found = {str(key): value for key, value in turn.items() if value is not None}
    role, content = found.get("role"), found.get("content")
    if not knows(tokenizer, role):
        raise _unfit(number, f"of role {role!r}", "a role such as 'user' or 'assistant'")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        kinds = {part.get("type", "text") for part in content if isinstance(part, Mapping)}
        if not parts or kinds != {"text"} or not all(isinstance(text, str) for text in parts):
            raise _unfit(number, f"of content {content!r:.60}", "text, or parts that are all text")
        content = found["content"] = "".join(map(str, parts))
    if content is None and "tool_calls" in found:
        found["content"] = ""  # as templates read a turn that only calls
    elif not isinstance(content, str):
        raise _unfit(number, f"of content {content!r:.60}", "a text under 'content'")
    return found


def _as_read(tokenizer: Any, turns: list[Turn]) -> list[Turn]:
    """The turns as this template reads them, contents as texts or as lists of one part.

    Templates of multimodal models may read parts alone; given a text they take its letters.

    Raises:
        PromptError: for a turn, or a key of one, that makes no difference to what is rendered.
    """
    texts = [turn["content"].strip() for turn in turns]
    parted = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    whole = (form for form in (turns, parted) if _holds(tokenizer, form, texts))
    form = next(whole, turns)
    shown = apply(tokenizer, form, opened=False)
    for number, turn in enumerate(form):
        others = [key for key in turn if key not in ("role", "content")]
        if texts[number] not in shown:  # a thinking template cuts thoughts; that is its right
            others.append("content")
        for key in others:
            _require_read(tokenizer, form, number, key, shown)
    return form


def _holds(tokenizer: Any, turns: list[Turn], texts: list[str]) -> bool:
    """Whether the template renders these turns, with every text in it."""
    try:
        shown = apply(tokenizer, turns, opened=False)
    except PromptError:
        return False
    return all(text in shown for text in texts)


def _require_read(tokenizer: Any, turns: list[Turn], number: int, key: str, shown: str) -> None:
    """Refuse a key of a turn that is rendered the same without it: the model is not told of it."""
    turn = {name: value for name, value in turns[number].items() if name != key}
    if key == "content":
        turn["content"] = "other"
    others = [*turns[:number], turn, *turns[number + 1 :]]
    try:
        without = apply(tokenizer, others, opened=False)
    except PromptError:
        return  # the template cannot do without it
    if without == shown:
        wanted = "what the tokenizer's chat template reads"
        raise _unfit(number, f"with {key!r}, which the template leaves out", wanted)


def _opened(tokenizer: Any, turns: list[Turn]) -> list[int]:
    """Ids up to where the assistant's answer begins.

    Some templates know no ``add_generation_prompt``; some write nothing before an answer. Which of
    the two it is shows in an answer that is there.
    """
    shown = apply(tokenizer, turns, opened=True)
    if shown == apply(tokenizer, turns, opened=False):
        mark = _mark(turns)
        try:
            answer = {"role": "assistant", "content": _with(turns[-1], mark)["content"]}
            opening = _behind(shown, _cut(tokenizer, [*turns, answer], mark))
        except PromptError:  # an answer cannot stand here; so there is nothing to compare with
            opening = ""
        if opening:
            wanted = f"a template that opens the answer with {opening[:40]!r} when asked to"
            raise _unfit(len(turns) - 1, "behind which the template opens no answer", wanted)
    return apply(tokenizer, turns, tokenize=True, opened=True)


def _continued(tokenizer: Any, turns: list[Turn]) -> list[int]:
    """Ids up to the end of the last turn's content, which is not closed.

    The template renders it with a mark behind, and is cut there. It must open the turn as it opens
    any other and keep the content as it is; both are compared.
    """
    *before, last = turns
    if last.get("tool_calls"):
        wanted = "the tool's answer behind it"
        raise _unfit(len(before), "that calls a tool, and none behind it", wanted)
    content, mark = _text(last), _mark(turns)
    opening = _cut(tokenizer, [*before, _with(last, mark)], mark)
    text = _cut(tokenizer, [*before, _with(last, content + mark)], mark)
    added = _behind(_start(tokenizer, before), opening).split()
    if text != opening + content or (added and added[0] in content):
        raise _unfit(
            len(before),
            f"of content {content!r:.60}, which the template renders as {text[-80:]!r}",
            "an assistant's turn that it renders as it is, so that it can be continued",
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _start(tokenizer: Any, before: list[Turn]) -> str:
    """What a template writes before an answer is there, where it can."""
    try:
        return apply(tokenizer, before, opened=True)
    except PromptError:  # a chat that begins with the assistant has nothing before it
        return ""


def _behind(start: str, text: str) -> str:
    """What a text adds to its start, blanks aside; nothing where it has another start."""
    return text[len(start) :].strip() if start and text.startswith(start) else ""


def _mark(turns: list[Turn]) -> str:
    """A word that no turn holds."""
    mark = "turnmark"
    while any(mark in _text(turn) for turn in turns):
        mark += "s"
    return mark


def _text(turn: Turn) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else content[0]["text"]


def _with(turn: Turn, text: str) -> Turn:
    plain = isinstance(turn["content"], str)
    return turn | {"content": text if plain else [{"type": "text", "text": text}]}


def _cut(tokenizer: Any, turns: list[Turn], mark: str) -> str:
    """What is rendered before the mark; everything where the template drops it."""
    return apply(tokenizer, turns, opened=False).rpartition(mark)[0]


def _unfit(number: int, got: str, wanted: str) -> PromptError:
    return PromptError(
        f"prompts: `prompts` is a chat with message {number} {got}, wanted {wanted}. Likely cause:"
        " a message of another model's form, or a key meant for other software. Try:"
        ' {"role": "user", "content": "text"} for each message, or the rendered text as a string'
    )
