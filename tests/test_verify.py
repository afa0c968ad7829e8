"""verify: a dictionary at a wrong site is found out, and the right site is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    FAMILIES,
    RAGGED,
    TRANSCODERS,
    D,
    build,
    make_sae,
    plant_sinks,
    tokenizer,
    unit_like,
    wrapped,
)
from saefeat.loading.declaration import Declared, missed, notes
from saefeat.results import outliers
from saefeat.studies.refusal import tiny
from saefeat.verification.null import BLOCK, mixed

PROMPTS = [
    [{"role": "user", "content": request.instruction}]
    for request in (*tiny.splits()["harmless_train"][:12], *tiny.splits()["harmful_train"][:12])
]


@pytest.fixture(scope="module")
def model():
    return tiny.model("chat")


def folder(name: str):
    return tiny.saes_folder("chat") / name


def test_the_shipped_saes_are_where_they_say(model):
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    found = sf.verify(model, saes, PROMPTS)
    assert found.right and len(found.checks) == len(saes)
    for check in found.checks:
        assert check.fvu < 0.1 and 5 < check.l0 < 30


@pytest.mark.parametrize("name", ["mlp_out_2", "transcoder_2"])
def test_an_mlp_sae_and_a_transcoder_are_right_too(model, name):
    found = sf.verify(model, sf.load_sae(folder(name)), PROMPTS)
    assert found.right and found.checks[0].fvu < 0.2


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_post_2", "resid_post.1"),
        ("resid_post_1", "resid_post.2"),
        ("resid_post_2", "resid_pre.2"),
        ("mlp_out_2", "attn_out.2"),
        ("mlp_out_2", "resid_post.2"),
    ],
)
def test_a_wrong_site_is_refused_by_the_right_ones_name(model, name, site):
    right = sf.load_sae(folder(name)).site
    with pytest.raises(sf.errors.SiteError) as caught:
        sf.verify(model, sf.load_sae(folder(name), site=site), PROMPTS)
    best = str(caught.value).split('site="')[1].split('"')[0]
    # resid_post of one layer is resid_pre of the next: either name is right
    same = {str(right)} | (
        {f"resid_pre.{right.layer + 1}"} if right.kind == "resid_post" else set()
    )
    assert best in same and "WRONG" in str(caught.value)
    report = sf.verify(model, sf.load_sae(folder(name), site=site), PROMPTS, strict=False)
    assert not report.right and "WRONG" in repr(report)


def test_the_sae_of_another_model_is_refused(model):
    with pytest.raises(sf.errors.SiteError):
        sf.verify(model, make_sae("jumprelu"), PROMPTS)  # another width
    stranger = wrapped(build())
    with pytest.raises(sf.errors.SiteError, match="unexplained"):
        sf.verify(stranger, make_sae("jumprelu"), RAGGED)  # random: explains nothing anywhere


def test_what_cannot_reconstruct_is_named(model):
    v = sf.dictionaries.Dictionaries([sf.Direction(torch.ones(D), site="resid_post.1")])
    with pytest.raises(sf.errors.DictionaryError, match="Direction"):
        sf.verify(model, v, PROMPTS)


def test_fvu_is_the_unexplained_variance(model):
    """Against numbers worked out by hand from the captured values."""
    sae = sf.load_sae(folder("resid_post_2"))
    kept = ~sf.Tokens.ids(model.tokenizer.bos_token_id)
    probe = sf.Probe(sf.Neurons("resid_post.2", sae.d_in), where=kept)
    reading = sf.run(model, PROMPTS, probe).readings[0]
    x = reading.values[reading.mask[..., 0]]
    wanted = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    check = sf.verify(model, sae, PROMPTS).checks[0]
    assert check.fvu == pytest.approx(float(wanted), rel=1e-4)
    assert check.l0 == pytest.approx(float((sae.encode(x) > 0).sum(-1).float().mean()), rel=1e-4)


# ---------------------------------------------------------------- what the files declare


def rewritten(tmp_path, **metadata):
    """The shipped SAE of layer 1, declaring something else of its training."""
    shutil.copytree(folder("resid_post_1"), tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"] |= metadata
    path.write_text(json.dumps(config))
    return sf.load_sae(tmp_path / "sae")


def test_the_declared_l0_is_in_the_table(model):
    found = sf.verify(model, sf.load_sae(folder("resid_post_1")), PROMPTS)
    assert found.checks[0].declared == 12.0 and not found.checks[0].notes
    assert "declared" in repr(found) and "note:" not in repr(found)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"l0": 80.0}, "declares an L0 of 80, and 1"),
        ({"l0": 2.0}, "declares an L0 of 2"),
        ({"prepend_bos": False}, "trained without BOS, and 24 of 24 prompts begin with it"),
        ({"l0": 13.0}, ""),
    ],
)
def test_what_differs_is_said_and_is_no_error(model, tmp_path, metadata, said):
    found = sf.verify(model, rewritten(tmp_path, **metadata), PROMPTS)
    (check,) = found.checks
    assert found.verdict == ("doubtful" if "L0" in said else "ok")
    assert found.right == (found.verdict == "ok")
    told = [one.reason for one in check.findings] + list(check.notes)
    assert (len(told) == 1 and said in told[0]) if said else told == []
    assert not said or f"sae: {told[0]}" in repr(found)


def noted(declared: Declared, *, name="", prompts=((2, 5), (2, 6))):
    model, sae = build("llama"), make_sae()
    model.config.name_or_path, sae.declared = name, declared
    return notes(sae, model, prompts, 2)


@pytest.mark.parametrize(
    ("trained", "here", "said"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", None),
        ("gpt2-small", "openai-community/gpt2", None),
        ("meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B", None),
        ("gemma-2-2b", "google/gemma-2-2b-it", "tuned further"),
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-it", "tuned further"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "tuned further"),
        ("gemma-2-2b", "google/gemma-2-9b", "this model is called google/gemma-2-9b"),
        ("gpt2-small", "openai-community/gpt2-medium", "is called"),
        ("gemma-2-2b", "", None),
        (None, "google/gemma-2-9b", None),
        ("gemma-2-2b", ".", None),  # a folder, which may be called anything
    ],
)
def test_the_models_name(trained, here, said):
    found = noted(Declared(model=trained), name=here)
    assert not found if said is None else said in found[0]


def test_width_variance_and_bos():
    assert noted(Declared(width=16384)) == ("declares 16,384 latents and holds 48",)
    assert noted(Declared(width=48)) == ()
    assert missed(Declared(explained=0.9, l0=12.0), 10.0, 0.2) == ()
    assert "explains 40% here" in missed(Declared(explained=0.9), 10.0, 0.6)[0]
    assert missed(None, 10.0, 0.2) == ()
    assert noted(Declared(prepend_bos=True)) == ()
    assert (
        "1 of 2 prompts have none" in noted(Declared(prepend_bos=True), prompts=((2, 5), (6,)))[0]
    )
    assert "two BOS" in noted(Declared(), prompts=((2, 2, 5), (2, 6)))[0]
    assert notes(make_sae(), build("llama"), (), 2) == ()  # nothing is declared


def test_a_gemma_scope_folder_says_its_model(tmp_path):
    from saefeat.loading.gemma_scope import _model

    assert _model("google/gemma-scope-2b-pt-res/layer_1") == "gemma-2-2b"
    assert _model("google/gemma-scope-9b-it-res/layer_9") == "gemma-2-9b-it"
    assert _model("google/gemma-scope-2-1b-pt/resid_post/layer_1") == "gemma-3-1b-pt"
    assert _model("elsewhere/layer_1") is None


def test_values_that_overflow_are_said_to():
    """A bfloat16 model in float16: infinities, which compare as nothing."""
    model = build("llama", torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    with pytest.raises(sf.errors.ModelError, match=r"float16.*not finite.*bfloat16"):
        sf.verify(wrapped(model), make_sae(), RAGGED)


def test_train_mode_is_refused():
    nn = wrapped(build("gpt2"))
    nn._module.train()
    with pytest.raises(sf.errors.ModelError, match="train mode"):
        sf.verify(nn, make_sae(), RAGGED)


# ---------------------------------------------------------------- at a path, and looking back


def test_an_sae_at_a_path_is_held_against_the_layers_beside(model):
    right = sf.load_sae(folder("resid_post_2"), site="model.layers.2.output")
    found = sf.verify(model, right, PROMPTS)
    assert (
        found.right
        and found.checks[0].fvu
        == sf.verify(model, sf.load_sae(folder("resid_post_2")), PROMPTS).checks[0].fvu
    )
    wrong = sf.load_sae(folder("resid_post_2"), site="model.layers.1.output")
    with pytest.raises(
        sf.errors.SiteError, match=r'load_sae\(folder, site="model\.layers\.2\.output"'
    ):
        sf.verify(model, wrong, PROMPTS)


def test_a_path_on_a_model_outside_the_table():
    from test_paths import stranger

    path = "model.decoder.layers.1.output"
    found = sf.verify(wrapped(stranger("OPT")), make_sae("standard", path), RAGGED, strict=False)
    assert {str(found.checks[0].site), str(found.checks[0].best)} <= {path, path.replace("1", "0")}


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_saes_that_are_read_whole_are_verified(architecture):
    """Against sae-lens's own forward, row by row without padding, less BOS."""
    from test_mixing import lens

    theirs, nn = lens(architecture), wrapped(build("llama"))
    prompts = [[2, *tokenizer()(text)["input_ids"]] for text in RAGGED]
    check = sf.verify(nn, sf.load_sae(theirs), prompts, strict=False).checks[0]
    reading = sf.run(nn, prompts, sf.Probe(sf.Neurons("resid_post.1", D))).readings[0]
    rows = [x[m] for x, m in zip(reading.values, reading.mask[..., 0], strict=True)]
    with torch.no_grad():
        f = torch.cat([theirs.encode(x.unsqueeze(0))[0, 1:] for x in rows])
        guess = torch.cat([theirs(x.unsqueeze(0))[0, 1:] for x in rows])
    target = torch.cat([x[1:] for x in rows])
    fvu = (target - guess).square().sum() / (target - target.mean(0)).square().sum()
    assert check.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert check.l0 == pytest.approx(float((f != 0).sum(-1).float().mean()))


