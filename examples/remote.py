"""The verbs on a server: a server of one's own by default, NDIF with a key.

    export PYTHONPATH=tests                                    # where loopback is
    python examples/remote.py                                  # starts a server on this machine
    python examples/remote.py --remote http://127.0.0.1:8001 --model FOLDER   # make ndif-up
    python examples/remote.py --remote ndif --model google/gemma-2-9b-it \\
        --saes gemma-scope-9b-it-res-canonical --layer 20 --latents 12 345

For NDIF the key is nnsight's: the environment's NDIF_API_KEY, or `nnsight login`. The model is not
loaded here then; only its configuration and tokenizer are.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import nnsight
import torch
from nnsight import TransformersModel
from transformers import AutoTokenizer

import loopback  # NDIF's server code on this machine: the repository's tests/loopback
import saefeat as sf
from saefeat.studies.refusal import tiny

QUESTIONS = ["how do i bake bread", "hello"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--remote", default="loopback", help='"loopback", "ndif" or a URL')
    parser.add_argument("--model", help="a repository id, or a folder; the tiny model by default")
    parser.add_argument("--saes", help="a release, with --model; the tiny model's by default")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--value", type=float, default=4.0, help="what the latents are set to")
    parser.add_argument("--job", type=Path, help="a file for the job: run again to resume")
    return parser.parse_args()


def load(asked: argparse.Namespace) -> tuple[TransformersModel, sf.dictionaries.Dictionaries]:
    """The model, without weights where it runs elsewhere, and its SAEs."""
    if asked.model is None:
        saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        return tiny.model("chat"), saes
    tokenizer, where = AutoTokenizer.from_pretrained(asked.model), asked.saes
    model = TransformersModel(asked.model, tokenizer=tokenizer, task="text-generation")
    if Path(asked.model).is_dir():  # what `make ndif-up` serves
        where = where or tiny.saes_folder("chat")
        sf.remote.named(model, asked.model)  # nnsight would look it up on the Hub
    return model, sf.load_saes(where, sites="resid_post")


def main() -> None:
    asked = options()
    model, saes = load(asked)
    latents = saes.latents({asked.layer: asked.latents})
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    edits = sf.Clamp(latents, asked.value) | sf.Probe(latents, reduce="max")

    with ExitStack() as stack:
        url = None if asked.remote == "ndif" else asked.remote
        if asked.remote == "loopback":
            url = stack.enter_context(loopback.serve(model)).url
        server = sf.remote.Server(url)

        print(sf.remote.preflight(model, chats, edits, max_new_tokens=12, on=server), "\n")

        # One call: prompts in; text, readings and a receipt out.
        # With --job, a second run takes the job up from its file and resends what failed.
        if asked.job is not None and asked.job.exists():
            job = sf.remote.Job.load(asked.job, model, on=server).resubmit()
        else:
            job = sf.remote.submit(
                model, chats, edits, max_new_tokens=12, on=server, file=asked.job
            )
        out = job.wait()
        for question, answer in zip(QUESTIONS, out.texts, strict=True):
            print(f"{question!r} -> {answer!r}")
        print(out.receipt.rows[0])
        print("readings", out.readings[0].values.squeeze(1).tolist(), "\n")

        # The same in a block of one's own.
        batch = model.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        bound = edits.bind(model)
        with model.trace(batch, remote=url or True):
            log = nnsight.save(bound(model))
            top = nnsight.save(model.output.logits[:, -1].detach().argmax(-1))
        print("first tokens", model.tokenizer.convert_ids_to_tokens(top.tolist()))
        print("tokens edited", edits.receipt(log).rows[0].tokens)

    if asked.model is None:
        here = sf.run(model, chats, edits, max_new_tokens=12)
        print("as here:", here.completions == out.completions)
        print("readings as here:", torch.allclose(here.readings[0].values, out.readings[0].values))


if __name__ == "__main__":
    main()
