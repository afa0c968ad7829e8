"""Prompts of every kind become one left-padded batch, with exactly the tokens they should have."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from helpers import BOS, PAD, batch_of, build, tokenizer, transformers_model, wrapped
from saefeat.text.prompts import split

W1, W2, W3 = 5, 6, 7  # <pad> <eos> <bos> <unk> w0 w1 ...
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


@pytest.fixture
def words():
    """A tokenizer with a chat template, that puts BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    found = copy.deepcopy(tokenizer())
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    found.chat_template = TEMPLATE
    return found


def rows(batch) -> list[list[int]]:
    """Real tokens of each row; padding must be on the left."""
    for mask in batch["attention_mask"].tolist():
        assert mask == sorted(mask)
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def chat(*turns):
    return [{"role": "user", "content": turn} for turn in turns]


def test_one_string_and_many(words):
    assert rows(sf.text.prompts.encode_prompts(words, "w1 w2")) == [[BOS, W1, W2]]
    batch = sf.text.prompts.encode_prompts(words, ["w1", "w1 w2 w3", "w2 w3"])
    assert rows(batch) == [[BOS, W1], [BOS, W1, W2, W3], [BOS, W2, W3]]
    assert batch["input_ids"].tolist()[0] == [PAD, PAD, BOS, W1]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4)
    assert batch["input_ids"].dtype == torch.long
    assert rows(sf.text.prompts.encode_prompts(words, ("w1", "w2"))) == [[BOS, W1], [BOS, W2]]


def test_a_string_is_one_prompt_not_its_letters(words):
    assert len(sf.text.prompts.encode_prompts(words, "w1 w2 w3")["input_ids"]) == 1


def test_bos_is_never_doubled(words):
    """A rendered chat template holds BOS already, and tokenizing it again adds a second one."""
    text = words.apply_chat_template(chat("w1"), tokenize=False, add_generation_prompt=True)
    assert words(text)["input_ids"][:2] == [BOS, BOS], "the trap is there"
    ids = rows(sf.text.prompts.encode_prompts(words, [text, chat("w1"), "w1"]))
    assert ids[0] == ids[1] and ids[0].count(BOS) == 1
    assert ids[2] == [BOS, W1]


def test_chats(words):
    """One chat or many; the generation prompt is added."""
    one = rows(sf.text.prompts.encode_prompts(words, chat("w1 w2")))
    assert len(one) == 1 and one[0][0] == BOS and one[0].count(BOS) == 1
    bare = words.apply_chat_template(chat("w1 w2"), add_generation_prompt=False, return_dict=False)
    assert len(one[0]) == len(bare) + 1
    two = rows(sf.text.prompts.encode_prompts(words, [chat("w1 w2"), chat("w3", "w1", "w2")]))
    assert two[0] == one[0] and len(two[1]) == 8
    assert rows(sf.text.prompts.encode_prompts(words, tuple(chat("w1 w2")))) == one


def test_ids(words):
    assert rows(sf.text.prompts.encode_prompts(None, [W1, W2])) == [[W1, W2]]
    assert rows(sf.text.prompts.encode_prompts(None, [[W1], [W1, W2]])) == [[W1], [W1, W2]]
    assert rows(sf.text.prompts.encode_prompts(words, [torch.tensor([W1, W2]), (W3,)])) == [
        [W1, W2],
        [W3],
    ]
    assert rows(sf.text.prompts.encode_prompts(words, [[BOS, W1], [W1]])) == [[BOS, W1], [W1]], (
        "as they are"
    )
    out = sf.run(wrapped(build("llama")), [[W1, W2], [W3]], max_new_tokens=1)
    again = sf.run(wrapped(build("llama")), out.prompts)
    assert again.prompts == out.prompts == ((W1, W2), (W3,))


def test_tensors_and_mappings(words):
    batch = batch_of()
    for prompts in (batch, words.__class__.__mro__ and dict(batch)):
        found = sf.text.prompts.encode_prompts(None, prompts)
        assert torch.equal(found["input_ids"], batch["input_ids"])
        assert torch.equal(found["attention_mask"], batch["attention_mask"])
    ids = torch.tensor([[W1, W2], [W2, W3]])
    found = sf.text.prompts.encode_prompts(None, ids)
    assert torch.equal(found["input_ids"], ids) and found["attention_mask"].all()
    words.padding_side = "left"
    encoded = words(["w1", "w1 w2"], return_tensors="pt", padding=True)
    assert rows(sf.text.prompts.encode_prompts(None, encoded)) == [[BOS, W1], [BOS, W1, W2]]