# ---------------------------------------------------------------- tokens that dwarf the others


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_no_outliers_among_tokens_of_usual_size(spread):
    g = torch.Generator().manual_seed(0)
    sizes = (spread * torch.randn(2000, 1, generator=g)).exp()
    for width in (8, 64, 512):
        assert not outliers(sizes * torch.randn(2000, width, generator=g)).any()
    assert not outliers(torch.zeros(5, 4)).any() and outliers(torch.zeros(0, 4)).tolist() == []


def test_outliers_are_found_wherever_they_stand_and_up_to_half():
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    for at in ([0], [4], [9], [0, 3, 7], list(range(5))):
        planted = x.clone()
        planted[at] *= 100
        assert outliers(planted).nonzero().flatten().tolist() == at


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_sinks_are_outliers_in_every_family(family):
    """The helper plants what real models have: the first token, and one in the middle."""
    model = plant_sinks(build(family), 1, ids=(12,))  # w8
    probe = sf.Probe(sf.Neurons("resid_post.1", D))
    reading = sf.run(wrapped(model), RAGGED, probe).readings[0]
    x = [row[m] for row, m in zip(reading.values, reading.mask[..., 0], strict=True)]
    found = [outliers(row).nonzero().flatten().tolist() for row in x]
    assert found == [[0], [0, 4], [0]]
    assert x[1][0].norm() > 30 * x[1][1].norm()
    plain = sf.run(wrapped(build(family)), RAGGED, probe).readings[0]
    rows = [row[m] for row, m in zip(plain.values, plain.mask[..., 0], strict=True)]
    assert not any(outliers(row).any() for row in rows)


