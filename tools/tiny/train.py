"""Train the tiny models and their SAEs from nothing.

    python -m tools.tiny.train --out DIR [--small] [--quiet]

Two stages, as real models are made: a base model that complies with everything unless it is told
to decline, then safety fine-tuning of the middle layers only. The frozen last layer goes on
reading the base model's direction for declining, so refusal keeps a complying state to fall back
on when that direction is ablated.
"""

import argparse
import contextlib
import copy
import datetime
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saefeat.studies.refusal.tiny import language

from . import bars
from .conversations import batch_tensors, conversations, sae_conversations
from .saes import Dictionary, activations, train_sae
from .sites import Site, sites
from .tokenizer import BOS, END, EOS, MAX_LENGTH, PAD, build_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and rates of one full training run.

    ``trained`` are the layers of the safety stage; ``middle`` is the last of them.
    """

    layers: int = 4
    width: int = 64
    mlp: int = 128
    base_steps: int = 1500
    safe_steps: int = 800
    batch: int = 32
    rate: float = 3e-3
    safe_rate: float = 4e-3
    trained: tuple[int, ...] = (1, 2)
    sae_conversations: int = 2000
    dictionary: Dictionary = field(default_factory=Dictionary)
    sae_sites: tuple[str, ...] = ()  # folder names; none means all
    seed: int = 0

    @property
    def middle(self) -> int:
        """The last layer the safety stage trains, where refusal is decided."""
        return self.trained[-1]


def build_model(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> "Gemma2ForCausalLM":
    """A freshly initialized Gemma-2 model, float32."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(recipe.seed)
    words = tokenizer.get_vocab()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.width // 4,
        query_pre_attn_scalar=recipe.width // 4,
        max_position_embeddings=MAX_LENGTH,
        sliding_window=MAX_LENGTH,
        initializer_range=0.05,
        pad_token_id=words[PAD],
        bos_token_id=words[BOS],
        eos_token_id=words[EOS],
    )
    model = Gemma2ForCausalLM(config)
    model.set_attn_implementation("eager")  # the one that applies the soft cap
    model.generation_config.eos_token_id = [words[END], words[EOS]]
    return model


