"""preflight: what is known of a remote run before it queues, and what cannot be; no server here."""

from __future__ import annotations

import inspect
import linecache
import pickle

import cloudpickle
import nnsight
import pytest
import torch
from nnsight.intervention import serialization

import saefeat as sf
from helpers import BOS, FAMILIES, RAGGED, VOCAB, D, batch_of, build, make_sae, unit, wrapped
from saefeat.generation.decoding import decoding
from saefeat.remote import Server
from saefeat.remote.batch import remote_batch
from saefeat.remote.preflight import Capture, captured, inspected, require_light
from saefeat.verbs.lower import lower

NEW = 4


@pytest.fixture(scope="module")
def model():
    return wrapped(build("gemma2"))


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    """A model without weights, as a remote user has it."""
    folder, full = tmp_path_factory.mktemp("llama"), wrapped(build("llama"))
    full._module.config.save_pretrained(folder)
    return nnsight.TransformersModel(str(folder), tokenizer=full.tokenizer, task="text-generation")


def jumprelu(layer: int = 1) -> sf.Latents:
    return make_sae("jumprelu", f"resid_post.{layer}", layer).latents([3, 40, 17])


def direction(layer: int = 1) -> sf.Direction:
    return sf.Direction(unit(), site=f"resid_post.{layer}")


def generic(function, latents: int = 2) -> sf.dictionaries.Function:
    return sf.dictionaries.Function(function, torch.randn(latents, D), site="resid_post.1", width=D)


def request_of(model, intervention, **how) -> bytes:
    backend, bound = Capture(), intervention.bind(model)
    with model.generate(batch_of(), max_new_tokens=2, backend=backend, **how):
        nnsight.save(bound(model))
    return backend.raw


# ---------------------------------------------------------------- expected firings

