"""verify: a dictionary at a wrong site is found out, and the right site is named."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, wrapped
from saefeat.studies.refusal import tiny

PROMPTS = [
    [{"role": "user", "content": request.instruction}]
    for request in (*tiny.splits()["harmless_train"][:12], *tiny.splits()["harmful_train"][:12])
]


@pytest.fixture(scope="module")
def model():
    return sf.wrap(*tiny.load("chat"))


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
    with pytest.raises(sf.SiteError) as caught:
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
    with pytest.raises(sf.SiteError):
        sf.verify(model, make_sae("jumprelu"), PROMPTS)  # another width
    stranger = wrapped(build())
    with pytest.raises(sf.SiteError, match="unexplained"):
        sf.verify(stranger, make_sae("jumprelu"), RAGGED)  # random: explains nothing anywhere


def test_what_cannot_reconstruct_is_named(model):
    v = sf.Dictionaries([sf.Direction(torch.ones(D), site="resid_post.1")])
    with pytest.raises(sf.DictionaryError, match="Direction"):
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
