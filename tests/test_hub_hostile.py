"""Files that lie: each is refused by name, runs nothing, and makes nothing larger than itself."""

from __future__ import annotations

import copy
import json
import os
import resource
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saefeat as sf
from helpers import D, build, make_sae, unit
from saefeat.files import container
from saefeat.hub.files import built, packed

CALM = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def sample() -> sf.Intervention:
    sae, topk = make_sae("jumprelu"), make_sae("topk", layer=0, d_sae=16)
    harm = sf.Direction(unit(9), site="resid_post.0")
    return (
        sf.Ablate(sae.latents([3, 40]), where=~sf.Tokens.first(1) & sf.Tokens.role("user"))
        | sf.Clamp(sae.latents([8, 3]), torch.tensor([1.0, 2.0]), when=sf.When(harm, above=0.5))
        | sf.Clamp(topk.latents([2]), add=1.0, where=sf.Tokens.ids(3) | sf.Tokens.generated(1, 4))
        | sf.Probe(sf.Neurons("resid_post.2", D).latents([4]), reduce="max")
    )


def values() -> sf.Intervention:
    """Values that depend on where they act."""
    some = make_sae("jumprelu").latents([3, 40])
    read = sf.results.Readings(
        some, torch.rand(2, 5, 2), torch.ones(2, 5, 2) > 0, torch.tensor([0, 2])
    )
    return (
        sf.Ablate(some, to=sf.values.Patch(read), where=sf.Tokens.prompt())
        | sf.Clamp(some, add=sf.values.Schedule([1.0, 2.0], prompt=[0.0, 1.0]))
        | sf.Ablate(some, to=sf.values.Resample(torch.rand(4, 2), seed=3))
        | sf.Ablate(some.span(), when=sf.When(some, above=0.1, below=2.0, match="all"))
    )


GOOD = packed(sample(), None)
BASE = container.unpack(GOOD, "test")


def load_bytes(data: bytes):
    return built(container.unpack(data, "load"), "load", None)


def rehashed(document: dict, tensors: dict) -> bytes:
    """A file whose hash is right, as a hostile author would make it."""
    named = {name: document.get(name) for name in ("format", "version", "spec")}
    return container.pack(
        {**document, "sha256": container.content_hash(named, tensors)}, tensors, "test"
    )


def lie(change) -> bytes:
    """The sample with one thing changed in its document or its tensors."""
    document, tensors = copy.deepcopy(BASE.document), dict(BASE.tensors)
    change(document["spec"], tensors)
    return rehashed(document, tensors)


