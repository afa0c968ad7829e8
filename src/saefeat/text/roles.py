"""Where a chat template puts the turns of a role, as runs of ids that open and close them.

Templates differ in all but one respect: each is a program that can be run. So the runs are read
off chats rendered for the purpose, and held against them: a rule is given out only if it selects
every turn's content in every one of those chats, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..errors import PromptError
from ..kernel.tokens import between
from .chats import apply, knows

Run = tuple[int, ...]
Marks = tuple[tuple[Run, ...], tuple[Run, ...]]
"""The runs of ids one of which opens a role's turns, and those one of which closes them."""

_PLAIN = ("", " ", ""), ('"', ", ", '."'), ("(", "\n\n", ")"), ("3", "\n", "?")
_BLANK = ("\n", " ", "\n"), ("\n\n", "\n\n", "  ")
"""How contents begin, go on within, and end: what tokens could merge with a template's own."""


class _Shown(NamedTuple):
    """A rendered chat: its ids, and the role and the tokens start..stop-1 of each content.

    ``edges`` are tokens of blanks at the end of the text, and next to contents that begin or end
    with blanks: templates and tokens mix those, so that either answer is right for them.
    """

    ids: Run
    turns: tuple[tuple[str, int, int], ...]
    edges: frozenset[int]

    def gaps(self) -> Iterator[tuple[str, str, Run]]:
        """The role before, the role after ("" at an end), and the template's ids between them."""
        ends = [("", 0, 0), *self.turns, ("", len(self.ids), len(self.ids))]
        for (before, _, start), (after, stop, _) in pairwise(ends):
            yield before, after, self.ids[start:stop]


def role_markers(tokenizer: Any, role: str) -> Marks:
    """The ids that open a role's turns in the tokenizer's chat template, and those that end them.

    Returns:
        Two tuples of runs. A turn begins behind any of the first, the longest where several fit,
        and ends before any of the second.

    Raises:
        PromptError: without a chat template, for a role it does not know, and for one whose turns
            no run of ids sets apart.
    """
    if tokenizer is None:
        raise PromptError(
            f"Tokens.role: `role` is {role!r} on a model without its tokenizer, wanted a model that"
            " knows its chat template. Likely cause: a plain Hugging Face module, which has none."
            " Try: nnsight.TransformersModel(model, tokenizer=tokenizer)"
        )
    if not knows(tokenizer, role):
        raise _unknown(role, "the template does not name it")
    vocabulary = _Vocabulary(tokenizer)
    chats = list(_chats(tokenizer, vocabulary, role, _PLAIN))
    starts = _starts(vocabulary, role, chats)
    stops = _stops(vocabulary, role, chats, starts)
    marks = tuple(sorted(starts)), tuple(sorted(stops))
    for chat in (*chats, *_chats(tokenizer, vocabulary, role, _BLANK)):
        _require_exact(vocabulary, role, marks, chat)
    return marks


class _Vocabulary:
    """What of a tokenizer tells markers from words."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        self._blank: dict[int, bool] = {}

    def blank(self, token: int) -> bool:
        """Whether a token is white space alone."""
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def stripped(self, run: Run, *, left: bool = False, right: bool = False) -> Run:
        """A run without blanks at its ends: a tokenizer may merge them with those of a content."""
        while right and run and self.blank(run[-1]):
            run = run[:-1]
        while left and run and self.blank(run[0]):
            run = run[1:]
        return run


# ---------------------------------------------------------------- chats to read markers off


def _chats(
    tokenizer: Any, vocabulary: _Vocabulary, role: str, styles: Sequence[tuple[str, str, str]]
) -> Iterator[_Shown]:
    """Chats of several turns: ended, and opened for an answer; with a system turn and without."""
    base = ["user", "assistant", "user", "assistant", "user", "assistant"]
    orders = [base, ["system", *base]]
    if role == "system":
        orders = orders[::-1]  # it must be rendered
    elif role not in base:
        orders = [["user", "assistant", role, "assistant", "user", "assistant"]]
    for number, order in enumerate(orders):
        for first in range(len(styles)):
            turned = [*styles[first:], *styles[:first]]
            try:
                yield _shown(tokenizer, vocabulary, order, turned, opened=False)
                yield _shown(tokenizer, vocabulary, order[:-1], turned, opened=True)
            except PromptError as error:
                if number == 0:
                    raise _unknown(role, error) from error
                break  # a template without system turns, or one that begins with one


def _shown(
    tokenizer: Any,
    vocabulary: _Vocabulary,
    order: Sequence[str],
    styles: Sequence[tuple[str, str, str]],
    opened: bool,
) -> _Shown:
    """One chat, rendered, and which of its tokens are whose content.

    Blanks at a content's ends are not counted as its own: most templates trim them.
    """
    contents = []
    for n in range(len(order)):
        lead, within, tail = styles[n % len(styles)]
        contents.append(f"{lead}alpha{within}beta{n}omega{tail}")
    turns = [{"role": r, "content": c} for r, c in zip(order, contents, strict=True)]
    text = apply(tokenizer, turns, opened=opened)
    ids, spans = _tokenized(tokenizer, text)
    found = []
    for role, content in zip(order, contents, strict=True):
        begin = text.find(content.strip())
        if begin < 0 or text.count(content.strip()) > 1:
            raise PromptError(f"the template does not render a turn of {role!r} as it is")
        end = begin + len(content.strip())
        own = [n for n, (a, b) in enumerate(spans) if text[max(a, begin) : min(b, end)].strip()]
        found.append((role, own[0], own[-1] + 1))
    found.sort(key=lambda turn: turn[1])
    blanks = any(content != content.strip() for content in contents)
    edges = _edges(vocabulary, ids, found if blanks else [("", len(ids), len(ids))])
    return _Shown(tuple(ids), tuple(found), edges)


def _edges(
    vocabulary: _Vocabulary, ids: Sequence[int], turns: Sequence[tuple[str, int, int]]
) -> frozenset[int]:
    """Places of blanks next to these spans."""
    places: set[int] = set()
    for _, start, stop in turns:
        for place, step in ((start - 1, -1), (stop, 1)):
            while 0 <= place < len(ids) and vocabulary.blank(ids[place]):
                places.add(place)
                place += step
    return frozenset(places)


def _tokenized(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A rendered text's ids, and the characters of each; by decoding where nobody says."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], [(a, b) for a, b in found["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
    if tokenizer.decode(ids) != text:
        raise PromptError("the tokenizer does not say which characters a token stands for")
    return ids, list(pairwise(ends))


# ---------------------------------------------------------------- the markers


def _starts(vocabulary: _Vocabulary, role: str, chats: Sequence[_Shown]) -> set[Run]:
    """The runs behind which the role's turns begin.

    Each is the end of what the template writes before such a turn, from an added token on that
    sets it apart from other roles' turns; where none does, all of it. Short ones come first: a
    thinking template writes its usual opening, and more behind it, before the last turn.
    """
    gaps = {gap for chat in chats for gap in chat.gaps()}
    others = {vocabulary.stripped(g, right=True) for _, after, g in gaps if after not in ("", role)}
    own = {gap for _, after, gap in gaps if after == role}
    if role == "assistant":  # an answer yet to come begins as one that is there
        own |= {g for before, after, g in gaps if not after and before == "user" and g}
    starts: list[Run] = []
    for gap in sorted(own, key=lambda g: (len(g), g)):
        within = [p for run in starts for p in _places(gap, run)]
        if within:
            run = gap[min(within) :]
        else:
            added = [n for n, token in enumerate(gap) if token in vocabulary.added]
            whole = vocabulary.stripped(gap, left=True)
            apart = [gap[n:] for n in reversed(added)] + [whole]
            clear = [run for run in apart if _sets_apart(vocabulary, run, others)]
            if not clear:
                raise _unclear(role, "begin with what other roles' turns begin with")
            run = clear[0]
        starts.append(run)
    return {run for start in starts for run in (start, vocabulary.stripped(start, right=True))}


def _sets_apart(vocabulary: _Vocabulary, run: Run, others: set[Run]) -> bool:
    """Whether a run has more than blanks, and no other role's turn begins behind it."""
    seen = vocabulary.stripped(run, right=True)
    return bool(seen) and not any(other[-len(seen) :] == seen for other in others)


