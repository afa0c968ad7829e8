"""The model that the stack serves: a tiny random one with a chat template, in four deployments."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers
from nnsight import TransformersModel
from tools.ndif.deployments import Deployment

from helpers import RAGGED, build, tokenizer
from saefeat.remote import named

ISOLATIONS = ("trusted", "sandbox")
DTYPES = ("float32", "bfloat16")
PLACES = [(isolation, dtype) for dtype in DTYPES for isolation in ISOLATIONS]
CHATS = [[{"role": "user", "content": text}] for text in RAGGED]
TEMPLATE = (
    "{% for m in messages %}{{ ('w90 ' if m.role == 'user' else 'w91 ') + m.content + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)


def write(model: torch.nn.Module, folder: Path) -> None:
    """A model and the tests' tokenizer in Hugging Face's format."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words = tokenizer()
    before, words.chat_template = words.chat_template, TEMPLATE
    words.save_pretrained(folder)
    words.chat_template = before


def deployments(folder: Path) -> dict[tuple[str, str], Deployment]:
    """The model for every isolation and dtype, each in a folder of its own."""
    found = {}
    for isolation, dtype in PLACES:
        where = folder / f"{isolation}-{dtype}"
        write(build("gemma2"), where)
        found[isolation, dtype] = Deployment(where, dtype, isolation, timeout=60.0)
    return found


@cache
def client(deployment: Deployment) -> TransformersModel:
    """The same weights here, in the same dtype, under the name by which the server knows them."""
    name = str(deployment.folder)
    words = transformers.AutoTokenizer.from_pretrained(name)
    dtype = getattr(torch, deployment.dtype)
    model = TransformersModel(
        name, tokenizer=words, task="text-generation", dtype=dtype, dispatch=True
    )
    return named(model, name)
