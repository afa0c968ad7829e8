"""Run by test_parallel.py, once a rank: a model split by tensor parallelism over two processes.

Both ranks run the same calls in the same order, as every collective needs. What each gave, and each
error, is written to a file for the test to compare with one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

import beartype  # noqa: F401  (before nnsight)
import nnsight
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import parallel_utils, tensor_parallel

import saefeat as sf
from helpers import RAGGED, D, batch_of, make_sae, tokenizer, transformers_model

WHOLE = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_norm", "mlp_out", "resid_post")
SHARDED = ("z", "mlp_post")
SITES = (*WHOLE, *SHARDED)
READ_ONLY = ("mlp_norm",)
WIDTH = {"mlp_post": 64}
NEW = 3


def direction(kind: str, seed: int = 0) -> sf.Direction:
    g = torch.Generator().manual_seed(seed)
    return sf.Direction(torch.randn(WIDTH.get(kind, D), generator=g), site=f"{kind}.1")


def at(kind: str) -> sf.Intervention:
    probe = sf.Probe(direction(kind, 1))
    return probe if kind in READ_ONLY else sf.Clamp(direction(kind), add=2.0) | probe


def latents() -> sf.Latents:
    return make_sae("jumprelu", "resid_post.1").latents([3, 40, 17])


def ran(model, kind: str) -> dict[str, torch.Tensor]:
    out = sf.run(model, RAGGED, at(kind), max_new_tokens=NEW)
    read = out.readings[0]
    tokens = [row for row in out.completions]
    return {"logits": out.logits, "read": read.values * read.mask, "text": tokens}


def inline(model) -> dict[str, torch.Tensor]:
    edit = sf.Ablate(latents())
    with torch.no_grad(), model.trace(batch_of()):
        nnsight.save(edit(model))
        logits = nnsight.save(model.output.logits)
    return {"logits": logits}


def edited(model) -> dict[str, torch.Tensor]:
    copy = sf.edit(model, sf.Clamp(latents(), 4.0))
    with copy.generate(batch_of(), max_new_tokens=NEW, do_sample=False) as tracer:
        tokens = nnsight.save(tracer.result)
    return {"tokens": tokens}


def attributed(model, kind: str) -> dict[str, torch.Tensor]:
    part = direction(kind).latents() if kind != "resid_post" else latents()
    found = sf.Attribute(part, sf.logit_diff(3, 5), method=sf.attribution.AtP())(model, RAGGED)
    return {"score": found.score}


def by_hooks(model, kind: str) -> dict[str, torch.Tensor]:
    module, batch = model._module, batch_of()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sf.hooked(module, at(kind)):
        return {"logits": module(**batch, position_ids=positions).logits}


def bare(model) -> dict[str, torch.Tensor]:
    return {"logits": sf.run(model, RAGGED).logits}


def everything(model) -> dict[str, object]:
    calls = {f"run {kind}": (ran, kind) for kind in SITES}
    calls |= {f"hooked {kind}": (by_hooks, kind) for kind in SITES}
    calls |= {f"attribute {kind}": (attributed, kind) for kind in ("resid_post", "mlp_out", "z")}
    calls |= {"inline": (inline,), "edit": (edited,), "bare": (bare,)}
    found: dict[str, object] = {}
    for name, (call, *arguments) in calls.items():
        try:
            found[name] = call(model, *arguments)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(folder: str, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=15)
    )
    module = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    found: dict[str, object] = {}
    if not hasattr(tensor_parallel, "_get_parameter_plan"):
        # nnsight 0.8.1 looks for a helper where transformers 5.19 had it; put there, all works
        tensor_parallel._get_parameter_plan = parallel_utils._get_parameter_plan
    found |= everything(transformers_model(module, tokenizer()))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], int(sys.argv[2]))
