"""An attribution read: totals by hand, masks, files, tables, pages and plots."""

from __future__ import annotations

import hashlib
import html.parser
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import saefeat as sf
from helpers import BOS, RAGGED, D, build, make_sae, transformers_model, wrapped
from saefeat.attribution import file as files
from saefeat.attribution.show import _token
from saefeat.files import container
from saefeat.files.hashing import content_hash

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [f"<bos> {prompt}" for prompt in RAGGED]
LENGTHS = [4, 7, 5]


def dictionaries() -> sf.dictionaries.Dictionaries:
    return sf.dictionaries.Dictionaries(
        [make_sae("jumprelu", layer=0), make_sae("standard", layer=1, seed=3)]
    )


def attribute(**options) -> sf.attribution.Attribution:
    model = wrapped(build("llama"))
    attribute = sf.Attribute(dictionaries(), sf.logit_diff(5, 6), method=sf.IG(3), **options)
    return attribute(model, PROMPTS, batch_size=2)


@pytest.fixture(scope="module")
def scores() -> sf.attribution.Attribution:
    return attribute()


def rows(found):
    """(prompt, dictionary, position, latent, score) in plain Python."""
    columns = (found.prompt, found.dictionary, found.position, found.latent, found.score.double())
    return list(zip(*(column.tolist() for column in columns), strict=True))


# ---------------------------------------------------------------- what is known of the tokens


def test_the_tokens_are_the_prompts_without_padding(scores):
    assert [len(ids) for ids in scores.texts.ids] == LENGTHS
    assert [" ".join(scores.texts.tokens(n)) for n in range(3)] == PROMPTS
    assert scores.tokens.tolist() == LENGTHS
    assert scores.scored.tolist() == [True] * 16
    assert scores.metric == repr(sf.logit_diff(5, 6))


def test_scored_tokens_follow_where():
    found = attribute(where=sf.Tokens.last(2) | sf.Tokens.ids(BOS))
    wanted = [[n == 0 or n >= length - 2 for n in range(length)] for length in LENGTHS]
    assert found.scored.tolist() == [yes for row in wanted for yes in row]
    assert found.tokens.tolist() == [3, 3, 3]
    positions = {(p, at) for p, _, at, _, _ in rows(found)}
    assert positions <= {(p, n) for p, row in enumerate(wanted) for n, yes in enumerate(row) if yes}


def test_rules_mean_the_same_as_in_an_edit():
    """Texts.select against the tokens an edit really fires on."""
    model = transformers_model(*_tiny())
    chats = [[{"role": "user", "content": text}] for text in ("how do i bake bread", "hello")]
    encoded = sf.text.prompts.encode_prompts(model.tokenizer, chats)
    texts = sf.attribution.Texts.of(model.tokenizer, encoded)
    width = encoded["input_ids"].shape[1]
    for rule in (
        sf.Tokens.role("user"),
        ~sf.Tokens.special(),
        sf.Tokens.first(2) | sf.Tokens.last(1),
        sf.Tokens.ids(*texts.ids[0][3:5]) & ~sf.Tokens.last(3),
        sf.Tokens.where(lambda ids, position: position % 2 == 0),
    ):
        probe = sf.Probe(sf.Neurons("resid_post.0", 64).latents([0]), where=rule)
        mask = sf.run(model, chats, probe).readings[0].mask[..., 0]
        real = encoded["attention_mask"].bool()
        assert mask.shape[1] == width
        for row in range(2):
            assert texts.select(rule)[row].tolist() == mask[row][real[row]].tolist(), rule
    with pytest.raises(sf.errors.PromptError, match="wanted one of user, assistant"):
        texts.select(sf.Tokens.role("tool"))


def _tiny():
    from saefeat.studies.refusal import tiny

    return tiny.load("chat")


def test_a_rule_needs_a_template(scores):
    with pytest.raises(sf.errors.PromptError, match="no template"):
        scores.totals(where=sf.Tokens.role("user"))


# ---------------------------------------------------------------- totals, added up by hand


RULES = {
    None: lambda at, length, token: True,
    ~sf.Tokens.special(): lambda at, length, token: token not in (0, 1, 2, 3),
    sf.Tokens.last(2): lambda at, length, token: at >= length - 2,
    sf.Tokens.first(1): lambda at, length, token: at == 0,
    sf.Tokens.ids(99): lambda at, length, token: False,
}