RULES = {
    "all": lambda: sf.Tokens.all(),
    "last": lambda: sf.Tokens.last(2) | sf.Tokens.generated(1, 2),
    "not ids": lambda: ~sf.Tokens.ids(7, 9),
    "ids or last": lambda: sf.Tokens.ids(7) | sf.Tokens.last(1),
    "special": lambda: ~sf.Tokens.special(),
    "where": lambda: sf.Tokens.where(lambda ids, position: position % 2 == 0),
    "first and not": lambda: sf.Tokens.first(3) & ~sf.Tokens.ids(7),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("new", [0, NEW])
def test_what_a_run_does_lies_within_what_was_expected(rule, new, model):
    """Over ragged prompts in several batches; exact where nothing depends on data."""
    edit = sf.Clamp(jumprelu(), add=2.0, where=RULES[rule]())
    options = {"max_new_tokens": new, "batch_size": 2}
    (expected,) = sf.remote.preflight(model, RAGGED, edit, **options).expected
    (row,) = sf.run(model, RAGGED, edit, allow_unfired=True, **options).receipt.rows
    prompts = sf.run(model, RAGGED, edit, allow_unfired=True).receipt.rows[0].tokens
    assert expected.prompt == (prompts, prompts)
    assert expected.least <= row.tokens <= expected.most
    if rule in ("all", "last", "special", "first and not"):
        assert row.tokens == expected.most or rule == "special"


def test_without_stop_tokens_positions_are_exact(model):
    own = wrapped(build("gemma2"))
    own._module.generation_config.eos_token_id = None
    edit = sf.Clamp(jumprelu(), 2.0, where=sf.Tokens.generated(1, 3))
    batches = [batch_of()]
    settings = decoding(own, max_new_tokens=NEW)
    (expected,) = inspected(own, batches, edit, settings, None).expected
    assert expected.generated == (6, 6)


@pytest.mark.parametrize("hold", [False, True])
def test_a_condition_is_an_interval(hold, model):
    above = 0.8 if hold else 0.2
    edit = sf.Clamp(jumprelu(2), 5.0, when=sf.When(direction(0), above=above, hold=hold))
    (expected,) = sf.remote.preflight(model, RAGGED, edit, max_new_tokens=NEW).expected
    (row,) = sf.run(model, RAGGED, edit, max_new_tokens=NEW).receipt.rows
    assert expected.prompt == (0, 13) and expected.generated == (0, 3 * (NEW - 1))
    assert 0 < row.tokens < expected.most  # so neither end would have done


def test_values_given_for_some_tokens_are_an_interval(model):
    latents = jumprelu()
    probe = sf.Probe(latents, where=sf.Tokens.last(1))
    readings = sf.run(model, RAGGED, probe).readings[0]
    edit = sf.Ablate(latents, to=sf.values.Patch(readings))
    (expected,) = sf.remote.preflight(model, RAGGED, edit).expected
    assert expected.prompt == (0, 13)
    assert sf.run(model, RAGGED, edit).receipt.rows[0].tokens == 3


# ---------------------------------------------------------------- the dry run


@pytest.mark.parametrize("new", [0, NEW])
def test_a_skeleton_is_tried_without_weights(new, skeleton):
    edits = sf.Clamp(jumprelu(), 3.0, when=sf.When(direction(0), above=0.2, hold=True))
    edits = edits | sf.Probe(jumprelu(2), reduce="max") | sf.Ablate(direction(2).latents().span())
    report = sf.remote.preflight(skeleton, RAGGED, edits, max_new_tokens=new)
    assert (report.fails, report.untried, report.device) == ("", "", "meta")
    assert next(skeleton._module.parameters()).is_meta  # still


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tried(family):
    edits = sf.Ablate(direction()) | sf.Probe(direction(2))
    report = sf.remote.preflight(wrapped(build(family)), RAGGED, edits, max_new_tokens=2)
    assert (report.fails, report.untried) == ("", "")


KINDS = {
    "topk": lambda: sf.Ablate(topk()),
    "reselect": lambda: sf.Clamp(topk().reselect(), 2.0),
    "error": lambda: sf.Clamp(
        sf.dictionaries.ErrorTerm(make_sae("jumprelu", "resid_post.1")), scale=0.5
    ),
    "transcoder": lambda: sf.Clamp(make_sae("transcoder").latents([1, 5]), 4.0),
    "between": lambda: sf.Clamp(sf.Direction(unit(), site="resid_mid.1"), add=3.0),
    "schedule": lambda: sf.Clamp(topk(), add=sf.values.Schedule([4.0, 2.0])),
    "resample": lambda: sf.Ablate(topk(), to=sf.values.Resample(torch.ones(3, 2), seed=1)),
    "by prompt": lambda: sf.Clamp(topk(), torch.ones(3, 2)),
}


def topk() -> sf.Latents:
    return make_sae("topk", "resid_post.1").latents([1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit_is_tried(kind, model):
    report = sf.remote.preflight(model, RAGGED, KINDS[kind](), max_new_tokens=2, batch_size=2)
    assert (report.fails, report.untried) == ("", "")


def test_a_copys_own_edits_are_not_known(model):
    """They look at masks, which are fake there; nothing is refused for it."""
    copy = sf.edit(model, sf.Ablate(direction()))
    report = sf.remote.preflight(copy, RAGGED, sf.Ablate(direction(2)))
    assert report.fails == "" and "data-dependent" in report.untried


def two_wide(x):
    return x[..., :2].sum(1)


def wide_score(x):
    return x[..., :2]


BAD = {
    "encoder": (
        lambda: sf.Clamp(generic(two_wide), 2.0),
        "fake tensors .(RuntimeError|TypeCheckError)",
    ),
    "scorer": (
        lambda: sf.Clamp(jumprelu(), 2.0, when=sf.When(wide_score, site="resid_post.0")),
        "gave a score of shape",
    ),
    "site": (
        lambda: sf.Ablate(sf.Direction(unit(), site="lm_head.input")),
        r"shape \(3, 1, 32\), and this pass has 3 rows of 6 tokens",
    ),
}


# the others' requests are like these, and take another ten seconds
LATER = [pytest.param(c, marks=pytest.mark.slow) for c in BAD if c in ("encoder", "scorer")]


@pytest.mark.parametrize("case", [*(c for c in BAD if c not in ("encoder", "scorer")), *LATER])
def test_what_would_fail_there_is_found_here(case, model, skeleton):
    made, said = BAD[case]
    for own in (model, skeleton):
        report = sf.remote.preflight(own, RAGGED, made(), max_new_tokens=2)
        assert report.untried == ""
        with pytest.raises(sf.errors.RemoteError, match=said):
            require_light(report, 1 << 30)
        assert report.fails in str(report)


def test_run_refuses_it_before_anything_is_sent(model):
    with pytest.raises(sf.errors.RemoteError, match="fails on fake tensors"):
        sf.run(model, RAGGED, BAD["scorer"][0](), on=Server("local"))


def by_value(x):
    return torch.relu(x[..., :2]) if x.detach().sum().item() > 0 else x[..., :2]


def through_numpy(x):
    return torch.from_numpy(x[..., :2].detach().numpy())


@pytest.mark.parametrize("function", [by_value, through_numpy])
def test_what_asks_for_numbers_is_not_known_and_not_refused(function, model):
    report = sf.remote.preflight(model, RAGGED, sf.Clamp(generic(function), 2.0))
    assert report.fails == "" and report.untried
    assert "not known" in str(report)
    require_light(report, 1 << 30)


def test_a_model_that_cannot_be_faked_blames_nobody():
    class Odd(torch.nn.Module):
        def forward(self, x):
            if type(x) is not torch.Tensor:
                raise RuntimeError("this layer has a kernel of its own")
            return x

    odd = wrapped(build("llama"))
    odd._module.model.norm = Odd()
    report = sf.remote.preflight(odd, RAGGED, sf.Ablate(direction()))
    assert report.fails == "" and "the model itself" in report.untried


def test_a_dry_run_leaves_nothing_behind(model):
    before = sf.run(model, RAGGED).logits
    state = torch.get_rng_state()
    sf.remote.preflight(model, RAGGED, sf.Clamp(jumprelu(), 3.0), max_new_tokens=2)
    assert torch.equal(sf.run(model, RAGGED).logits, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_looking_into_a_request_keeps_sources_whole(model):
    """nnsight enters a request's block as if it were its whole file; tracebacks would be wrong."""
    file = inspect.getsourcefile(remote_batch)
    sf.remote.preflight(model, RAGGED, sf.Ablate(direction()))
    assert linecache.getline(file, 1).startswith('"""')


# ---------------------------------------------------------------- weights and dtypes


@pytest.mark.slow
def test_the_result_is_no_larger_than_said(model):
    """Changes that edits made come back too, and are most of it."""
    edits = sf.Clamp(jumprelu(), 3.0) | sf.Probe(jumprelu(2)) | sf.Probe(jumprelu(), reduce="mean")
    report = sf.remote.preflight(model, RAGGED, edits, max_new_tokens=NEW)
    settings = decoding(model, max_new_tokens=NEW)
    saved, _ = remote_batch(model, lower(edits, model), batch_of(), settings, remote="local")
    got = sum(t.nbytes for t in leaves(saved))
    assert got <= report.result < 2 * got


def leaves(data):
    if isinstance(data, torch.Tensor):
        yield data
    for value in (
        data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    ):
        yield from leaves(value)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_that_cuts_fractions_is_refused(dtype, model):
    with pytest.raises(sf.errors.RemoteError, match="a floating dtype"):
        sf.remote.preflight(model, RAGGED, sf.Ablate(direction()), on=Server("local", dtype=dtype))


def test_a_dtype_that_overflows_is_refused(model):
    rows = torch.full((D, D), 1e6)
    large = sf.dictionaries.Function(torch.relu, rows, site="resid_post.1", width=D)
    with pytest.raises(sf.errors.RemoteError, match="small range"):
        sf.remote.preflight(
            model, RAGGED, sf.Ablate(large), on=Server("local", dtype=torch.float16)
        )
    sf.remote.preflight(model, RAGGED, sf.Ablate(large), on=Server("local", dtype=torch.bfloat16))


def test_what_only_runs_here_says_so(model):
    columns = {"activation": torch.relu, "directions": torch.ones(D, D), "norm": "none"}
    columns |= {"prefix": False, "local": "it is encoded by a sae-lens object"}
    own = generic(torch.relu, D)
    object.__setattr__(own, "columns", lambda indices: columns)
    with pytest.raises(sf.errors.RemoteError, match="encoded by a sae-lens object"):
        sf.remote.preflight(model, RAGGED, sf.Ablate(own))


# ---------------------------------------------------------------- blocks of one's own


def test_blocks_and_edited_copies_send_halves_too(model):
    wide = make_sae("jumprelu", "resid_post.1").latents([3, 40, 17])
    half = make_sae("jumprelu", "resid_post.1", dtype=torch.bfloat16).latents([3, 40, 17])
    assert len(request_of(model, sf.Ablate(half))) + 300 < len(request_of(model, sf.Ablate(wide)))
    sizes = []
    for latents in (wide, half):
        edited, backend = sf.edit(model, sf.Ablate(latents)), Capture()
        with edited.trace(batch_of(), backend=backend):
            nnsight.save(edited.output.logits)
        sizes.append(len(backend.raw))
    assert sizes[1] + 300 < sizes[0]


def test_a_heavy_block_warns(model, monkeypatch):
    monkeypatch.setattr("saefeat.shipping.program.PAYLOAD_LIMIT", 100)
    with pytest.warns(UserWarning, match="sf.remote.preflight shows the others"):
        request_of(model, sf.Ablate(jumprelu()))


def test_strangers_are_refused_in_a_block(model):
    import safetensors.torch

    def with_stranger(x):
        return x[..., :2] * len(safetensors.torch.__name__)

    with pytest.raises(sf.errors.RemoteError, match="in need of safetensors"):
        request_of(model, sf.Ablate(generic(with_stranger)))


def test_only_nnsights_pickler_treats_our_objects_so():
    """The dispatch table that ``requests`` fills; another nnsight must fail here first."""
    for subject in (sf.Ablate(jumprelu()), jumprelu(), jumprelu().parts[0][0]):
        with pytest.raises(sf.errors.RemoteError, match=r"bind\(model\)"):
            serialization.dumps(subject)
        cloudpickle.dumps(subject)
        assert repr(pickle.loads(pickle.dumps(subject))) == repr(subject)


def test_requests_have_the_checkpoints_settings_spelled_out(model):
    """A checkpoint whose own settings search beams would else do so there, and not here."""
    raw = captured(
        model, lower(sf.verbs.base.Chain(()), model), batch_of([[BOS, 5]]), decoding(model)
    )
    for name in (b"num_beams", b"do_sample", b"eos_token_id"):
        assert name in raw
    assert VOCAB in decoding(model).stops
