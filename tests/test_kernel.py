"""The pure functions: encode, change, move, and the resolution of token rules."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saefeat as sf
from helpers import ARCHITECTURES, D_SAE, D, build, make_sae, tensors_for, unit
from saefeat.kernel.edit import Acted, Change, moved
from saefeat.kernel.encode import encode
from saefeat.kernel.frozen import Placed
from saefeat.kernel.read import Norm, lift
from saefeat.kernel.state import Log, Memory, State, window
from saefeat.kernel.tokens import select
from saefeat.verbs.lower import lower

F64 = torch.float64


# ---------------------------------------------------------------- encode


def by_the_book(architecture: str, t: dict, x: torch.Tensor, k: int = 7) -> torch.Tensor:
    """The papers' formulas on the whole dictionary, one at a time, x [b, t, d] float64."""
    x = x - t["b_dec"]
    if architecture == "gated":
        gate = (x @ t["W_enc"] + t["b_gate"]) > 0
        magnitude = x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
        return gate * magnitude.clamp(min=0)
    h = x @ t["W_enc"] + t["b_enc"]
    if architecture == "standard":
        return h.clamp(min=0)
    if architecture == "jumprelu":
        return torch.where(h > t["threshold"], h.clamp(min=0), 0.0)
    order = (h.abs() if architecture == "abstopk" else h).argsort(-1, descending=True)
    out = torch.zeros_like(h)
    for row in range(h.shape[0]):
        for column in range(h.shape[1]):
            for latent in order[row, column, :k].tolist():
                value = h[row, column, latent]
                out[row, column, latent] = (
                    value if architecture == "abstopk" else value.clamp(min=0)
                )
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("indices", [None, [5], [40, 3, 17, 0, 47], list(range(8, 20))])
def test_encode_is_the_formula(architecture, indices):
    tensors = tensors_for(architecture, dtype=F64)
    sae = make_sae(architecture, dtype=F64)
    x = torch.randn(2, 5, D, dtype=F64)
    wanted = by_the_book(architecture, tensors, x)
    assert 0 < (wanted != 0).double().mean() < 0.9, "the case must have both kinds of latents"
    wanted = wanted if indices is None else wanted[..., indices]
    torch.testing.assert_close(sae.encode(x, indices), wanted, rtol=0, atol=1e-12)


