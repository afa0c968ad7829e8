"""Fingerprints: whatever changes a result changes them, and nothing else does.

Two dictionaries or two models with one fingerprint would hand the results of one to the other.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from saefeat.dictionaries.weights import InMemory, OnDisk
from saefeat.files.hashing import computation, digest, weights
from saefeat.results.provenance import model_identity

X = torch.randn(7, D, generator=torch.Generator().manual_seed(5)) * 2 + 0.5
OPTIONS = {
    "norm": ("none", "layer_norm", "constant_norm_rescale"),
    "subtract_bias": (True, False),
    "centered": (False, True),
    "k": (4, 5),
    "rescale": (False, True),
}


def sae(architecture, tensors, **options):
    site = {"site": "mlp_norm.1", "write_site": "mlp_out.1"}
    where = site if "transcoder" in architecture else {"site": "resid_post.1"}
    return sf.SAE(InMemory(tensors), architecture=architecture, **where, **options)


def computed(dictionary, indices=None):
    return dictionary.encode(X, indices), dictionary.directions(indices)


LATER = [
    pytest.param(name, marks=() if name in ("standard", "jumprelu") else pytest.mark.slow)
    for name in ARCHITECTURES
]


@pytest.mark.parametrize("architecture", LATER)
@given(data=st.data())
def test_what_changes_latents_changes_the_fingerprint(architecture, data):
    """One entry of one tensor, or one setting, of all latents and of a selection."""
    options = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    tensors = {name: t.clone() for name, t in tensors_for(architecture).items()}
    before = sae(architecture, tensors, **options)
    changed = {name: t.clone() for name, t in tensors.items()}
    other = dict(options)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        place = data.draw(st.integers(0, tensors[name].numel() - 1))
        changed[name].view(-1)[place] += data.draw(st.sampled_from([1e-3, 0.5]))
    else:
        name = data.draw(st.sampled_from(sorted(OPTIONS)))
        other[name] = data.draw(st.sampled_from(OPTIONS[name]))
    after = sae(architecture, changed, **other)
    for indices in (None, [3, 17, 8]):
        moved = any(
            not torch.equal(a, b)
            for a, b in zip(computed(before, indices), computed(after, indices), strict=True)
        )
        if moved:
            assert before.fingerprint(indices) != after.fingerprint(indices)
    again = sae(architecture, {name: t.clone() for name, t in tensors.items()}, **options)
    assert again.fingerprint() == before.fingerprint()


def test_the_activation_is_part_of_it():
    """The same tensors, as topk and as abstopk."""
    tensors = tensors_for("topk")
    kinds = [sae(kind, tensors, k=4) for kind in ("topk", "abstopk")]
    assert len({kind.fingerprint() for kind in kinds}) == 2
    assert len({kind.fingerprint([1]) for kind in kinds}) == 2


def test_where_it_acts_is_part_of_it():
    tensors = tensors_for("standard")
    first = sf.SAE.from_tensors(tensors, site="resid_post.1")
    others = (
        sf.SAE.from_tensors(tensors, site="resid_post.2"),
        sf.SAE(InMemory(tensors), site="resid_post.1", subtract_bias=False, excluded=(3,)),
    )
    assert len({one.fingerprint() for one in (first, *others)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_and_its_tensors_have_one_fingerprint(architecture, dtype, tmp_path):
    """Whatever the dtype it is stored in: latents are computed in float32."""
    tensors = {name: t.to(dtype).contiguous() for name, t in tensors_for(architecture).items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    on_disk = sf.SAE(
        OnDisk(tmp_path / "x.safetensors"), architecture=architecture, site="resid_post.1", k=4
    )
    for held in (tensors, wide):
        in_memory = sf.SAE(InMemory(held), architecture=architecture, site="resid_post.1", k=4)
        assert in_memory.fingerprint() == on_disk.fingerprint()
        assert in_memory.fingerprint([5, 2]) == on_disk.fingerprint([5, 2])
        assert in_memory.fingerprint(range(D_SAE)) == on_disk.fingerprint()


def test_a_file_written_over_in_place_is_read_anew(tmp_path):
    """With its size, its inode and, by a copying tool, its time of change as they were."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors_for("standard"), path)
    dictionary, about = sf.SAE(OnDisk(path), site="resid_post.1"), path.stat()
    before = dictionary.fingerprint()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert dictionary.fingerprint() != before


