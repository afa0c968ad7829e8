"""The lm-evaluation-harness sees an edit: its own scores, with and without refusal latents.

    pip install -e '.[harness]' -c constraints.txt
    python examples/harness/evaluate.py

The harness calls the model itself, so the edit is made with ``sf.hooked``. Nothing is downloaded:
the model ships with saefeat, the task is refusal.yaml and the data requests.jsonl beside it.
"""

from __future__ import annotations

from contextlib import chdir, nullcontext
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from nnsight import TransformersModel

import saefeat as sf
from saefeat.studies.refusal import tiny

HERE = Path(__file__).resolve().parent


def refusal_latents(model, tokenizer) -> sf.Latents:
    """The latents that carry the choice between refusing and complying, on other requests."""
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    requests = tiny.splits()["harmful_val"][:8]
    chats = [[{"role": "user", "content": request.instruction}] for request in requests]
    metric = sf.logit_diff(list(tiny.COMPLY_OPENINGS), list(tiny.REFUSAL_OPENINGS))
    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    return sf.Attribute(saes, metric)(wrapped, chats).top(8)


def score(lm: HFLM, intervention: sf.Intervention | None = None) -> tuple[float, list[list[float]]]:
    """Accuracy, and for each request the log likelihoods of refusing and of complying."""
    edited = nullcontext() if intervention is None else sf.hooked(lm.model, intervention)
    with chdir(HERE), edited:  # the task names its data relative to this folder
        found = simple_evaluate(
            lm,
            tasks=["tiny_refusal"],
            task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["tiny_refusal"], key=lambda sample: sample["doc_id"])
    likelihoods = [[choice[0][0] for choice in sample["resps"]] for sample in samples]
    return found["results"]["tiny_refusal"]["acc,none"], likelihoods


def main() -> None:
    """Scores of the model as it is, and with its refusal latents ablated."""
    model, tokenizer = tiny.load("chat")
    ablate = sf.Ablate(refusal_latents(model, tokenizer))
    # The harness pads on the right and passes no mask for likelihoods. Batches of one need none,
    # so that rules which count from the end, receipts and readings are right too.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256)
    for name, intervention in (("as it is", None), ("refusal ablated", ablate)):
        accuracy, likelihoods = score(lm, intervention)
        refused = sum(refuse > comply for refuse, comply in likelihoods)
        print(f"{name:16} accuracy {accuracy:.2f}, refused {refused} of {len(likelihoods)}")


if __name__ == "__main__":
    main()
