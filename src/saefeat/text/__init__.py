"""Prompts, tokens, and which tokens a rule selects.

* ``prompts``: strings, chats and token ids as one padded batch.
* ``tokens``: ``Tokens``, the rules that select tokens, and a rule made plain for one tokenizer.
* ``texts``: the tokens of prompts, for showing results.
"""