def _stops(
    vocabulary: _Vocabulary, role: str, chats: Sequence[_Shown], starts: set[Run]
) -> set[Run]:
    """The runs before which the role's turns end.

    Each is the start of what the template writes behind such a turn, up to an added token. Where a
    role's opening is only the first part of another's (Llama 2 writes the system's text within the
    user's turn), the rest of the other's closes it.
    """
    gaps = sorted({gap for chat in chats for gap in chat.gaps()})
    stops = {run for before, _, gap in gaps if before == role for run in _ending(vocabulary, gap)}
    for _, after, gap in gaps:
        opened = [p + len(run) for run in starts for p in _places(gap, run)]
        if opened and after not in ("", role):
            behind = gap[max(opened) :]
            if not any(_places(behind, stop) for stop in stops):
                stops |= set(_ending(vocabulary, behind))
    if not stops:
        raise _unclear(role, "have no end that the template writes")
    return stops


def _ending(vocabulary: _Vocabulary, behind: Run) -> list[Run]:
    """What closes a turn, of all that stands behind it: with the blanks before it and without."""
    added = next((n + 1 for n, t in enumerate(behind) if t in vocabulary.added), len(behind))
    run = vocabulary.stripped(behind[:added], right=True)
    return [stop for stop in (run, vocabulary.stripped(run, left=True)) if stop]


def _places(ids: Run, run: Run) -> list[int]:
    """Where a run of ids begins within others."""
    return [n for n in range(len(ids) - len(run) + 1) if ids[n : n + len(run)] == run]


def _require_exact(vocabulary: _Vocabulary, role: str, marks: Marks, chat: _Shown) -> None:
    """Refuse markers that select anything but the role's contents in a chat."""
    found = between(torch.tensor([chat.ids]), *marks)[0].tolist()
    spans = [(start, stop) for own, start, stop in chat.turns if own == role]
    # A default system text is the template's, and stands where a system turn would.
    from_place = chat.turns[0][1] if role == "system" and not spans else 0
    for place, chosen in enumerate(found):
        wanted = any(start <= place < stop for start, stop in spans)
        if chosen != wanted and place not in chat.edges and place >= from_place:
            what = vocabulary.tokenizer.decode(chat.ids[place])
            missed = "miss" if wanted else "also take"
            raise _unclear(role, f"cannot be told by ids alone: they would {missed} {what!r}")


def _unclear(role: str, why: str) -> PromptError:
    return PromptError(
        f"Tokens.role: `role` is {role!r}, whose turns {why}, wanted turns that the tokenizer's"
        " chat template opens and closes with tokens of their own. Likely cause: a template that"
        " writes one role's text within another's turn, or without markers. Try: Tokens.ids(...),"
        " or Tokens.where(function) with positions from the prompt's own tokens"
    )


def _unknown(role: str, error: object) -> PromptError:
    return PromptError(
        f"Tokens.role: `role` is {role!r}, which cannot be rendered ({error}), wanted a role of"
        " the tokenizer's chat template. Likely cause: a base model without a template, or a"
        " template without this role. Try: Tokens.ids(...) or Tokens.where(...) for texts that"
        " are not chats"
    )