def sunk(ids=()):
    """The tiny chat model with sinks behind its last block, where nothing reads them."""
    from nnsight import TransformersModel

    module, its_tokenizer = tiny.load("chat")
    plant_sinks(module, 3, ids=ids)
    return TransformersModel(module, tokenizer=its_tokenizer, task="text-generation")


def without_bos() -> list[list[int]]:
    """Prompts whose first token is none that ``verify`` leaves out in any case."""
    rows = sf.run(tiny.model("chat"), PROMPTS).prompts
    return [list(row[1:]) for row in rows]


def test_an_sae_is_judged_by_the_tokens_that_are_no_outliers():
    sae, rows = sf.load_sae(folder("resid_post_3")), without_bos()
    (plain,) = sf.verify(tiny.model("chat"), sae, rows, strict=False).checks
    found = sf.verify(sunk(), sae, rows, strict=False)
    (check,) = found.checks
    assert (check.outliers, check.tokens) == (24, found.tokens - 24)
    assert check.outlier_share > 0.9 and check.whole_fvu > 0.5 and check.verdict == plain.verdict
    assert f"24 of {found.tokens} tokens hold" in repr(found) and "with them FVU is" in repr(found)
    assert check.fvu == pytest.approx(plain.fvu, rel=0.5) and plain.outliers == 0


