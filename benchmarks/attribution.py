"""Integrated gradients over all sites and latents, against its rivals.

    python benchmarks/attribution.py [--layers 8 --latents 16384 --steps 10]
    python benchmarks/attribution.py --growth     # figures, in benchmarks/

Each variant runs in a fresh process, which reports its time and how much its peak memory grew
over the point at which model and dictionaries were loaded. The floor is what no method can avoid:
the bare model's passes, and encoding both runs once.

Rivals: the SAE in the graph as the paper's authors have it, each hook encoding and decoding inside
the graph and every step's gradient kept until the mean; the same written as leanly as it can be,
latents as leaves and one sum of gradients; captum's integrated gradients over the same latents,
as one input a site; and SAELens's own modules spliced in with their error term. SAELens detaches
the error, so what it computes is another thing (through_sae), at one gradient a run where its
latents are nodes: it is given ``steps`` of these on blended inputs of the first site alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import memory
import models
import torch

import saefeat as sf
from saefeat.kernel.encode import encode

OURS = ("saefeat", "10 candidates a site", "one site at a time", "through_sae")
RIVALS = ("SAE in the graph, as published", "SAE in the graph, lean", "captum", "SAELens hooks")
VARIANTS = ("floor", "the bare model's passes", *OURS, *RIVALS)
GROWTH = {  # what grows, its values, and the variants that are drawn
    "latents": (4096, 16384, 65536),
    "layers": (2, 4, 8, 16),
    "prompts": (1, 4, 16),
    "tokens": (32, 128, 256),
}
DRAWN = ("floor", "saefeat", "SAE in the graph, lean")


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 5] - logits[:, 7]


def floor(
    plain: torch.nn.Module, saes: sf.dictionaries.Dictionaries, inputs: dict, steps: int
) -> None:
    """The bare model's passes, and two encodes of every site."""
    nodes = bare_passes(plain, inputs, steps)
    with torch.no_grad():
        for node, sae in zip(nodes, saes.values(), strict=True):
            for _ in range(2):
                sae.encode(node.detach())


def bare_passes(plain: torch.nn.Module, inputs: dict, steps: int) -> list[torch.Tensor]:
    """Baseline pass, and ``steps`` forward and backward passes to every site, which is returned."""
    nodes: list[torch.Tensor] = []

    def watch(_: object, args: object, output: torch.Tensor) -> torch.Tensor:
        node = output if nodes else output.detach().requires_grad_()
        nodes.append(node)
        return node

    with torch.no_grad():
        plain(**inputs)
    hooks = [block.register_forward_hook(watch) for block in plain.model.layers]  # type: ignore[union-attr]
    for _ in range(steps):
        nodes.clear()
        torch.autograd.grad(metric(plain(**inputs, logits_to_keep=1).logits[:, -1]).sum(), nodes)
    for hook in hooks:
        hook.remove()
    return nodes


class _Passed(torch.autograd.Function):
    """The second value; backward its gradient goes to both, as if the first had passed through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient


def as_published(
    plain: torch.nn.Module, saes: sf.dictionaries.Dictionaries, inputs: dict, steps: int
) -> list[torch.Tensor]:
    """The authors' way (PAPER.md, section 2.4), towards zero latents and the clean error.

    A hook encodes its input and decodes it for the error, blends latents and error with those of
    the other run, decodes the blend, and hands gradients through as they come. Latents and errors
    of both runs, and the latents' gradients of every step, are kept in full until the end.
    """
    sites = list(saes.values())
    weights = [cast_all(sae) for sae in sites]
    decoders = [columns["directions"] for columns in weights]
    blocks = list(plain.model.layers)  # type: ignore[union-attr, arg-type]
    clean = bare(plain, inputs)
    with torch.no_grad():
        first = [encode(columns, x)[0] for columns, x in zip(weights, clean, strict=True)]
        other = [torch.zeros_like(f) for f in first]
        errors = [x - f @ decoder for x, f, decoder in zip(clean, first, decoders, strict=True)]
    kept: list[list[torch.Tensor]] = [[] for _ in sites]
    for step in range(steps):
        share, nodes = step / steps, {}

        def hook(n: int, x: torch.Tensor, share: float = share, nodes: dict = nodes):
            x = x if x.requires_grad else x.requires_grad_()
            inside = x.detach().requires_grad_()
            f = encode(weights[n], inside)[0]
            error = inside - f @ decoders[n]
            blend = (1 - share) * f + share * other[n]
            blend.retain_grad()
            nodes[n] = blend
            out = blend @ decoders[n] + (1 - share) * error + share * errors[n]
            return _Passed.apply(x, out)

        hooks = [
            block.register_forward_hook(lambda m, a, out, n=n, hook=hook: hook(n, out))
            for n, block in enumerate(blocks)
        ]
        logits = plain(**inputs, logits_to_keep=1).logits[:, -1]
        for handle in hooks:
            handle.remove()
        metric(logits).sum().backward()
        for n, node in nodes.items():
            assert node.grad is not None
            kept[n].append(node.grad.detach())
    means = [torch.stack(gradients).mean(0) for gradients in kept]
    return [(g - f) * mean for g, f, mean in zip(other, first, means, strict=True)]


def cast_all(sae: sf.dictionaries.Dictionary) -> dict:
    """All of a dictionary's tensors."""
    return sae.columns(torch.arange(sae.d_sae))


