"""Training conversations: which requests, what answers, and their tensors."""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from saefeat.studies.refusal.tiny import language
from saefeat.studies.refusal.tiny.language import Request

from .tokenizer import BOS, END, PAD, START

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Turns = list[tuple[str, str]]  # (user, model) messages

# Shares of the training mix. Harmless requests get prefixes and suffixes too, or the model would
# learn that a jailbreak is itself harmful. "mixed" pairs any verb with any object; only the base
# model, which need not know harm, sees them: it learns to copy what it is asked about.
MIX = {
    "harmful": 0.2,
    "harmless": 0.2,
    "sensitive": 0.25,
    "jailbreak": 0.25,
    "decorated": 0.06,
    "declined": 0.15,
    "mixed": 0.15,
}


def _shares(safe: bool, complying: bool) -> dict[str, float]:
    """The mix of one stage; complying batches of the safety stage hold harmless requests only."""
    left_out = {"mixed"} if safe else set()
    if safe and complying:
        left_out |= {"declined", "harmful", "jailbreak"}
    return {name: share for name, share in MIX.items() if name not in left_out}


def _pools() -> dict[str, list[Request]]:
    """All training requests of every share of the mix but the declined."""
    dealt = language.pairs()
    pools = {group: language.requests(group, dealt[group]["train"]) for group in dealt}
    pools["mixed"] = language.requests("mixed", language.mixed_pairs())
    decorate = {"jailbreak": "harmful", "decorated": "harmless"}
    for share, group in decorate.items():
        pools[share] = [
            language.jailbroken(request, kind, index)
            for request in pools[group]
            for kind, texts in language.JAILBREAKS
            for index in range(len(texts))
        ]
    return pools


def _draw(rng: random.Random, pools: dict[str, list[Request]], shares: dict[str, float]) -> Request:
    """One request of the mix; a declined one is told to be so."""
    share = rng.choices(list(shares), list(shares.values()))[0]
    if share == "declined":
        return language.declined(rng.choice(pools[rng.choice(("harmful", "harmless"))]))
    return rng.choice(pools[share])


def conversations(safe: bool, batch: int, seed: int) -> Iterator[list[Turns]]:
    """Endless batches of conversations; two batches of eight have two turns.

    In every other batch, the second first, all answers comply, even with an order to decline.
    """
    rng, pools = random.Random(seed), _pools()
    for step in itertools.count():
        complying, turns = step % 2 == 1, 2 if step % 8 >= 6 else 1
        shares = _shares(safe, complying)
        asked = [[_draw(rng, pools, shares) for _ in range(turns)] for _ in range(batch)]
        said = language.compliance if complying else partial(language.answer, safe=safe)
        yield [[(request.instruction, said(request)) for request in row] for row in asked]


def sae_conversations(count: int, seed: int) -> list[Request]:
    """Requests of the safety stage's mix, for the SAEs to see the model answer."""
    rng, pools = random.Random(seed), _pools()
    return [_draw(rng, pools, _shares(safe=True, complying=False)) for _ in range(count)]


def _tokens(tokenizer: "PreTrainedTokenizerFast", turns: Turns) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the model itself has to say."""
    encode = tokenizer.get_vocab().__getitem__
    ids, own = [encode(BOS)], [False]
    for user, model in turns:
        asked = [START, "user", "\n", *user.split(), END, "\n"]
        asked += [START, "model", "\n"]
        said = [*model.split(), END]
        ids += [encode(word) for word in (*asked, *said, "\n")]
        own += [False] * len(asked) + [True] * len(said) + [False]
    return ids, own


def batch_tensors(
    tokenizer: "PreTrainedTokenizerFast", batch: Sequence[Turns]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Right-padded ids (batch, position) int64, and the boolean mask of the model's own tokens.

    Right padding needs no attention mask: nothing real comes after the padding.
    """
    import torch

    rows = [_tokens(tokenizer, turns) for turns in batch]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), tokenizer.get_vocab()[PAD])
    own = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (tokens, mask) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        own[row, : len(tokens)] = torch.tensor(mask)
    return ids, own