def test_right_padding_is_refused(words):
    """padding_side changed: the last column is no longer each row's last token."""
    words.padding_side = "right"
    encoded = words(["w1", "w1 w2"], return_tensors="pt", padding=True)
    assert encoded["attention_mask"][0, -1] == 0
    with pytest.raises(sf.errors.PromptError, match="padding_side = 'left'"):
        sf.text.prompts.encode_prompts(words, encoded)
    # strings are padded by saefeat itself, whatever the tokenizer is set to
    assert rows(sf.text.prompts.encode_prompts(words, ["w1", "w1 w2"])) == [
        [BOS, W1],
        [BOS, W1, W2],
    ]


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        (),
        "",
        ["w1", ""],
        [[]],
        [[W1], []],
        torch.tensor([W1, W2]),
        torch.zeros(0, 3, dtype=torch.long),
        torch.zeros(2, 0, dtype=torch.long),
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4).long()},
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()},
    ],
    ids=repr,
)
def test_prompts_that_mean_nothing(prompts):
    with pytest.raises(sf.errors.PromptError) as caught:
        sf.text.prompts.encode_prompts(tokenizer(), prompts)  # adds no BOS, so that "" is empty
    assert "Try: " in str(caught.value)


def test_an_empty_string_is_a_prompt_where_bos_is_added(words):
    assert rows(sf.text.prompts.encode_prompts(words, "")) == [[BOS]]


@pytest.mark.parametrize("prompts", ["w1", ["w1", "w2"], chat("w1")])
def test_text_needs_a_tokenizer(prompts):
    with pytest.raises(sf.errors.PromptError, match="no tokenizer"):
        sf.text.prompts.encode_prompts(None, prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        [W1, "w1"],
        [None],
        [1.5, 2.5],
        {"ids": torch.ones(1, 2)},
        {"input_ids": [[W1, W2]], "attention_mask": [[1, 1]]},
        {"role": "user", "content": "w1"},
        5,
    ],
    ids=repr,
)
def test_other_things_are_refused_as_prompts(prompts):
    """The docstring promises a PromptError for mixed kinds."""
    with pytest.raises(sf.errors.PromptError):
        sf.text.prompts.encode_prompts(tokenizer(), prompts)


@pytest.mark.parametrize("prompts", [["w1 w2", [W1, W2]], ["w1", chat("w1")]], ids=repr)
def test_mixed_kinds_of_whole_prompts_give_a_row_each(words, prompts):
    """Contrary to the docstring of encode_prompts they are not refused; each is encoded alone."""
    both = rows(sf.text.prompts.encode_prompts(words, prompts))
    assert both == [rows(sf.text.prompts.encode_prompts(words, [one]))[0] for one in prompts]


# ---------------------------------------------------------------- split


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    size=st.integers(1, 10),
)
def test_split_keeps_rows_and_drops_columns_that_are_all_pad(lengths, size):
    prompts = [[10 + n] * length for n, length in enumerate(lengths)]
    pieces = split(sf.text.prompts.encode_prompts(None, prompts), size)
    assert [row for piece in pieces for row in rows(piece)] == prompts
    assert all(len(piece["input_ids"]) <= size for piece in pieces)
    for n, piece in enumerate(pieces):
        widest = max(lengths[n * size : (n + 1) * size])
        assert piece["input_ids"].shape == piece["attention_mask"].shape
        assert piece["input_ids"].shape[1] == widest


def test_split_does_not_cut_pads_inside_a_row():
    batch = {
        "input_ids": torch.tensor([[0, 4, 0, 5], [0, 0, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]),
    }
    (piece,) = split(batch, 4)
    assert piece["input_ids"].tolist() == [[4, 0, 5], [0, 6, 7]]
    assert piece["attention_mask"].tolist() == [[1, 0, 1], [0, 1, 1]]


def test_run_gives_back_the_prompts_it_was_given(words):
    out = sf.run(
        transformers_model(build("llama"), words),
        ["w1 w2 w3", "w2"],
        max_new_tokens=2,
        batch_size=1,
    )
    assert out.prompts == ((BOS, W1, W2, W3), (BOS, W2))
    assert len(out.completions) == len(out.texts) == 2
    assert out.texts[0].split() == words.convert_ids_to_tokens(out.completions[0])
