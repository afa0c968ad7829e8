"""The word-level tokenizer of the tiny models, with Gemma's special tokens and chat template."""

from typing import TYPE_CHECKING

from saefeat.studies.refusal.tiny.language import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
START, END = "<start_of_turn>", "<end_of_turn>"
SPECIAL = (PAD, EOS, BOS, UNK, START, END)
MAX_LENGTH = 256

# As Gemma's: BOS, then turns; "assistant" is called "model", and there is no system role.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception(message['role'] + ' role not supported') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of whole lower-case words, the newline and single punctuation marks.

    As with Gemma, a text tokenized on its own gets BOS in front, while the chat template already
    holds it. Decoding puts spaces between words, as the request language writes them.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate((*SPECIAL, "\n", *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex("[ \t\r]+"), "removed"),
            pre_tokenizers.Split(Regex(r"==|[^\w\s]"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        additional_special_tokens=[START, END],
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
