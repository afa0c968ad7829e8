"""Prompts, tokens, and which tokens a rule selects.

* ``prompts``: strings, chats and token ids as one padded batch.
* ``chats``: messages, rendered by the tokenizer's template.
* ``padding``: masks, and pads that no mask marks.
* ``limits``: what of a model a prompt must fit.
* ``roles``: where a template puts the turns of a role.
* ``tokens``: ``Tokens``, the rules that select tokens, and a rule made plain for one tokenizer.
* ``texts``: the tokens of prompts, for showing results.
"""
