"""Heads, and queries, keys and values: columns of a module's value, held against plain hooks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, batch_of, build, forward, wrapped
from saefeat.remote import Server

# one projection for all of them, head by head and side by side; the others are the simpler ones
FIRST = ["gpt_neox", "phi3"]
FAMILIES = [*FIRST, *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "llama", "gemma2"))]


def attention(model, layer: int = 1):
    block = (
        model.transformer.h
        if hasattr(model, "transformer")
        else (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).layers
    )[layer]
    names = ("attn", "attention", "self_attn")
    return next(getattr(block, name) for name in names if hasattr(block, name))


def heads_of(model) -> tuple[int, int, int]:
    config = model.config
    queries = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return queries, getattr(config, "num_key_value_heads", None) or queries, width


def columns(model, kind: str):
    """Module, whether its input, and the columns [heads, width] of a kind, written out by hand."""
    own, (queries, keys, width) = attention(model), heads_of(model)
    every = torch.arange(4096)
    if kind == "z":
        names = ("c_proj", "dense", "o_proj")
        module = next(getattr(own, name) for name in names if hasattr(own, name))
        return module, True, every[: queries * width].view(queries, width)
    if hasattr(own, "q_proj"):
        count = queries if kind == "q" else keys
        return getattr(own, f"{kind}_proj"), False, every[: count * width].view(count, width)
    if hasattr(own, "query_key_value"):  # head by head: its query, its key, its value
        place = "qkv".index(kind)
        return own.query_key_value, False, every[: 3 * queries * width].view(-1, 3, width)[:, place]
    module = own.c_attn if hasattr(own, "c_attn") else own.qkv_proj
    start = {"q": 0, "k": queries, "v": queries + keys}[kind] * width
    count = queries if kind == "q" else keys
    return module, False, every[start : start + count * width].view(count, width)


@contextmanager
def changed(model, kind: str, change):
    """Plain hooks: ``change`` [b, t, heads, width] is what the kind's value becomes."""
    module, at_input, index = columns(model, kind)

    def new(x):
        out = x.clone()
        out[..., index] = change(x[..., index])
        return out

    if at_input:
        handle = module.register_forward_pre_hook(lambda _, args: (new(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: new(out))
    try:
        yield
    finally:
        handle.remove()


def seen(model, kind: str) -> torch.Tensor:
    """[b, t, heads, width] in a bare run."""
    found = []
    with changed(model, kind, lambda x: found.append(x) or x):
        forward(model, batch_of(RAGGED))
    return found[0]


def vector_of(size: int) -> torch.Tensor:
    torch.manual_seed(size)
    vector = torch.randn(size)
    return vector / vector.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", "qkvz")
@pytest.mark.parametrize("head", [None, 0, 1])
def test_a_head_is_read_where_it_lies(family, kind, head):
    plain = build(family)
    values = seen(plain, kind)
    wanted = values.flatten(-2) if head is None else values[..., head, :]
    site = f"{kind}.1" if head is None else f"{kind}.1:{head}"
    vector = vector_of(wanted.shape[-1])
    probe = sf.Probe(sf.Direction(vector, site=site))
    out = sf.run(wrapped(plain), RAGGED, probe, allow_unfired=True)
    real = batch_of(RAGGED)["attention_mask"].bool()
    reading = out.readings[0]
    found = reading.values[reading.mask].flatten()
    assert torch.allclose(found, (wanted @ vector)[real], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", "qkvz")
@pytest.mark.parametrize("head", [None, 1])
def test_a_head_is_written_where_it_lies(family, kind, head):
    plain = build(family)
    shape = seen(plain, kind).shape[-2:]
    size = shape.numel() if head is None else shape[-1]
    site, vector = f"{kind}.1" if head is None else f"{kind}.1:{head}", vector_of(size)

    def add(x):  # at the last token: the same vector added to all keys of a head changes nothing
        x = x.clone()
        if head is None:
            x[:, -1] += 3 * vector.view(shape)
        else:
            x[:, -1, head] += 3 * vector
        return x

    with changed(plain, kind, add):
        wanted = forward(plain, batch_of(RAGGED))
    bare = forward(plain, batch_of(RAGGED))
    push = sf.Clamp(sf.Direction(vector, site=site), add=3.0, where=sf.Tokens.last(1))
    out = sf.run(wrapped(plain), RAGGED, push)
    assert torch.allclose(out.logits, wanted[:, -1], atol=1e-5)
    assert not torch.allclose(bare[:, -1], wanted[:, -1], atol=1e-4)


def pushed(site: str, size: int, **how) -> sf.Clamp:
    return sf.Clamp(sf.Direction(vector_of(size), site=site), **how)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new", [0, 3])
def test_a_chain_at_one_module_keeps_its_order(family, new):
    """Whole, one head, whole again: each sees what the one before it left."""
    plain = build(family)
    queries, _, width = heads_of(plain)
    size = queries * width
    whole, part = vector_of(size), vector_of(width)
    chain = pushed("z.1", size, value=2.0) | pushed("z.1:1", width, value=-1.0)
    chain |= pushed("z.1", size, scale=0.5)

    def change(x):
        flat = x.flatten(-2)
        flat = flat + (2.0 - flat @ whole)[..., None] * whole
        x = flat.view(x.shape).clone()
        x[..., 1, :] += (-1.0 - x[..., 1, :] @ part)[..., None] * part
        flat = x.flatten(-2)
        return (flat - 0.5 * (flat @ whole)[..., None] * whole).view(x.shape)

    out = sf.run(wrapped(plain), RAGGED, chain, max_new_tokens=new)
    with changed(plain, "z", change), torch.no_grad():
        if new:
            batch = batch_of(RAGGED)
            ids = plain.generate(**batch, max_new_tokens=new, do_sample=False)
            wanted = ids[:, batch["input_ids"].shape[1] :].tolist()
            for mine, theirs in zip(out.completions, wanted, strict=True):
                assert list(mine) == theirs[: len(mine)]
        else:
            wanted = forward(plain, batch_of(RAGGED))[:, -1]
            assert torch.allclose(out.logits, wanted, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", "qkvz")
def test_scores_of_heads_are_the_gradient_there(family, kind):
    """Ablated directions at two heads: each score is its own columns' part of the slope."""
    plain = build(family)
    width = seen(plain, kind).shape[-1]
    vector = vector_of(width)
    basis = sf.dictionaries.Dictionaries(
        sf.Direction(vector, site=f"{kind}.1:{head}") for head in (0, 1)
    )
    attribute = sf.Attribute(basis, sf.logit_diff(5, 6), method=sf.attribution.AtP())
    found = attribute(wrapped(plain), RAGGED)
    leaf = []

    def grow(x):
        leaf.append(x.detach().requires_grad_())
        return leaf[0]

    batch = batch_of(RAGGED)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with changed(plain, kind, grow):
        logits = plain(**batch, position_ids=positions).logits[:, -1]
    (slope,) = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), leaf)
    along = -(leaf[0] @ vector).detach() * (slope @ vector)
    wanted = torch.where(batch["attention_mask"].bool()[..., None], along, 0.0).sum(1)
    for head in (0, 1):
        totals = torch.zeros(len(RAGGED)).index_add_(
            0, found.prompt[found.dictionary == head], found.score[found.dictionary == head]
        )
        assert torch.allclose(totals, wanted[:, head], atol=1e-5)
    assert float(wanted.abs().max()) > 1e-4


def test_a_head_travels():
    model = wrapped(build("llama"))
    edit = pushed("z.1:1", heads_of(build("llama"))[2], add=3.0)
    here, there = (sf.run(model, RAGGED, edit, on=on) for on in (None, Server("local")))
    assert torch.allclose(here.logits, there.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "wanted"), [("z.1:4", "0..3"), ("k.1:2", "0..1"), ("v.0:9", "0..1")]
)
def test_a_head_the_model_lacks_is_refused(site, wanted):
    model = wrapped(build("llama"))
    with pytest.raises(sf.errors.SiteError, match=wanted):
        sf.run(model, RAGGED, pushed(site, heads_of(build("llama"))[2], add=1.0))


def test_names_of_heads():
    site = sf.Site("z", 3, head=5)
    assert sf.Site.parse("z.3:5") == sf.Site.parse("blocks.3:5.attn.hook_z") == site
    assert sf.Site.parse(str(site)) == sf.Site.parse(site.hook) == site
    for wrong in (lambda: sf.Site("resid_post", 3, head=1), lambda: sf.Site("z", 3, head=-1)):
        with pytest.raises(sf.errors.SiteError, match=r"Try: Site\(\"z\", 3, head=5\)"):
            wrong()
