"""Several changes from one reading of a site: ``a & b``, in every way of running."""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, batch_of, build, forward, make_sae, raw_hooks, unit, wrapped

NEW = 3
SITE = "resid_post.1"


@pytest.fixture(scope="module")
def setting():
    """A model, clamp A while B keeps its clean values, and the same by hand."""
    model, sae = build("llama"), make_sae("jumprelu")
    a, b = sae.latents([3, 8]), sae.latents([40, 22, 17])
    clean = sf.run(wrapped(model), batch_of(), sf.Probe(b)).readings[0]
    joint = sf.Clamp(a, 4.0) & sf.Clamp(b, sf.values.Patch(clean))

    def by_hand(x):
        real = batch_of()["attention_mask"].bool()
        steps = torch.cat(
            [4.0 - sae.encode(x, [3, 8]), clean.values - sae.encode(x, [40, 22, 17])], -1
        )
        moved = x + steps @ sae.directions([3, 8, 40, 22, 17])
        return torch.where(real[..., None], moved, x)

    return model, sae, joint, by_hand


def oracle(model, by_hand):
    with torch.no_grad(), raw_hooks(model, {1: by_hand}):
        return forward(model, batch_of())[:, -1]


def test_each_part_changes_what_the_model_itself_had_there(setting):
    """Chained, the second edit undoes what the first did to its latents."""
    model, _, joint, by_hand = setting
    wanted, (a, b) = oracle(model, by_hand), joint.steps
    nn = wrapped(model)
    torch.testing.assert_close(sf.run(nn, batch_of(), joint).logits, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(sf.run(nn, batch_of(), b & a).logits.argmax(-1), wanted.argmax(-1))
    chained = sf.run(nn, batch_of(), a | b).logits
    assert (chained - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["hooked", "edit", "inline", "sweep", "local", "saved"])
def test_in_every_way_of_running(way, setting, tmp_path):
    model, _, joint, by_hand = setting
    nn, batch, wanted = wrapped(model), batch_of(), oracle(model, by_hand)
    if way == "hooked":
        with torch.no_grad(), sf.hooked(model, joint):
            found = forward(model, batch)[:, -1]
    elif way == "edit":
        edited = sf.edit(nn, joint)
        with torch.no_grad(), edited.trace(batch):
            found = nnsight.save(edited.output.logits[:, -1])
    elif way == "inline":
        with torch.no_grad(), nn.trace(batch):
            joint(nn)
            found = nnsight.save(nn.output.logits[:, -1])
    elif way == "sweep":
        found = sf.sweep(nn, batch, {"joint": joint, "bare": None})["joint"].logits
    elif way == "local":
        found = sf.run(nn, batch, joint, on=sf.remote.Server("local")).logits
    else:
        path = sf.save(joint, tmp_path / "joint.safetensors", model=nn)
        again = sf.load(path, model=nn)
        assert repr(again).count(" & ") == 1 and isinstance(again, type(joint))
        found = sf.run(nn, batch, again).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_in_generation_at_every_token(setting):
    model, sae, _, _ = setting
    joint = sf.Clamp(sae.latents([3]), 6.0) & sf.Clamp(sae.latents([8]), scale=-3.0)
    joint &= sf.Ablate(sae.latents([40, 17]), where=sf.Tokens.generated())

    def by_hand(x):
        prompt = x.shape[1] > 1
        f = sae.encode(x, [3, 8, 40, 17])
        new = torch.cat(
            [torch.full_like(f[..., :1], 6.0), -3 * f[..., 1:2], f[..., 2:] * prompt], -1
        )
        moved = x + (new - f) @ sae.directions([3, 8, 40, 17])
        real = (
            batch_of()["attention_mask"].bool()[..., None] if prompt else torch.ones(1, 1, 1).bool()
        )
        return torch.where(real, moved, x)

    args = {"max_new_tokens": 6, "do_sample": False}
    with raw_hooks(model, {1: by_hand}):
        wanted = model.generate(**batch_of(), **args)
    assert not torch.equal(wanted, model.generate(**batch_of(), **args))
    with sf.hooked(model, joint):
        assert torch.equal(model.generate(**batch_of(), **args), wanted)
    out = sf.run(wrapped(model), batch_of(), joint, max_new_tokens=6)
    assert torch.equal(torch.tensor(out.completions), wanted[:, 6:])
    assert [row.tokens for row in out.receipt.rows] == [13 + 15, 13 + 15, 15]


def test_a_probe_reads_what_the_edits_read(setting):
    model, _, _, _ = setting
    v = sf.Direction(unit(), site=SITE)
    nn = wrapped(model)
    clean = sf.run(nn, RAGGED, sf.Probe(v)).readings[0].values
    out = sf.run(nn, RAGGED, sf.Clamp(v, 5.0) & sf.Probe(v) | sf.Probe(v))
    assert torch.equal(out.readings[0].values, clean)
    torch.testing.assert_close(
        out.readings[1].values[out.readings[1].mask], torch.full((13,), 5.0), atol=1e-4, rtol=0
    )


def test_conditions_are_tested_before_anything_is_written(setting):
    """In a chain the second condition reads what the first edit left."""
    model, _, _, _ = setting
    v, w = (sf.Direction(unit(n), site=SITE) for n in (1, 2))
    low = sf.When(v, below=3.0)
    first, second = sf.Clamp(v, 5.0), sf.Clamp(w, add=1.0, when=low)
    nn = wrapped(model)
    joint = sf.run(nn, RAGGED, first & second, allow_unfired=True).receipt
    chain = sf.run(nn, RAGGED, first | second, allow_unfired=True).receipt
    assert joint.rows[1].tokens == 13 and chain.rows[1].tokens == 0


def test_two_conditions_stay_with_their_edits(setting):
    model, _, _, _ = setting
    v, w = (sf.Direction(unit(n), site=SITE) for n in (1, 2))
    never, always = sf.When(v, above=1e6), sf.When(v, below=1e6)
    joint = sf.Clamp(v, add=1.0, when=never) & sf.Clamp(w, add=1.0, when=always)
    rows = sf.run(wrapped(model), RAGGED, joint, allow_unfired=True).receipt.rows
    assert [row.tokens for row in rows] == [0, 13]


def test_a_transcoder_and_an_sae(setting):
    """Reads upstream and writes are sorted as always; order among the parts does not matter."""
    model, sae, _, _ = setting
    t = make_sae("transcoder")
    a, b = sf.Ablate(t.latents([3, 4])), sf.Clamp(sae.latents([1]), 2.0)
    nn = wrapped(model)
    torch.testing.assert_close(sf.run(nn, RAGGED, a & b).logits, sf.run(nn, RAGGED, b & a).logits)
    torch.testing.assert_close(sf.run(nn, RAGGED, a & b).logits, sf.run(nn, RAGGED, a | b).logits)


def test_what_has_no_joint_meaning_is_refused(setting):
    _, sae, _, _ = setting
    a, b = sf.Ablate(sae.latents([1, 2])), sf.Clamp(sae.latents([2, 3]), 1.0)
    topk = make_sae("topk")
    with pytest.raises(sf.errors.LatentError, match="a latent that an earlier part edits"):
        a & b
    with pytest.raises(sf.errors.LatentError, match="wanted single edits"):
        (a | sf.Ablate(sae.latents([5]))) & sf.Ablate(sae.latents([6]))
    with pytest.raises(sf.errors.LatentError, match="removes a span"):
        sf.Ablate(sae.latents([1]).span()) & sf.Ablate(sae.latents([6]))
    with pytest.raises(sf.errors.LatentError, match="selected anew"):
        sf.Ablate(topk.latents([1]).reselect()) & sf.Ablate(topk.latents([6]))


def test_shape_of_a_joint_edit(setting):
    _, sae, _, _ = setting
    a, b, c = (sf.Ablate(sae.latents([n])) for n in (1, 2, 3))
    chain = a & b | c
    assert repr(chain) == f"{a!r} & {b!r} | {c!r}"
    assert [len(group) for group in chain.groups()] == [2, 1] and len(chain.parts()) == 3
    assert (a & b & c).steps == (a, b, c)
    from saefeat.files.hashing import digest

    assert digest(a & b) != digest(a | b)


@pytest.mark.parametrize("joint", [[1], [3], [2.0, 1], [0, 3], "2", [1, -1, 3]])
def test_a_file_with_other_groups_is_refused(joint, setting, tmp_path):
    from saefeat.hub.read import Reader
    from saefeat.hub.write import Writer

    _, sae, _, _ = setting
    a, b, c = (sf.Ablate(sae.latents([n])) for n in (1, 2, 3))
    writer = Writer()
    spec = writer.intervention(a & b | c)
    assert spec["joint"] == [2, 1] and "joint" not in Writer().intervention(a | b)
    spec["joint"] = joint
    if joint == [3]:  # a chain of one joint edit is one that code could make
        assert len(Reader(spec, writer.tensors, "load").intervention().groups()) == 1
        return
    with pytest.raises(sf.errors.FileError, match="joint"):
        Reader(spec, writer.tensors, "load").intervention()
