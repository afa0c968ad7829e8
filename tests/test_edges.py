"""edges against central differences of real runs, in float64."""

from __future__ import annotations

import importlib

import pytest
import torch

import saefeat as sf
from helpers import (
    EOS,
    RAGGED,
    build,
    hook_count,
    make_sae,
    tokenizer,
    unit,
    wrapped,
)
from saefeat.validation.stats import spearman

F64 = torch.float64
STEP = 1e-4


def smooth(family: str) -> torch.nn.Module:
    """A model in float64 throughout: transformers' RMS norms compute in float32 whatever comes,
    and differences of rounded numbers are no derivatives.
    """
    model = build(family, F64)
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        eps = getattr(module, "variance_epsilon", None) or module.eps
        weight = module.weight + ("Gemma" in type(module).__name__)

        def forward(x, eps=eps, weight=weight):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

        module.forward = forward
    return model


def sums(nn, down, where, edit=None, prompts=RAGGED) -> torch.Tensor:
    """[prompts, d]: downstream activations, summed over the tokens."""
    probe = sf.Probe(down, where=where)
    reading = sf.run(nn, prompts, probe if edit is None else edit | probe).readings[0]
    return torch.where(reading.mask, reading.values, 0.0).sum(1).double()


def slope(nn, one, down, where) -> torch.Tensor:
    """[d, prompts]: the derivative of the sums as one latent is faded out, at the start."""
    ends = [sums(nn, down, where, sf.Clamp(one, scale=1.0 - s)) for s in (STEP, -STEP)]
    return ((ends[0] - ends[1]) / (2 * STEP)).T


def active(nn, dictionary, n: int) -> sf.Latents:
    """The n latents that are active most."""
    look = sf.run(nn, RAGGED, sf.Probe(dictionary)).readings[0]
    return dictionary.latents(look.active().topk(n).indices)


def encoded(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def check(family, upper, lower, where=None, tolerance=2e-4) -> sf.validation.Edges:
    nn = wrapped(smooth(family))
    up, down = active(nn, upper, 4), active(nn, lower, 3)
    found = sf.validation.edges(nn, RAGGED, up, down, where=where, check=0, batch_size=2)
    assert found.by_prompt.abs().max() > 1e-3
    for i, one in enumerate(up.singles()):
        wanted = slope(nn, one, down, where)
        torch.testing.assert_close(
            found.by_prompt[i].double(), wanted, atol=tolerance, rtol=tolerance
        )
    return found


@pytest.mark.parametrize("where", [None, sf.Tokens.last(1)], ids=["all", "last"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "abstopk"])
def test_edges_between_saes(architecture, where):
    check("llama", make_sae("standard", layer=0), make_sae(architecture, seed=1, layer=2), where)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "qwen3"])
def test_edges_in_other_families(family):
    check(family, make_sae("jumprelu", layer=0), make_sae("standard", seed=1, layer=1))


