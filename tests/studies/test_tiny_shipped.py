"""The shipped weights: their bars, their files, and how they load."""

import json
from functools import cache

import pytest
import torch
from tools.tiny import bars
from tools.tiny.sites import Site, parse, read, sites

from saefeat.studies.refusal import tiny


@cache
def recorded() -> dict:
    """What the training script wrote beside the weights."""
    return json.loads((tiny.data_folder() / "bars.json").read_text(encoding="utf-8"))


@cache
def figures() -> dict:
    """The shipped files measured afresh; the direction at its best layer alone, to be quick.

    A minute all the same, for files that seldom change: what uses it is slow.
    """
    best = recorded()["chat"]["direction"]["best_layer"]
    return {
        which: bars.measure(which, tiny.data_folder(), layers=[best]) for which in ("chat", "base")
    }


@pytest.mark.slow
@pytest.mark.parametrize("bar", bars.BARS)
def test_a_bar_is_reached(bar):
    low, high = bars.BARS[bar]
    assert all(low <= value <= high for value in bars.values(figures(), bar))


@pytest.mark.slow
def test_the_record_tells_what_is_measured():
    for bar in bars.BARS:
        # Another build of torch may tip a prompt or two.
        assert bars.values(recorded(), bar) == pytest.approx(bars.values(figures(), bar), abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["chat", "base"])
def test_saes_are_sparse_and_faithful(which):
    found = figures()[which]["saes"]
    model, _ = tiny.load(which)
    expected = sites(model.config.num_hidden_layers, middle=2)
    assert {parse(place) for place in tiny.saes_folder(which).iterdir()} == set(expected)
    for row in found.values():
        assert row["l0"] < 20 and row["fvu"] < 0.1 and row["dead"] < 256


def test_everything_fits_in_eight_megabytes():
    files = [path for path in tiny.data_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_the_template_is_gemmas():
    _, tokenizer = tiny.load()
    first = [{"role": "user", "content": "how do i bake bread"}]
    more = [*first, {"role": "assistant", "content": "sure"}, {"role": "user", "content": "ok"}]
    asked, longer = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in (first, more)
    )
    turn = "<start_of_turn>user\nhow do i bake bread<end_of_turn>\n<start_of_turn>model\n"
    assert asked == "<bos>" + turn
    assert longer == asked + (
        "sure<end_of_turn>\n<start_of_turn>user\nok<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = tokenizer(asked, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == [
        "user", "how", "do", "i", "bake", "bread", "model",
    ]  # fmt: skip
    assert tokenizer("Bake bread?").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.padding_side == "left"


def test_left_padding_changes_no_answer():
    model, tokenizer = tiny.load()
    found = tiny.splits()
    requests = [*found["harmful_test"][:3], *found["jailbreak_test"][:3]]
    alone = [bars.answers(model, tokenizer, [request])[0] for request in requests]
    assert bars.answers(model, tokenizer, requests) == alone


def test_a_second_turn_is_answered_like_a_first():
    model, tokenizer = tiny.load()
    found = tiny.splits()
    pairs = list(zip(found["harmless_test"][:16], found["harmful_test"][:16], strict=True))
    chats = [
        [
            {"role": "user", "content": kind.instruction},
            {"role": "assistant", "content": tiny.answer(kind)},
            {"role": "user", "content": bad.instruction},
        ]
        for kind, bad in pairs
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**prompt, max_new_tokens=tiny.MAX_ANSWER_TOKENS, do_sample=False)
    said = tokenizer.batch_decode(ids[:, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert [tiny.judge(text) for text in said].count("refused") >= 14


@pytest.mark.parametrize("which", ["chat", "base"])
def test_sae_lens_reads_the_files_and_agrees(which):
    from sae_lens import SAE

    model, tokenizer = tiny.load(which)
    prompt = bars.encode(tokenizer, tiny.splits()["harmful_test"][:4])
    for place in tiny.saes_folder(which).iterdir():
        site, sae = parse(place), SAE.load_from_disk(place)
        assert sae.cfg.metadata.hook_name == site.hook_name
        assert sae.cfg.metadata.model_name == f"saefeat-tiny-{which}"
        x, _ = read(model, [site], **prompt)[site]
        torch.testing.assert_close(sae(x), bars.load_sae(place)(x)[1])


def test_the_transcoder_reads_the_mlps_input_without_the_norms_weight():
    model, tokenizer = tiny.load()
    prompt = bars.encode(tokenizer, tiny.splits()["harmful_test"][:4])
    block = model.model.layers[2]
    seen = []
    handle = block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    source, target = read(model, [site := Site("transcoder", 2)], **prompt)[site]
    handle.remove()
    weight = 1 + block.pre_feedforward_layernorm.weight
    torch.testing.assert_close(source * weight, seen[0])
    written = block.post_feedforward_layernorm(block.mlp(seen[0]))
    torch.testing.assert_close(written, target)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match='"chat" or "base"'):
        tiny.load("small")