def chosen(found, rule, prompt, at):
    return RULES[rule](at, LENGTHS[prompt], found.texts.ids[prompt][at])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_totals_count_only_chosen_tokens(scores, rule):
    wanted: dict[tuple, float] = {}
    for prompt, dictionary, at, latent, score in rows(scores):
        if chosen(scores, rule, prompt, at):
            count = sum(chosen(scores, rule, prompt, n) for n in range(LENGTHS[prompt]))
            key = (prompt, dictionary, latent)
            wanted[key] = wanted.get(key, 0.0) + score / count
    keys, values, prompts = scores.totals(per="prompt", where=rule)
    got = {
        (p, *key): v
        for p, key, v in zip(
            prompts.tolist(), map(tuple, keys.tolist()), values.tolist(), strict=True
        )
    }
    assert got == pytest.approx(wanted, abs=1e-5)
    keys, values, _ = scores.totals(where=rule)
    got = {tuple(key): v for key, v in zip(keys.tolist(), values.tolist(), strict=True)}
    mean: dict[tuple, float] = {}
    for (_, *key), value in wanted.items():
        mean[tuple(key)] = mean.get(tuple(key), 0.0) + value / 3
    assert got == pytest.approx(mean, abs=1e-5)
    if rule is not None and wanted:
        assert not torch.equal(values[:3], scores.totals()[1][:3])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_by_site(scores, rule):
    wanted = dict.fromkeys((sf.Site("resid_post", 0), sf.Site("resid_post", 1)), 0.0)
    for prompt, dictionary, at, _, score in rows(scores):
        if chosen(scores, rule, prompt, at):
            wanted[sf.Site("resid_post", dictionary)] += score / 3
    assert scores.by_site(where=rule) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("origin", ["start", "end"])
def test_by_position(scores, origin):
    sums = [[0.0] * length for length in LENGTHS]
    for prompt, _, at, _, score in rows(scores):
        sums[prompt][at] += score
    wanted: dict[int, list[float]] = {}
    for row in sums:
        for at, value in enumerate(row):
            wanted.setdefault(at if origin == "start" else at - len(row), []).append(value)
    means = {at: sum(v) / len(v) for at, v in wanted.items()}
    got = scores.by_position(origin=origin)
    assert list(got) == sorted(means)
    assert got == pytest.approx(means, abs=1e-4)
    last = scores.by_position(origin=origin, where=sf.Tokens.last(1))
    assert set(last) == ({-1} if origin == "end" else {n - 1 for n in LENGTHS})


def test_top_of_a_prompt_and_of_some_tokens(scores):
    assert len(scores.top(4, per="prompt")) == 3
    end = scores.top(4, where=sf.Tokens.last(1))
    assert end != scores.top(4)
    keys, values, _ = scores.totals(where=sf.Tokens.last(1))
    best = {tuple(keys[i].tolist()) for i in values.topk(4).indices}
    assert {(site.layer, index) for site, index in end} == best
    within = scores.dictionaries[1].latents()
    assert {site.layer for site, _ in scores.top(4, per="dataset", within=within)} == {1}
    with pytest.raises(sf.SaefeatError, match='"dataset" or "prompt"'):
        scores.top(4, per="token")
    with pytest.raises(sf.SaefeatError, match='"start" or "end"'):
        scores.by_position(origin="middle")


def test_a_budget_can_be_exact(scores):
    """Latents below zero were left out, so that one method had 10 latents where others had 20."""
    keys, values, _ = scores.totals()
    positive = int((values > 0).sum())
    k = positive + 3
    assert k < len(keys)
    best = keys[values.argsort(descending=True, stable=True)[:k]]
    wanted = {(str(scores.dictionaries[d].site), i) for d, i in best.tolist()}
    chosen = scores.top(k, exactly=True)
    assert {(str(site), index) for site, index in chosen} == wanted
    assert len(scores.top(k)) == positive and scores.top(positive) == scores.top(
        positive, exactly=True
    )
    few = scores.top(2)
    assert scores.top(2, exactly=True, within=few) == few
    with pytest.raises(sf.errors.LatentError, match="exactly, where 2 latents have a score"):
        scores.top(3, exactly=True, within=few)
    for number, own in enumerate(scores.top(2, per="prompt", exactly=True)):
        assert len(own) == 2, number