def in_graph(
    plain: torch.nn.Module, saes: sf.dictionaries.Dictionaries, inputs: dict, steps: int
) -> list[torch.Tensor]:
    """Latents as leaves, decoded inside the graph, one gradient of size d_sae a site and step."""
    sites = list(saes.values())
    clean: list[torch.Tensor] = []
    with torch.no_grad():
        hooks = [
            block.register_forward_hook(lambda m, a, out: clean.append(out.clone()))
            for block in plain.model.layers  # type: ignore[union-attr]
        ]
        plain(**inputs)
        for hook in hooks:
            hook.remove()
        latents = [sae.encode(x) for sae, x in zip(sites, clean, strict=True)]
        decoders = [sae.directions() for sae in sites]
        errors = [x - f @ decoder for x, f, decoder in zip(clean, latents, decoders, strict=True)]

    def spliced(n: int, out: torch.Tensor, share: float, leaves: list) -> torch.Tensor:
        leaf = (latents[n] * share).requires_grad_()
        leaves.append(leaf)
        part = leaf @ decoders[n]
        rest = torch.lerp(errors[n], out.detach(), share) - part.detach()
        return part + rest + (out - out.detach())

    total = [torch.zeros_like(f) for f in latents]
    for step in range(steps):
        leaves: list[torch.Tensor] = []

        share = 1 - step / steps
        hooks = [
            block.register_forward_hook(
                lambda m, a, out, n=n, share=share, leaves=leaves: spliced(n, out, share, leaves)
            )
            for n, block in enumerate(plain.model.layers)  # type: ignore[union-attr, arg-type]
        ]
        logits = plain(**inputs, logits_to_keep=1).logits[:, -1]
        for hook in hooks:
            hook.remove()
        for n, gradient in enumerate(torch.autograd.grad(metric(logits).sum(), leaves)):
            total[n] += gradient / steps
    return [-(f * g) for f, g in zip(latents, total, strict=True)]


def captum_ig(
    plain: torch.nn.Module, saes: sf.dictionaries.Dictionaries, inputs: dict, steps: int
) -> None:
    """captum's IG with every site's latents as an input, blended to zero together."""
    from captum.attr import IntegratedGradients  # imported by ``work`` already

    sites = list(saes.values())
    clean, decoders = bare(plain, inputs), [sae.directions() for sae in sites]
    latents = tuple(sae.encode(x) for sae, x in zip(sites, clean, strict=True))
    errors = [x - f @ d for x, f, d in zip(clean, latents, decoders, strict=True)]

    def forward(*leaves: torch.Tensor) -> torch.Tensor:
        copies = len(leaves[0]) // len(errors[0])
        many = {name: tensor.repeat(copies, 1) for name, tensor in inputs.items()}
        hooks = [
            block.register_forward_hook(
                lambda m, a, out, n=n: (
                    leaves[n] @ decoders[n] + errors[n].repeat(copies, 1, 1) + (out - out.detach())
                )
            )
            for n, block in enumerate(plain.model.layers)  # type: ignore[union-attr, arg-type]
        ]
        try:
            return metric(plain(**many, logits_to_keep=1).logits[:, -1])
        finally:
            for hook in hooks:
                hook.remove()

    IntegratedGradients(forward).attribute(
        latents, n_steps=steps, method="riemann_left", internal_batch_size=len(errors[0])
    )


def sae_lens_modules(saes: sf.dictionaries.Dictionaries) -> list:
    """The same dictionaries as SAELens's own modules, with their error term."""
    import sae_lens

    modules = []
    for sae in saes.values():
        config = sae_lens.JumpReLUSAEConfig(
            d_in=sae.d_in, d_sae=sae.d_sae, apply_b_dec_to_input=False
        )
        module = sae_lens.JumpReLUSAE(config, use_error_term=True)
        columns = sae.columns(torch.arange(sae.d_sae))
        names = {"W_enc": "encoder", "b_enc": "bias", "W_dec": "directions"}
        for theirs, ours in (names | {"threshold": "threshold"}).items():
            getattr(module, theirs).data = columns[ours]
        modules.append(module.requires_grad_(False))
    return modules


def sae_lens_hooks(plain: torch.nn.Module, modules: list, inputs: dict, steps: int) -> None:
    """SAELens's modules spliced into the model; latents are nodes by their own hook."""
    clean = bare(plain, inputs)
    for step in range(steps):
        held: list[torch.Tensor] = []

        def keep(f: torch.Tensor, hook: object = None, held: list = held) -> torch.Tensor:
            held.append(f if f.requires_grad else f.requires_grad_())
            return held[-1]

        hooks = []
        for n, block in enumerate(plain.model.layers):  # type: ignore[union-attr, arg-type]
            modules[n].reset_hooks()
            modules[n].add_hook("hook_sae_acts_post", keep)
            share = 1 - step / steps

            def splice(m: object, a: object, out: torch.Tensor, n: int = n, share: float = share):
                return modules[n](clean[0] * share if n == 0 else out)

            hooks.append(block.register_forward_hook(splice))
        logits = plain(**inputs, logits_to_keep=1).logits[:, -1]
        for hook in hooks:
            hook.remove()
        for f, slope in zip(held, torch.autograd.grad(metric(logits).sum(), held), strict=True):
            f * slope