def header_lie(change) -> bytes:
    """The sample with one thing changed in the safetensors header itself."""
    (length,) = struct.unpack("<Q", GOOD[:8])
    text = change(json.loads(GOOD[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + GOOD[8 + length :]


def refused(data: bytes, match: str) -> None:
    with pytest.raises(sf.errors.FileError, match=match) as caught:
        load_bytes(data)
    assert len(str(caught.value)) < 1500, "a message as long as the file"


def test_the_sample_is_good():
    assert repr(load_bytes(GOOD)) == repr(sample())
    assert lie(lambda spec, tensors: None) == GOOD


# ---------------------------------------------------------------- the container


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04", "4 bytes"),
        (GOOD[:7], "7 bytes"),
        (GOOD[:100], "announce a header"),
        (GOOD[:-1], "bytes of tensors"),
        (GOOD + b"\0", "bytes of tensors"),
        (struct.pack("<Q", 2**63) + GOOD[8:], "announce a header of 9,223"),
        (struct.pack("<Q", container.MAX_HEADER + 1) + b" " * 100, "announce a header"),
        (struct.pack("<Q", 2) + b"{}", "without this library's header"),
        (struct.pack("<Q", 2) + b"[]", "without this library's header"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "announce"),
    ],
)
def test_broken_bytes(data, match):
    refused(data, match)


def edit(name, **values):
    def change(header):
        header[name] = {**header[name], **values}
        return header

    return change


ROWS = next(n for n in BASE.tensors if n.endswith("rows"))


@pytest.mark.parametrize(
    "change, match",
    [
        (edit(ROWS, shape=[2**40]), "bytes for shape"),
        (edit(ROWS, shape=[2**40, 2**40]), "a shape that can be"),
        (edit(ROWS, shape=[0, 2**52, 2**52], data_offsets=[0, 0]), "a shape that can be"),
        (edit(ROWS, shape=[-1, -D]), "whole numbers"),
        (edit(ROWS, shape=[True, D]), "whole numbers"),
        (edit(ROWS, shape=[1.0, D]), "whole numbers"),
        (edit(ROWS, shape="1"), "whole numbers"),
        (edit(ROWS, shape=[1, 1, 1, D]), "at most three"),
        (edit(ROWS, data_offsets=[0, 4 * D]), "without gap or overlap"),
        (edit(ROWS, data_offsets=[10**9, 10**9 + 4 * D]), "without gap or overlap"),
        (edit(ROWS, data_offsets=[4 * D, 0]), "bytes for shape"),
        (edit(ROWS, data_offsets=[0]), "and two"),
        (edit(ROWS, dtype="F8_E4M3"), "of dtype"),
        (edit(ROWS, dtype=["F32"]), "of dtype"),
        (edit(ROWS, dtype="F64"), "bytes for shape"),
        (edit(ROWS, extra=1), "another form"),
        (lambda h: {**h, ROWS: 3}, "another form"),
        (lambda h: {**h, "__metadata__": {"saefeat": 3}}, "without this library's"),
        (lambda h: {**h, "__metadata__": {"saefeat": "{"}}, "no JSON"),
        (lambda h: {**h, "__metadata__": {"saefeat": "3"}}, "no JSON object"),
        (lambda h: {**h, "__metadata__": {"saefeat": "[" * 10**6}}, "no JSON|too deeply"),
        (lambda h: {**h, "__metadata__": {"saefeat": "[" * 500 + "]" * 500}}, "too deeply"),
        (lambda h: {**h, "__metadata__": {"saefeat": '{"a":1,"a":2}'}}, "a key twice"),
        (lambda h: {**h, "__metadata__": {"saefeat": '{"a":NaN}'}}, "number NaN"),
        (lambda h: {**h, "__metadata__": {"saefeat": '{"a":1e999}'}}, "number 1e999"),
        (lambda h: {**h, "__metadata__": {"saefeat": '{"a":' + "9" * 9999 + "}"}}, "no JSON"),
        (lambda h: json.dumps(h).encode() + b"x", "no JSON"),
        (lambda h: b'{"a":1,"a":2}', "a key twice"),
    ],
)
def test_a_header_that_lies(change, match):
    refused(header_lie(change), match)


def test_booleans_are_zero_or_one():
    data = container.pack({}, {"flags": torch.tensor([True, False])}, "test")
    assert container.unpack(data, "x").tensors["flags"].tolist() == [True, False]
    with pytest.raises(sf.errors.FileError, match="above 1"):
        container.unpack(data[:-1] + b"\x02", "x")


def test_contents_that_were_edited_afterwards():
    refused(GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "do not match their hash")
    document = copy.deepcopy(BASE.document)
    document["spec"]["steps"][2]["fields"]["add"] = 2.0
    refused(container.pack(document, BASE.tensors, "test"), "do not match their hash")


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True, None, 2])
def test_versions(version):
    document = {**BASE.document, "version": version}
    refused(rehashed(document, BASE.tensors), "version")


def test_other_formats():
    refused(rehashed({**BASE.document, "format": "saefeat.attribution"}, {}), "of format")
    refused(rehashed({**BASE.document, "spec": []}, BASE.tensors), "a JSON object")


def test_a_document_without_a_spec():
    """Its hash is that of nothing, and right."""
    said = {"format": "saefeat.intervention", "version": 1}
    refused(rehashed({**said, "written": {}}, {}), "a spec that is None")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "pipe"])
def test_what_has_no_end_is_not_read(path, tmp_path):
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
        writer = os.open(path, os.O_RDWR)  # or opening it to read would wait
    with pytest.raises(sf.errors.FileError, match="a regular file"):
        sf.load(path)
    if "pipe" in path:
        os.close(writer)


# ---------------------------------------------------------------- the document


def put(*path, value):
    """Set one place of the spec."""

    def change(spec, tensors):
        at = spec
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def drop(*path):
    def change(spec, tensors):
        at = spec
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