def test_outliers_in_the_middle_are_set_apart_too():
    sae = sf.load_sae(folder("resid_post_3"))
    (plain,) = sf.verify(tiny.model("chat"), sae, PROMPTS).checks
    word = sf.run(tiny.model("chat"), PROMPTS).prompts[0][4]
    (check,) = sf.verify(sunk((word,)), sae, PROMPTS).checks  # BOS is a sink, and left out
    assert check.verdict == "ok" and check.outliers > 0 and check.whole_fvu > 0.5
    assert check.fvu == pytest.approx(plain.fvu, rel=0.3)


def test_a_dictionary_of_the_sink_alone_is_wrong():
    """One direction explains all that the sink holds, and nothing of any other token."""
    model, rows = sunk(), without_bos()
    d = model._module.config.hidden_size
    reading = sf.run(model, rows, sf.Probe(sf.Neurons("resid_post.3", d))).readings[0]
    x = reading.values[reading.mask[..., 0]]
    mean, u = x[~outliers(x)].mean(0), unit_like(x)
    tensors = {"W_enc": u[:, None], "b_enc": torch.full((1,), -500.0), "W_dec": 1.2 * u[None]}
    sae = sf.SAE.from_tensors({**tensors, "b_dec": mean}, site="resid_post.3")
    (check,) = sf.verify(model, sae, rows, strict=False).checks
    assert check.whole_fvu < 0.1 and check.fvu > 0.99 and check.verdict == "WRONG"
    with pytest.raises(sf.errors.SiteError, match=r"mixed at random|unexplained"):
        sf.verify(model, sae, rows)


# ---------------------------------------------------------------- against the null


def test_mixed_tokens_keep_mean_and_covariance_and_nothing_sparse():
    g = torch.Generator().manual_seed(0)
    sparse = torch.where(torch.rand(700, 6, generator=g) < 0.05, 10.0, 0.0) + 3
    blends = mixed(sparse, 0)
    assert len(sparse) > BLOCK  # two blocks, each with a mean of its own
    torch.testing.assert_close(blends.mean(0), sparse.mean(0))
    torch.testing.assert_close(blends.T.cov(), sparse.T.cov(), atol=0.2, rtol=0.05)

    def kurtosis(x):
        z = (x - x.mean(0)) / x.std(0)
        return float((z**4).mean())

    assert kurtosis(sparse) > 10 and kurtosis(blends) < 4  # a Gaussian's is 3
    torch.testing.assert_close(mixed(sparse, 0), blends)
    assert (mixed(sparse, 1) - blends).abs().max() > 1


@pytest.mark.parametrize("site", ["resid_post_1", "resid_post_2", "resid_post_3", "mlp_out_2"])
@pytest.mark.parametrize("pair", [("chat", "base"), ("base", "chat")])
def test_the_saes_of_a_model_that_was_tuned_further_are_wrong(pair, site):
    """Both models are one up to their tuning, so the SAEs leave .26 to .75 and not 1."""
    trained, other = pair
    sae = sf.load_sae(tiny.saes_folder(trained) / site)
    (check,) = sf.verify(tiny.model(other), sae, PROMPTS, strict=False).checks
    assert check.verdict == "WRONG" and check.fvu < 1
    with pytest.raises(sf.errors.SiteError, match="WRONG"):
        sf.verify(tiny.model(other), sae, PROMPTS)


def test_the_transcoder_of_a_model_that_was_tuned_further_is_wrong(model):
    sae = sf.load_sae(tiny.saes_folder("base") / "transcoder_2")
    assert sf.verify(model, sae, PROMPTS, strict=False).verdict == "WRONG"


def test_what_two_models_share_is_right_on_both(model):
    """Tuning left the first block as it was."""
    sae = sf.load_sae(tiny.saes_folder("base") / "resid_post_0")
    assert sf.verify(model, sae, PROMPTS).right


LONG = [[5 + (7 * n + n * n * t + t) % 90 for t in range(12)] for n in range(12)]
"""144 tokens, of which no random dictionary knows anything."""


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_a_random_dictionary_is_wrong(architecture):
    nn = wrapped(build("llama"))
    assert sf.verify(nn, make_sae(architecture), LONG, strict=False).verdict == "WRONG"