def test_slope_is_the_gradient_along_the_direction(scores):
    assert torch.allclose(scores.slope * scores.change, scores.score, rtol=1e-5, atol=1e-7)
    assert scores.slope.isfinite().all()
    still = replace(scores, change=torch.zeros_like(scores.change))
    assert still.slope.isnan().all()


def test_without_tokens(scores):
    bare = replace(scores, texts=None, scored=None)
    assert torch.equal(bare.totals()[1], scores.totals()[1])
    assert bare.by_site() == scores.by_site()
    for ask in (
        lambda: bare.totals(where=sf.Tokens.last(1)),
        lambda: bare.by_position(),
        lambda: bare.plot_tokens(),
    ):
        with pytest.raises(sf.SaefeatError, match="without the prompts' tokens"):
            ask()
    assert bare.to_pandas()["token"].isna().all()
    assert "not scored" not in bare.to_html()


def test_a_score_of_all_tokens_together_belongs_to_none(scores):
    """Exact ablations have position −1: sums by token were empty or zero once, silently."""
    every = replace(scores, position=torch.full_like(scores.position, -1))
    assert torch.equal(every.totals()[1], scores.totals()[1])
    assert every.by_site() == scores.by_site() and every.top(4) == scores.top(4)
    for ask in (
        lambda: every.totals(where=sf.Tokens.last(1)),
        lambda: every.top(4, where=sf.Tokens.last(1)),
        lambda: every.by_site(where=sf.Tokens.last(1)),
        lambda: every.by_position(),
        lambda: every.plot_tokens(),
    ):
        with pytest.raises(sf.SaefeatError, match="of whole prompts"):
            ask()
    assert every.to_pandas()["token"].isna().all()
    page = every.to_html()
    assert "no token has a score of its own" in page and "shaded" not in page


# ---------------------------------------------------------------- files


def same(a: sf.attribution.Attribution, b: sf.attribution.Attribution) -> bool:
    names = ("prompt", "dictionary", "position", "latent", "score", "activation", "change")
    names += ("clean", "baseline", "tokens", "scored")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and (
        a.texts,
        a.metric,
    ) == (b.texts, b.metric)


def test_save_and_load(scores, tmp_path):
    path = scores.save(tmp_path / "x.safetensors")
    live = dictionaries()
    loaded = sf.attribution.Attribution.load(path, saes=live)
    assert same(loaded, scores)
    assert loaded.dictionaries == tuple(live.values())
    assert repr(loaded) == repr(scores)
    assert loaded.save(tmp_path / "y.safetensors").read_bytes() == path.read_bytes()
    out = sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(loaded.top(3)))
    assert out.receipt.rows[0].tokens == 13
    assert sf.attribution.Attribution.load(path, saes=list(live.values())).dictionaries == tuple(
        live.values()
    )


def test_without_dictionaries_tables_work_and_edits_do_not(scores, tmp_path):
    loaded = sf.attribution.Attribution.load(scores.save(tmp_path / "x.safetensors"))
    assert repr(loaded.top(5)) == repr(scores.top(5))
    assert loaded.to_pandas().equals(scores.to_pandas())
    assert loaded.to_html() == scores.to_html()
    assert loaded.dictionaries[0].fingerprint() == scores.dictionaries[0].fingerprint()
    with pytest.raises(sf.errors.LatentError, match=r"not held.*load_saes"):
        sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(loaded.top(3)))
    with pytest.raises(sf.errors.LatentError, match="some of the 0"):
        loaded.dictionaries[0].encode(torch.zeros(1, D))


def test_other_dictionaries_are_refused(scores, tmp_path):
    path = scores.save(tmp_path / "x.safetensors")
    others = sf.dictionaries.Dictionaries(
        [make_sae("jumprelu", layer=0), make_sae("standard", layer=1, seed=4)]
    )
    with pytest.raises(sf.errors.FileError, match=r"`saes` is without the dictionary 'standard-3'"):
        sf.attribution.Attribution.load(path, saes=others)


