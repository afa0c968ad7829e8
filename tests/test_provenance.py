"""Where results come from, how they print, and what tokens that dwarf the others do to them."""

from __future__ import annotations

import html
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, plant_sinks, readable, wrapped
from saefeat.results import Provenance
from saefeat.results.outliers import robust_top
from saefeat.studies.refusal import tiny

LONG = [[5 + (7 * n + t * t + t) % 90 for t in range(10)] for n in range(3)]
"""Three prompts of ten tokens."""
METRIC = sf.logit_diff(5, 6)


def scored(model=None, **options) -> sf.attribution.Attribution:
    model = wrapped(build("llama")) if model is None else model
    return sf.Attribute(make_sae(), METRIC, **options)(model, LONG)


# ---------------------------------------------------------------- what is held


def test_an_attribution_says_how_it_was_made():
    ablation = sf.Ablate(make_sae(seed=1))
    found = scored(
        baseline=ablation, method=sf.IG(2), where=~sf.Tokens.first(1), one_site=True, keep=9
    ).provenance
    assert found.model == "LlamaForCausalLM in memory" and found.dtype == "float32"
    assert found.settings["method"] == repr(sf.IG(2)) and found.settings["one_site"] == "True"
    assert found.settings["where"] == repr(~sf.Tokens.first(1)) and found.settings["keep"] == "9"
    assert found.settings["baseline"].startswith("Ablate(") and found.settings["backward"] == "None"
    assert found.settings["semantics"] == "pass_through"
    assert make_sae().fingerprint() in found.dictionaries["resid_post.1"]
    assert found.versions["torch"] and found.created
    plain = scored().provenance
    assert plain.settings["baseline"] == "zero"
    relp = scored(backward=sf.attribution.RelP(), semantics="pass_through").provenance
    assert relp.settings["backward"].startswith("RelP(")


def test_every_result_of_a_validation_says_it():
    model, sae = wrapped(build("llama")), make_sae()
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(model, LONG)
    chosen = scores.top(3)
    results = {
        "k 2": sf.audit(attribute, model, LONG, scores, k=2, budget=4),
        "samples 9": sf.validation.stability(scores, 3, samples=9),
        "controls 0": sf.validation.faithfulness(
            attribute, model, LONG, scores, sizes=[2], controls=0
        ),
        "logit_diff": sf.validation.interactions(model, LONG, chosen, METRIC),
        "check 1": sf.validation.edges(
            model, LONG, make_sae(layer=0).latents([1, 2]), sae.latents([3]), check=1
        ),
        "verified": sf.verify(model, sae, LONG, strict=False),
    }
    for said, found in results.items():
        line = found.provenance.line
        assert "LlamaForCausalLM in memory, float32 on cpu" in line and line in repr(found)
        assert said in repr(found) and "resid_post.1" in found.provenance.dictionaries


def test_a_minimal_set_says_it():
    model, sae = wrapped(build("llama")), make_sae()
    latents = sf.Attribute(sae, METRIC)(model, LONG).top(3)
    before = sf.metrics.measure(model, LONG, METRIC).mean()
    after = sf.metrics.measure(model, LONG, METRIC, sf.Ablate(latents)).mean()
    holds = float(before + after) / 2
    found = sf.validation.minimal_set(model, LONG, latents, METRIC, holds=holds)
    assert found.provenance.settings["metric"] == repr(METRIC)
    assert found.provenance.settings["holds"] == repr(holds)


def test_the_file_holds_it(tmp_path):
    scores = scored(method=sf.IG(2))
    loaded = sf.attribution.Attribution.load(scores.save(tmp_path / "x.safetensors"))
    assert loaded.provenance == scores.provenance and repr(loaded) == repr(scores)
    assert scores.provenance.line in html.unescape(loaded.to_html())
    bare = replace(scores, provenance=None)
    loaded = sf.attribution.Attribution.load(bare.save(tmp_path / "y.safetensors"))
    assert loaded.provenance is None and "from" not in repr(loaded)


def test_plain_data_and_back():
    found = scored().provenance
    assert Provenance.from_dict(found.to_dict()) == found
    for change in ({"latents": 3}, {"model": None}, {"surplus": 1}, {"settings": [1]}):
        with pytest.raises(ValueError, match=r"provenance|is a"):
            Provenance.from_dict(found.to_dict() | change)
    with pytest.raises(ValueError):
        Provenance.from_dict("mine")


