"""Models inside of others: adapters, bodies without a head, classifiers, wrappers of training.

What ``adapted`` makes calls its model as PEFT does; where PEFT is installed, its own classes are
held to the same.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import types
import warnings

import nnsight
import pytest
import torch
import transformers
from nnsight import TransformersModel

import saefeat as sf
from adapted import NAMES, adapted
from helpers import (
    CONFIGS,
    RAGGED,
    D,
    batch_of,
    blocks_of,
    build,
    forward,
    hook_count,
    make_sae,
    raw_hooks,
    tokenizer,
    unit,
    wrapped,
)
from saefeat.results.provenance import model_identity

V = sf.Direction(unit(5), site="resid_post.1")
PUSH = sf.Clamp(V, 40.0)
ATP = sf.Attribute(make_sae().latents([1, 2, 3]), sf.logit_diff(5, 6), method=sf.attribution.AtP())
REAL = batch_of()["attention_mask"].bool()
NEW = 4


def by_hand(x):
    """The same as PUSH, for hooks that know nothing of saefeat."""
    return x + (40.0 - x @ unit(5))[..., None] * unit(5)


# ---------------------------------------------------------------- adapters

HAS_PEFT = importlib.util.find_spec("peft") is not None or "SAEFEAT_REQUIRE_PEFT" in os.environ
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed: `make test` does it")


def peft_model(kind: str = "lora", family: str = "llama"):
    """A tiny model under PEFT's own classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        some = {"target_modules": ["c_attn"] if family == "gpt2" else ["q_proj", "o_proj"]}
        task = {} if kind == "no task" else {"task_type": "CAUSAL_LM"}
        lora = {"r": 2, "init_lora_weights": False, **some, **task}
        virtual = {"num_virtual_tokens": 4, **task}
        config = {
            "lora": lambda: peft.LoraConfig(**lora),
            "no task": lambda: peft.LoraConfig(**lora),
            "dora": lambda: peft.LoraConfig(use_dora=True, **lora),
            "saved head": lambda: peft.LoraConfig(modules_to_save=["lm_head"], **lora),
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                init_ia3_weights=False, **task,
            ),
            "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, **some, **task),
            "oft": lambda: peft.OFTConfig(
                r=0, oft_block_size=8, init_weights=False, **some, **task
            ),
            "vera": lambda: peft.VeraConfig(
                r=2, init_weights=False, target_modules=["q_proj"], **task
            ),
            "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **task),
            "prompt": lambda: peft.PromptTuningConfig(**virtual),
            "prefix": lambda: peft.PrefixTuningConfig(**virtual),
            "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual),
        }[kind]()  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = peft.get_peft_model(build(family), config, adapter_name=NAMES[0])
            if kind == "lora":
                model.add_adapter(NAMES[1], copy.deepcopy(config))
    return model.eval()


def check_edits(model, family):
    """Every way of running against plain hooks on the wrapped model itself."""
    batch, nn, inner = batch_of(), wrapped(model), model.get_base_model()
    with raw_hooks(inner, {1: by_hand}):
        wanted = forward(model, batch)
        tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert (wanted - forward(model, batch))[REAL].abs().max() > 1.0
    close = {"atol": 1e-5, "rtol": 1e-5}
    with sf.hooked(model, PUSH) as log:
        torch.testing.assert_close(forward(model, batch)[REAL], wanted[REAL], **close)
        torch.testing.assert_close(forward(inner, batch)[REAL], wanted[REAL], **close)
        assert log.passes == 2
    run = sf.run(nn, RAGGED, PUSH)
    torch.testing.assert_close(run.logits, wanted[:, -1], **close)
    made = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW)
    assert [list(row) for row in made.completions] == tokens[:, 6:].tolist()
    assert made.receipt.rows[0].tokens == 13 + 3 * (NEW - 1)
    for cached in (True, False):
        options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": cached}
        with sf.hooked(model, PUSH):
            assert torch.equal(model.generate(**batch, **options), tokens)
        for step in (PUSH, None):
            with (sf.edit(nn, PUSH) if step is None else nn).generate(**options) as tracer:
                with tracer.invoke(batch):
                    if step is not None:
                        step(nn)
                with tracer.invoke():
                    found = nnsight.save(tracer.result)
            assert torch.equal(found, tokens)
    assert hook_count(model) == 0 and "generate" not in vars(inner)