def tied(model, kind: str):
    """Random directions read and written, scaled to explain as much as they can."""
    d = model._module.config.hidden_size
    probe = sf.Probe(sf.Neurons("resid_post.2", d), where=~sf.Tokens.ids(2))
    reading = sf.run(model, PROMPTS, probe).readings[0]
    x = reading.values[reading.mask[..., 0]]
    architecture, width, k = {
        "tied": ("standard", 4 * d, None),
        "wide": ("standard", 16 * d, None),
        "few": ("topk", 8 * d, 8),
        "many": ("topk", 8 * d, d),
        "signed": ("abstopk", 8 * d, d // 2),
        "whole": ("abstopk", d, d),
        "gated": ("gated", 8 * d, None),
        "jumping": ("jumprelu", 8 * d, None),
    }[kind]
    rows = torch.randn(width, d, generator=torch.Generator().manual_seed(3))
    rows = torch.linalg.qr(rows).Q if kind == "whole" else rows / rows.norm(dim=1, keepdim=True)
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": x.mean(0)}
    extra = {"jumprelu": ("threshold",), "gated": ("b_gate", "b_mag", "r_mag")}
    names = (*(() if architecture == "gated" else ("b_enc",)), *extra.get(architecture, ()))
    tensors |= {name: torch.zeros(width) for name in names}
    options = {"site": "resid_post.2", "architecture": architecture, "k": k}
    guess = sf.SAE.from_tensors(tensors, subtract_bias=True, **options).reconstruct(x) - x.mean(0)
    tensors["W_dec"] = rows * float((guess * (x - x.mean(0))).sum() / guess.square().sum())
    return sf.SAE.from_tensors(tensors, subtract_bias=True, **options)


@pytest.mark.parametrize(
    "kind", ["tied", "wide", "few", "many", "signed", "whole", "gated", "jumping"]
)
def test_random_directions_explain_much_and_are_wrong(model, kind):
    """Enough random directions explain anything: no less of tokens that are mixed."""
    (check,) = sf.verify(model, tied(model, kind), PROMPTS, strict=False).checks
    assert check.fvu < 0.6 and check.fvu == pytest.approx(check.mixed_fvu, rel=0.15, abs=1e-6)
    assert check.verdict == "WRONG" and "mixed at random" in check.findings[0].reason


def test_the_sae_of_another_random_model_is_wrong():
    """Fitted to one model, by its principal directions, and held against one of other weights."""
    one, other = build("llama"), build("qwen3")
    reading = sf.run(wrapped(one), LONG, sf.Probe(sf.Neurons("resid_post.1", D))).readings[0]
    x = reading.values.flatten(0, 1)
    rows = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:64]]
    rows = (rows - x.mean(0)) / (rows - x.mean(0)).norm(dim=1, keepdim=True)
    tensors = {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(64), "W_dec": rows}
    tensors["b_dec"] = x.mean(0)
    sae = sf.SAE.from_tensors(
        tensors, site="resid_post.1", architecture="topk", k=1, subtract_bias=True
    )
    assert sf.verify(wrapped(one), sae, LONG, strict=False).checks[0].fvu < 0.8
    assert sf.verify(wrapped(other), sae, LONG, strict=False).verdict == "WRONG"


def test_few_tokens_are_too_few_to_say(model):
    found = sf.verify(model, sf.load_sae(folder("resid_post_2")), PROMPTS[:1])
    assert found.verdict == "doubtful" and not found.right and "too few to say" in repr(found)
    assert found.checks[0].mixed_fvu is None
    one = sf.verify(model, make_sae_like(model), ["how"], strict=False)  # a single token
    assert one.verdict == "doubtful" and one.tokens == 1


def make_sae_like(model):
    """A random SAE as wide as the model."""
    d = model._module.config.hidden_size
    g = torch.Generator().manual_seed(0)
    tensors = {"W_enc": torch.randn(d, 8, generator=g), "b_enc": torch.zeros(8)}
    tensors |= {"W_dec": torch.randn(8, d, generator=g), "b_dec": torch.zeros(d)}
    return sf.SAE.from_tensors(tensors, site="resid_post.1")


def test_only_wrong_is_raised(model, tmp_path):
    """A declared L0 that is missed is doubtful: the table says so, and there is no error."""
    sae = rewritten(tmp_path, l0=60.0)
    assert sf.verify(model, sae, PROMPTS, strict=True).verdict == "doubtful"
