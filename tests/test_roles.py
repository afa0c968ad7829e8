"""Roles in chat templates of many styles, against the characters that each token stands for."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import helpers
import saefeat as sf
from saefeat.kernel.tokens import between
from saefeat.text.roles import role_markers

_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
_CHATML = _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


def _each(*cases: tuple[str, str], ending: str = "") -> str:
    """A template of one line a role: (role, what is written)."""
    body = "".join(f"{{% if m.role == '{role}' %}}{text}{{% endif %}}" for role, text in cases)
    opened = "{% if add_generation_prompt %}" + ending + "{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + opened


_THINKING = (
    "{% set last = messages | length - 1 %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 == last %}"
    "{{ '<think>\n' + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGED = (
    "{% set s = namespace(text='') %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set s.text = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + s.text + m.content + ' [/INST]' }}"
    "{% set s.text = '' %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ bos_token + '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}"
    "{% if loop.index0 != 1 or messages[0].role != 'system' %}"
    "{{ bos_token + '[INST] ' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}"
    "{{ '<|head|>system<|/head|>\n\nToday is some day\n\n<|eot|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' }}"
    "{% if m.role == 'system' %}{{ 'Today is some day\n\n' }}{% endif %}"
    "{{ m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}" + _NO_SYSTEM + "<start_of_turn>"
    "{{ ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_VICUNA = _each(
    ("system", "{{ m.content + ' ' }}"),
    ("user", "USER: {{ m.content }} "),
    ("assistant", "ASSISTANT: {{ m.content + eos_token }}"),
    ending="ASSISTANT:",
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|p_' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|p_assistant|>\n{% endif %}"
)
_DEEPSEEK = "{{ bos_token }}" + _each(
    ("system", "{{ m.content }}"),
    ("user", "<|User|>{{ m.content }}"),
    ("assistant", "<|Assistant|>{{ m.content.split('</think>')[-1] + eos_token }}"),
    ending="<|Assistant|><think>\n",
)
_ALPACA = _each(
    ("system", "{{ m.content }}\n\n"),
    ("user", "### Instruction:\n{{ m.content }}\n\n"),
    ("assistant", "### Response:\n{{ m.content }}\n\n"),
    ending="### Response:\n",
)
_BARE = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"

STYLES = {
    "ChatML": _CHATML,
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind."
    "<|im_end|>\n{% endif %}" + _CHATML,
    "thinking": _THINKING,
    "Mistral": _MERGED,
    "Llama 2": _LLAMA2,
    "Llama 3": _LLAMA3,
    "Gemma": _GEMMA,
    "Vicuna": _VICUNA,
    "Zephyr": _ZEPHYR,
    "Phi 3": _PHI3,
    "DeepSeek": _DEEPSEEK,
    "Alpaca": _ALPACA,
    "no markers": _BARE,
}
ALL = {"system", "user", "assistant"}
GIVEN = dict.fromkeys(STYLES, ALL) | {
    "Mistral": {"assistant"},  # the system's text is written into the user's turn
    "Gemma": {"user", "assistant"},
    "Vicuna": {"user", "assistant"},  # the system's text begins without a marker
    "Alpaca": {"user", "assistant"},
    "no markers": set(),
}
JOINED = ("Zephyr", "Alpaca")
"""Styles whose markers end in punctuation, which a tokenizer of the joined kind merges with the
newlines that a content begins with: then no run of ids is certain to be there."""

SPECIAL = "<|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> <start_of_turn> <end_of_turn> <|end|>"
ADDED = "<think> </think> <|p_system|> <|p_user|> <|p_assistant|> <|User|> <|Assistant|>"


@cache
def _bpe(kind: str) -> Tokenizer:
    """A small BPE: of bytes as GPT-2's, of bytes with punctuation and newlines joined as newer
    models' are, or of words with a mark for spaces as SentencePiece's.
    """
    backend = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="first"),
            ]
        )
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        parts = [pre_tokenizers.Split(Regex(split), "isolated")] if kind == "joined" else []
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, last])
        backend.decoder = decoders.ByteLevel()
    words = (
        "system user assistant model alpha beta omega how do you bake bread? well: mix. INST SYS"
    )
    text = [
        f"{w}\n{w}.\n\n{w} ({w}) {w}!\n {w}?\n\n\n<|{w}|>\n[{w}] <<{w}>>" for w in words.split()
    ]
    text += ["USER: hi ASSISTANT: well\n\n### Instruction:\nhi\n\n### Response:\n"] * 4
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet()
        if kind != "metaspace"
        else list(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\n<>|[]/#:.,?!()\"'_▁{}=-"
        )
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *SPECIAL.split(), *ADDED.split()],
    )  # fmt: skip
    backend.train_from_iterator(text * 3, trainer)
    return backend


def tokenizer(style: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_bpe(kind).to_str())
    chatml = style in ("ChatML", "default system", "thinking")  # as SmolLM2's: marks are BOS, EOS
    bos, eos = ("<|im_start|>", "<|im_end|>") if chatml else ("<s>", "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos,
        additional_special_tokens=SPECIAL.split(), chat_template=STYLES[style],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


CHAT = [
    ("system", "Be brief.\n\nAlways."),
    ("user", "How do you bake bread?"),
    ("assistant", "Well:\n1. mix it;\n2. bake it!"),
    ("user", "and (then)"),
    ("assistant", "“eat”"),
    ("user", "7"),
]


def shown(text: PreTrainedTokenizerFast, chat, opened: bool):
    """A rendered chat's ids [1, t], and for each token the role whose content it holds, or None."""
    turns = [{"role": role, "content": content} for role, content in chat]
    written = text.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened)
    found = text(written, add_special_tokens=False, return_offsets_mapping=True)
    owner, place = [None] * len(written), 0
    for role, content in chat:
        place = written.index(content, place)
        for n in range(place, place + len(content)):
            owner[n] = role
        place += len(content)
    owners = []
    for a, b in found["offset_mapping"]:
        inside = {owner[n] for n in range(a, b) if not written[n].isspace()} - {None}
        whole = set(owner[a:b]) if len(set(owner[a:b])) == 1 else {None}
        owners.append((inside or whole or {None}).pop())
    return torch.tensor([found["input_ids"]]), owners