def test_a_result_made_by_hand(tmp_path):
    """Without tokens, without rows."""
    none, one = torch.zeros(0), torch.ones(1)
    empty = none.long()
    found = sf.attribution.Attribution(
        (make_sae(),), *[empty] * 4, *[none] * 3, one, 2 * one, torch.tensor([4])
    )
    loaded = sf.attribution.Attribution.load(found.save(tmp_path / "x.safetensors"))
    assert len(loaded) == 0 and loaded.texts is None and "0 scores" in repr(loaded)
    assert "1 degenerate" not in repr(loaded)
    assert loaded.to_html() and len(loaded.to_pandas()) == 0
    for plot in (loaded.plot_latents, loaded.plot_cumulative):
        with pytest.raises(sf.SaefeatError, match="no latent moved"):
            plot()


@pytest.mark.parametrize("version", [1, 2])
def test_old_files_are_read(version):
    path = GOLDEN / f"attribution-v{version}.safetensors"
    known = json.loads((GOLDEN / "attribution.json").read_text())[path.name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == known["sha256"], "pinned: never change"
    loaded = sf.attribution.Attribution.load(path, saes=dictionaries())
    assert repr(loaded.top(4)) == known["top"]
    assert loaded.by_site()[sf.Site("resid_post", 1)] == pytest.approx(known["resid_post.1"])
    assert list(loaded.texts.tokens(0)) == known["tokens"]
    assert (loaded.provenance and loaded.provenance.line) == known.get("from")


def test_every_version_of_the_file_is_kept():
    names = [f"attribution-v{n}.safetensors" for n in range(1, files.VERSION + 1)]
    assert sorted(json.loads((GOLDEN / "attribution.json").read_text())) == names


def lie(path, change):
    document, tensors = container.read(path, "test")
    tensors = dict(tensors)
    change(document, tensors)
    said = {name: document[name] for name in ("format", "version", "spec")}
    document["sha256"] = content_hash(said, tensors)
    container.write(path, container.pack(document, tensors, "test"), "test")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda d, t: d.update(version=3), "of version 3"),
        (lambda d, t: d["spec"]["provenance"].pop("dtype"), "provenance"),
        (lambda d, t: d["spec"]["provenance"].update(settings=3), "provenance"),
        (lambda d, t: d["spec"].update(provenance="mine"), "provenance"),
        (lambda d, t: d.update(format="saefeat.intervention"), "of format"),
        (lambda d, t: t.update(score=t["score"][1:]), "score|prompt of"),
        (lambda d, t: t.update(score=t["score"].long()), "score of torch.int64"),
        (lambda d, t: t.update(score=t["score"][0]), "prompt of|score of"),
        (lambda d, t: t.update(clean=t["clean"][0]), "clean|prompts"),
        (lambda d, t: t.update(latent=t["latent"] + 48), "latent out of range"),
        (lambda d, t: t.update(latent=t["latent"] - 48), "latent out of range"),
        (lambda d, t: t.update(prompt=t["prompt"] + 1), "prompt out of range"),
        (lambda d, t: t.update(prompt=-t["prompt"]), "prompt out of range"),
        (lambda d, t: t.update(dictionary=t["dictionary"] + 1), "dictionary out of range"),
        (lambda d, t: t.update(position=t["position"] + 4), "position out of range"),
        (lambda d, t: t.update(position=t["position"] - 2), "position out of range"),
        (lambda d, t: t.update(clean=t["clean"][:2]), "prompts|clean"),
        (lambda d, t: t.update(scored=t["scored"][:2]), "scored"),
        (lambda d, t: t.update(surplus=t["clean"]), "surplus"),
        (lambda d, t: t.pop("activation"), "activation"),
        (lambda d, t: t.pop("texts.ids"), "tokens"),
        (lambda d, t: t.update({"texts.lengths": t["texts.lengths"] * 2}), "add up"),
        (lambda d, t: t.update({"texts.lengths": -t["texts.lengths"]}), "add up"),
        (lambda d, t: d["spec"].update(texts=None), "tokens"),
        (lambda d, t: d["spec"]["texts"].update(words={"a": "b"}), "words"),
        (lambda d, t: d["spec"]["texts"].update(words={"1": 2}), "words"),
        (lambda d, t: d["spec"]["texts"].update(words=[]), "words"),
        (lambda d, t: d["spec"]["texts"].update(special="all"), "words, special"),
        (lambda d, t: d["spec"]["texts"].update(roles={"user": 3}), "roles"),
        (lambda d, t: d["spec"].update(metric=3), "metric"),
        (lambda d, t: d["spec"].update(signed=0), "signed 0"),
        (lambda d, t: d["spec"].update(surplus=0), "surplus"),
        (lambda d, t: d["spec"]["texts"].update(prompts=[1, 2]), "prompts of lengths"),
        (lambda d, t: d["spec"]["texts"].update(prompts=[1, 2, 9]), "prompts of lengths"),
        (lambda d, t: d["spec"]["texts"].update(prompts=3), "prompts of lengths"),
        (lambda d, t: d["spec"].update(dictionaries=3), "dictionaries"),
        (lambda d, t: d["spec"]["dictionaries"][0].update(site="x"), "site"),
        (lambda d, t: d["spec"]["dictionaries"][0].update(d_sae=0), "widths"),
        (lambda d, t: d["spec"]["dictionaries"][0].update(name=3), "widths"),
        (lambda d, t: d["spec"]["dictionaries"][0].pop("name"), "a dictionary"),
    ],
)
def test_files_that_lie(scores, change, match, tmp_path):
    path = scores.save(tmp_path / "x.safetensors")
    lie(path, change)
    with pytest.raises(sf.errors.FileError, match=match):
        sf.attribution.Attribution.load(path)