def test_files_that_differ_in_the_middle_are_told_apart(tmp_path):
    """Beyond the first and the last MiB, and in a file that changes while it is in use."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, 12_000, generator=generator),
        "W_dec": torch.randn(12_000, D, generator=generator),
        "b_enc": torch.zeros(12_000),
        "b_dec": torch.zeros(D),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    dictionary = sf.SAE(OnDisk(path), site="resid_post.1")
    before = dictionary.fingerprint(), dictionary.fingerprint([1, 2])
    assert dictionary.fingerprint() == before[0]
    tensors["W_dec"][5000:8000] *= 2
    safetensors.torch.save_file(tensors, path)
    os.utime(path, ns=(1, 1))
    assert dictionary.fingerprint() != before[0]
    assert dictionary.fingerprint([1, 2]) == before[1], "nothing these latents depend on"
    assert dictionary.fingerprint([1, 6000]) != before[1]


def test_a_selection_reads_no_other_latents(tmp_path, monkeypatch):
    """The provenance of a run must not read a file of gigabytes."""
    safetensors.torch.save_file(tensors_for("jumprelu"), tmp_path / "x.safetensors")
    dictionary = sf.SAE(
        OnDisk(tmp_path / "x.safetensors"), architecture="jumprelu", site="resid_post.1"
    )
    whole = []
    monkeypatch.setattr(
        OnDisk, "read", lambda self, name, read=OnDisk.read: whole.append(name) or read(self, name)
    )
    sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(dictionary.latents([3, 40])))
    assert set(whole) <= {"b_dec"}


def test_a_checkpoint_knows_another_dictionary(tmp_path):
    """The same tensors read with another k: not the first one's logits."""
    nn = wrapped(build("llama"))
    few, many = (sae("topk", tensors_for("topk"), k=k) for k in (2, 16))
    sf.run(nn, RAGGED, sf.Ablate(few.latents([1])), checkpoint=tmp_path)
    with pytest.raises(sf.errors.CheckpointError, match="intervention"):
        sf.run(nn, RAGGED, sf.Ablate(many.latents([1])), checkpoint=tmp_path)


# ---------------------------------------------------------------- other dictionaries


def test_functions_are_known_by_what_they_do():
    def of(factor):
        return sf.dictionaries.Function(
            lambda x: x * factor, torch.eye(D), site="resid_post.0", width=D
        )

    assert of(2.0).fingerprint() == of(2.0).fingerprint() != of(3.0).fingerprint()
    unreadable = object()
    named = sf.dictionaries.Function(
        lambda x: x * len(str(unreadable)), torch.eye(D), site="resid_post.0", width=D, name="mine"
    )
    assert named.fingerprint() and named.fingerprint([1]) != named.fingerprint([2])


def test_directions_neurons_errors_and_controls():
    base = make_sae("jumprelu")
    made = [
        sf.Direction(unit(1), site="resid_post.1"),
        sf.Direction(unit(2), site="resid_post.1"),
        sf.Neurons("resid_post.1", D),
        sf.Neurons("resid_post.1", D + 1),
        base,
        base.error(),
        make_sae("jumprelu", seed=1).error(),
        *(sf.controls.random_directions(base, seed=s).parts[0][0] for s in (0, 1)),
    ]
    assert len({one.fingerprint() for one in made}) == len(made)
    assert len({one.fingerprint([0]) for one in made}) == len(made)


def test_a_selection_has_one_of_its_own():
    base = make_sae("jumprelu")
    made = [
        base.latents([1, 2]),
        base.latents([2, 1]),
        base.latents([1]),
        base.latents([1, 2]).span(),
        base.latents([1, 2]).reselect(),
        make_sae("jumprelu", seed=1).latents([1, 2]),
    ]
    assert len({one.fingerprint() for one in made}) == len(made)
    assert digest(sf.Ablate(made[0])) == digest(sf.Ablate(make_sae("jumprelu").latents([1, 2])))


