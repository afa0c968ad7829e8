"""Chats: what is said is rendered, once, and up to where the answer begins or goes on."""

from __future__ import annotations

import pytest

import saefeat as sf
from helpers import build
from test_roles import STYLES, tokenizer


def turn(role: str, content: object, **others: object) -> dict:
    return {"role": role, "content": content, **others}


def encoded(text, chat) -> str:
    """What the model is given of one chat, read back."""
    batch = sf.text.prompts.encode_prompts(text, chat)
    return text.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])


def ids(text, prompts) -> list[int]:
    return sf.text.prompts.encode_prompts(text, prompts)["input_ids"].tolist()


HI, SURE = turn("user", "hi"), turn("assistant", "Sure, ")
LONG = [HI, turn("assistant", "well"), turn("user", "how?")]


@pytest.mark.parametrize("style", [name for name in STYLES if name != "no markers"])
@pytest.mark.parametrize("chat", [[HI], LONG], ids=["one turn", "three"])
def test_a_chat_is_what_the_tokenizer_makes_of_it(style, chat):
    """Both of its ways: ids at once, and the text tokenized without special tokens."""
    text = tokenizer(style)
    options = {"add_generation_prompt": True}
    assert ids(text, chat) == [text.apply_chat_template(chat, return_dict=False, **options)]
    shown = text.apply_chat_template(chat, tokenize=False, **options)
    assert ids(text, chat) == [text(shown, add_special_tokens=False)["input_ids"]]
    assert ids(text, shown) == ids(text, chat), "and given as a rendered text"
    assert ids(text, [chat, chat]) == ids(text, chat) * 2 == ids(text, [tuple(chat)]) * 2


OPENED = {
    "ChatML": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "thinking": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "Mistral": "<s>[INST] hi [/INST] ",
    "Gemma": "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "Vicuna": "USER: hi ASSISTANT: ",
    "Zephyr": "<|user|>\nhi</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("style", OPENED)
def test_a_last_turn_of_the_assistant_is_continued(style):
    """It was closed, and a second one opened behind it."""
    text = tokenizer(style)
    assert encoded(text, [HI, SURE]) == OPENED[style] + "Sure, "
    found, content = ids(text, [HI, SURE])[0], text("Sure, ")["input_ids"]
    assert found[-len(content) :] == content
    assert encoded(text, [*LONG, SURE]).endswith("Sure, ")
    assert ids(text, [HI, turn("assistant", "")]) == ids(text, [HI]), "nothing is said yet"
    if style == "Gemma":
        assert ids(text, [HI, turn("model", "Sure, ")]) == [found], "as templates call it"


@pytest.mark.parametrize(
    ("style", "content"),
    [
        ("Gemma", " Sure"),
        ("Llama 3", "\nSure"),
        ("thinking", "<think>\nhm"),
        ("thinking", "\nSure"),
    ],
)
def test_what_cannot_be_continued_as_it_is_is_refused(style, content):
    """A template that trims it, or writes an empty thought before one that is begun."""
    with pytest.raises(sf.errors.PromptError, match=r"renders as .* continued"):
        ids(tokenizer(style), [HI, turn("assistant", content)])


@pytest.mark.parametrize(
    ("chat", "wanted"),
    [
        ([{"role": "user"}], "message 0 of content None"),
        ([turn("user", None)], "message 0 of content None"),
        ([HI, turn("assistant", None), HI], "message 1 of content None"),
        ([turn("user", 3)], "message 0 of content 3"),
        ([{"content": "hi"}], "of role None"),
        ([turn(None, "hi")], "of role None"),
        ([turn("usr", "hi")], "of role 'usr'"),
        ([turn("user", "hi", name="bo")], "with 'name', which the template leaves out"),
        ([HI, turn("assistant", "a", reasoning="b"), HI], "with 'reasoning'"),
        ([HI, turn("assistant", None, tool_calls=[{"name": "f"}])], "with 'tool_calls'"),
        ([turn("user", [])], "of content"),
        ([turn("user", [{"type": "image"}, {"type": "text", "text": "a"}])], "all text"),
        ([turn("user", [{"type": "text"}])], "all text"),
        ([HI, "hi"], "wanted a string, a chat"),
        (HI, "one message of a chat"),
        ({"messages": [HI]}, "row of a data set"),
        ([[]], "no tokens"),
    ],
)  # fmt: skip
def test_messages_that_would_be_misread(chat, wanted):
    with pytest.raises(sf.errors.PromptError, match="Try: ") as caught:
        sf.text.prompts.encode_prompts(tokenizer("ChatML"), chat)
    assert wanted in str(caught.value)
    if isinstance(chat, list) and all(isinstance(one, dict) for one in chat):
        with pytest.raises(sf.errors.PromptError, match="Try: ") as caught:
            sf.text.prompts.encode_prompts(tokenizer("ChatML"), [[HI], chat])
        assert wanted in str(caught.value)


def test_a_list_of_parts_is_a_text():
    text, parts = tokenizer("ChatML"), [{"type": "text", "text": t} for t in ("how ", "are you")]
    assert ids(text, [turn("user", parts)]) == ids(text, [turn("user", "how are you")])
    assert ids(text, [HI, turn("assistant", parts)]) == ids(
        text, [HI, turn("assistant", "how are you")]
    )


def test_a_template_that_reads_parts_alone_is_given_parts():
    """Given a text it would write its letters, or nothing."""
    text = tokenizer("ChatML")
    text.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for content in ("hi", [{"type": "text", "text": "hi"}]):
        assert encoded(text, [turn("user", content)]) == OPENED["ChatML"]
        assert encoded(text, [turn("user", content), SURE]) == OPENED["ChatML"] + "Sure, "


def test_a_turn_the_template_leaves_out_is_refused():
    text = tokenizer("ChatML")
    text.chat_template = STYLES["ChatML"].replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    with pytest.raises(sf.errors.PromptError, match=r"message 0 with 'content'.*leaves out"):
        ids(text, [turn("system", "be kind"), HI])


def test_a_thinking_template_may_cut_thoughts():
    chat = [HI, turn("assistant", "<think>hm</think>well"), turn("user", "how?")]
    assert ids(tokenizer("thinking"), chat) == ids(tokenizer("thinking"), LONG)


def test_calls_of_tools_are_rendered_where_the_template_has_them():
    text = tokenizer("ChatML")
    calls = "m.content + (m.tool_calls | string if m.tool_calls else '')"
    text.chat_template = STYLES["ChatML"].replace("m.content", calls)
    call = turn("assistant", None, tool_calls=[{"name": "bake"}])
    assert "bake" in encoded(text, [HI, call, turn("tool", "bread")])
    with pytest.raises(sf.errors.PromptError, match="calls a tool"):
        ids(text, [HI, call])


def test_keys_without_a_value_are_nothing():
    text = tokenizer("ChatML")
    assert ids(text, [turn("user", "hi", name=None, tool_calls=None)]) == ids(text, [HI])


@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        (None, [HI], "no chat template"),
        ("{{ messages[5].content }}", [HI], "cannot be rendered"),
        ("{{ messages[0].content + 3 }}", [HI], "cannot be rendered"),
        ("{{ 1 // (messages | length - 1) }}", [HI], "cannot be rendered"),
        ("{% for m in messages %}{{ m.content", [HI], "cannot be rendered"),
        (STYLES["Gemma"], [turn("system", "x"), HI], "no system turn"),
    ],
)
def test_errors_of_a_template_are_prompt_errors(template, chat, words):
    """jinja2's own, KeyError and TypeError came through."""
    text = tokenizer("ChatML")
    text.chat_template = template
    with pytest.raises(sf.errors.PromptError, match=words):
        ids(text, chat)