def test_no_path_of_anybody_stands_in_it(tmp_path):
    """A model and SAEs from folders: names and hashes, and no folder above them."""
    home = tmp_path / "home" / "somebody"
    shutil.copytree(tiny.data_folder() / "chat", home / "chat")
    shutil.copytree(tiny.saes_folder("chat") / "resid_post_1", home / "sae")
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(home / "chat")
    its_tokenizer = transformers.AutoTokenizer.from_pretrained(home / "chat")
    model = nnsight.TransformersModel(module, tokenizer=its_tokenizer, task="text-generation")
    sae = sf.load_sae(home / "sae")
    out = sf.run(model, ["how do i bake bread"], sf.Ablate(sae.latents([3])), allow_unfired=True)
    scores = sf.Attribute(sae, METRIC)(model, ["how do i bake bread"])
    for found in (out.provenance, scores.provenance):
        assert "somebody" not in str(found.to_dict()) and str(tmp_path) not in str(found.to_dict())
        assert found.model.startswith("Gemma2ForCausalLM chat (configuration ")
        assert found.dictionaries["resid_post.1"].startswith("sae (")
    other = module.config.rms_norm_eps
    module.config.rms_norm_eps = 2 * other
    changed = sf.run(model, ["how do i bake bread"]).provenance
    assert changed.model != out.provenance.model


def test_adapters_and_quantization_are_named():
    model = build("llama")
    assert scored(wrapped(model)).provenance.adapters == ()
    # what PEFT's layers have, and what a quantized checkpoint's configuration has
    part = model.model.layers[0].self_attn.q_proj
    part.active_adapters, part.disable_adapters = ["careful"], False
    model.config.quantization_config = SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))
    found = scored(wrapped(model)).provenance
    assert (found.adapters, found.quantization) == (("careful",), "quantized by gptq")
    assert "adapters careful, quantized by gptq" in found.line
    part.disable_adapters = True
    assert scored(wrapped(model)).provenance.adapters == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear})
    assert sf.results.provenance.provenance(small, []).quantization == "quantized by torch"


# ---------------------------------------------------------------- how results print


def everything():
    sae = make_sae()
    edit = sf.Ablate(sae.latents(range(40))) | sf.Probe(sae)
    return sf.run(wrapped(build("llama")), LONG * 30, edit, max_new_tokens=3)


def test_results_fit_a_screen():
    out = everything()
    for found in (out, out.readings[0], out.receipt, out.provenance):
        lines = repr(found).splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 320
    text = repr(out)
    assert "Run(90 prompts of 10 tokens, 270 generated tokens)" in text
    assert f"0: {out.texts[0]!r}" in text and "... 87 more" in text
    assert out.provenance.line in text and "Ablate(Latents(40" in text
    row = out.receipt.rows[0]
    assert f"{row.tokens} tokens selected, {row.changed} latents" in repr(out.receipt)
    read = out.readings[0].values[out.readings[0].mask]
    assert f"largest {float(read.max()):.4g}" in repr(out.readings[0])
    bare = sf.run(wrapped(build("llama")), RAGGED)
    assert "Run(3 prompts of 3 to 6 tokens, nothing generated)" in repr(bare)


def test_pages_escape_what_they_show():
    out = everything()
    evil = replace(out, texts=("<script>alert(1)</script>",) * 90)
    assert "<script>" not in evil._repr_html_() and "&lt;script&gt;" in evil._repr_html_()
    found = sf.verify(wrapped(build("llama")), make_sae(), LONG, strict=False)
    for one in (out, out.receipt, out.readings[0], out.provenance, found):
        assert one._repr_html_().startswith("<div") and one._repr_html_().endswith("</div>")


