"""Prompts of every kind become one left-padded batch, with exactly the tokens they should have."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from helpers import BOS, EOS, PAD, batch_of, build, tokenizer, transformers_model, unit, wrapped
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


def test_right_padding_moves_to_the_left(words):
    """padding_side changed: the last column is no longer each row's last token."""
    words.padding_side = "right"
    encoded = words(["w1", "w1 w2"], return_tensors="pt", padding=True)
    assert encoded["attention_mask"][0, -1] == 0
    found = sf.text.prompts.encode_prompts(words, encoded)
    assert rows(found) == [[BOS, W1], [BOS, W1, W2]]
    # strings are padded by saefeat itself, whatever the tokenizer is set to
    assert rows(sf.text.prompts.encode_prompts(words, ["w1", "w1 w2"])) == rows(found)


def test_right_padding_changes_no_result():
    """Logits, completions and readings by position are those of the rows alone."""
    model, ids = wrapped(build("gpt2")), torch.tensor([[5, 6, 7, 8], [9, 10, PAD, PAD]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.1").latents([0]))
    found = sf.run(model, {"input_ids": ids, "attention_mask": mask}, probe, max_new_tokens=3)
    alone = [sf.run(model, [row], probe, max_new_tokens=3) for row in ([5, 6, 7, 8], [9, 10])]
    assert found.completions == alone[0].completions + alone[1].completions
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone]))
    for row, one in enumerate(alone):
        mask, only = found.readings[0].mask[row], one.readings[0].mask[0]
        values = found.readings[0].values[row][mask], one.readings[0].values[0][only]
        torch.testing.assert_close(*values)