def check_gradients(model):
    """Attribute, a metric, and a trace's own scores: as autograd by hand."""
    nn, inner, seen = wrapped(model), model.get_base_model(), {}

    def keep(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen["x"] = x.detach().requires_grad_()
        return (seen["x"], *output[1:]) if isinstance(output, tuple) else seen["x"]

    batch = batch_of()
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with blocks_of(inner)[1].register_forward_hook(keep):
        logits = model(**batch, position_ids=places).logits[:, -1]
    (slope,) = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), seen["x"])
    basis, index = make_sae(), [1, 2, 3]
    f = basis.encode(seen["x"].detach(), index)
    wanted = -(f * (slope @ basis.directions(index).T))[REAL]
    found = ATP(nn, RAGGED)
    torch.testing.assert_close(found.score.sum(), wanted.sum(), atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(
        sf.metrics.measure(nn, RAGGED, ATP.metric), logits[:, 5] - logits[:, 6]
    )
    with nn.trace(RAGGED):
        watching = ATP.watch(nn)
        last = nn.output.logits[:, -1]
        scores = nnsight.save(watching.scores(last[:, 5] - last[:, 6]))
    torch.testing.assert_close(scores.score, found.score, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_adapted_model_is_edited_like_any(family):
    model = adapted(family)
    assert (forward(model, batch_of()) - forward(build(family), batch_of())).abs().max() > 0.1
    check_edits(model, family)
    check_gradients(model)


@needs_peft
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_so_is_one_of_peft(family):
    check_edits(peft_model("lora", family), family)
    check_gradients(peft_model("lora", family))


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["no task", "dora", "saved head", "ia3", "loha", "oft", "vera", "norms"]
)
def test_so_are_its_other_adapters(kind):
    check_edits(peft_model(kind), "llama")
    check_gradients(peft_model(kind))


@pytest.mark.parametrize("make", [adapted, pytest.param(peft_model, marks=needs_peft)])
def test_the_active_adapter_is_seen_at_every_run(make):
    model = make()
    nn, identities, runs = wrapped(model), [], []

    def look():
        identities.append(model_identity(nn))
        runs.append(sf.run(nn, RAGGED, PUSH))
        return runs[-1].provenance.adapters

    assert look() == (NAMES[0],)
    model.set_adapter(NAMES[1])
    assert look() == (NAMES[1],)
    model.set_adapter(NAMES[0])
    assert look() == (NAMES[0],)
    assert identities[0] == identities[2] != identities[1]
    assert torch.equal(runs[0].logits, runs[2].logits)
    assert (runs[0].logits - runs[1].logits).abs().max() > 0.01
    assert "adapters careful" in runs[0].provenance.line
    assert model_identity(wrapped(make())) == identities[0]


def test_adapters_switched_off_and_merged():
    model = adapted()
    nn = wrapped(model)
    active = sf.run(nn, RAGGED, PUSH)
    before = model_identity(nn)
    for layer in model.layers():
        layer.disable_adapters = True
    off = sf.run(nn, RAGGED, PUSH)
    assert off.provenance.adapters == () and model_identity(nn) != before
    assert torch.equal(off.logits, sf.run(wrapped(build("llama")), RAGGED, PUSH).logits)
    for layer in model.layers():
        layer.disable_adapters = False
        layer.merge()
    merged = sf.run(nn, RAGGED, PUSH)
    torch.testing.assert_close(merged.logits, active.logits, atol=1e-5, rtol=1e-5)
    assert merged.provenance.adapters == (NAMES[0],) and model_identity(nn) != before


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    model = adapted()
    sf.run(wrapped(model), RAGGED[:1], PUSH, checkpoint=tmp_path)
    model.set_adapter(NAMES[1])
    with pytest.raises(sf.errors.CheckpointError, match="differs in computation"):
        sf.run(wrapped(model), RAGGED[:1], PUSH, checkpoint=tmp_path)


def test_sites_heads_and_paths_are_those_of_the_model_inside():
    """The same intervention fits with and without the adapter; layers are as wide as they were."""
    model, plain = adapted(), build("llama")
    sites = ("q.1:2", "z.1:3", "mlp_post.2", "model.layers.1.mlp.up_proj.output")
    widths = (8, 8, 64, 64)
    probes = [sf.Probe(sf.Neurons(site, n)) for site, n in zip(sites, widths, strict=True)]
    for layer in model.layers():
        layer.disable_adapters = True
    for probe in probes:
        found, wanted = (sf.run(wrapped(m), RAGGED, probe).readings[0] for m in (model, plain))
        assert torch.equal(found.values, wanted.values)
    with pytest.raises(sf.errors.SiteError, match=r"has no module base_model\.model"):
        sf.edit(wrapped(model), sf.Probe(sf.Neurons("base_model.model.model.norm.output", D)))


def test_a_positional_mask_is_found_by_a_wrapper_that_names_no_arguments():
    class Plain(type(adapted())):
        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

    model, batch = Plain(build("llama")).eval(), batch_of()
    step = sf.Clamp(V, 40.0, where=sf.Tokens.first(1))
    with torch.no_grad(), sf.hooked(model, step) as log:
        model(batch["input_ids"], batch["attention_mask"])
    assert step.receipt(log).rows[0].tokens == 3
    assert torch.equal(log.view.shown, batch["attention_mask"].bool())


def test_a_part_called_past_the_wrapper_is_refused():
    model = adapted()
    with torch.no_grad(), sf.hooked(model, PUSH):
        model(batch_of()["input_ids"])
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            model.get_base_model().model(batch_of()["input_ids"])
        model(batch_of()["input_ids"])
    with torch.no_grad(), sf.hooked(model.get_base_model(), PUSH):
        with pytest.raises(sf.errors.ModelError, match="PeftModel"):
            model(batch_of()["input_ids"])
        model.get_base_model()(batch_of()["input_ids"])


def test_a_pass_that_fails_in_a_wrapper_leaves_nothing_open():
    model, batch = adapted(), batch_of()
    with torch.no_grad(), sf.hooked(model, PUSH):
        wanted = model(**batch).logits
        with pytest.raises(IndexError):
            model(batch["input_ids"] + 1000)
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            model.get_base_model().model(batch["input_ids"])
        assert torch.equal(model(**batch).logits, wanted)
        inside = forward(copy.deepcopy(model), batch)
    assert torch.equal(inside, forward(model, batch)) and hook_count(model) == 0


def virtual(kind):
    if kind != "stand-in":
        return peft_model(kind)
    model = adapted()
    model.active_peft_config = types.SimpleNamespace(is_prompt_learning=True)
    return model


@pytest.mark.parametrize(
    "kind",
    ["stand-in", *(pytest.param(k, marks=needs_peft) for k in ("prompt", "prefix", "p-tuning"))],
)
def test_virtual_tokens_are_refused_before_anything_runs(kind):
    model = virtual(kind)
    nn = wrapped(model)
    for act in (
        lambda: sf.run(nn, RAGGED, PUSH),
        lambda: sf.edit(nn, PUSH),
        lambda: sf.hooked(model, PUSH).__enter__(),
        lambda: ATP(nn, RAGGED),
        lambda: sf.metrics.measure(nn, RAGGED, ATP.metric),
    ):
        with pytest.raises(sf.errors.ModelError, match=r"virtual tokens.*get_base_model"):
            act()
    inner = model.get_base_model()
    with sf.hooked(inner, PUSH) as log:
        forward(inner, batch_of())
    assert log.passes == 1


def test_a_wrapper_in_a_request_is_refused():
    """A server's model has no wrapper, so that results would be without the adapter."""
    nn, here = wrapped(adapted()), sf.remote.Server("local")
    for act in (
        lambda: sf.run(nn, RAGGED, PUSH, on=here),
        lambda: ATP(nn, RAGGED, on=here),
    ):
        with pytest.raises(sf.errors.RemoteError, match=r"PeftModel in a request.*peft="):
            act()


def test_train_mode_of_an_adapter_counts():
    model = adapted()
    model.layers()[0].drop = torch.nn.Dropout(0.1)
    model.train()
    with pytest.raises(sf.errors.ModelError, match="train mode with dropout"):
        sf.run(wrapped(model), RAGGED, PUSH)


# ---------------------------------------------------------------- other wrappers


class Distributed(torch.nn.parallel.DistributedDataParallel):
    """Without a process group."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, Distributed])
def test_wrappers_that_run_copies_are_refused(wrap):
    Distributed.__module__ = torch.nn.parallel.__name__
    outer = wrap(build("llama"))
    for act in (lambda: sf.hooked(outer, PUSH).__enter__(), lambda: model_identity(outer)):
        with pytest.raises(sf.errors.ModelError, match=r"the module inside.*\.module"):
            act()


def test_an_unknown_wrapper_is_refused_by_name():
    outer = torch.nn.Module()
    outer.policy, outer.config = build("llama"), build("llama").config
    with pytest.raises(sf.errors.ModelError, match=r"a Module without model\.layers.*wrapper"):
        sf.hooked(outer, PUSH).__enter__()


@pytest.mark.parametrize("how", ["compile(model)", "model.compile()", "inside"])
def test_a_compiled_wrapper_is_refused(how):
    model = adapted()
    if how == "compile(model)":
        model = torch.compile(model, backend="eager")
    elif how == "model.compile()":
        model.compile(backend="eager")
    else:
        model.get_base_model().compile(backend="eager")
    with pytest.raises(sf.errors.ModelError, match=r"torch\.compile"):
        sf.hooked(model, PUSH).__enter__()


# ---------------------------------------------------------------- without a language model's head


def check_reads(model, call, task, family):
    """Edits and readings, in a trace and by hooks, of a model that gives no logits of words."""
    batch = batch_of()
    places = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    given = batch | places
    seen = []

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        seen.append(by_hand(first))
        return (seen[-1], *output[1:]) if isinstance(output, tuple) else seen[-1]

    whole = any(hasattr(model, name) for name in ("model", "transformer"))
    blocks = blocks_of(model) if whole else getattr(model, "h", None) or model.layers
    with torch.no_grad():
        bare = call(model(**given))
        with blocks[1].register_forward_hook(hook):
            wanted = call(model(**given))
    step = PUSH | sf.Probe(sf.Neurons("resid_post.1", D))
    with torch.no_grad(), sf.hooked(model, step) as log:
        found = call(model(**given))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        step.readings(log)[0].values[REAL], seen[0][REAL], atol=1e-5, rtol=1e-5
    )
    assert (wanted - bare).abs().max() > 0.1
    nn = TransformersModel(model, tokenizer=tokenizer(), task=task)
    with torch.no_grad(), nn.trace(given):
        log = nnsight.save(step(nn))
        traced = nnsight.save(nn.output)
    torch.testing.assert_close(call(traced), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), sf.edit(nn, PUSH).trace(given) as tracer:
        traced = nnsight.save(tracer.result)
    torch.testing.assert_close(call(traced), wanted, atol=1e-5, rtol=1e-5)
    one, other = (make_sae(layer=n).latents([1]) for n in (0, 1))
    for act in (
        lambda: sf.run(nn, RAGGED, PUSH),
        lambda: sf.sweep(nn, RAGGED, {1: PUSH}),
        lambda: sf.metrics.measure(nn, RAGGED, ATP.metric),
        lambda: ATP(nn, RAGGED),
        lambda: sf.validation.edges(nn, RAGGED, one, other, check=0),
        lambda: sf.verify(nn, make_sae(), RAGGED),
    ):
        with pytest.raises(sf.errors.ModelError, match=r"no logits.*AutoModelForCausalLM"):
            act()


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "gpt_neox", "gemma2"))],
)
def test_a_body_without_its_head(family):
    body = build(family).base_model
    check_reads(body, lambda out: out.last_hidden_state[REAL], "feature-extraction", family)


@pytest.mark.parametrize("kind", ["Llama", pytest.param("GPT2", marks=pytest.mark.slow)])
def test_a_classifier(kind):
    """Its logits are [b, classes]: the last class was taken for the last token."""
    _, options = CONFIGS[kind.lower()]
    config = getattr(transformers, f"{kind}Config")(**options, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
        model.score.weight.data = torch.randn_like(model.score.weight)
    check_reads(model, lambda out: out.logits, "text-classification", kind.lower())