def test_an_intervention_is_no_attribution(scores, tmp_path):
    path = scores.save(tmp_path / "x.safetensors")
    with pytest.raises(sf.errors.FileError, match="of format 'saefeat\\.attribution'"):
        sf.load(path)
    sf.save(sf.Ablate(make_sae().latents([1])), path)
    with pytest.raises(sf.errors.FileError, match="of format 'saefeat\\.intervention'"):
        sf.attribution.Attribution.load(path)


def test_every_field_is_written():
    """A field added to Attribution is a tensor, or named in ``files.PLAIN`` and written there."""
    from dataclasses import fields

    kinds = {f.name: str(f.type) for f in fields(sf.attribution.Attribution)}
    plain = {name for name, kind in kinds.items() if "Tensor" not in kind}
    assert plain == set(files.PLAIN)


# ---------------------------------------------------------------- shown


def test_the_table_has_every_score(scores):
    table = scores.to_pandas()
    assert len(table) == len(scores)
    assert list(table) == [
        *("prompt", "position", "token", "site", "dictionary", "latent"),
        *("score", "activation", "change", "slope"),
    ]
    for row, (prompt, dictionary, at, latent, score) in zip(
        table.itertuples(), rows(scores), strict=True
    ):
        assert (row.prompt, row.position, row.latent) == (prompt, at, latent)
        assert row.token == PROMPTS[prompt].split()[at]
        assert row.site == f"resid_post.{dictionary}"
        assert row.dictionary == ("jumprelu-0", "standard-3")[dictionary]
        assert row.score == pytest.approx(score)
    grouped = table.groupby(["site"])["score"].sum() / 3
    assert grouped["resid_post.0"] == pytest.approx(scores.by_site()[sf.Site("resid_post", 0)])


def test_the_repr_fits_a_screen(scores):
    text = repr(scores)
    assert len(text.splitlines()) <= 7 and max(map(len, text.splitlines())) < 200
    (latents, value), *_ = scores.ranking(1)
    ((site, index),) = latents
    assert f"{site} {index}: {value:+.3g}" in text
    assert "metric: logit_diff(5, 6)" in text
    assert f"mean |gap| {scores.gap.abs().mean():.3g}, over 2 sites" in text
    assert "degenerate" not in text
    blind = replace(scores, clean=torch.zeros(3), baseline=torch.tensor([0.0, 0.0, 1.0]))
    assert "2 degenerate" in repr(blind)
    one = sf.Attribute(make_sae(), sf.logit_diff(5, 6))(wrapped(build("llama")), PROMPTS)
    assert "% of the metric's change" in repr(one)


