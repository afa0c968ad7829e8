"""Integrated gradients over all sites and latents, against the SAE-in-the-graph form.

    python benchmarks/attribution.py [--layers 8 --latents 16384 --steps 10]

Each variant runs in a fresh process, which reports its time and how much its peak memory grew
over the point at which model and dictionaries were loaded. The floor is what no method can avoid:
the bare model's passes, and encoding both runs once.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import models
import torch

import saefeat as sf

VARIANTS = ("floor", "saefeat", "10 candidates a site", "SAE in the graph")


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 5] - logits[:, 7]


def floor(plain: torch.nn.Module, saes: sf.Dictionaries, inputs: dict, steps: int) -> None:
    """Baseline pass, and ``steps`` forward and backward passes to every site; two encodes."""
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
    with torch.no_grad():
        for node, sae in zip(nodes, saes.values(), strict=True):
            for _ in range(2):
                sae.encode(node.detach())


def in_graph(plain: torch.nn.Module, saes: sf.Dictionaries, inputs: dict, steps: int) -> None:
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
        return leaf @ decoders[n] + errors[n] + (out - out.detach())

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
    [-(f * g) for f, g in zip(latents, total, strict=True)]


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plain = models.model(args.layers, args.width)
    plain.requires_grad_(False)
    saes = models.saes(plain, args.latents)
    inputs = models.batch(4, 32)
    target: object = saes
    if args.variant == "10 candidates a site":
        target = saes.latents({layer: range(10) for layer in range(args.layers)})
    attribute = sf.Attribute(target, sf.metric(metric), method=sf.IG(args.steps))  # type: ignore[arg-type]
    traced = models.traced(plain)
    plain(**inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        if args.variant == "floor":
            floor(plain, saes, inputs, args.steps)
        elif args.variant == "SAE in the graph":
            in_graph(plain, saes, inputs, args.steps)
        else:
            attribute(traced, inputs)
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": min(seconds), "extra_mb": (after - before) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variant", choices=VARIANTS)
    args = parser.parse_args()
    if args.variant:
        child(args)
        return
    print(
        f"{args.layers} layers, d_model {args.width}, {args.latents} latents a site, 4 x 32 tokens"
    )
    base = None
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--variant", variant], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        base = base or found
        times = found["seconds"] / base["seconds"]
        print(
            f"{variant:22s} {found['seconds']:7.2f} s  {times:6.2f} x floor"
            f"  {found['extra_mb']:8.0f} MB extra"
        )


if __name__ == "__main__":
    main()