def bare(plain: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Every block's output."""
    found: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: found.append(out.clone()))
        for block in plain.model.layers  # type: ignore[union-attr]
    ]
    with torch.no_grad():
        plain(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def work(
    args: argparse.Namespace,
    plain: torch.nn.Module,
    saes: sf.dictionaries.Dictionaries,
    inputs: dict,
):
    """What a variant does, as a function without arguments."""
    if args.variant == "SAELens hooks":
        modules = sae_lens_modules(saes)
        return lambda: sae_lens_hooks(plain, modules, inputs, args.steps)
    if args.variant == "captum":
        import captum.attr  # noqa: F401  (not in the time of the job)
    if args.variant == "the bare model's passes":
        return lambda: bare_passes(plain, inputs, args.steps)
    rivals = {"floor": floor, "captum": captum_ig}
    rivals |= {"SAE in the graph, as published": as_published, "SAE in the graph, lean": in_graph}
    if args.variant in rivals:
        return lambda: rivals[args.variant](plain, saes, inputs, args.steps)
    few = args.variant == "10 candidates a site"
    target = saes.latents({layer: range(10) for layer in range(args.layers)}) if few else saes
    attribute = sf.Attribute(
        target,
        sf.metrics.custom(metric),
        method=sf.IG(args.steps),
        one_site=args.variant == "one site at a time",
        semantics="through_sae" if args.variant == "through_sae" else "pass_through",
    )
    traced = models.traced(plain)  # type: ignore[arg-type]
    return lambda: attribute(traced, inputs, batch_size=args.prompts)


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plain = models.model(args.layers, args.width)
    plain.requires_grad_(False)
    saes = models.saes(plain, args.latents)
    inputs = models.batch(args.prompts, args.tokens)
    job = work(args, plain, saes, inputs)
    with torch.no_grad():
        plain(**inputs)
    before = memory.settled()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(seconds), "extra_mb": memory.peak() - before}))


def measured(args: argparse.Namespace, variant: str, **changed: int) -> dict[str, float]:
    """One variant in a fresh process."""
    sizes = {name: getattr(args, name) for name in (*GROWTH, "width", "steps", "repeats")} | changed
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--variant", variant], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def growth(args: argparse.Namespace) -> None:
    """Time and memory as one thing grows: a figure for each."""
    for name, values in GROWTH.items():
        sizes = [max(1, int(value * args.scale)) for value in values]
        found = {}
        for variant in DRAWN:
            found[variant] = [measured(args, variant, **{name: size}) for size in sizes]
            print(name, variant, list(zip(sizes, found[variant], strict=True)), flush=True)
        draw(name, sizes, found)


def draw(name: str, sizes: list[int], found: dict[str, list[dict[str, float]]]) -> None:
    """One figure: seconds, and extra memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, key, label in zip(
        axes, ("seconds", "extra_mb"), ("seconds", "extra memory, MB"), strict=True
    ):
        for variant, rows in found.items():
            axis.plot(sizes, [row[key] for row in rows], marker="o", label=variant)
        axis.set(xlabel=name, ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    figure.savefig(Path(__file__).parent / f"attribution_{name}.png", dpi=100)
    pyplot.close(figure)


def checked() -> None:
    """The three forms give the same scores, at a small size."""
    plain = models.model(3, 128)
    plain.requires_grad_(False)
    saes, inputs = models.saes(plain, 512, 20), models.batch(4, 32)
    scores = sf.Attribute(saes, sf.metrics.custom(metric), method=sf.IG(4))(
        models.traced(plain), inputs
    )
    ours = torch.zeros(3, *inputs["input_ids"].shape, 512)
    ours[scores.dictionary, scores.prompt, scores.position, scores.latent] = scores.score
    for name, form in (("as published", as_published), ("lean", in_graph)):
        theirs = torch.stack(form(plain, saes, inputs, 4))
        apart = float((theirs - ours).abs().max() / theirs.abs().max())
        print(f"scores as with the SAE in the graph, {name}, to {apart:.1e} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="draw figures in place of the table")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink what grows, to try it out")
    parser.add_argument("--variant", choices=VARIANTS)
    args = parser.parse_args()
    if args.variant:
        child(args)
        return
    if args.growth:
        growth(args)
        return
    checked()
    print(
        f"{args.layers} layers, d_model {args.width}, {args.latents} latents a site,"
        f" {args.prompts} x {args.tokens} tokens"
    )
    base = None
    for variant in VARIANTS:
        found = measured(args, variant)
        base = base or found
        times = found["seconds"] / base["seconds"]
        print(
            f"{variant:32s} {found['seconds']:7.2f} s  {times:6.2f} x floor"
            f"  {found['extra_mb']:8.0f} MB extra"
        )


if __name__ == "__main__":
    main()
