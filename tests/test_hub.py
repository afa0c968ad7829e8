"""Saved interventions: same results, same text, same bytes; and old files still read."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import nnsight
import pytest
import safetensors.torch
import torch

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    D_SAE,
    RAGGED,
    D,
    batch_of,
    build,
    forward,
    make_sae,
    tensors_for,
    unit,
    wrapped,
)
from saefeat.files import container
from saefeat.hub import fields as forms

GOLDEN = Path(__file__).parent / "golden"
NEW = 3


# ---------------------------------------------------------------- what is saved


def few(architecture: str = "jumprelu", **options) -> sf.Latents:
    return make_sae(architecture, **options).latents([3, 40, 17, 8])


def upstream() -> sf.Latents:
    return make_sae("standard", layer=0, seed=4).latents([1, 2])


def harm() -> sf.Direction:
    return sf.Direction(unit(9), site="resid_post.0", name="harm")


CASES = {
    "ablate": lambda: sf.Ablate(few()),
    "ablate to a number": lambda: sf.Ablate(few(), to=0.7),
    "ablate to values": lambda: sf.Ablate(few(), to=torch.tensor([0.1, -2.0, 3.5, 0.0])),
    "clamp": lambda: sf.Clamp(few(), 3.0),
    "clamp integers": lambda: sf.Clamp(few(), torch.tensor([1, 2, 3, 4])),
    "clamp by prompt": lambda: sf.Clamp(few(), scale=torch.arange(12.0).reshape(3, 4) - 5),
    "clamp in float64": lambda: sf.Clamp(few(), add=torch.rand(4, dtype=torch.float64)),
    "clamp in bfloat16": lambda: sf.Clamp(few(), add=torch.rand(4).bfloat16()),
    "bounds": lambda: sf.Clamp(few(), low=0.25, high=torch.tensor([1.0, 2.0, 0.5, 0.3])),
    "active only": lambda: sf.Clamp(few(), add=2.0, active_only=True),
    "add": lambda: sf.Clamp(harm(), add=4.0),
    "probe": lambda: sf.Probe(few(), where=sf.Tokens.last(2)),
    "probe reduced": lambda: sf.Probe(few(), reduce="max") | sf.Clamp(few(), 1.0),
    "when": lambda: sf.Clamp(few(), 2.0, when=sf.When(harm(), above=0.1)),
    "when held": lambda: sf.Clamp(few(), 2.0, when=sf.When(upstream(), above=-0.3, hold=True)),
    "when always": lambda: sf.Ablate(few(), when=sf.When(harm(), above=float("-inf"))),
    "neurons": lambda: sf.Clamp(sf.Neurons("resid_post.1", D).latents([5, 2]), scale=0.0),
    "subspace": lambda: sf.Ablate(sf.Direction(torch.randn(3, D), site="attn_out.1")),
    "wide direction": lambda: sf.Ablate(sf.Direction(unit(3).double(), site="resid_pre.2")),
    "several sites": lambda: sf.Ablate(
        sf.Direction.at_sites(unit(1), sites=["resid_mid.0", "mlp_out.1"])
    ),
    "error term": lambda: sf.Clamp(make_sae("jumprelu").error(), scale=0.5),
    "error of topk": lambda: sf.Clamp(make_sae("topk").error(), scale=0.5),
    "error, standardized": lambda: sf.Clamp(make_sae("standard", norm="layer_norm").error(), 0.0),
    "excluded": lambda: sf.Ablate(few(excluded=(4, 5, 6))),
    "excluded special": lambda: sf.Ablate(few(excluded="special")),
    "normalized": lambda: sf.Ablate(few(norm="layer_norm")),
    "centered": lambda: sf.Ablate(few(centered=True)) | sf.Clamp(centered().error(), scale=0.5),
    "orthogonal": lambda: sf.Ablate(few().span()),
    "schedule": lambda: sf.Clamp(few(), add=sf.values.Schedule([3.0, 2.0, 0.7], prompt=0.1)),
    "schedule by latent": lambda: sf.Clamp(few(), scale=sf.values.Schedule(torch.rand(2, 4))),
    "pin": lambda: pinned(few()),
    "resample": lambda: sf.Ablate(few(), to=sf.values.Resample(torch.rand(5, 4), seed=7)),
    "resample readings": lambda: resampled(few()),
    "when between": lambda: sf.Ablate(
        few(), when=sf.When(upstream(), above=-2.0, below=9.0, match="all")
    ),
    "rescaled topk": lambda: sf.Clamp(few("topk", norm="constant_norm_rescale", rescale=True), 2.0),
    "one SAE, many selections": lambda: many_selections(),
    "empty": lambda: sf.verbs.base.Chain(()),
    **{f"{a} SAE": lambda a=a: sf.Clamp(few(a), 3.0) for a in ARCHITECTURES},
    **{
        a: lambda a=a: sf.Ablate(few(a))
        for a in ("transcoder", "skip_transcoder", "jumprelu_transcoder")
    },
}
GPT2 = ("centered",)
"""Cases for a model with LayerNorm."""
RULES = [
    sf.Tokens.all(),
    sf.Tokens.prompt() & ~sf.Tokens.first(1),
    sf.Tokens.last(2) | sf.Tokens.generated(),
    sf.Tokens.generated(1, 3),
    sf.Tokens.positions(2) | ~sf.Tokens.positions(1, 4),
    sf.Tokens.ids(4, 8, 13) | sf.Tokens.special(),
]


def many_selections() -> sf.verbs.base.Chain:
    """Overlapping selections of one SAE, in other orders, as edits, readings and conditions."""
    sae = make_sae("gated", layer=0)
    return (
        sf.Clamp(sae.latents([9, 3]), 1.0)
        | sf.Probe(sae.latents([3, 9, 20]))
        | sf.Ablate(sae.latents([3]), when=sf.When(sae.latents([20]), above=0.0))
        | sf.Probe(sae.latents([9, 3]))
    )


def norm(x):
    return x.norm(dim=-1)


def centered() -> sf.SAE:
    return make_sae("standard", layer=2, centered=True)


def clean(latents: sf.Latents) -> sf.results.Readings:
    found = sf.run(wrapped(build("gemma2")), RAGGED, sf.Probe(latents)).readings[0]
    return replace(found, values=found.values + 1)


def pinned(latents: sf.Latents) -> sf.Ablate:
    return sf.Ablate(latents, to=sf.values.Patch(clean(latents)), where=sf.Tokens.prompt())


def resampled(latents: sf.Latents) -> sf.Ablate:
    return sf.Ablate(latents, to=sf.values.Resample(clean(latents)))


def again(intervention, tmp_path, **options):
    return sf.load(sf.save(intervention, tmp_path / "x.safetensors", **options))


def plain(receipt):
    return [replace(row, edit="") for row in receipt.rows], receipt.passes


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_intervention_is_the_saved_one(name, tmp_path):
    """Text, bytes, and every number of a generation, bit for bit."""
    torch.manual_seed(0)
    saved = CASES[name]()
    loaded = again(saved, tmp_path)
    assert repr(loaded) == repr(saved)
    assert type(loaded) is type(saved)
    first = (tmp_path / "x.safetensors").read_bytes()
    assert sf.save(loaded, tmp_path / "y.safetensors").read_bytes() == first
    nn = wrapped(build("gpt2" if name in GPT2 else "gemma2"))
    runs = [sf.run(nn, RAGGED, i, max_new_tokens=NEW, allow_unfired=True) for i in (saved, loaded)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert runs[0].completions == runs[1].completions
    assert runs[0].receipt == runs[1].receipt
    for a, b in zip(runs[0].readings, runs[1].readings, strict=True):
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.mask, b.mask)


def test_the_edits_do_something():
    """The test above would hold for edits that never act."""
    models = [wrapped(build("gemma2")), wrapped(build("gpt2"))]
    bare = [sf.run(nn, RAGGED).logits for nn in models]
    still = []
    for name, make in CASES.items():
        which = int(name in GPT2)
        logits = sf.run(models[which], RAGGED, make(), allow_unfired=True).logits
        still += [name] if torch.equal(logits, bare[which]) else []
    assert still == ["probe", "empty"]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_token_rules(rule, tmp_path):
    saved = sf.Clamp(few(), 3.0, where=rule)
    loaded = again(saved, tmp_path)
    assert loaded.where == rule
    nn = wrapped(build("llama"))
    runs = [sf.run(nn, RAGGED, i, max_new_tokens=NEW, allow_unfired=True) for i in (saved, loaded)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert runs[0].receipt == runs[1].receipt


def test_every_rule_there_is_is_listed(tmp_path):
    """A rule added to Tokens must be written, or refused by name."""
    made = {
        "all": sf.Tokens.all(),
        "prompt": sf.Tokens.prompt(),
        "special": sf.Tokens.special(),
        "first": sf.Tokens.first(2),
        "last": sf.Tokens.last(3),
        "positions": sf.Tokens.positions(2),
        "generated": sf.Tokens.generated(2),
        "ids": sf.Tokens.ids(1, 2),
        "role": sf.Tokens.role("user"),
        "where": None,
    }
    listed = {n for n, v in vars(sf.Tokens).items() if isinstance(v, classmethod)}
    assert listed == set(made)
    for rule in filter(None, made.values()):
        for shape in (rule, ~rule, rule & sf.Tokens.last(1), sf.Tokens.first(1) | rule):
            assert again(sf.Ablate(harm(), where=shape), tmp_path).where == shape


def test_every_way_of_running(tmp_path):
    saved = CASES["one SAE, many selections"]() | sf.Clamp(few(), 2.0, where=sf.Tokens.last(2))
    loaded = again(saved, tmp_path)
    model, batch = build("gemma2"), batch_of()
    nn = wrapped(model)

    def ways(intervention):
        with torch.no_grad(), sf.hooked(model, intervention) as log:
            yield forward(model, batch)
            yield plain(intervention.receipt(log))
        edited = sf.edit(nn, intervention)
        with edited.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(batch):
                pass
            with tracer.invoke():
                tokens = nnsight.save(tracer.result)
        yield tokens
        with torch.no_grad(), nn.trace(batch):
            log = nnsight.save(intervention(nn))
            logits = nnsight.save(nn.output.logits)
        yield logits
        yield plain(intervention.receipt(log))

    for a, b in zip(list(ways(saved)), list(ways(loaded)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Rounding(sf.dictionaries.Dictionary):
    """A dictionary whose columns depend on which others they are computed with."""

    def __init__(self) -> None:
        self.sae = make_sae("jumprelu")
        self.site = self.write_site = self.sae.site
        self.d_in, self.d_out, self.d_sae, self.name = D, D, D_SAE, "rounding"

    def columns(self, indices):
        found = self.sae.columns(indices)
        return {**found, "bias": found["bias"] + 1e-6 * len(indices)}

    def fingerprint(self) -> str:
        return "rounding"


def test_each_selection_is_kept_as_it_was_computed(tmp_path):
    """A product over other columns may round otherwise: nothing is cut from a union."""
    rounding = Rounding()
    selections = [[3, 40], [40, 17, 3, 5, 8]]
    saved = sf.verbs.base.Chain(tuple(sf.Ablate(rounding.latents(i)) for i in selections))
    loaded = again(saved, tmp_path)
    (excerpt, *_), (other, *_) = (step.latents.parts[0] for step in loaded.parts())
    assert excerpt is other
    for chosen in selections:
        wanted = rounding.columns(torch.tensor(chosen))["bias"]
        assert torch.equal(excerpt.columns(torch.tensor(chosen))["bias"], wanted)


# ---------------------------------------------------------------- excerpts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_excerpt_gives_latents_in_any_order(architecture):
    """One by one, from two selections; close, not equal: other products round otherwise."""
    sae = make_sae(architecture)
    excerpt = sf.dictionaries.excerpt.Excerpt.of(sae, [(3, 40), (17,)])
    x = torch.randn(2, 5, D)
    assert excerpt.held == (3, 40, 17)
    assert repr(excerpt.latents()) == repr(sae.latents([3, 40, 17]))
    torch.testing.assert_close(excerpt.encode(x, [17, 3]), sae.encode(x, [17, 3]))
    torch.testing.assert_close(excerpt.encode(x), sae.encode(x, [3, 40, 17]))
    assert torch.equal(excerpt.directions([40]), sae.directions([40]))
    assert excerpt.encode(x, []).shape == (2, 5, 0)


def test_an_excerpt_refuses_what_it_does_not_hold():
    excerpt = sf.dictionaries.excerpt.Excerpt.of(make_sae(), [(3, 40)])
    for asked in (lambda: excerpt.latents([4]), lambda: excerpt.columns(torch.tensor([4]))):
        with pytest.raises(sf.errors.LatentError, match=r"latent 4, which is not held.*3, 40"):
            asked()
    with pytest.raises(sf.errors.LatentError, match=r"0\.\.47"):
        excerpt.latents([D_SAE])
    by_hand = sf.Latents(((excerpt, (5,)),))
    with pytest.raises(sf.errors.LatentError, match="not held"):
        sf.run(wrapped(build()), RAGGED, sf.Ablate(by_hand))


def test_an_excerpt_knows_both_hashes():
    sae, other = make_sae(), make_sae(seed=1)
    one, two = (
        sf.dictionaries.excerpt.Excerpt.of(sae, [(3,)]),
        sf.dictionaries.excerpt.Excerpt.of(sae, [(4,)]),
    )
    assert one.fingerprint() == two.fingerprint() == sae.fingerprint()
    again = sf.dictionaries.excerpt.Excerpt.of(make_sae(), [(3,)])
    third = sf.dictionaries.excerpt.Excerpt.of(other, [(3,)])
    assert one.fingerprint([3]) == again.fingerprint([3]) != third.fingerprint([3])
    assert one.fingerprint([3]) != two.fingerprint([4])


def test_an_excerpt_checks_its_columns():
    columns = make_sae().columns(torch.tensor([3]))
    options = dict(site="resid_post.1", write_site="resid_post.1", d_in=D, d_out=D, d_sae=D_SAE)
    options |= dict(name="x", excluded=(), origin=None, fingerprint="f")
    sf.dictionaries.excerpt.Excerpt({(3,): columns}, **options)
    for wrong in (
        {**columns, "bias": torch.zeros(2)},
        {**columns, "encoder": columns["encoder"].T},
        {**columns, "activation": "swish"},
        {**columns, "norm": "batch_norm"},
        {**columns, "surplus": torch.zeros(1)},
        {k: v for k, v in columns.items() if k != "directions"},
    ):
        with pytest.raises(sf.errors.DictionaryError):
            sf.dictionaries.excerpt.Excerpt({(3,): wrong}, **options)
    with pytest.raises(sf.errors.LatentError):
        sf.dictionaries.excerpt.Excerpt({(D_SAE,): columns}, **options)


def test_a_loaded_direction_keeps_its_bits(tmp_path):
    """Normalizing a unit vector again moves its last bits for about half of all vectors."""
    moved = 0
    for seed in range(20):
        v = sf.Direction(torch.randn(D, generator=torch.Generator().manual_seed(seed)), site="z.0")
        moved += not torch.equal(sf.Direction(v.vectors, site="z.0").vectors, v.vectors)
        loaded = again(sf.Ablate(v), tmp_path).latents.parts[0][0]
        assert torch.equal(loaded.vectors, v.vectors)
        assert loaded.fingerprint() == v.fingerprint()
    assert moved
    with pytest.raises(sf.errors.DictionaryError, match="away from orthonormal"):
        sf.Direction.orthonormal(2 * torch.eye(3)[:2], site="z.0")


# ---------------------------------------------------------------- the file


def test_the_file_is_a_safetensors_file_without_the_dictionary(tmp_path):
    path = sf.save(sf.Ablate(few(d_sae=4096)), tmp_path / "x.safetensors")
    found = safetensors.torch.load_file(path)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        "dictionaries.0.0.encoder": (D, 4),
        "dictionaries.0.0.directions": (4, D),
        "dictionaries.0.0.bias": (4,),
        "dictionaries.0.0.threshold": (4,),
    }
    assert path.stat().st_size < 4 * 2 * D * 4 + 2500  # two rows of D a latent, and the document
    with safetensors.safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["saefeat"])
    assert document["format"] == "saefeat.intervention"
    assert document["version"] == forms.VERSION
    assert document["written"]["saefeat"] == sf.__version__


def test_bytes_are_those_of_the_safetensors_library(tmp_path):
    """Layout, order and padding are the library's own, so nothing depends on our reader."""
    path = sf.save(sf.Clamp(few(), torch.rand(4).double()), tmp_path / "x.safetensors")
    contents = container.read(path, "test")
    document = {container.KEY: container.canonical(contents.document)}
    assert safetensors.torch.save(contents.tensors, metadata=document) == path.read_bytes()


