"""Dictionaries of which no latent can be computed alone: matching pursuit and temporal SAEs.

The oracle is sae-lens's own ``encode``: of one value for matching pursuit, of a whole row without
padding for temporal.
"""

from __future__ import annotations

import json
import warnings
from functools import cache

import nnsight
import pytest
import torch
from safetensors.torch import load_file, save_file

import saefeat as sf
from helpers import (
    RAGGED,
    D,
    batch_of,
    blocks_of,
    build,
    forward,
    hook_count,
    raw_hooks,
    unit,
    wrapped,
)
from saefeat.dictionaries.contract import check_dictionary
from saefeat.generation import Beams
from saefeat.kernel.read import Read
from saefeat.verbs.lower import lower
from test_ways import every_way

N = 64
NORMS = ["none", "layer_norm", "constant_norm_rescale"]
SITE = "resid_post.1"


@cache
def lens(architecture: str, **options):
    """A random sae-lens SAE of resid_post.1."""
    import sae_lens
    from sae_lens.registry import get_sae_class

    kind, config_kind = get_sae_class(architecture)
    if architecture == "temporal":
        options = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 6, **options}
    else:
        options = {"residual_threshold": 0.5, "max_iterations": 9, **options}
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    config = config_kind(
        d_in=D, d_sae=N, metadata=sae_lens.saes.sae.SAEMetadata(**metadata), **options
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        sae = kind(config)
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(N, D), dim=1)
        sae.b_dec.data = torch.randn(D) / 4
        if architecture == "temporal":
            sae.lam = 1.0  # random weights: at sae-lens's own scale nothing would be predicted
    return sae.eval()


TEMPORAL = [
    {},
    {"sae_diff_type": "relu"},
    {"tied_weights": False},
    {"normalize_activations": "layer_norm"},
    {
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.3,
    },
]


def values(*shape: int) -> torch.Tensor:
    return 1.5 * torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what they compute


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_matching_pursuit_is_sae_lenss(norm, bias):
    theirs = lens("matching_pursuit", normalize_activations=norm, apply_b_dec_to_input=bias)
    ours, x = sf.load_sae(theirs), values(2, 5)
    wanted = theirs.encode(x)
    assert ((wanted > 0).sum(-1) > 3).all()
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode(x, [7, 3]), wanted[..., [7, 3]], atol=1e-5, rtol=1e-5)
    theirs.encode(x)
    torch.testing.assert_close(ours.reconstruct(x), theirs.decode(wanted), atol=1e-5, rtol=1e-5)
    check_dictionary(ours)


@torch.no_grad()
@pytest.mark.parametrize("options", TEMPORAL, ids=str)
def test_temporal_is_sae_lenss(options):
    theirs = lens("temporal", **options)
    ours, x = sf.load_sae(theirs), values(2, 7)
    wanted = theirs.encode(x)
    assert (wanted > 0).any(-1).all() and ours.prefix
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x), atol=1e-5, rtol=1e-5)
    alone = theirs.encode(x[:, 4:5])  # the same value without what went before
    assert (alone[:, 0] - wanted[:, 4]).abs().max() > 1e-2
    check_dictionary(ours)