# ---------------------------------------------------------------- models


def attention(model):
    return model.model.layers[0].self_attn


def bare(identity):
    """Without the tokenizer, which a plain Hugging Face model has not."""
    return identity | {"tokenizer": None}


class Scaled:
    """A callable with a setting, in place of a function."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


class Around:
    """A callable around something that does the work."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def times(factor, x):
    return x * factor


def closing_over(value):
    return lambda x: x * value


def replaced(function):
    def change(model):
        model.model.layers[1].mlp.forward = function

    return change


def activated(function):
    def change(model):
        del model.model.layers[1].mlp.act_fn
        model.model.layers[1].mlp.act_fn = function

    return change


def hooked(register, value):
    return lambda model: getattr(model.model.layers[1].mlp, register)(
        lambda module, args, out=None, kept=value: out if out is None else out * kept
    )


ONE, TWO = torch.full((D,), 1.0), torch.full((D,), 2.0)
PAIRS = {
    "a partial": (replaced(partial(times, 2.0)), replaced(partial(times, 3.0))),
    "a callable": (replaced(Scaled(2.0)), replaced(Scaled(3.0))),
    "another object's method": (replaced(Scaled(2.0).__call__), replaced(Scaled(3.0).__call__)),
    "a closed-over tensor": (replaced(closing_over(ONE)), replaced(closing_over(TWO))),
    "a closed-over module": (
        replaced(closing_over(torch.nn.Linear(4, 4))), replaced(closing_over(torch.nn.Linear(4, 4)))
    ),
    "a closed-over object": (replaced(closing_over(Scaled(2))), replaced(closing_over(Scaled(3)))),
    "a default": (activated(lambda x, k=2.0: x * k), activated(lambda x, k=3.0: x * k)),
    "a function of torch": (activated(torch.tanh), activated(torch.relu)),
    "a callable activation": (activated(Scaled(2.0)), activated(Scaled(3.0))),
    "a tensor kept": (
        lambda model: setattr(attention(model), "steer", ONE),
        lambda model: setattr(attention(model), "steer", [TWO]),
    ),
    "a hook's tensor": (
        hooked("register_forward_hook", ONE), hooked("register_forward_hook", TWO)
    ),
    "a hook's array": (
        hooked("register_forward_hook", numpy.float32([1.0])),
        hooked("register_forward_hook", numpy.float32([2.0])),
    ),
    "a setting in an object": (
        lambda model: setattr(attention(model), "steer", SimpleNamespace(gain=1.0)),
        lambda model: setattr(attention(model), "steer", SimpleNamespace(gain=2.0)),
    ),
    "a setting in an object in an object": (
        activated(Around(Scaled(2.0))), activated(Around(Scaled(3.0)))
    ),
    "a module in a list of an object": (
        activated(Around([torch.nn.Linear(4, 4)])), activated(Around([torch.nn.Linear(4, 4)]))
    ),
    "a function of torch in an object": (
        activated(Around(torch.tanh)), activated(Around(torch.relu))
    ),
    "a hook at the input": (lambda model: None, hooked("register_forward_pre_hook", 1.0)),
    "a hook on gradients": (lambda model: None, hooked("register_full_backward_hook", 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_models_that_differ_in_code_or_hooks_are_told_apart(name):
    found = []
    for change in PAIRS[name]:
        model = build("llama")
        change(model)
        found.append(model_identity(model))
        assert model_identity(model) == found[-1]
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["computation"]


def test_a_forward_put_over_nnsights_own_is_what_runs():
    model = build("llama")
    nn, mlp = wrapped(model), model.model.layers[1].mlp
    found, inner = [model_identity(nn)], mlp.forward
    for factor in (2.0, 3.0):
        mlp.forward = lambda x, factor=factor: inner(x) * factor
        found.append(model_identity(nn))
    assert len({one["computation"] for one in found}) == 3


def test_how_attention_is_computed_is_part_of_it():
    models = [build("llama"), build("llama")]
    models[1].config._attn_implementation = "eager"
    assert model_identity(models[0])["configuration"] != model_identity(models[1])["configuration"]


def test_the_tokenizer_is_part_of_it():
    """Rules for special tokens, roles, stops and words of a metric mean other ids with another."""
    before = model_identity(wrapped(build("llama")))
    nn = wrapped(build("llama"))
    nn.tokenizer = copy.deepcopy(nn.tokenizer)
    assert model_identity(nn) == before
    nn.tokenizer.add_special_tokens({"additional_special_tokens": ["w3"]})
    special = model_identity(nn)
    nn.tokenizer.chat_template = "{{ messages }}"
    template = model_identity(nn)
    for one, other in ((before, special), (special, template)):
        assert [key for key in one if one[key] != other[key]] == ["tokenizer"]


def test_a_block_that_edits_the_model_is_refused():
    nn = wrapped(build("llama"))
    step, refused = sf.Ablate(make_sae().latents([1])), sf.errors.CheckpointError
    with torch.no_grad(), sf.hooked(nn, step), pytest.raises(refused, match=r"hooked.*Try:"):
        forward(nn._module, batch_of())
        model_identity(nn)
    assert model_identity(nn)


def test_what_contains_itself_is_refused():
    endless: list = []
    endless.append(endless)
    ring: dict = {"a": {}}
    ring["a"]["b"] = ring
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, ring, deep):
        with pytest.raises(sf.errors.CheckpointError, match=r"contains itself.*Try:"):
            digest(value)
    assert digest([[], []]) and digest((ONE, ONE))


CHANGES = {
    "epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 0.1),
    "attention scaling": lambda model: setattr(attention(model), "scaling", 0.5),
    "activation": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
    "forward": lambda model: setattr(model.model.layers[2].mlp, "forward", lambda x: 2 * x),
    "bound forward": lambda model: setattr(
        model.model.layers[2].mlp, "forward", torch.nn.Identity().forward
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_model_computes_is_part_of_its_identity(name):
    """Weights and configuration are the same; what is computed with them is not."""
    before = model_identity(build("llama"))
    model = build("llama")
    CHANGES[name](model)
    after = model_identity(model)
    assert [key for key in before if before[key] != after[key]] == ["computation"]
    assert bare(model_identity(wrapped(model))) == after, "nnsight's own wrapper is no change"


def test_ambient_torch_state_is_part_of_it():
    model = build("llama")
    before = model_identity(model)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model_identity(model)
    torch.set_default_dtype(torch.float64)
    try:
        wide = model_identity(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (autocast, wide):
        assert [key for key in before if before[key] != other[key]] == ["ambient"]
    assert model_identity(model) == before


def test_a_traced_model_is_the_same_model():
    nn = wrapped(build("llama"))
    before = model_identity(nn)
    sf.run(nn, RAGGED, sf.Ablate(make_sae().latents([1])))
    with torch.no_grad(), sf.hooked(nn, sf.Ablate(make_sae().latents([1]))):
        forward(nn._module, batch_of())
    assert model_identity(nn) == before
    assert bare(before) == model_identity(build("llama"))


class Adapted(torch.nn.Linear):
    """As peft's layers: weights of every adapter, and the name of the active one."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self._active_adapter = ["a"]
        self.adapters = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})

    def forward(self, x):
        return super().forward(x) + sum(self.adapters[name](x) for name in self._active_adapter)


def test_the_active_adapter_is_part_of_it():
    layer = Adapted()
    before = computation(layer)
    layer._active_adapter = ["b"]
    assert computation(layer) != before
    layer._active_adapter = ["a"]
    assert computation(layer) == before


def test_entries_that_change_places_are_seen():
    """Sums over rows and columns alone would not see two pairs swapped crosswise."""
    module = torch.nn.Linear(4, 4, bias=False)
    before = weights(module)
    with torch.no_grad():
        module.weight[:2, :2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        first = weights(module)
        module.weight[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert len({before, first, weights(module)}) == 3