@pytest.mark.parametrize(
    ("upper", "lower"),
    [
        ("mlp_out.0", "resid_post.0"),
        ("attn_out.1", "resid_mid.1"),
        ("resid_mid.0", "mlp_out.0"),
        ("resid_post.0", "resid_mid.2"),
        ("resid_mid.1", "resid_mid.2"),
        ("resid_pre.1", "mlp_norm.1"),
        ("resid_pre.1", "resid_post.1"),
        ("resid_post.1", "resid_pre.2"),  # one and the same value
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_edges_between_sites(family, upper, lower):
    """At resid_mid both halves of the value carry the gradient."""
    check(family, make_sae("standard", upper), make_sae("standard", lower, seed=1))


def test_edges_of_transcoders_and_moving_directions():
    check("llama", make_sae("transcoder", layer=0), make_sae("transcoder", seed=1, layer=2))
    norm = make_sae("standard", layer=0, norm="layer_norm")
    check("llama", norm, make_sae("standard", seed=1, layer=1, norm="constant_norm_rescale"))


def test_upstream_latents_keep_to_the_tokens_of_their_dictionary():
    check(
        "llama",
        make_sae("standard", layer=0, excluded=tuple(encoded("w1 w5 w12"))),
        make_sae("standard", seed=1, layer=2),
    )


def test_several_dictionaries_and_only_edges_forward():
    nn = wrapped(smooth("llama"))
    saes = [make_sae("standard", seed=n, layer=n) for n in range(3)]
    parts = [active(nn, sae, 2) for sae in saes]
    up, down = parts[1] | parts[0], parts[0] | parts[1] | parts[2]
    found = sf.validation.edges(nn, RAGGED, up, down, check=100)
    later = torch.tensor([[d.layer > u.layer for d, _ in down] for u, _ in up])
    assert torch.equal(found.ordered, later)
    assert bool((found.by_prompt[~later] == 0).all())
    assert bool(found.exact[~later].isnan().all() and found.ablated[~later].isnan().all())
    for i, one in enumerate(up.singles()):
        wanted = slope(nn, one, down, None)
        own = later[i]
        torch.testing.assert_close(
            found.by_prompt[i][own].double(), wanted[own], atol=2e-4, rtol=2e-4
        )


def test_the_check_is_an_ablation():
    nn = wrapped(smooth("llama"))
    up = active(nn, make_sae("standard", layer=0), 5)
    down = active(nn, make_sae("jumprelu", seed=1, layer=2), 4)
    where = sf.Tokens.last(2)
    found = sf.validation.edges(nn, RAGGED, up, down, where=where, check=7, batch_size=4)
    checked = ~found.exact.isnan()
    assert int(checked.sum()) == 7
    assert found.estimate.abs()[checked].min() >= found.estimate.abs()[~checked].max()
    before = sums(nn, down, where)
    for i, one in enumerate(up.singles()):
        change = (sums(nn, down, where, sf.Ablate(one)) - before).mean(0)
        torch.testing.assert_close(
            found.exact[i][checked[i]].double(), change[checked[i]], atol=1e-5, rtol=1e-5
        )
    assert found.rank == pytest.approx(spearman(found.estimate[checked], found.exact[checked]))


def test_where_everything_is_linear_estimates_are_exact():
    """A direction read one norm-free step later: the edge is the ablation."""
    nn = wrapped(smooth("llama"))
    up = sf.Direction(torch.stack([unit(1), unit(2)]), site="mlp_out.1").latents()
    down = sf.Direction(torch.stack([unit(3), unit(4)]), site="resid_post.1").latents()
    found = sf.validation.edges(nn, RAGGED, up, down, check=4)
    torch.testing.assert_close(found.estimate, found.exact, atol=1e-5, rtol=1e-5)
    assert found.rank == pytest.approx(1.0)


def test_frozen_models_batches_and_no_hook_left():
    model = build("llama")
    up, down = make_sae("standard", layer=0).latents([1, 2, 3, 4]), make_sae("standard", layer=2)
    chosen = down.latents([5, 6, 7])
    first = sf.validation.edges(wrapped(model), RAGGED, up, chosen, batch_size=1)
    frozen = build("llama").requires_grad_(False)
    second = sf.validation.edges(wrapped(frozen), RAGGED, up, chosen, batch_size=3)
    torch.testing.assert_close(first.by_prompt, second.by_prompt, atol=1e-5, rtol=1e-4)
    assert hook_count(frozen) == hook_count(build("llama"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_views_of_the_record():
    nn = wrapped(build("llama"))
    up = active(nn, make_sae("standard", layer=0), 3)
    down = active(nn, make_sae("standard", seed=1, layer=2), 2)
    found = sf.validation.edges(nn, RAGGED, up, down, check=3)
    table = found.to_pandas()
    assert len(table) == int((found.estimate != 0).sum())
    assert table["estimate"].abs().is_monotonic_decreasing
    strongest = found.top(1)[0]
    assert strongest[2] == pytest.approx(float(table["estimate"].iloc[0]))
    assert next(iter(strongest[0]))[1] == table["upstream"].iloc[0]
    assert next(iter(strongest[1]))[1] == table["downstream"].iloc[0]
    assert len(found.top(100)) == len(table)
    with pytest.raises(sf.SaefeatError, match=r"Edges\.top: `n`"):
        found.top(-1)
    assert len(repr(found).splitlines()) == 7


def test_what_an_ablation_switches_on_has_no_edge_and_is_seen():
    """Off, a latent has no gradient: its edge is zero, and the ablation of the check shows it."""
    nn = wrapped(smooth("llama"))
    up = active(nn, make_sae("standard", layer=0), 4)
    lower = make_sae("jumprelu", seed=1, layer=2)
    where = sf.Tokens.last(1)
    off = (sums(nn, lower.latents(), where) == 0).all(0).nonzero().flatten()
    change = torch.stack([sums(nn, lower.latents(off), where, sf.Ablate(u)) for u in up.singles()])
    dormant = int(off[change.abs().sum((0, 1)).argmax()])
    assert change.abs().max() > 0, "the case needs a latent that is switched on"
    down = active(nn, lower, 2) | lower.latents([dormant])
    found = sf.validation.edges(nn, RAGGED, up, down, where=where, check=4)
    column = [i for _, i in down].index(dormant)
    assert bool((found.estimate[:, column] == 0).all())
    assert bool(found.exact[:, column].isnan().all())
    before = sums(nn, down, where)
    for i, one in enumerate(up.singles()):
        if bool(found.exact[i].isnan().all()):
            assert bool(found.ablated[i].isnan().all())
            continue
        wanted = (sums(nn, down, where, sf.Ablate(one)) - before).mean(0)
        torch.testing.assert_close(found.ablated[i].double(), wanted, atol=1e-5, rtol=1e-5)
    (_, latent, value), *_ = found.unseen(5)
    assert [i for _, i in latent] == [dormant]
    assert value == pytest.approx(float(found.ablated[:, column].nan_to_num().abs().max()))


def test_one_that_is_not_seen_is_printed_if_it_is_strong():
    a, b = (sf.Neurons(f"resid_post.{n}", 4).latents([1, 2]) for n in (0, 1))
    estimate, nan = torch.tensor([[0.5, 0.0], [0.2, 0.1]]), float("nan")
    ablated = torch.tensor([[0.4, 0.9], [nan, nan]])
    exact = torch.tensor([[0.4, nan], [nan, nan]])
    found = sf.validation.Edges(a, b, estimate < 9, estimate[..., None], exact, ablated)
    assert found.unseen(3)[0][2] == pytest.approx(0.9) and len(found.unseen(3)) == 1
    line = "not seen by the gradient: resid_post.0 1 → resid_post.1 2: exact +0.900"
    assert line in repr(found)
    assert sf.validation.Edges(a, b, estimate < 9, estimate[..., None], exact).unseen(3) == ()


def test_interrupted_edges_go_on_where_they_stopped(tmp_path, monkeypatch):
    room = importlib.import_module("saefeat.validation.edges")

    nn = wrapped(build("llama"))
    up = active(nn, make_sae("standard", layer=0), 4)
    down = active(nn, make_sae("standard", seed=1, layer=2), 3)

    def job(**options):
        return sf.validation.edges(
            nn, RAGGED, up, down, **{"batch_size": 2, "check": 12, **options}
        )

    whole, done = job(), []
    once = room._once

    def spy(held, number, work):
        def counted():
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(number)
            return work()

        return once(held, number, counted)

    monkeypatch.setattr(room, "_once", spy)
    total = 2 + 1 + 4  # two batches, the sums as they are, four latents ablated
    for stop in (1, 3, 5):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            job(checkpoint=tmp_path / str(stop))
        done.clear()
        before, stop = stop, None
        found = job(checkpoint=tmp_path / str(before))
        assert len(done) == total - before
        assert torch.equal(found.by_prompt, whole.by_prompt)
        torch.testing.assert_close(found.exact, whole.exact, equal_nan=True, atol=0, rtol=0)
    for name, other in (("check", {"check": 1}), ("tokens", {"where": sf.Tokens.last(1)})):
        with pytest.raises(sf.errors.CheckpointError, match=f"edges.*differs in {name}"):
            job(checkpoint=tmp_path / "1", **other)


def test_refusals(capsys):
    nn = wrapped(build("llama"))
    early, late = make_sae("standard", layer=0), make_sae("standard", seed=1, layer=2)
    up, down = active(nn, early, 2), active(nn, late, 2)
    with pytest.raises(sf.errors.SiteError, match="swapped"):
        sf.validation.edges(nn, RAGGED, down, up)
    with pytest.raises(sf.errors.SiteError, match="one site"):
        sf.validation.edges(nn, RAGGED, up, early.latents([7]))
    with torch.no_grad(), pytest.raises(sf.errors.GradientError, match="switched off"):
        sf.validation.edges(nn, RAGGED, up, down)
    with pytest.raises(sf.errors.LatentError, match="at least one latent"):
        sf.validation.edges(nn, RAGGED, sf.Latents(()), down)
    with pytest.raises(sf.errors.FiringError, match="`downstream`"):
        sf.validation.edges(nn, RAGGED, up, down, where=sf.Tokens.ids(EOS))
    fires = sf.run(nn, RAGGED[:1], sf.Probe(early)).readings[0].active()
    silent = (fires == 0).nonzero().flatten()[:1]
    assert len(silent), "the case needs a silent latent"
    with pytest.raises(sf.errors.FiringError, match="`upstream`"):
        sf.validation.edges(nn, RAGGED[:1], early.latents(silent), down)
    for options in ({"check": -1}, {"batch_size": 0}):
        with pytest.raises(sf.SaefeatError, match="integer from"):
            sf.validation.edges(nn, RAGGED, up, down, **options)
    assert capsys.readouterr().err == ""
    sf.validation.edges(nn, RAGGED, up, down, progress=True)
    assert "edges" in capsys.readouterr().err