@pytest.mark.parametrize("path", [None, "out.safetensors"])
def test_save_outside_a_trace_is_refused_clearly(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = everything()
    found = sf.verify(wrapped(build("llama")), make_sae(), LONG, strict=False)
    for one in (out, out.receipt, out.readings[0], out.provenance, found):
        with pytest.raises(sf.errors.FileError, match=rf"^{type(one).__name__}\.save: `path` is"):
            one.save(path) if path else one.save()
    with pytest.raises(sf.errors.FileError, match=r"Attribution\.save: `path` is not given"):
        scored().save()
    assert list(tmp_path.iterdir()) == []


def test_save_inside_a_trace_keeps_the_result():
    """As nnsight's users write it, for a value made in the block."""
    model = wrapped(build("llama"))
    attribute = sf.Attribute(make_sae(), METRIC)
    with model.trace(RAGGED):
        watching = attribute.watch(model)
        scores = watching.scores(model.output.logits).save()
    assert isinstance(scores, sf.attribution.Attribution) and len(scores)
    assert scores.provenance.settings["method"] == "AtP()"


# ---------------------------------------------------------------- tokens that dwarf the others


def sunk():
    return wrapped(plant_sinks(build("llama"), 1))


def summing():
    """A model whose logits sum the stream over tokens, so that the sink has the largest scores."""
    return wrapped(plant_sinks(readable(over_tokens=True), 1))


def test_a_receipt_says_what_of_the_change_lies_at_first_tokens():
    edit = sf.Ablate(make_sae().latents(range(40)))
    row = sf.run(sunk(), LONG, edit).receipt.rows[0]
    events = row.events
    size = (events.after - events.before).abs()
    share = float(size[events.position == 0].sum() / size.sum())
    assert row.first_share == pytest.approx(share) and share > 0.5 and row.first_weighs
    said = f"{share:.0%} of Σ|change| at prompts' first tokens"
    assert said in repr(row) and said in repr(sf.results.Receipt((row,), 1))
    plain = sf.run(wrapped(build("llama")), LONG, edit).receipt.rows[0]
    assert plain.first_share < 0.25 and "first tokens" not in repr(plain)
    # an edit of first tokens alone was asked for, and short prompts have little else
    for prompts, where in ((LONG, sf.Tokens.first(1)), ([row[:3] for row in LONG], None)):
        asked = sf.Ablate(make_sae().latents(range(40)), where=where)
        assert "first tokens" not in repr(sf.run(sunk(), prompts, asked).receipt)
    many = sf.run(sunk(), LONG, sf.Ablate(make_sae(d_sae=80))).receipt.rows[0]
    assert many.events is None and many.first_share != many.first_share
    assert not many.first_weighs and "first tokens" not in repr(many)


def test_readings_say_what_of_them_lies_at_first_tokens():
    """A mean of them, as a baseline or to match controls, would be that of the sink."""
    probe = sf.Probe(make_sae().latents(range(40)))
    reading = sf.run(sunk(), LONG, probe, max_new_tokens=2).readings[0]
    firsts = [reading.values[n, start].abs().sum() for n, start in enumerate(reading.starts)]
    share = float(sum(firsts) / reading.values[reading.mask].abs().sum())
    assert reading.first_share == pytest.approx(share) and share > 0.4
    assert f"{share:.0%} of Σ|value| at prompts' first tokens" in repr(reading)
    without = sf.Probe(probe.latents, where=~sf.Tokens.first(1))
    few, reduced = [row[:3] for row in LONG], sf.Probe(probe.latents, reduce="mean")
    plain, model = wrapped(build("llama")), sunk()
    quiet = {"another model": (plain, LONG, probe), "no first": (model, LONG, without)}
    quiet |= {"short": (model, few, probe), "reduced": (model, LONG, reduced)}
    found = {name: sf.run(*case).readings[0] for name, case in quiet.items()}
    assert not [name for name, one in found.items() if "first tokens" in repr(one)]
    assert found["no first"].first_share == 0 and found["another model"].first_share < 0.25
    assert found["reduced"].first_share != found["reduced"].first_share


def test_an_attribution_says_which_token_holds_its_scores(tmp_path):
    scores = scored(summing())
    share, at = scores.heaviest
    for n in range(3):
        sums = torch.zeros(10, dtype=torch.float64)
        own = scores.prompt == n
        sums.index_add_(0, scores.position[own], scores.score[own].abs().double())
        assert float(share[n]) == pytest.approx(float(sums.max() / sums.sum()))
        assert int(at[n]) == int(sums.argmax())
    line = f"one token holds {float(share.mean()):.0%} of a prompt's Σ|score|"
    first = int((at == 0).sum())
    assert float(share.mean()) > 0.25 and first == 3
    loaded = sf.attribution.Attribution.load(scores.save(tmp_path / "x.safetensors"))
    for text in (repr(scores), repr(loaded), html.unescape(loaded.to_html())):
        assert line in text and "the first of its prompt in 3 of 3" in text
    flat = replace(scores, score=torch.ones_like(scores.score))
    assert "one token holds" not in repr(flat)
    short = replace(scores, tokens=torch.full((3,), 7))
    assert "one token holds" not in repr(short)
    empty = replace(scores, score=torch.zeros_like(scores.score))
    assert empty.heaviest[1].tolist() == [-1, -1, -1] and "one token holds" not in repr(empty)


@pytest.mark.parametrize(
    ("sizes", "prompts", "top"),
    [
        ([1.0, 2, 3, 4, 5, 6, 7, 8], 1, 8.0),  # nothing dwarfs the others
        ([1.0, 2, 3, 4, 5, 6, 7, 100], 1, 7.0),
        ([1.0, 2, 3, 4, 5, 6, 100, 90], 1, 100.0),  # two of one prompt are no exception
        ([1.0, 2, 3, 4, 5, 6, 100, 90], 2, 6.0),
        ([1.0, 2, 100], 1, 100.0),  # too few to say
        ([0.0] * 9 + [5.0], 1, 5.0),  # there is nothing else to see
        ([0.0] * 9, 1, 0.0),
        ([], 1, 0.0),
        ([float("nan"), 1, 2, 3, 4, 5, 6, 7, 100], 1, 7.0),
    ],
)
def test_the_color_scale_ends_below_a_token_that_dwarfs_the_others(sizes, prompts, top):
    assert robust_top(torch.tensor(sizes), prompts) == top


def test_plots_and_pages_mark_what_is_beyond_the_scale():
    pytest.importorskip("matplotlib")
    scores = scored(summing())
    sums = torch.zeros(10).index_add_(
        0, scores.position[scores.prompt == 0], scores.score[scores.prompt == 0]
    )
    top = robust_top(sums.abs())
    assert top < float(sums.abs().max()) / 3
    axes = scores.plot_tokens(0)
    assert axes.images[0].get_clim() == pytest.approx((-top, top))
    assert [text.get_text() for text in axes.texts] == [f"{float(sums[0]):+.2g}"]
    page = scores.to_html()
    assert page.count("outline:2px solid") == 3 and page.count("beyond the scale") >= 3
    plain = replace(scores, score=torch.ones_like(scores.score))
    assert "outline:" not in plain.to_html() and len(plain.plot_tokens(0).texts) == 0


def test_the_study_counts_one_set_of_tokens():
    """Peaks, pool, attribution, checks and clamps leave the first token out."""
    from saefeat.studies.refusal.clamping import held, scaled, scaled_per_prompt
    from saefeat.studies.refusal.lab import counted

    latents = sf.Neurons("resid_post.1", D).latents([1])
    where = counted(1)
    edits = (
        scaled(latents, -1.0, where),
        scaled_per_prompt([latents] * 3, -1.0, where),
        held(latents, 2.0, where),
    )
    for edit in edits:
        assert edit.where == ~sf.Tokens.first(1)
        events = sf.run(wrapped(build("llama")), LONG, edit).receipt.rows[0].events
        assert int(events.position.min()) == 1


def test_peaks_of_the_study_do_not_see_the_first_token(tmp_path):
    from saefeat.studies.refusal.selection import peaks
    from saefeat.studies.refusal.setup import TINY, one_thread, tiny_lab

    with one_thread():
        settings = replace(TINY, limit=3, batch_size=3)
        lab = tiny_lab(tmp_path, settings, lambda text: None, quiet=True)
        lab = replace(lab, sets=lab.sets.limited(3))
        site = sf.Site("resid_post", 1)
        neurons = sf.Neurons(site, lab.width)
        saes = sf.dictionaries.Dictionaries([neurons])
        plain = peaks(replace(lab, saes=saes), lab.sets.harmful_train)[site]
        module, its_tokenizer = tiny.load("chat")
        model = nnsight.TransformersModel(
            plant_sinks(module, 1), tokenizer=its_tokenizer, task="text-generation"
        )
        found = peaks(replace(lab, model=model, saes=saes), lab.sets.harmful_train)[site]
    torch.testing.assert_close(found, plain)  # the sink is written at this very site
