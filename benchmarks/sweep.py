"""A sweep of 32 settings on one prompt, against 32 runs of their own.

python benchmarks/sweep.py [--settings 32 --tokens 24 --rounds 5]
"""

from __future__ import annotations

import argparse

from generation import timed

import saefeat as sf
from saefeat.studies.refusal import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = tiny.model("chat")
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    chat = [{"role": "user", "content": "how do i bake bread"}]
    settings = {
        (index, value): sf.Clamp(saes.latents({2: [index]}), float(value))
        for index in range(args.settings // 4)
        for value in range(4)
    }

    def together() -> None:
        sf.sweep(model, chat, settings, max_new_tokens=args.tokens)

    def alone() -> None:
        for edit in settings.values():
            sf.run(model, chat, edit, max_new_tokens=args.tokens)

    seconds = timed({"runs of their own": alone, "sweep": together}, args.rounds)
    print(f"{len(settings)} settings, one prompt, {args.tokens} tokens, the tiny model")
    for name, found in seconds.items():
        print(f"{name:20s} {found:7.3f} s   {found / seconds['runs of their own']:5.2f} x")


if __name__ == "__main__":
    main()