@torch.no_grad()
@pytest.mark.parametrize("options", TEMPORAL, ids=str)
def test_a_directions_unit_is_what_decoding_adds(options):
    theirs = lens("temporal", **options)
    ours, x = sf.load_sae(theirs), values(1, 4)
    f = theirs.encode(x)
    more = f.clone()
    more[..., 5] += 1.0
    theirs.encode(x)
    before = theirs.decode(f)
    theirs.encode(x)
    moved = (theirs.decode(more) - before)[0]
    scale = 1.0
    if ours.norm == "layer_norm":
        scale = x[0].std(-1, keepdim=True)
    torch.testing.assert_close(
        moved, (ours.directions([5]) * scale).expand(4, D), atol=1e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_a_folder_is_read_by_sae_lens(architecture, tmp_path):
    theirs = lens(architecture)
    theirs.save_model(tmp_path / "one")
    x = values(2, 6)
    loaded = sf.load_sae(tmp_path / "one")
    mapped = sf.load_saes(tmp_path)[SITE]
    moved = sf.load_sae(tmp_path / "one", site="mlp_out.2")
    from sae_lens import SAE

    wanted = SAE.load_from_disk(tmp_path / "one").encode(x)
    for ours in (loaded, mapped, moved):
        torch.testing.assert_close(ours.encode(x), wanted, atol=1e-6, rtol=1e-5)
    assert str(loaded.site) == SITE and str(moved.site) == "mlp_out.2"
    assert loaded.fingerprint() == sf.load_sae(theirs).fingerprint()
    assert "one" in str(loaded.origin)


def test_a_folder_that_is_not_whole(tmp_path):
    lens("temporal").save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "k_ctx" not in name}, path)
    with pytest.raises(sf.errors.DictionaryError, match="sae-lens cannot read"):
        sf.load_sae(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(sf.errors.DictionaryError):
        sf.load_sae(tmp_path)


def test_the_object_is_left_as_it_was():
    theirs = lens("temporal", normalize_activations="layer_norm")
    before = theirs.run_time_activation_norm_fn_in
    ours = sf.load_sae(theirs)
    ours.encode(values(1, 4))
    assert theirs.run_time_activation_norm_fn_in is before and not hasattr(theirs, "ln_mu")
    assert ours.columns(torch.tensor([1]))["directions"].requires_grad is False


# ---------------------------------------------------------------- matching pursuit, every way


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_matching_pursuit_edits_as_a_hand_written_hook(norm):
    theirs = lens("matching_pursuit", normalize_activations=norm)
    model, batch, picked = build("llama"), batch_of(), [3, 9, 40, 41, 60]
    real = batch["attention_mask"].bool().unsqueeze(-1)

    @torch.no_grad()
    def edit(x):
        f = theirs.encode(x)
        less = f.clone()
        less[..., picked] = 2.0
        theirs.encode(x)
        change = theirs.decode(less)
        theirs.encode(x)
        return torch.where(real, x + change - theirs.decode(f), x)

    with raw_hooks(model, {1: edit}):
        wanted = forward(model, batch)[:, -1]
    chain = sf.Clamp(sf.load_sae(theirs).latents(picked), 2.0)
    found = every_way(model, batch, chain)
    for way, (logits, tokens) in found.items():
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4, msg=way)
        assert torch.equal(tokens, found["hooked"][1]), way


def test_matching_pursuit_is_attributed():
    """f · (g · direction), with sae-lens's own f."""
    nn, theirs = wrapped(build("llama")), lens("matching_pursuit")
    ours = sf.load_sae(theirs)
    found = sf.Attribute(ours, sf.metrics.logit(7))(nn, RAGGED)
    look = sf.run(nn, RAGGED, sf.Probe(sf.Neurons(SITE, D))).readings[0]
    rows = look.mask[..., 0].nonzero()
    f = theirs.encode(look.values)[look.mask[..., 0]].detach()
    assert len(found.score) == int((f != 0).sum())
    own = {(int(p), int(i)) for p, i in zip(found.prompt, found.latent, strict=True)}
    token, latent = (f != 0).nonzero(as_tuple=True)
    assert own == {(int(rows[t, 0]), int(i)) for t, i in zip(token, latent, strict=True)}


# ---------------------------------------------------------------- temporal: padding and caches