def test_negative_topk_values_are_cut_and_abstopk_keeps_signs():
    """TopK read as ReLU, or AbsTopK read as TopK, changes the support."""
    x = torch.randn(2, 5, D, dtype=F64)
    plain = make_sae("topk", dtype=F64, k=45).encode(x)
    signed = make_sae("abstopk", dtype=F64, k=45).encode(x)
    assert (plain >= 0).all() and (plain > 0).sum(-1).max() < 45
    assert (signed < 0).any() and ((signed != 0).sum(-1) == 45).all()


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_input_norms_scale_activations_and_directions(architecture, norm):
    tensors = tensors_for(architecture, dtype=F64)
    sae = make_sae(architecture, dtype=F64, norm=norm)
    x = 3 * torch.randn(2, 5, D, dtype=F64) + 1
    if norm == "layer_norm":
        std = x.std(-1, keepdim=True)
        normalized, back = (x - x.mean(-1, keepdim=True)) / (std + 1e-5), std
    else:
        back = x.norm(dim=-1, keepdim=True) / D**0.5
        normalized = x / back
    f, scale = encode(sae.columns(torch.arange(D_SAE)), x)
    torch.testing.assert_close(
        f, by_the_book(architecture, tensors, normalized), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(scale, back, atol=1e-12, rtol=0)


def test_normalization_keeps_no_state():
    """encode(a), encode(b), then use of f_a: sae-lens's module gets this silently wrong."""
    sae = make_sae(norm="constant_norm_rescale", dtype=F64)
    columns = sae.columns(torch.arange(D_SAE))
    a, b = torch.randn(2, 3, D, dtype=F64), 50 * torch.randn(2, 3, D, dtype=F64)
    before = encode(columns, a)
    encode(columns, b)
    after = encode(columns, a)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_rescale_divides_directions_and_multiplies_activations():
    tensors = tensors_for("topk", dtype=F64)
    norms = tensors["W_dec"].norm(dim=1)
    x = torch.randn(2, 5, D, dtype=F64)
    h = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    wanted = torch.zeros_like(h)
    top = h.topk(7, -1)
    wanted.scatter_(-1, top.indices, top.values.relu())
    sae = make_sae("topk", dtype=F64, rescale=True)
    torch.testing.assert_close(sae.encode(x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sae.directions([9, 2]), (tensors["W_dec"] / norms[:, None])[[9, 2]], rtol=0, atol=1e-12
    )


def test_encode_computes_in_float32_whatever_came():
    """A bfloat16 encode flips active latents."""
    sae = make_sae("jumprelu", d_sae=512)
    x = torch.randn(2, 50, D).bfloat16()
    f = sae.encode(x)
    assert f.dtype == torch.float32
    wanted = by_the_book("jumprelu", tensors_for("jumprelu", d_sae=512, dtype=F64), x.to(F64))
    assert torch.equal(f != 0, wanted != 0)


# ---------------------------------------------------------------- delta form

CHANGES = {
    "zero": ({"scale": 0.0, "shift": 0.0}, lambda f: f * 0),
    "value": ({"scale": 0.0, "shift": 2.5}, lambda f: f * 0 + 2.5),
    "scale": ({"scale": -1.5}, lambda f: f * -1.5),
    "add": ({"shift": 0.75}, lambda f: f + 0.75),
    "bounds": ({"low": 0.1, "high": 0.3}, lambda f: f.clamp(0.1, 0.3)),
    "low": ({"low": 0.4}, lambda f: torch.where(f < 0.4, 0.4, f)),
    "high": ({"high": 0.2}, lambda f: torch.where(f > 0.2, 0.2, f)),
    "active": ({"shift": 1.0, "active_only": True}, lambda f: torch.where(f == 0, f, f + 1.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_is_its_formula(name):
    given, wanted = CHANGES[name]
    f = torch.randn(2, 5, 4, dtype=F64).relu()
    assert torch.equal(Change(**given).new(f), wanted(f))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_the_site_moves_by_exactly_the_delta(name, architecture, norm):
    """x' − x = (f' − f) · Dir (times the norm's scale) where selected; x itself elsewhere."""
    given, formula = CHANGES[name]
    sae = make_sae(architecture, dtype=F64, norm=norm)
    index = torch.tensor([31, 4, 12, 8, 25, 40])
    x = torch.randn(2, 5, D, dtype=F64)
    columns = sae.columns(index)
    f, scale = encode(columns, x)
    mask = torch.rand(2, 5, 1) > 0.4
    assert mask.any() and not mask.all()
    out = moved(x, Change(**given).new(f) - f, columns["directions"], scale, mask)

    by_hand = torch.zeros_like(x)
    for row in range(2):
        for column in range(5):
            step = formula(f[row, column]) - f[row, column]
            for j, latent in enumerate(index.tolist()):
                by_hand[row, column] += (
                    step[j] * tensors_for(architecture, dtype=F64)["W_dec"][latent]
                )
            if scale is not None:
                by_hand[row, column] *= scale[row, column, 0]
    selected = mask.squeeze(-1)
    torch.testing.assert_close((out - x)[selected], by_hand[selected], rtol=0, atol=1e-12)
    assert torch.equal(out[~selected], x[~selected])
    assert (out - x)[selected].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_step_returns_x_bit_for_bit(dtype):
    x = (torch.randn(2, 7, D) * torch.logspace(-3, 4, D)).to(dtype)
    directions = torch.randn(3, D) * 100
    mask = torch.ones(2, 7, 1, dtype=torch.bool)
    out = moved(x, torch.zeros(2, 7, 3), directions, None, mask)
    assert out.dtype == dtype and torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """The delta is added in float32 and rounded once; adding in bfloat16 rounds twice."""
    x, step, directions = torch.randn(2, 50, D).to(dtype), torch.randn(2, 50, 3), torch.randn(3, D)
    mask = torch.ones(2, 50, 1, dtype=torch.bool)
    once = (x.float() + step @ directions).to(dtype)
    twice = x + (step @ directions).to(dtype)
    assert not torch.equal(once, twice)
    assert torch.equal(moved(x, step, directions, None, mask), once)


def test_unselected_positions_survive_a_delta_that_is_not_a_number():
    x = torch.randn(2, 3, D)
    mask = torch.tensor([[True, False, False], [False, True, False]]).unsqueeze(-1)
    step = torch.where(mask, 1.0, torch.nan).expand(2, 3, 2)
    out = moved(x, step, torch.randn(2, D), None, mask)
    assert torch.isfinite(out).all()
    assert torch.equal(out[~mask.squeeze(-1)], x[~mask.squeeze(-1)])


def test_fired_counts_only_what_was_selected():
    step = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[-5.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[[True], [True]], [[True], [False]]])
    seen = window(None, None, (2, 2), 0, Memory(), None)
    acted = Acted((step, step, step), mask, torch.zeros(2, D), None, seen)
    assert acted.counts().tolist() == [3.0, 3.0, 5.0]


def test_lift_is_the_norm_without_its_weight():
    x = torch.randn(2, 5, D, dtype=F64) + 2
    rms = lift(x, Norm(kind="rms", eps=1e-3))
    torch.testing.assert_close(rms, x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt())
    layer = lift(x, Norm(kind="layer", eps=1e-3))
    wanted = torch.nn.functional.layer_norm(x, (D,), eps=1e-3)
    torch.testing.assert_close(layer, wanted)
    assert torch.equal(lift(x, Norm()), x)


def test_a_visit_without_a_write_returns_the_same_object():
    program = lower(sf.Probe(make_sae().latents([1, 2])), build("llama"))
    (stop,) = program.visits
    x = torch.randn(2, 4, D)
    view = look(None, torch.ones(2, 4, dtype=torch.long), (2, 4), None)
    log = Log()
    assert stop.act(x, State(view, log, Placed())) is x
    kept = log.readings[0][0].clone()
    x.zero_()  # what was read is a copy: a later in-place edit must not reach it
    assert torch.equal(log.readings[0][0], kept) and kept.abs().max() > 0


# ---------------------------------------------------------------- token rules


def look(ids, mask, shape, before=None):
    """A pass as the ways of running show it to the rules, its cache holding all but its columns."""
    past = 0 if mask is None else mask.shape[1] - shape[1]
    memory = Memory() if before is None else before.memory
    return window(ids, mask, shape, past, memory, None)


def slow(rule: tuple, ids: list[int], real: list[int], length: int) -> list[bool]:
    """One row of the whole sequence, in plain Python: which columns the rule selects."""
    out, position = [], -1
    for token, kept in zip(ids, real, strict=True):
        position += kept
        out.append(bool(kept) and holds(rule, token, position, length))
    return out


def holds(rule: tuple, token: int, position: int, length: int) -> bool:
    kind, *rest = rule
    match kind:
        case "all":
            return True
        case "not":
            return not holds(rest[0], token, position, length)
        case "and":
            return holds(rest[0], token, position, length) and holds(
                rest[1], token, position, length
            )
        case "or":
            return holds(rest[0], token, position, length) or holds(
                rest[1], token, position, length
            )
        case "prompt":
            return position < length
        case "first":
            return position in list(range(length))[: rest[0]]
        case "last":
            return position in list(range(length))[-rest[0] :]
        case "generated":
            new = position - length
            return new >= rest[0] and (rest[1] is None or new < rest[1])
        case "ids":
            return token in rest[0]
        case "where":
            return token % 3 == position % 2
    raise AssertionError(kind)


def third(ids, position):
    return ids % 3 == position % 2


leaf = st.one_of(
    st.just(sf.Tokens.all()),
    st.just(sf.Tokens.prompt()),
    st.integers(1, 6).map(sf.Tokens.first),
    st.integers(1, 6).map(sf.Tokens.last),
    st.tuples(st.integers(0, 3), st.none() | st.integers(0, 5)).map(
        lambda pair: sf.Tokens.generated(pair[0], None if pair[1] is None else sum(pair))
    ),
    st.lists(st.integers(0, 9), max_size=3).map(lambda ids: sf.Tokens.ids(*ids)),
    st.just(sf.Tokens.where(third)),
)
rules = st.recursive(
    leaf,
    lambda inner: st.one_of(
        inner.map(lambda r: ~r),
        st.tuples(inner, inner).map(lambda two: two[0] & two[1]),
        st.tuples(inner, inner).map(lambda two: two[0] | two[1]),
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    rule=rules,
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    new=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_rules_match_a_slow_reference_at_every_pass_of_a_cached_run(rule, lengths, new, seed):
    """Ragged left padding; the prompt in one pass, then a column at a time."""
    width = max(lengths)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 10, (len(lengths), width + new), generator=g)
    mask = torch.tensor([[0] * (width - n) + [1] * (n + new) for n in lengths])
    wanted = torch.tensor(
        [
            slow(rule.rule, row, real, n)
            for row, real, n in zip(ids.tolist(), mask.tolist(), lengths, strict=True)
        ]
    )
    view = look(ids[:, :width], mask[:, :width], (len(lengths), width), None)
    assert view.lengths.flatten().tolist() == lengths
    found = [select(rule.rule, view)]
    for step in range(new):
        end = width + step + 1
        view = look(ids[:, end - 1 : end], mask[:, :end], (len(lengths), 1), view)
        found.append(select(rule.rule, view))
    assert torch.equal(torch.cat(found, 1), wanted)
    # the same without a cache: every pass sees the whole sequence
    view = look(ids, mask, tuple(ids.shape), view)
    assert torch.equal(select(rule.rule, view), wanted)


@given(rule=rules, length=st.integers(1, 5), pads=st.integers(1, 4))
def test_padding_moves_nothing_and_is_never_selected(rule, length, pads):
    ids = torch.arange(2 * length).reshape(2, length) % 10
    bare = select(rule.rule, look(ids, torch.ones_like(ids), (2, length), None))
    padded_ids = torch.cat([torch.zeros(2, pads, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, pads, dtype=torch.long), torch.ones_like(ids)], 1)
    found = select(rule.rule, look(padded_ids, mask, (2, length + pads), None))
    assert not found[:, :pads].any()
    assert torch.equal(found[:, pads:], bare)


def test_no_mask_means_no_padding():
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    view = look(ids, None, (2, 3), None)
    assert select(("last", 1), view).tolist() == [[False, False, True]] * 2
    assert view.position.tolist() == [[0, 1, 2]] * 2


def test_a_four_dimensional_mask_is_refused():
    untyped = inspect.unwrap(window)  # the types would refuse it first, and users have none
    for mask in (torch.ones(2, 1, 3, 3), {"full": None}):
        with pytest.raises(ValueError, match=r"attention mask.*default dynamic cache"):
            untyped(None, mask, (2, 3), 0, Memory(), None)


@pytest.mark.parametrize("kind", ["ids", "where"])
def test_rules_over_ids_need_ids(kind):
    rule = sf.Tokens.ids(4) if kind == "ids" else sf.Tokens.where(third)
    view = look(None, torch.ones(2, 3, dtype=torch.long), (2, 3), None)
    with pytest.raises(ValueError, match="input_ids"):
        select(rule.rule, view)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.Tokens.first(0),
        lambda: sf.Tokens.last(-1),
        lambda: sf.Tokens.last(1.5),
        lambda: sf.Tokens.generated(-1),
    ],
)
def test_counts_that_mean_nothing_are_refused(make):
    with pytest.raises(sf.errors.PromptError, match="negative counts have no meaning"):
        make()


@given(rule=rules.filter(lambda r: "where" not in repr(r)))
def test_the_repr_of_a_rule_builds_it_again(rule):
    assert eval(repr(rule), {"Tokens": sf.Tokens}) == rule


# ---------------------------------------------------------------- directions on the kernel


def test_ablating_a_direction_is_the_projection():
    v = unit().to(F64)
    columns = sf.Direction(v, site="resid_post.0").columns(torch.tensor([0]))
    x = torch.randn(2, 5, D, dtype=F64)
    f, scale = encode(columns, x)
    mask = torch.ones(2, 5, 1, dtype=torch.bool)
    out = moved(x, Change(scale=0.0).new(f) - f, columns["directions"], scale, mask)
    torch.testing.assert_close(out, x - (x @ v)[..., None] * v / (v @ v), atol=1e-12, rtol=0)
    torch.testing.assert_close(out @ v, torch.zeros(2, 5, dtype=F64), atol=1e-12, rtol=0)
