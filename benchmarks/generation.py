"""Generation under an edit, against the same generation without one.

    python benchmarks/generation.py [--layers 24 --width 512 --rounds 7]

Variants take turns within each round, and ratios are of medians within this one run: on a shared
machine seconds mean little and ratios something.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import models
import nnsight

import saefeat as sf


def timed(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def variants(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    plain = models.model(args.layers, args.width)
    traced = models.traced(plain)
    inputs = models.batch(1, 16)
    options = {"max_new_tokens": args.tokens, "do_sample": False}

    def nnsight_run(model: object) -> Callable[[], None]:
        def run() -> None:
            with model.generate(inputs, **options) as tracer:  # type: ignore[attr-defined]
                nnsight.save(tracer.result)

        return run

    found: dict[str, Callable[[], None]] = {
        "plain HF": lambda: plain.generate(**inputs, **options),
        "nnsight, no edit": nnsight_run(traced),
    }
    for latents in (4096, 16384, 65536):
        saes = models.saes(plain, latents)
        chosen = saes.latents({layer: range(20) for layer in range(args.layers)})
        clamp = sf.Clamp(chosen, scale=0.5)
        if latents == 16384:

            def hooked(clamp: sf.Clamp = clamp) -> None:
                with sf.hooked(plain, clamp):
                    plain.generate(**inputs, **options)

            found["hooked, 20 of 16k"] = hooked
        found[f"edit, 20 of {latents // 1024}k"] = nnsight_run(sf.edit(traced, clamp))
        del saes  # an edit keeps its 20 columns and nothing else
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    seconds = timed(variants(args), args.rounds)
    print(f"{args.layers} layers, d_model {args.width}, {args.tokens} tokens, 20 latents a layer")
    for name, found in seconds.items():
        base = "plain HF" if name in ("plain HF", "hooked, 20 of 16k") else "nnsight, no edit"
        print(f"{name:20s} {found:7.3f} s   {found / seconds[base]:5.2f} x {base}")


if __name__ == "__main__":
    main()