def expected(theirs, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[b, t, N]: each row's real tokens by themselves, through sae-lens."""
    out = torch.zeros(*mask.shape, N)
    with torch.no_grad():
        for row, kept in enumerate(mask):
            out[row, kept] = theirs.encode(values[row, kept].unsqueeze(0))[0]
    return out


@pytest.mark.parametrize("way", ["hooked", "trace"])
def test_a_row_is_read_without_its_padding(way):
    theirs, model, batch = lens("temporal"), build("gemma2"), batch_of()
    ours, real = sf.load_sae(theirs), batch["attention_mask"].bool()
    chain = sf.Probe(sf.Neurons(SITE, D)) | sf.Probe(ours)
    if way == "hooked":
        with torch.no_grad(), sf.hooked(model, chain) as log:
            forward(model, batch)
    else:
        nn = wrapped(model)
        with torch.no_grad(), nn.trace(batch):
            log = nnsight.save(chain(nn))
    x, f = (reading.values for reading in chain.readings(log))
    wanted = expected(theirs, x, real)
    torch.testing.assert_close(f[real], wanted[real], atol=1e-5, rtol=1e-5)
    padded = theirs.encode(x)  # what reading the padded batch would give
    assert (padded[real] - wanted[real]).abs().max() > 1e-2


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_generation_with_a_cache_sees_the_whole_sequence(norm):
    """Read and edited at every step, as the values of all tokens so far give it."""
    theirs = lens("temporal", normalize_activations=norm)
    ours, nn = sf.load_sae(theirs), wrapped(build("llama"))
    look = sf.Probe(sf.Neurons(SITE, D)) | sf.Probe(ours)
    out = sf.run(nn, RAGGED, look | sf.Clamp(ours.latents([3, 9, 40]), 3.0), max_new_tokens=5)
    x, f = out.readings
    mask = x.mask[..., 0]
    assert mask.shape[1] == 6 + 4 and mask[:, -1].all()
    wanted = expected(theirs, x.values, mask)
    torch.testing.assert_close(f.values[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    last = theirs.encode(x.values[:, -1:])[:, 0]  # what a step alone would give
    assert (last - wanted[:, -1]).abs().max() > 1e-2


def test_every_way_of_running_agrees_and_so_does_none_cached():
    model, batch = build("llama"), batch_of()
    ours = sf.load_sae(lens("temporal"))
    chain = sf.Clamp(ours.latents(range(0, N, 3)), 3.0) | sf.Ablate(
        sf.Direction(unit(), site="resid_post.2"),
        when=sf.When(ours.latents(range(1, N, 3)), above=0.5),
    )
    found = every_way(model, batch, chain)
    for way, (logits, tokens) in found.items():
        torch.testing.assert_close(logits, found["hooked"][0], atol=1e-4, rtol=1e-4, msg=way)
        assert torch.equal(tokens, found["hooked"][1]), way
    with sf.hooked(model, chain):
        slow = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(slow[:, batch["input_ids"].shape[1] :], found["hooked"][1])
    bare = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert not torch.equal(slow, bare) and hook_count(model) == 0


def test_one_prompt_alone_is_the_same_prompt_in_a_batch():
    nn = wrapped(build("gpt2"))
    edit = sf.Clamp(sf.load_sae(lens("temporal")).latents([1, 2, 3]), 4.0)
    together = sf.run(nn, RAGGED, edit, max_new_tokens=4)
    for row, prompt in enumerate(RAGGED):
        single = sf.run(nn, [prompt], edit, max_new_tokens=4)
        torch.testing.assert_close(single.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
        assert single.completions[0] == together.completions[row]


def test_edits_of_earlier_steps_do_not_reach_the_memory_of_a_new_sequence():
    model, chain = build("llama"), sf.Probe(sf.load_sae(lens("temporal")))
    with torch.no_grad(), sf.hooked(model, chain) as log:
        forward(model, batch_of(["w5 w6 w7 w8", "w1 w2"]))
        forward(model, batch_of())
    again = sf.run(wrapped(model), RAGGED, chain).readings[0]
    seen = chain.readings(log)[0]
    assert torch.allclose(seen.values[seen.mask], again.values[again.mask], atol=1e-5)


def test_a_cache_filled_before_is_refused():
    model, ids = build("llama"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    past = model(ids, use_cache=True).past_key_values
    probe = sf.Probe(sf.load_sae(lens("temporal")))
    with pytest.raises(ValueError, match="not seen"), sf.hooked(model, probe):
        model(ids[:, :1], past_key_values=past)


# ---------------------------------------------------------------- what is refused, what is said


def test_attribution_is_refused():
    ours = sf.load_sae(lens("temporal"))
    with pytest.raises(sf.errors.GradientError, match="look back over the text"):
        sf.Attribute(ours, sf.metrics.logit(3))(wrapped(build("llama")), RAGGED)


@pytest.mark.parametrize("place", ["latents", "when"])
def test_one_step_at_a_time_is_refused(place):
    nn, ours = wrapped(build("llama")), sf.load_sae(lens("temporal"))
    v = sf.Direction(unit(), site="resid_post.2")
    edit = sf.Ablate(ours) if place == "latents" else sf.Ablate(v, when=sf.When(ours))
    with pytest.raises(Exception, match="looks back"), nn.trace(batch_of()):
        edit(nn, step=0)


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_a_program_says_that_it_cannot_be_sent(architecture):
    ours = sf.load_sae(lens(architecture))
    program = lower(sf.Ablate(ours.latents([3])), build("llama"))
    local = [a.source.encoder.local for a in program.actions if isinstance(a, Read)]
    assert any(reason and "sae-lens object" in reason for reason in local)


# ---------------------------------------------------------------- dictionaries of one's own


def running_mean(x: torch.Tensor) -> torch.Tensor:
    count = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]
    return x.cumsum(-2) / count


def test_a_dictionary_of_ones_own_may_look_back():
    """Against the mean of the values so far, by hand, over padding and generated tokens."""
    own = sf.dictionaries.Function(running_mean, torch.eye(D), site=SITE, width=D, prefix=True)
    check_dictionary(own)
    nn = wrapped(build("gpt_neox"))
    out = sf.run(nn, RAGGED, sf.Probe(sf.Neurons(SITE, D)) | sf.Probe(own), max_new_tokens=3)
    x, f = out.readings
    for row in range(len(RAGGED)):
        kept = x.mask[row, :, 0]
        own_values = x.values[row, kept]
        wanted = torch.stack([own_values[: n + 1].mean(0) for n in range(len(own_values))])
        torch.testing.assert_close(f.values[row, kept], wanted, atol=1e-5, rtol=1e-5)


def test_one_that_looks_ahead_is_named():
    ahead = sf.dictionaries.Function(
        lambda x: x - x.mean(-2, keepdim=True), torch.eye(D), site=SITE, width=D, prefix=True
    )
    with pytest.raises(sf.errors.DictionaryError, match="look ahead"):
        check_dictionary(ahead)


def test_blocks_are_untouched():
    model = build("llama")
    sf.run(wrapped(model), RAGGED, sf.Ablate(sf.load_sae(lens("temporal"))))
    assert not any(b._forward_hooks for b in blocks_of(model))


def test_the_configuration_of_a_folder_says_which(tmp_path):
    lens("matching_pursuit").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "matching_pursuit"
    assert sf.load_sae(tmp_path).architecture == "matching_pursuit"


def test_beams_take_their_memory_along():
    """Beam search drops and copies rows; what a row remembers must go with it."""
    model, batch = build("llama"), batch_of()
    weight, way = unit(3), unit(4)

    def running(x):  # [1, n, d] → [1, n, 1]
        return (x @ weight).cumsum(1).unsqueeze(-1)

    latent = sf.dictionaries.Function(
        running, way[None] * 3, site="resid_post.1", width=D, prefix=True
    )
    edit = sf.Clamp(latent, scale=2.0)

    def by_hand(x):  # without a cache every pass shows the whole row
        real = batch["attention_mask"].repeat_interleave(len(x) // 3, 0)
        real = torch.cat([real, torch.ones(len(x), x.shape[1] - real.shape[1])], 1)
        sums = torch.where(real.bool(), x @ weight, 0.0).cumsum(1)
        return x + torch.where(real.bool()[..., None], sums[..., None] * way * 3, 0.0)

    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with raw_hooks(model, {1: by_hand}):
        wanted = model.generate(**batch, **options, use_cache=False)
    with sf.hooked(model, edit):
        assert torch.equal(model.generate(**batch, **options), wanted)
    assert not torch.equal(model.generate(**batch, **options), wanted)
    out = sf.run(wrapped(model), RAGGED, edit, max_new_tokens=6, decode=Beams(3))
    assert [list(c) for c in out.completions] == wanted[:, batch["input_ids"].shape[1] :].tolist()