@contextlib.contextmanager
def hooked(modules: "Iterable[torch.nn.Module]", hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook on some modules, while the block runs."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class DeclineAxis:
    """The running direction from complying to declining, at the prompt's end in one layer.

    A real model complies when nothing speaks against it. A tiny one, left alone, puts
    complying and declining at the two ends of one axis, and then the state without that
    direction is neither. So declining is planted in one direction: every other step of the base
    stage projects the axis out of every layer, and there the model has to comply even when it is
    told to decline. The safety stage does the same with harmless requests alone. What becomes
    of a *harmful* request without the direction is never trained: it is there to be found.
    """

    def __init__(self, model: "Gemma2ForCausalLM", layer: int) -> None:
        """Watch one layer; the axis starts at zero, which projects nothing out."""
        import torch

        self.model, self.layer = model, layer
        self.axis = torch.zeros(model.config.hidden_size)

    @contextlib.contextmanager
    def watched(self, own: "torch.Tensor", declined: "torch.Tensor") -> Iterator[None]:
        """Update the axis from a pass; ``declined`` (batch,) bool says which rows decline."""
        import torch

        def hook(module: Any, args: Any, output: "torch.Tensor") -> None:
            last = output.detach()[torch.arange(len(own)), own.int().argmax(1) - 1]
            if declined.any() and not declined.all():
                gap = last[declined].mean(0) - last[~declined].mean(0)
                self.axis = 0.9 * self.axis + 0.1 * gap

        with hooked([self.model.model.layers[self.layer]], hook):
            yield

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Project the axis out of resid_post of every layer and position."""
        unit = self.axis / self.axis.norm().clamp(min=1e-6)

        def hook(module: Any, args: Any, output: "torch.Tensor") -> "torch.Tensor":
            return output - (output @ unit)[..., None] * unit

        with hooked(self.model.model.layers, hook):
            yield


def _loss(logits: "torch.Tensor", ids: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """Weighted mean cross-entropy of the next tokens; weight (batch, position) belongs to them."""
    import torch

    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()


def _trainable(model: "Gemma2ForCausalLM", safe: bool, recipe: Recipe) -> "list[torch.Tensor]":
    """Freeze what the stage leaves alone; the weights it trains."""
    model.requires_grad_(not safe)
    for layer in recipe.trained:
        model.model.layers[layer].requires_grad_(True)
    return [weight for weight in model.parameters() if weight.requires_grad]


def train(
    model: "Gemma2ForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    safe: bool,
    recipe: Recipe,
    report: Callable[[float], object] = lambda loss: None,
) -> None:
    """One training stage, in place; ``report`` gets the loss of every step.

    The base stage (``safe=False``) trains everything on all tokens, prompts at a tenth of the
    weight; the safety stage trains only the layers ``recipe.trained``, on answers alone.
    """
    import torch

    weights = _trainable(model, safe, recipe)
    steps, rate = (
        (recipe.safe_steps, recipe.safe_rate) if safe else (recipe.base_steps, recipe.rate)
    )
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    batches = conversations(safe, recipe.batch, recipe.seed + safe)
    axis = DeclineAxis(model, recipe.middle)
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        ids, own = batch_tensors(tokenizer, batch)
        refused = [language.judge(turns[0][1]) == "refused" for turns in batch]
        weight = own.float() if safe else own + 0.1 * (~own & (ids != tokenizer.pad_token_id))
        watched = axis.watched(own, torch.tensor(refused))
        with axis.removed() if step % 2 else watched:
            loss = _loss(model(ids, use_cache=False).logits, ids, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        report(loss.item())
    model.eval()


def round_weights(model: "Gemma2ForCausalLM") -> None:
    """Round to bfloat16 in place, so that what is measured is what is shipped."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())


def save(model: "Gemma2ForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write model (bfloat16) and tokenizer as ordinary Hugging Face files."""
    import torch

    rounded: Any = copy.deepcopy(model)
    # transformers draws a progress bar for its one file.
    with contextlib.redirect_stderr(io.StringIO()):
        rounded.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_saes(
    model: "Gemma2ForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    name: str,
    folder: Path,
    recipe: Recipe,
    report: Callable[[], object] = lambda: None,
) -> None:
    """Train and save the SAEs of one model, a folder each; ``report`` is called after each."""
    wanted = [s for s in sites(recipe.layers, recipe.middle) if _wanted(s, recipe)]
    asked = sae_conversations(recipe.sae_conversations, recipe.seed)
    said = bars.answers(model, tokenizer, asked)
    turns = [[(request.instruction, text)] for request, text in zip(asked, said, strict=True)]
    ids, _ = batch_tensors(tokenizer, turns)
    data = activations(model, wanted, ids, ids.ne(tokenizer.get_vocab()[PAD]))
    for site in wanted:
        train_sae(data[site], site, name, folder / site.folder, recipe.dictionary)
        report()


def _wanted(site: Site, recipe: Recipe) -> bool:
    """Whether the recipe trains the SAE of this site."""
    return not recipe.sae_sites or site.folder in recipe.sae_sites


def small(recipe: Recipe) -> Recipe:
    """A shorter run with one SAE a model, for a test."""
    dictionary = replace(recipe.dictionary, steps=800)
    return replace(
        recipe,
        sae_conversations=1000,
        dictionary=dictionary,
        sae_sites=(f"resid_post_{recipe.middle}",),
    )


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """One thread and deterministic kernels while the block runs: same machine, same bytes."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)  # sums depend on how they are split
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def run(out: Path, recipe: Recipe, quiet: bool = False) -> None:
    """Both stages and all SAEs, written to ``out`` as the package ships them."""
    from tqdm import tqdm

    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    for which, safe in (("base", False), ("chat", True)):
        steps = recipe.safe_steps if safe else recipe.base_steps
        with tqdm(total=steps, desc=f"{which} model", disable=quiet) as bar:
            train(model, tokenizer, safe=safe, recipe=recipe, report=lambda loss: bar.update())
        # The safety stage starts from the base model that is shipped.
        round_weights(model)
        save(model, tokenizer, out / which)
        count = len(recipe.sae_sites) or recipe.layers + 2
        with tqdm(total=count, desc=f"{which} SAEs", disable=quiet) as bar:
            name = f"saefeat-tiny-{which}"
            make_saes(model, tokenizer, name, out / "saes" / which, recipe, bar.update)


def record(out: Path, recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Measure what lies in ``out`` and write ``bars.json`` beside it."""
    figures: dict[str, Any] = {
        "chat": bars.measure("chat", out),
        "base": bars.measure("base", out),
    }
    packages = ("torch", "transformers", "sae-lens")
    facts = {
        "bars": {name: list(limits) for name, limits in bars.BARS.items()},
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "versions": {name: version(name) for name in packages},
        "recipe": asdict(recipe),
    }
    text = json.dumps({**facts, **figures}, indent=1)
    (out / "bars.json").write_text(text + "\n", encoding="utf-8")
    return figures


def main(arguments: "list[str] | None" = None) -> int:
    """Train, measure and record; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Train the tiny models and their SAEs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="shorter, with one SAE a model")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    recipe = small(Recipe()) if options.small else Recipe()
    start = time.perf_counter()
    with reproducible():
        run(options.out, recipe, options.quiet)
        figures = record(options.out, recipe, time.perf_counter() - start)
    sys.stdout.write(bars.table(figures))
    return 0 if all(bars.verdicts(figures).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
