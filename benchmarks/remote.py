"""What verbs cost on the released NDIF server: bytes sent, parks, crossings, seconds.

    make .venv-ndif/.stamp                 # the server's environment
    python benchmarks/remote.py            # a tiny random llama of 26 layers, and one of 80

Each verb acts on 20 latents at every layer's residual stream, for two prompts in one forward pass.
``parks`` is what preflight foresees: how often a pass hands a value to the block or takes one back.
Messages and bytes between model and block are counted in the sandbox, where they cross between two
processes. Seconds are from the call to the result, the median of some; in the sandbox each request
waits for a fresh interpreter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nnsight
import torch
import transformers
from nnsight import TransformersModel
from transformers import LlamaConfig, LlamaForCausalLM

import saefeat as sf
from saefeat.studies.refusal import tiny

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.ndif.deployments import Deployment  # noqa: E402
from tools.ndif.space import isolate  # noqa: E402
from tools.ndif.stack import Stack  # noqa: E402

WIDTH, LATENTS = 64, 20
PROMPTS = ["how do i bake bread", "hello"]


def write(layers: int, folder: Path) -> None:
    """A tiny random llama with the embedded model's tokenizer."""
    _, tokenizer = tiny.load("chat")
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer),
    )  # fmt: skip
    torch.manual_seed(layers)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def client(deployment: Deployment) -> TransformersModel:
    name = str(deployment.folder)
    _, tokenizer = tiny.load("chat")
    model = TransformersModel(name, tokenizer=tokenizer, task="text-generation")
    return sf.remote.named(model, name)


def latents(layers: int, count: int) -> sf.Latents:
    """Unit rows weigh what latents weigh."""
    rows = (torch.linalg.qr(torch.randn(WIDTH, count)).Q.T for _ in range(layers))
    return sf.dictionaries.Dictionaries(
        sf.Direction(row, site=f"resid_post.{layer}") for layer, row in enumerate(rows)
    ).latents()


def verbs(layers: int) -> dict[str, sf.verbs.base.Intervention]:
    every = latents(layers, LATENTS)
    one = sf.Direction(torch.randn(WIDTH), site=f"resid_post.{layers // 2}")
    return {
        "Probe, one site": sf.Probe(one),
        "Probe": sf.Probe(every, reduce="max"),
        "Ablate": sf.Ablate(every),
        "Clamp": sf.Clamp(every, add=1.0),
        "Clamp | Probe": sf.Clamp(every, add=1.0) | sf.Probe(every, reduce="max"),
    }


def calls(layers: int, model: TransformersModel, on: sf.remote.Server) -> Iterator[tuple]:
    """Name, payload, parks, and the call."""
    for name, verb in verbs(layers).items():
        told = sf.remote.preflight(model, PROMPTS, verb)
        yield name, told.payload, told.parks, lambda verb=verb: sf.run(model, PROMPTS, verb, on=on)
    told = sf.remote.preflight(model, PROMPTS, verb, max_new_tokens=4)
    yield (
        "Clamp | Probe, 4 tokens", told.payload, told.parks,
        lambda verb=verb: sf.run(model, PROMPTS, verb, max_new_tokens=4, on=on),
    )  # fmt: skip


def timed(call: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def crossed(counts: Path) -> str:
    """The last request's messages and bytes between the model and its block."""
    if not counts.exists():
        return f"{'':>8} {'':>11}"
    last = json.loads(counts.read_text().splitlines()[-1])
    counts.unlink()
    messages = last["to_block"] + last["to_model"]
    return f"{messages:>8,} {last['bytes_to_block'] + last['bytes_to_model']:>11,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[26, 80])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ndif")
    asked = parser.parse_args()
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    transformers.utils.logging.disable_progress_bar()
    isolate()
    with tempfile.TemporaryDirectory(prefix="ndif-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        places = [(n, i) for n in asked.layers for i in ("trusted", "sandbox")]
        served = {(n, i): Deployment(folder / f"{i}-{n}", "float32", i) for n, i in places}
        for (layers, _), deployment in served.items():
            write(layers, deployment.folder)
        counts = folder / "crossings"
        settings = {"NDIF_CROSSINGS": str(counts)}
        with Stack(folder / "s", asked.venv.absolute(), served.values(), settings) as stack:
            print(f"{'sites':>5} {'isolation':<9} {'verb':<24} {'sent':>8} {'parks':>5}", end=" ")
            print(f"{'messages':>8} {'bytes':>11} {'seconds':>7}")
            for (layers, isolation), deployment in served.items():
                model, on = client(deployment), sf.remote.Server(stack.url)
                for verb, payload, parks, call in calls(layers, model, on):
                    start = f"{layers:>5} {isolation:<9} {verb:<24} {payload:>8,} {parks:>5}"
                    seconds = timed(call, asked.rounds)
                    print(start, crossed(counts), f"{seconds:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