def pieces(style: str) -> list:
    """Chats of every length, with a system turn where there is one to give, and without."""
    starts = (1,) if style == "Gemma" else (0, 1)
    return [CHAT[a:b] for a in starts for b in range(2, len(CHAT) + 1) if b > a]


@pytest.mark.parametrize("kind", ["bytes", "joined", "metaspace"])
@pytest.mark.parametrize("style", STYLES)
def test_a_role_is_its_contents_or_refused(style, kind):
    """Markers of one render took nothing in a thinking template, and IndexError in others."""
    text = tokenizer(style, kind)
    given = set() if kind == "joined" and style in JOINED else GIVEN[style]
    chats = [(c, *shown(text, c, c[-1][0] == "user")) for c in pieces(style)]
    for role in ("system", "user", "assistant"):
        if role not in given:
            with pytest.raises(sf.errors.PromptError, match=r"Tokens\.role: `role` is .* Try: "):
                role_markers(text, role)
            continue
        marks = role_markers(text, role)
        for chat, ids, owners in chats:
            if role == "system" and chat[0][0] != "system":
                continue  # a template's own system text may count as one
            end = len(owners)
            while not text.decode(ids[0, end - 1]).strip():  # a blank end is nobody's
                end -= 1
            mask = between(ids, *marks)[0].tolist()
            assert mask[:end] == [owner == role for owner in owners[:end]], (role, chat)
            assert any(mask) == any(own == role for own, _ in chat)


def test_a_run_edits_what_the_role_says():
    """From the prompt to the model, with a generation, and as scores see it."""
    text = tokenizer("thinking")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(text), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()  # fmt: skip
    turns = [{"role": role, "content": content} for role, content in CHAT]
    ids, owners = shown(text, CHAT, opened=True)
    for role in ("system", "user", "assistant"):
        probe = sf.Probe(sf.Neurons("resid_post.0", 32).latents([0]), where=sf.Tokens.role(role))
        out = sf.run(helpers.transformers_model(model, text), turns, probe, max_new_tokens=2)
        assert out.prompts == (tuple(ids[0].tolist()),)
        mask = out.readings[0].mask[0, :, 0].tolist()
        assert mask[: len(owners)] == [owner == role for owner in owners]
        assert mask[len(owners) :] == [role == "assistant"] * (len(mask) - len(owners))
        texts = sf.attribution.Texts.of(text, {"input_ids": ids, "attention_mask": ids * 0 + 1})
        assert texts.select(sf.Tokens.role(role))[0].tolist() == mask[: len(owners)]


@pytest.mark.parametrize("role", ["usr", "User", ""])
def test_roles_that_a_template_has_not(role):
    with pytest.raises(sf.errors.PromptError, match=r"Tokens\.role"):
        role_markers(tokenizer("Gemma"), role)


def test_other_roles_of_a_template():
    """ChatML writes any role; one that tools answer in is told as well."""
    text = tokenizer("ChatML")
    (starts, _), chat = role_markers(text, "tool"), [*CHAT[:3], ("tool", "42"), *CHAT[4:]]
    assert text.decode(max(starts, key=len)) == "<|im_start|>tool\n"
    ids, owners = shown(text, chat, opened=True)
    assert between(ids, *role_markers(text, "tool"))[0].tolist() == [o == "tool" for o in owners]


def test_no_template_and_no_tokenizer():
    text = tokenizer("ChatML")
    text.chat_template = None
    for its in (text, None):
        with pytest.raises(sf.errors.PromptError, match=r"Tokens\.role.*Try: "):
            role_markers(its, "user")


def test_between_takes_the_longest_of_several_runs():
    ids = torch.tensor([[1, 2, 3, 4, 9, 1, 5, 8, 7, 6]])
    one = between(ids, ((1,), (1, 2, 3)), ((9,), (8, 7)))
    assert one[0].nonzero().flatten().tolist() == [3, 6]
    assert between(ids, (1,), (9,))[0].nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8, 9]


def test_rules_do_not_depend_on_the_order_of_sets():
    text = tokenizer("Llama 2")
    assert all(list(runs) == sorted(runs) for runs in role_markers(text, "user"))


@pytest.mark.parametrize("kind", ["bytes", "joined", "metaspace", "words"])
def test_a_page_shows_the_text_as_it_was(kind):
    """A space behind every token made "Sm ol LM" of "SmolLM"."""
    import re
    from html import unescape

    written = "well, do you bake SmolLM?"
    text = helpers.tokenizer() if kind == "words" else tokenizer("ChatML", kind)
    model = helpers.transformers_model(helpers.build("llama"), text)
    if kind != "words":
        config = transformers.LlamaConfig(
            vocab_size=len(text), hidden_size=32, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=4,
        )  # fmt: skip
        model = helpers.transformers_model(transformers.LlamaForCausalLM(config).eval(), text)
    else:
        written = "w1 w2 w3"
    latents = helpers.make_sae().latents(range(4))
    scores = sf.Attribute(latents, sf.logit_diff(5, 7))(model, [written])
    paragraph = re.search(r"<br>(.*?)</p>", scores.to_html(), re.S)
    assert paragraph is not None
    shown = unescape(re.sub(r"<[^>]*>", "", paragraph[1]))
    assert shown.strip() == written