def test_who_wrote_a_file_is_not_part_of_its_hash(tmp_path, monkeypatch):
    path = sf.save(sf.Ablate(few()), tmp_path / "x.safetensors")
    before = container.read(path, "test").document
    monkeypatch.setattr("saefeat.hub.files.versions", lambda: {"saefeat": "9.9"})
    after = container.read(sf.save(sf.load(path), path), "test").document
    assert before["sha256"] == after["sha256"]
    assert after["written"] == {"saefeat": "9.9"}


def test_folders_of_this_machine_stay_here(tmp_path):
    """A shared file must not say where its author keeps things."""
    from saefeat.studies.refusal import tiny

    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    path = sf.save(sf.Ablate(saes.latents({1: [0, 1]})), tmp_path / "x.safetensors")
    assert str(tiny.saes_folder("chat")).encode() not in path.read_bytes()
    loaded = sf.load(path)
    (entry,) = container.read(path, "test").document["spec"]["dictionaries"]
    assert entry["origin"] == f"{saes[1].origin.id} (sae_lens)"
    assert entry["fingerprint"] == saes[1].fingerprint()
    out = sf.run(tiny.model("chat"), ["hello"], loaded)
    assert saes[1].fingerprint() in out.provenance.dictionaries["resid_post.1"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = sf.save(sf.Ablate(few()), tmp_path / "x.safetensors")
    before = path.read_bytes()

    def fails(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(sf.errors.FileError, match="No space left"):
        sf.save(sf.Clamp(few(), 1.0), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("path", ["no/such/folder/x", ".", "x\0y"])
def test_a_path_that_cannot_be_written(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sf.errors.FileError):
        sf.save(sf.Ablate(harm()), path)
    with pytest.raises(sf.errors.FileError):
        sf.load(path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what cannot be saved


def only_threes(ids, position):
    return ids == 3


class Custom(sf.Intervention):
    def groups(self):
        return ((self,),)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: sf.Ablate(
                sf.dictionaries.Function(torch.relu, torch.eye(D), site="resid_post.0", width=D)
            ),
            r"Function\('generic'.*Python function",
        ),
        (lambda: sf.Ablate(harm(), where=sf.Tokens.where(only_threes)), r"where\(only_threes\)"),
        (
            lambda: sf.Ablate(harm(), where=~(sf.Tokens.last(1) | sf.Tokens.where(only_threes))),
            "only_threes",
        ),
        (lambda: Custom(), "Custom"),
        (lambda: harm().latents(), "Latents"),
        (lambda: sf.When(harm()), "When"),
        (lambda: sf.Ablate(harm(), when=sf.When(norm, site="resid_post.0")), "function"),
        (lambda: sf.Ablate(few("topk").reselect()), "reselect"),
        (lambda: sf.Ablate(harm(), where=~sf.Tokens.role("u" * 5000)), "a long role"),
        (
            lambda: sf.Ablate(sf.Direction(unit(), site="model." + "a" * 300 + ".output")),
            "at most 256 characters",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_named(make, message, tmp_path):
    with pytest.raises(sf.errors.FileError, match=message):
        sf.save(make(), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_dictionary_that_is_not_finite_is_refused_before_a_file_is_begun(tmp_path):
    tensors = tensors_for("standard")
    tensors["W_enc"][0, 3] = torch.nan
    broken = sf.SAE.from_tensors(tensors, site="resid_post.1").latents([3])
    with pytest.raises(sf.errors.DictionaryError, match="`encoder` has nan, of latent 3"):
        sf.save(sf.Ablate(broken), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_field_has_a_kind_that_a_file_knows():
    """Without one it would be lost, or refused wherever it stands."""
    assert all(kinds for form in forms.FORMS.values() for kinds in form.kinds.values())
    assert {cls.__name__ for cls in sf.verbs.base.Step.__subclasses__()} == set(forms.STEPS)


def test_size_is_limited_and_said(tmp_path):
    """A topk SAE needs its whole encoder."""
    wide = sf.Ablate(few("topk", d_sae=4096))
    with pytest.raises(sf.errors.FileError, match=r"topk.*max_bytes=\d+"):
        sf.save(wide, tmp_path / "x.safetensors", max_bytes=500_000)
    path = sf.save(wide, tmp_path / "x.safetensors")
    assert path.stat().st_size > 4096 * D * 4
    with pytest.raises(sf.errors.FileError, match=r"at most 500,000 bytes.*max_bytes"):
        sf.load(path, max_bytes=500_000)
    small = sf.save(sf.Ablate(few()), tmp_path / "y.safetensors")
    exact = small.stat().st_size
    sf.load(small, max_bytes=exact)
    sf.save(sf.Ablate(few()), small, max_bytes=exact)
    with pytest.raises(sf.errors.FileError):
        sf.save(sf.Ablate(few()), small, max_bytes=exact - 1)


def test_nesting_is_limited_on_both_sides(tmp_path):
    rule = sf.Tokens.ids(1)
    for i in range(200):
        rule = rule | sf.Tokens.ids(i)
    assert again(sf.Ablate(harm(), where=rule), tmp_path).where == rule
    for i in range(100):
        rule = rule | sf.Tokens.ids(i)
    for _ in range(2):
        with pytest.raises(sf.errors.FileError, match="nested too deeply"):
            sf.save(sf.Ablate(harm(), where=rule), tmp_path / "x.safetensors")
        for i in range(3000):  # deeper than Python itself goes
            rule = rule | sf.Tokens.ids(i)


# ---------------------------------------------------------------- another model


def test_another_model_is_refused(tmp_path):
    model = build("gemma2")
    path = sf.save(sf.Ablate(few()), tmp_path / "x.safetensors", model=wrapped(model))
    assert repr(sf.load(path, model=model)) == repr(sf.load(path, model=wrapped(model)))
    with pytest.raises(sf.errors.ModelError, match=r"of family .llama.*wanted .gemma2."):
        sf.load(path, model=build("llama"))
    for name, value, word in (
        ("vocab_size", 99, "vocab 99"),
        ("hidden_size", 64, "d_model 64"),
    ):
        other = build("gemma2")
        setattr(other.config, name, value)
        with pytest.raises(sf.errors.ModelError, match=word):
            sf.load(path, model=other)
    deeper = build("gemma2")
    deeper.model.layers.append(deeper.model.layers[0])
    with pytest.raises(sf.errors.ModelError, match="layers 4"):
        sf.load(path, model=deeper)
    with pytest.raises(sf.errors.ModelError):
        sf.load(path, model="gpt2")


def test_without_facts_the_dictionaries_decide(tmp_path):
    wide = sf.Direction(torch.ones(D + 1), site="resid_post.0")
    path = sf.save(sf.Ablate(harm(), when=sf.When(wide)), tmp_path / "x.safetensors")
    with pytest.raises(sf.errors.SiteError, match=f"{D + 1} wide"):
        sf.load(path, model=build())
    with pytest.raises(sf.errors.SiteError, match=f"{D + 1} wide"):
        sf.run(wrapped(build()), RAGGED, sf.load(path))
    deep = sf.save(sf.Ablate(sf.Direction(unit(), site="resid_post.30")), path)
    with pytest.raises(sf.errors.SiteError, match=r"0\.\.2"):
        sf.load(deep, model=build())


def test_model_facts(tmp_path):
    model = build("gpt2")
    model.config.name_or_path = "/home/someone/models/tiny"
    path = sf.save(sf.Ablate(harm()), tmp_path / "x.safetensors", model=model)
    facts = container.read(path, "test").document["spec"]["model"]
    assert facts == {
        "family": "gpt2",
        "d_model": D,
        "layers": 3,
        "vocab": 100,
        "name": "tiny",
        "revision": None,
    }


# ---------------------------------------------------------------- old files


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("v*.safetensors")), ids=lambda p: p.name)
def test_old_files_are_read(path):
    """Every file ever released is read, and gives the numbers written down when it was made."""
    known = json.loads((GOLDEN / "golden.json").read_text())[path.name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == known["sha256"], "pinned: never change"
    loaded = sf.load(path)
    assert repr(loaded) == known["repr"]
    out = sf.run(wrapped(build(known["family"])), RAGGED, loaded)
    torch.testing.assert_close(
        out.logits[:, :8], torch.tensor(known["logits"]), rtol=2e-4, atol=2e-5
    )
    assert [[r.tokens, r.changed] for r in out.receipt.rows] == known["fired"]


def test_golden_files_are_there():
    names = {p.name for p in GOLDEN.glob("v*.safetensors")}
    assert names == set(json.loads((GOLDEN / "golden.json").read_text()))
    assert {f"v{n}" for n in range(1, forms.VERSION + 1)} == {name.split("-")[0] for name in names}


def test_a_later_version_is_refused_by_name(tmp_path):
    path = sf.save(sf.Ablate(harm()), tmp_path / "x.safetensors")
    document, tensors = container.read(path, "test")
    document["version"] = forms.VERSION + 1
    container.write(path, container.pack(document, tensors, "test"), "test")
    with pytest.raises(sf.errors.FileError, match=r"of version 2.*pip install --upgrade saefeat"):
        sf.load(path)


def test_the_header_starts_where_safetensors_says(tmp_path):
    data = sf.save(sf.Ablate(harm()), tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"].keys() == {"saefeat"}