def tensor(name, value):
    def change(spec, tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


MADE_ON = {"family": "gemma2", "d_model": 1, "layers": 1, "vocab": 1, "name": "", "revision": None}
NOT = ["steps", 0, "fields", "where"]
ENCODER = "dictionaries.0.0.encoder"
SPEC_LIES = {
    "an unknown verb": (put("steps", 0, "form", value="os.system"), "os.system"),
    "a condition as a step": (put("steps", 0, "form", value="When"), "a 'When'"),
    "a step as a condition": (
        put("steps", 1, "fields", "when", "form", value="Ablate"),
        "a 'Ablate'",
    ),
    "a list as a verb": (put("steps", 0, "form", value=["Ablate"]), "Ablate"),
    "an unknown field": (put("steps", 0, "fields", "strength", value=2), "strength"),
    "a private field": (put("steps", 0, "fields", "__class__", value="x"), "__class__"),
    "text for a number": (put("steps", 2, "fields", "add", value="zero"), "text 'zero'"),
    "a bool for a number": (put("steps", 2, "fields", "add", value=True), "bool True"),
    "a list for a number": (put("steps", 2, "fields", "add", value=[1]), "list"),
    "no latents": (drop("steps", 0, "fields", "latents"), "latents"),
    "latents of nothing": (put("steps", 0, "fields", "latents", "latents", value=[]), "one latent"),
    "two changes": (put("steps", 2, "fields", "value", value=1.0), "value and add"),
    "a bad reduction": (put("steps", 3, "fields", "reduce", value="median"), "median"),
    "a number by another name": (put("steps", 2, "fields", "add", value={"inf": 1}), "inf"),
    "an infinite add": (put("steps", 2, "fields", "add", value={"infinite": 1}), "not finite"),
    "a huge list of steps": (put("steps", value=[None] * 70_000), "at most 65,536"),
    "steps as an object": (put("steps", value={}), "a list"),
    "several steps, no chain": (put("chain", value=False), "without a chain"),
    "a chain that is no bool": (put("chain", value=1), "without a chain"),
    "a rule that is code": (put(*NOT, "tokens", value=["where", "len"]), "token rule"),
    "a rule without its argument": (put(*NOT, "tokens", value=["first"]), "token rule"),
    "a rule counting from the end": (put(*NOT, "tokens", value=["first", -1]), "count"),
    "the first no tokens": (put(*NOT, "tokens", value=["last", 0]), "count"),
    "ids that are text": (put(*NOT, "tokens", value=["ids", ["a"]]), "ids"),
    "a role that is no text": (put(*NOT, "tokens", value=["role", 3]), "text"),
    "a role without end": (put(*NOT, "tokens", value=["role", "x" * 5000]), "text"),
    "half a conjunction": (put(*NOT, "tokens", value=["and", ["all"]]), "token rule"),
    "a rule in a rule": (put(*NOT, "tokens", value=["not", "all"]), "rule"),
    "an empty rule": (put(*NOT, "tokens", value=[]), "token rule"),
    "an unknown dictionary": (
        put("steps", 0, "fields", "latents", "latents", value=[[99, 0]]),
        "dictionary, selection",
    ),
    "the last dictionary": (
        put("steps", 0, "fields", "latents", "latents", value=[[-1, 0]]),
        "dictionary, selection",
    ),
    "an unknown selection": (
        put("steps", 0, "fields", "latents", "latents", value=[[0, 9]]),
        "selection 9",
    ),
    "a latent twice": (
        put("steps", 0, "fields", "latents", "latents", value=[[0, 0], [0, 1]]),
        "twice",
    ),
    "an unknown kind": (put("dictionaries", 0, "kind", value="pickle"), "pickle"),
    "another kind": (put("dictionaries", 0, "kind", value="direction"), "'activation'"),
    "another kind of the same form": (put("dictionaries", 3, "kind", value="excerpt"), "'width'"),
    "an unknown activation": (put("dictionaries", 0, "activation", value="eval"), "eval"),
    "an activation that is a list": (put("dictionaries", 0, "activation", value=["relu"]), "relu"),
    "an activation with other tensors": (
        put("dictionaries", 0, "activation", value="gated"),
        "no tensor",
    ),
    "a tensor too many": (put("dictionaries", 0, "activation", value="relu"), "nothing names"),
    "an unknown norm": (put("dictionaries", 0, "norm", value="batch"), "batch"),
    "a site elsewhere": (put("dictionaries", 0, "site", value="../../etc/passwd"), "site"),
    "a layer below zero": (put("dictionaries", 0, "site", value="resid_post.-1"), "site"),
    "a layer without end": (
        put("dictionaries", 0, "site", value="resid_post." + "9" * 5000),
        "site",
    ),
    "a width of nothing": (put("dictionaries", 0, "d_in", value=0), "d_in"),
    "a width beyond all": (put("dictionaries", 0, "d_sae", value=2**60), "d_sae"),
    "a width that is text": (put("dictionaries", 0, "d_out", value="32"), "d_out"),
    "another width": (put("dictionaries", 0, "d_in", value=D + 1), "encoder"),
    "a width below the latents": (put("dictionaries", 0, "d_sae", value=8), r"0\.\.7"),
    "no active latents": (put("dictionaries", 2, "k", value=0), "`k`"),
    "more active latents than there are": (put("dictionaries", 2, "k", value=17), "`k`"),
    "an index below zero": (
        put("dictionaries", 0, "selections", 0, "latents", value=[-1, 3]),
        "whole numbers",
    ),
    "an index beyond all": (
        put("dictionaries", 0, "selections", 0, "latents", value=[2**62, 3]),
        "whole numbers",
    ),
    "an index twice": (put("dictionaries", 0, "selections", 0, "latents", value=[3, 3]), "repeats"),
    "an index that is no integer": (
        put("dictionaries", 0, "selections", 0, "latents", value=[3.0, 4]),
        "whole numbers",
    ),
    "a selection of nothing": (
        put("dictionaries", 0, "selections", 0, "latents", value=[]),
        "at least one",
    ),
    "fewer latents than rows": (
        put("dictionaries", 0, "selections", 0, "latents", value=[3]),
        "encoder|bias",
    ),
    "a selection twice": (
        put("dictionaries", 0, "selections", 1, "latents", value=[3, 40]),
        "twice",
    ),
    "neurons beyond all": (put("dictionaries", 3, "width", value=2**40), "width"),
    "neurons too few": (put("dictionaries", 3, "width", value=2), r"0\.\.1"),
    "a name without end": (put("dictionaries", 0, "name", value="x" * 5000), "characters"),
    "an excluded function": (put("dictionaries", 0, "excluded", value="eval"), "excluded"),
    "an origin that is an object": (put("dictionaries", 0, "origin", value={}), "origin"),
    "NaN in a dictionary": (tensor(ENCODER, lambda t: t * torch.nan), "NaN"),
    "infinity in a dictionary": (tensor(ENCODER, lambda t: t * torch.inf), "NaN or infinity"),
    "integers in a dictionary": (tensor(ENCODER, lambda t: t.long()), "int64"),
    "half precision": (tensor(ENCODER, lambda t: t.half()), "float16"),
    "a transposed encoder": (tensor(ENCODER, lambda t: t.T.contiguous()), "encoder"),
    "a direction that is not one": (tensor(ROWS, lambda t: 2 * t), "orthonormal"),
    "a direction of integers": (tensor(ROWS, lambda t: t.int()), "int32"),
    "a direction in three dimensions": (tensor(ROWS, lambda t: t[None]), "rows of"),
    "NaN in a value": (tensor("values.0", torch.tensor([1.0, torch.nan])), "NaN"),
    "too many values": (tensor("values.0", torch.ones(3)), r"shape \(3,\)"),
    "no values": (tensor("values.0", torch.ones(0)), r"shape \(0,\)"),
    "a tensor nothing names": (
        lambda spec, tensors: tensors.update(surplus=torch.ones(1)),
        "nothing names",
    ),
    "a tensor that is not there": (
        put("steps", 1, "fields", "value", value={"tensor": "values.9"}),
        "no tensor 'values.9'",
    ),
    "a tensor by path": (
        put("steps", 1, "fields", "value", value={"tensor": "/etc/passwd"}),
        "no tensor",
    ),
    "a tensor by list": (put("steps", 1, "fields", "value", value={"tensor": []}), "no tensor"),
    "a name of a later version in a dictionary": (
        put("dictionaries", 0, "rotation", value=1),
        "'rotation'.*later saefeat",
    ),
    "a field of another kind of dictionary": (put("dictionaries", 3, "k", value=1), "'k'"),
    "a name of a later version in a selection": (
        put("dictionaries", 0, "selections", 0, "weights", value=[1]),
        "'weights'",
    ),
    "a name of a later version in a form": (put("steps", 0, "on", value="gpu"), "'on'"),
    "a name of a later version in all": (put("order", value="reversed"), "'order'"),
    "a family without end": (
        put("model", value={**MADE_ON, "family": "x" * 10**6}),
        "family, shape, name",
    ),
    "a model's name without end": (
        put("model", value={**MADE_ON, "name": "x" * 10**6}),
        "family, shape, name",
    ),
    "a model without a name": (put("model", value={"family": "gpt2"}), "family, shape, name"),
    "a model that is text": (put("model", value="gpt2"), "model"),
}


@pytest.mark.parametrize("name", SPEC_LIES)
def test_a_document_that_lies(name):
    change, match = SPEC_LIES[name]
    refused(lie(change), match)


PIN = ["steps", 0, "fields", "to", "fields", "readings", "fields"]
VALUE_LIES = {
    "a value of no kind": (put("steps", 1, "fields", "add", "form", value="Readings"), "Readings"),
    "readings as a step": (put("steps", 0, "form", value="Patch"), "a 'Patch'"),
    "readings of other latents": (tensor("values.0", torch.rand(2, 5, 3)), "readings of shapes"),
    "readings without tokens": (tensor("values.0", torch.rand(2, 2)), "readings of shapes"),
    "integers read": (tensor("values.0", torch.ones(2, 5, 2).int()), "readings of shapes"),
    "a mask of numbers": (tensor("values.1", torch.ones(2, 5, 2)), "readings of shapes"),
    "a mask of another shape": (tensor("values.1", torch.ones(2, 4, 2) > 0), "readings of shapes"),
    "starts behind the end": (tensor("values.2", torch.tensor([0, 6])), "readings of shapes"),
    "starts before the start": (tensor("values.2", torch.tensor([0, -1])), "readings of shapes"),
    "starts of other prompts": (tensor("values.2", torch.tensor([0])), "readings of shapes"),
    "counts of another shape": (
        lambda spec, tensors: (
            put(*PIN, "counts", value={"tensor": "values.9"})(spec, tensors),
            tensors.update({"values.9": torch.ones(7, 7)}),
        ),
        "counts as values",
    ),
    "no starts": (put(*PIN, "starts", value=None), "without starts|nothing names"),
    "a schedule of nothing": (tensor("values.3", torch.ones(0)), "Schedule"),
    "a schedule in space": (tensor("values.3", torch.ones(2, 2, 2)), "Schedule"),
    "a schedule of other latents": (tensor("values.3", torch.ones(2, 3)), "Schedule"),
    "a schedule's NaN": (tensor("values.3", torch.ones(2) * torch.nan), "NaN"),
    "a schedule as a bound": (
        lambda spec, _: spec["steps"][1]["fields"].update(
            low=spec["steps"][1]["fields"].pop("add")
        ),
        "Schedule",
    ),
    "a draw of other latents": (tensor("values.5", torch.rand(4, 3)), "Resample"),
    "a seed below zero": (
        put("steps", 2, "fields", "to", "fields", "seed", value=-1),
        "seed",
    ),
    "a scorer": (
        put("steps", 3, "fields", "when", "fields", "subject", value="eval"),
        "text 'eval'",
    ),
    "a match of no kind": (
        put("steps", 3, "fields", "when", "fields", "match", value="x"),
        "match",
    ),
    "a support of no kind": (put("steps", 1, "fields", "support", value="x"), "support"),
    "an ablation to no word": (put("steps", 3, "fields", "to", value="mean"), "mean"),
}


@pytest.mark.parametrize("name", VALUE_LIES)
def test_values_that_lie(name):
    change, match = VALUE_LIES[name]
    data = packed(values(), None)
    document, tensors = container.unpack(data, "test")
    tensors = dict(tensors)
    change(document["spec"], tensors)
    refused(rehashed(document, tensors), match)


@pytest.mark.slow
def test_a_small_file_is_no_long_work():
    """Many steps that name one long selection: a few bytes each, and all of it to be built."""
    big = sf.Neurons("resid_post.0", 2**16).latents(range(2**16))
    document, _ = container.unpack(packed(sf.verbs.base.Chain((sf.Ablate(big),)), None), "test")
    document["spec"]["steps"] *= 2000
    refused(rehashed(document, {}), "at most 4,194,304 in all steps")
    with pytest.raises(sf.errors.FileError, match="4,194,304 in all steps"):
        packed(sf.verbs.base.Chain((sf.Ablate(big),) * 65), None)


def test_the_error_for_another_model_is_short():
    named = {**MADE_ON, "name": "\x1b[2J" * 1000}
    data = lie(put("model", value=named))
    with pytest.raises(sf.errors.ModelError) as caught:
        built(container.unpack(data, "load"), "load", build("gemma2"))
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


def test_nothing_large_is_made():
    """Widths and indices that a file only claims cost nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = sf.Neurons("resid_post.0", 2**31).latents([5, 2**31 - 1])
    loaded = load_bytes(packed(sf.Ablate(wide), None))
    assert repr(loaded) == repr(sf.Ablate(wide))
    for change in (
        edit(ROWS, shape=[2**50]),
        edit(ROWS, data_offsets=[0, 2**50]),
    ):
        refused(header_lie(change), "bytes")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024, "kilobytes"
    with pytest.raises(sf.errors.SiteError, match="wide at"), sf.hooked(build(), loaded):
        pass


# ---------------------------------------------------------------- anything at all


@CALM
@given(st.binary(max_size=400))
def test_any_bytes(data):
    with pytest.raises(sf.errors.FileError):
        load_bytes(data)


@CALM
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8))
def test_any_damage_is_noticed(at, patch):
    """The hash sees what the structure does not; only who wrote the file is free text."""
    data = GOOD[:at] + patch + GOOD[at + len(patch) :]
    try:
        loaded = load_bytes(data)
    except sf.errors.FileError:
        return
    assert repr(loaded) == repr(sample())
    new, old = (container.unpack(d, "x") for d in (data, GOOD))
    assert new.document["sha256"] == old.document["sha256"]
    assert {n: t.tolist() for n, t in new.tensors.items()} == {
        n: t.tolist() for n, t in old.tensors.items()
    }


@CALM
@given(st.integers(0, len(GOOD)))
def test_any_truncation(length):
    if length < len(GOOD):
        with pytest.raises(sf.errors.FileError):
            load_bytes(GOOD[:length])


def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


PLACES = [path for path in places(BASE.document["spec"]) if path]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["Ablate", "Clamp", "When", "topk", "relu", "resid_post.1", "values.0", ROWS]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(["form", "fields", "tensor", "latents", "tokens"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(CALM, max_examples=400)
@given(st.sampled_from(PLACES), JSON)
def test_any_document(path, value):
    """Whatever stands wherever: a FileError, or an intervention that saves to the same spec."""
    data = lie(put(*path, value=value))
    try:
        loaded = load_bytes(data)
    except sf.errors.FileError:
        return
    assert isinstance(loaded, sf.Intervention)
    assert repr(load_bytes(packed(loaded, None))) == repr(loaded)


MOVING = container.unpack(packed(values(), None), "test")
MOVING_PLACES = [path for path in places(MOVING.document["spec"]) if path]


@settings(CALM, max_examples=400)
@given(st.sampled_from(MOVING_PLACES), JSON)
def test_any_document_with_values(path, value):
    document = copy.deepcopy(MOVING.document)
    put(*path, value=value)(document["spec"], {})
    try:
        loaded = load_bytes(rehashed(document, dict(MOVING.tensors)))
    except sf.errors.FileError:
        return
    assert repr(load_bytes(packed(loaded, None))) == repr(loaded)


@settings(CALM, max_examples=100)
@given(st.sampled_from(PLACES))
def test_any_gap(path):
    data = lie(drop(*path))
    try:
        loaded = load_bytes(data)
    except sf.errors.FileError:
        return
    assert repr(load_bytes(packed(loaded, None))) == repr(loaded)