MASKS = {
    "a hole": [[1, 0, 1]],
    "another value": [[1, 2, 1]],
    "a negative one": [[-1, 1, 1]],
    "floats": [[1.0, 1.0, 1.0]],
    "an additive mask": [[-torch.inf, 0.0, 0.0]],
    "another width": [[1, 1]],
    "all of [b, 1, t, t]": [[[[1, 1, 1]] * 3]],
    "a row without tokens": [[0, 0, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_masks_that_say_something_else(mask):
    batch = {"input_ids": torch.tensor([[W1, W2, W3]]), "attention_mask": torch.tensor(mask)}
    with pytest.raises(sf.errors.PromptError, match="attention_mask"):
        sf.text.prompts.encode_prompts(None, batch)


FORMS = {
    "tensor": torch.tensor,
    "mapping": lambda ids: {"input_ids": torch.tensor(ids)},
    "int32": lambda ids: {"input_ids": torch.tensor(ids, dtype=torch.int32)},
    "BatchEncoding": lambda ids: transformers.BatchEncoding({"input_ids": torch.tensor(ids)}),
    "lists": lambda ids: ids,
    "tuples": lambda ids: tuple(map(tuple, ids)),
    "tensors in a list": lambda ids: [torch.tensor(row) for row in ids],
}


def shared(pad: str = "<eos>", bos: str | None = "<bos>"):
    """A tokenizer whose pad is another special token as well, or only that one is there."""
    found = copy.deepcopy(tokenizer())
    found.pad_token, found.bos_token = pad, bos
    return found


def is_refused(its_tokenizer, prompts) -> bool:
    try:
        sf.text.prompts.encode_prompts(its_tokenizer, prompts)
    except sf.errors.PromptError as error:
        assert "mask" in str(error)
        return True
    return False


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize(
    "ids",
    [[[PAD, W1], [W1, W2]], [[W1, PAD], [W1, W2]], [[W1, PAD, PAD]], [[PAD, W1]], [[W1, PAD, W2]]],
    ids=str,
)
def test_pads_without_a_mask_are_refused_in_every_form(form, ids):
    """Logits of a real model were off by 11.6."""
    assert is_refused(tokenizer(), form(ids))


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_pad_that_is_eos_is_padding_where_rows_differ(form):
    padded = [
        [[EOS, W1], [W1, W2]],  # padded to the longest row, on either side
        [[W1, EOS], [W1, W2]],
        [[EOS, EOS, W1], [EOS, W1, W2]],
        [[W1, EOS, EOS]],  # or to a fixed length
        [[EOS, EOS, W1], [EOS, EOS, W2]],
    ]
    text = [
        [[EOS, W1, W2]],  # a turn's end before a new turn
        [[W1, EOS]],
        [[W1, EOS], [W2, EOS]],  # documents, each with its end
        [[W1, EOS, W2], [W1, W2, W3]],
        [[EOS]],
    ]
    assert all(is_refused(shared(), form(ids)) for ids in padded)
    assert not any(is_refused(shared(), form(ids)) for ids in text)


def test_ragged_lists_are_judged_row_by_row():
    """Nobody has padded rows of different lengths to one width."""
    assert not is_refused(shared(), [[W1, EOS], [W1, W2, W3]])
    assert is_refused(shared(), [[W1, EOS, EOS], [W1, W2]])


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_pad_that_is_bos_begins_every_row(form):
    """GPT-2: bos = eos, and people set pad to it."""
    for its in (shared("<eos>", "<eos>"), shared("<bos>", "<bos>")):
        pad = its.pad_token_id
        assert not is_refused(its, form([[pad, W1], [pad, W2]]))
        assert is_refused(its, form([[pad, W1], [W1, W2]]))


def test_a_tokenizer_without_a_pad_is_padded_with_eos():
    its = copy.deepcopy(tokenizer())
    its.pad_token = None
    assert is_refused(its, torch.tensor([[EOS, EOS, W1], [W1, W2, W3]]))
    assert not is_refused(its, torch.tensor([[PAD, PAD, W1], [W1, W2, W3]]))


@pytest.mark.parametrize("ids", [[[PAD, W1], [W1, W2]], [[W1, PAD], [W1, W2]], [[W1, W2, PAD]]])
def test_without_a_tokenizer_the_configuration_says_what_pads(ids):
    for form in FORMS.values():
        with pytest.raises(sf.errors.PromptError, match="mask"):
            sf.text.prompts.encode_for(build("llama"), form(ids))


def test_a_mask_settles_it():
    ids = torch.tensor([[EOS, W1], [W1, W2]])
    for mask, wanted in (
        (torch.ones_like(ids), [[EOS, W1], [W1, W2]]),
        (torch.tensor([[0, 1], [1, 1]]), [[W1], [W1, W2]]),
    ):
        batch = {"input_ids": ids, "attention_mask": mask}
        assert rows(sf.text.prompts.encode_prompts(shared(), batch)) == wanted


@pytest.mark.parametrize(
    "key", ["pixel_values", "position_ids", "inputs_embeds", "labels", "token_type_ids", "mask"]
)
def test_keys_that_a_run_would_leave_out_are_refused_by_name(key):
    batch = {"input_ids": torch.tensor([[W1, W2]]), key: torch.tensor([[1, 2]])}
    with pytest.raises(sf.errors.PromptError, match=f"with {key}, wanted"):
        sf.text.prompts.encode_prompts(tokenizer(), batch)


def test_keys_that_say_nothing_are_let_through(words):
    found = words("w1", return_tensors="pt", return_special_tokens_mask=True)
    found["token_type_ids"] = torch.zeros_like(found["input_ids"])  # one segment
    found["labels"] = None
    assert rows(sf.text.prompts.encode_prompts(words, found)) == [[BOS, W1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_are_integers(dtype):
    with pytest.raises(sf.errors.PromptError, match="integer token ids"):
        sf.text.prompts.encode_prompts(None, torch.ones(1, 3).to(dtype))


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("bad", [-1, -100, 100, 2**40])
def test_ids_are_of_the_vocabulary(form, bad):
    """The embedding's own IndexError came from far away; on a GPU it ends the process."""
    if form is FORMS["int32"] and bad > 2**31:
        return
    with pytest.raises(sf.errors.PromptError, match=f"id {bad} in prompt 1"):
        sf.run(wrapped(build("llama")), form([[W1, W2], [W1, bad]]))


def test_places_of_images_are_refused():
    """A processor's ids without its pixel_values."""
    from saefeat.text.limits import Limits

    limits = Limits(media=(W2,))
    with pytest.raises(sf.errors.PromptError, match="stands for an image"):
        sf.text.prompts.encode_prompts(None, [[W1], [W1, W2]], limits)
    masked = {"input_ids": torch.tensor([[W2, W1]]), "attention_mask": torch.tensor([[0, 1]])}
    assert rows(sf.text.prompts.encode_prompts(None, masked, limits)) == [[W1]]


def test_pads_outside_the_vocabulary_are_never_written():
    """A pad added to a tokenizer without resizing the model's embedding."""
    its = copy.deepcopy(tokenizer())
    its.add_special_tokens({"pad_token": "<new>"})
    out = sf.run(transformers_model(build("llama"), its), ["w1 w2 w3", "w1"])
    alone = sf.run(wrapped(build("llama")), ["w1"])
    torch.testing.assert_close(out.logits[1:], alone.logits)


def test_learned_positions_have_an_end():
    gpt2, llama = (wrapped(build(family)) for family in ("gpt2", "llama"))
    fits, long = [[5] * 60], [[5] * 65]
    assert len(sf.run(gpt2, fits, max_new_tokens=5).completions[0]) == 5
    for call in (
        lambda: sf.run(gpt2, long),
        lambda: sf.run(gpt2, fits, max_new_tokens=6),
        lambda: sf.sweep(gpt2, fits, {0: None}, max_new_tokens=6),
        lambda: list(sf.run(gpt2, iter(fits), max_new_tokens=6, stream=True)),
        lambda: sf.metrics.measure(gpt2, fits, sf.metrics.log_prob([5] * 6)),
    ):
        with pytest.raises(sf.errors.PromptError, match="64"):
            call()
    assert sf.run(llama, [[5] * 80]).logits.isfinite().all(), "rotary positions go on"


# ---------------------------------------------------------------- BOS and EOS


@pytest.mark.parametrize("lead", ["", " ", "\n", " \n\t "])
def test_a_rendered_text_gets_no_second_bos(words, lead):
    text = lead + words.apply_chat_template(chat("w1"), tokenize=False)
    (ids,) = rows(sf.text.prompts.encode_prompts(words, text))
    assert ids.count(BOS) == 1


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_ids_with_two_bos_are_refused(words, form):
    """A rendered chat, tokenized by hand."""
    ids = words(words.apply_chat_template(chat("w1"), tokenize=False))["input_ids"]
    with pytest.raises(sf.errors.PromptError, match=r"BOS .* twice"):
        sf.text.prompts.encode_prompts(words, form([ids]))
    padded = {
        "input_ids": torch.tensor([[PAD, *ids]]),
        "attention_mask": torch.tensor([[0] + [1] * len(ids)]),
    }
    with pytest.raises(sf.errors.PromptError, match=r"BOS .* twice"):
        sf.text.prompts.encode_prompts(words, padded)


@pytest.fixture
def closing(words):
    """A tokenizer that puts EOS behind every text."""
    from tokenizers.processors import TemplateProcessing

    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return words


def test_an_eos_that_the_tokenizer_adds_is_left_out(closing, words):
    assert closing("w1")["input_ids"] == [BOS, W1, EOS], "the trap is there"
    encode = sf.text.prompts.encode_prompts
    assert rows(encode(closing, ["w1", "w1 w2", ""])) == [[BOS, W1], [BOS, W1, W2], [BOS]]
    assert rows(encode(closing, "w1 <eos>")) == [[BOS, W1, EOS]], "written by hand, it is text"
    assert rows(encode(closing, "<bos> w1 <eos>")) == [[BOS, W1, EOS]]
    assert rows(encode(closing, chat("w1")))[0][-1] != EOS


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_ids_that_the_tokenizer_has_ended_are_refused(closing, form):
    with pytest.raises(sf.errors.PromptError, match="end with '<eos>' in prompt 1"):
        sf.text.prompts.encode_prompts(closing, form([[BOS, W1, W2], [BOS, W1, EOS]]))
    assert rows(sf.text.prompts.encode_prompts(closing, form([[BOS, W1]]))) == [[BOS, W1]]


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
        b"w1",
        {"w1"},
        np.array([[W1, W2]]),
        [np.array([W1, W2])],
        [[True, False]],
        [torch.tensor([0.5])],
        [[[W1]]],
        [[2**70]],
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


@pytest.mark.parametrize("one", [[W1, W2], chat("w1", "w2")], ids=["ids", "messages"])
def test_a_stream_of_one_prompts_parts_is_refused(words, one):
    """Every ``batch_size`` of them would be a prompt."""
    model = transformers_model(build("llama"), words)
    with pytest.raises(sf.errors.PromptError, match="numbers or messages"):
        list(sf.run(model, iter(one), stream=True))
    assert len(list(sf.run(model, iter([one, one]), stream=True, batch_size=1))) == 2
