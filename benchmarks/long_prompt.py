"""Memory of one long prompt: 2,000 tokens, 8 layers, every latent of every site.

    python benchmarks/long_prompt.py [--tokens 2000 --latents 16384 --steps 2 --keep 0]

Each row is a fresh process and its peak resident memory, the interpreter, the model and the
dictionaries included. Scores are read out in blocks of tokens and latents, so that the model's own
graph is what memory is spent on: eager attention keeps [heads, tokens, tokens] twice a layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import memory
import models
import torch

import saefeat as sf

VARIANTS = ("loaded", "the model's own pass", "saefeat")


def own_pass(plain: torch.nn.Module, inputs: dict) -> None:
    """One forward and backward pass of the bare model from the first block's output on."""
    held: list[torch.Tensor] = []

    def start(_: object, args: object, output: torch.Tensor) -> torch.Tensor:
        held.append(output.detach().requires_grad_())
        return held[0]

    hook = plain.model.layers[0].register_forward_hook(start)  # type: ignore[union-attr, index]
    logits = plain(**inputs, logits_to_keep=1).logits[:, -1]
    hook.remove()
    torch.autograd.grad((logits[:, 5] - logits[:, 7]).sum(), held)


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    plain = models.model(args.layers, args.width)
    plain.requires_grad_(False)
    saes = models.saes(plain, args.latents)
    inputs = models.batch(1, args.tokens)
    found: dict[str, float] = {"loaded_mb": memory.peak()}
    start = time.perf_counter()
    if args.variant == "the model's own pass":
        own_pass(plain, inputs)
    elif args.variant == "saefeat":
        method = sf.IG(args.steps) if args.steps > 1 else sf.attribution.AtP()
        job = sf.Attribute(saes, sf.logit_diff(5, 7), method=method, keep=args.keep or None)
        found["scores"] = len(job(models.traced(plain), inputs))
    print(json.dumps({**found, "seconds": time.perf_counter() - start, "peak_mb": memory.peak()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS)
    args = parser.parse_args()
    if args.variant:
        child(args)
        return
    print(f"{args.tokens} tokens, {args.layers} layers, {args.latents} latents a site")
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--variant", variant], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        scores = f"  {found['scores']:,} scores" if "scores" in found else ""
        print(f"{variant:22s} {found['peak_mb']:7.0f} MB  {found['seconds']:6.1f} s{scores}")


if __name__ == "__main__":
    main()