class Page(html.parser.HTMLParser):
    """The spans with a title, their text and style; and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.spans, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "br":
            self.open.append((tag, dict(attrs)))
            if tag == "span" and "title" in dict(attrs):
                self.spans.append([dict(attrs)["title"], dict(attrs)["style"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span" and "title" in self.open[-1][1]:
            self.spans[-1][2] += data


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_shades_each_token_by_its_score(scores):
    page = parsed(scores._repr_html_())
    assert page.tags <= {"div", "p", "b", "small", "br", "span", "table", "tr", "td", "th"}
    assert [span[2] for span in page.spans] == " ".join(PROMPTS).split()
    sums = [0.0] * 16
    for prompt, _, at, _, score in rows(scores):
        sums[sum(LENGTHS[:prompt]) + at] += score
    largest = max(map(abs, sums))
    for (title, style, _), value in zip(page.spans, sums, strict=True):
        assert float(title) == pytest.approx(value, rel=1e-3, abs=1e-5)
        color = "31,119,180" if value > 0 else "214,96,77"
        assert f"rgba({color},{0.75 * abs(value) / largest:.3f})" in style
        assert "color:" not in style.replace("background", ""), "text keeps the theme's color"


def test_the_page_escapes_and_cuts(scores):
    evil = {i: f"<script>{i}</script>&\"'" for row in scores.texts.ids for i in row}
    texts = replace(scores.texts, words=evil)
    page = parsed(replace(scores, texts=texts, metric="<b onclick=x>").to_html(prompts=2))
    assert "script" not in page.tags
    assert len(page.spans) == 4 + 7
    assert page.spans[0][2] == "<script>2</script>&\"'"
    assert "… 1 more prompts" in scores.to_html(prompts=2)
    assert _token("", 1.0, True, 1.0).text == "∅"
    assert _token("\n", 1.0, True, 1.0).text == "⏎"
    assert parsed(attribute(where=sf.Tokens.last(1)).to_html()).spans[0][0] == "not scored"


# ---------------------------------------------------------------- plots


def test_plot_of_latents(scores):
    ax = scores.plot_latents(6)
    keys, values, _ = scores.totals()
    order = values.abs().argsort(descending=True, stable=True)[:6]
    image = ax.images[0].get_array()
    assert image.shape == (2, 6)
    for column, row in enumerate(order.tolist()):
        site, latent = keys[row].tolist()
        assert image[site, column] == pytest.approx(float(values[row]))
        assert bool(image.mask[1 - site, column])
        assert ax.get_xticklabels()[column].get_text() == str(latent)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["resid_post.0", "resid_post.1"]
    low, high = ax.images[0].get_clim()
    assert low == -high == pytest.approx(-float(values.abs().max()))


def test_plot_of_tokens():
    found = attribute(where=sf.Tokens.last(3))
    ax = found.plot_tokens(1)
    sums = [0.0] * 7
    for prompt, _, at, _, score in rows(found):
        sums[at] += score if prompt == 1 else 0.0
    image = ax.images[0].get_array()[0]
    assert [bool(m) for m in image.mask] == [True] * 4 + [False] * 3
    assert list(image[4:]) == pytest.approx(sums[4:], rel=1e-5)
    assert [t.get_text() for t in ax.get_xticklabels()] == PROMPTS[1].split()
    with pytest.raises(sf.SaefeatError, match=r"0\.\.2"):
        found.plot_tokens(3)


def test_plot_of_the_cumulative_curve(scores):
    (line,) = scores.plot_cumulative().lines
    sizes = sorted((abs(v) for v in scores.totals()[1].tolist()), reverse=True)
    x, y = line.get_data()
    assert list(x) == list(range(len(sizes) + 1))
    assert y[0] == 0.0 and y[-1] == pytest.approx(1.0)
    assert y[5] == pytest.approx(sum(sizes[:5]) / sum(sizes))


def test_plots_draw_where_they_are_told_and_leave_no_figure(scores, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(3)
    assert scores.plot_latents(ax=axes[0]) is axes[0]
    assert scores.plot_tokens(ax=axes[1]) is axes[1]
    assert scores.plot_cumulative(ax=axes[2]) is axes[2]
    figure.savefig(tmp_path / "x.png")
    code = (
        "import saefeat, sys, torch; v = saefeat.Direction(torch.ones(2), site='resid_post.0');"
        "o, z = torch.ones(1), torch.zeros(1, dtype=torch.long);"
        "found = saefeat.attribution.Attribution((v,), z, z, z, z, o, o, -o, o, -o, z + 4);"
        "assert 'matplotlib' not in sys.modules; found.plot_latents();"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot keeps figures for ever'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module, ask", [("pandas", "to_pandas"), ("matplotlib", "plot_latents")])
def test_a_missing_extra_is_named(scores, module, ask, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(sf.SaefeatError, match=r"pip install 'saefeat\[\w+\]'"):
        getattr(scores, ask)()