def test_a_template_that_opens_no_answer_is_refused():
    """One from before ``add_generation_prompt``: the model would go on behind the user's turn."""
    text = tokenizer("ChatML")
    text.chat_template = STYLES["ChatML"].partition("{% if add_generation_prompt")[0]
    with pytest.raises(sf.errors.PromptError, match=r"opens the answer with '<\|im_start\|>assi"):
        ids(text, [HI])
    assert encoded(text, [HI, SURE]) == OPENED["ChatML"] + "Sure, ", "this one says where"


def test_an_answer_is_opened_once():
    """Also where the template opens it whether asked to or not."""
    text = tokenizer("ChatML")
    text.chat_template = STYLES["ChatML"].partition("{% if")[0] + "{{ '<|im_start|>assistant\n' }}"
    assert encoded(text, [HI]) == OPENED["ChatML"]
    assert encoded(text, [HI, SURE]) == OPENED["ChatML"] + "Sure, "


def test_a_chat_prompt_without_pads_is_no_padding():
    """bos is the start of every turn here, and eos = pad the end of every turn."""
    text = tokenizer("ChatML")
    assert (text.bos_token, text.eos_token) == ("<|im_start|>", "<|im_end|>") == (
        text.bos_token, text.pad_token,
    )  # fmt: skip
    prompts = ids(text, [HI])
    for prompt in (prompts, [prompts[0], prompts[0][2:]]):
        assert ids(text, prompt)[0] == prompts[0]
    closed = text.apply_chat_template([HI], return_dict=False)[:-1]
    assert closed[-1] == text.pad_token_id
    assert ids(text, [closed]) == ids(text, [closed, closed])[:1] == [closed]
    model = build("llama")
    with pytest.raises(sf.errors.PromptError, match="without an attention mask"):
        sf.text.prompts.encode_for(model, [[0, *range(5, 9)]])
