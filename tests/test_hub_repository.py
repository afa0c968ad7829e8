"""push and pull against a small hub on this machine, over HTTP; and steering vectors."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, unit, wrapped
from saefeat.hub.repository import FILE
from saefeat.hub.vectors import steering_vector

TOKEN = "hf_" + "a" * 20


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes commits, serves files; only with the right token."""

    store: dict[str, dict[str, dict[str, bytes]]]
    asked: list[str]

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fails(self, status, code):
        self.reply(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message="no")

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def trusted(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self):
        body = self.body()
        self.asked.append(self.path)
        if not self.trusted():
            return self.fails(401, "")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
            hidden = asked.get("private", asked.get("visibility") == "private")
            self.store.setdefault(name or asked["name"], {"private": hidden})
            return self.reply(
                200, json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode()
            )
        if "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.reply(200, json.dumps({"files": modes}).encode())
        if self.path == "/api/validate-yaml":
            assert "saefeat" in json.loads(body)["content"]
            return self.reply(200, b'{"errors": [], "warnings": []}')
        repo = re.match(r"/api/models/(.*)/commit/main", self.path)[1]
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        commit = hashlib.sha1(body).hexdigest()
        made = {f["path"]: base64.b64decode(f["content"]) for f in files}
        self.store[repo] |= {commit: made, "main": made, "head": commit}
        url = f"http://{self.headers['Host']}/{repo}/commit/{commit}"
        return self.reply(200, json.dumps({"commitUrl": url, "commitOid": commit}).encode())

    def do_GET(self):
        self.asked.append(self.path)
        found = re.match(r"/(.*)/resolve/([^/]*)/(.*)", self.path)
        repo = self.store.get(found[1]) if found else None
        if repo is None or not self.trusted():
            return self.fails(401, "RepoNotFound")
        if found[2] not in repo:
            return self.fails(404, "RevisionNotFound")
        if found[3] not in repo[found[2]]:
            return self.fails(404, "EntryNotFound")
        data = repo[found[2]][found[3]]
        commit = repo["head"] if found[2] == "main" else found[2]
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.reply(200, data, ETag=tag, X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    handler = type("OneHub", (Hub,), {"store": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def edits() -> sf.Intervention:
    return sf.Ablate(make_sae().latents([3, 40])) | sf.Clamp(
        sf.Direction(unit(1), site="resid_post.0", name="a|b`c\n# d"), add=2.0
    )


def test_push_and_pull(hub, tmp_path):
    model = build("gemma2")
    model.config.name_or_path = "someone/tiny-gemma"
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    commit = sf.hub.push(edits(), "me/refusal", model=model, **options)
    assert hub.store["me/refusal"]["private"] is True
    local = sf.save(edits(), tmp_path / "x.safetensors", model=model).read_bytes()
    assert hub.store["me/refusal"]["main"][FILE] == local
    pulled = sf.hub.pull("me/refusal", model=model, **options)
    assert repr(pulled) == repr(edits())
    nn = wrapped(model)
    assert torch.equal(sf.run(nn, RAGGED, pulled).logits, sf.run(nn, RAGGED, edits()).logits)

    sf.hub.push(sf.Ablate(make_sae().latents([5])), "me/refusal", **options)
    assert repr(sf.hub.pull("me/refusal", revision=commit, **options)) == repr(edits())
    assert "[5]" in repr(sf.hub.pull("me/refusal", **options))
    with pytest.raises(sf.errors.ModelError, match="of family"):
        sf.hub.pull("me/refusal", revision=commit, model=build("llama"), **options)


def test_the_card_says_what_the_file_says(hub):
    model = build("gemma2")
    model.config.name_or_path = "someone/tiny-gemma"
    options = {"token": TOKEN, "endpoint": hub.endpoint, "file": "sub/other.safetensors"}
    sf.hub.push(edits(), "me/refusal", model=model, **options)
    card = hub.store["me/refusal"]["main"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saefeat\n")
    assert "base_model: someone/tiny-gemma\n---" in card
    assert "Ablate(Latents(2: resid_post.1 [3, 40]))\n    | Clamp" in card
    assert "`someone/tiny-gemma`: family gemma2, 3 layers, d_model 32, vocabulary 100" in card
    assert f"2 of 48 |  | `{make_sae().fingerprint()}`" in card
    assert "sf.hub.pull('me/refusal', file='sub/other.safetensors')" in card
    assert "`a¦b'c # d`" in card, "a name cannot break out of its cell"
    assert "{" not in card
    assert repr(sf.hub.pull("me/refusal", **options)) == repr(edits())


def test_a_card_without_a_model(hub):
    sf.hub.push(edits(), "me/refusal", token=TOKEN, endpoint=hub.endpoint, private=False)
    card = hub.store["me/refusal"]["main"]["README.md"].decode()
    assert "base_model" not in card
    assert "The file does not say" in card
    assert hub.store["me/refusal"]["private"] is False


def test_errors_of_the_hub(hub, monkeypatch):
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    sf.hub.push(edits(), "me/refusal", **options)
    for message, call in {
        r"pull: .*'me/nothing'.*no such repository": lambda: sf.hub.pull("me/nothing", **options),
        r"no such branch": lambda: sf.hub.pull("me/refusal", revision="v9", **options),
        r"has no such file": lambda: sf.hub.pull("me/refusal", file="x.safetensors", **options),
        r"no such repository, or a private one": lambda: sf.hub.pull(
            "me/refusal", endpoint=hub.endpoint
        ),
        r"push: .*no token": lambda: sf.hub.push(edits(), "me/x", endpoint=hub.endpoint),
        r"one that may not write": lambda: sf.hub.push(
            edits(), "me/x", token="hf_wrong", endpoint=hub.endpoint
        ),
        r"not the name of a repository": lambda: sf.hub.push(edits(), "a/b/c", **options),
        r"ends in \.safetensors": lambda: sf.hub.pull("me/refusal", file="../../x.bin", **options),
        r"a path in the repository": lambda: sf.hub.push(
            edits(), "me/x", file="../x.safetensors", **options
        ),
        r"at most 100 bytes": lambda: sf.hub.pull("me/refusal", max_bytes=100, **options),
        r"`intervention` is of 648 bytes": lambda: sf.hub.push(
            edits(), "me/x", max_bytes=100, **options
        ),
    }.items():
        with pytest.raises(sf.errors.FileError, match=message):
            call()
    assert "me/x" not in hub.store, "nothing is made for what is refused"


def test_a_large_file_is_not_fetched(hub, tmp_path):
    """It would fill the disk before anybody could measure it."""
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    sf.hub.push(edits(), "me/refusal", **options)
    hub.store["me/refusal"]["main"][FILE] = b"x" * 10**6
    hub.asked.clear()
    with pytest.raises(sf.errors.FileError, match=r"of 1,000,000 bytes, wanted at most 500,000"):
        sf.hub.pull("me/refusal", max_bytes=500_000, **options)
    assert len(hub.asked) == 1
    assert not any(path.stat().st_size > 10**5 for path in tmp_path.rglob("*") if path.is_file())


def test_a_file_s_name_stays_in_the_repository(hub):
    for name in (
        "..\\x.safetensors",
        "a\\..\\..\\x.safetensors",
        "/x.safetensors",
        "a/./x.safetensors",
    ):
        with pytest.raises(sf.errors.FileError, match="a path in the repository"):
            sf.hub.pull("me/refusal", file=name, token=TOKEN, endpoint=hub.endpoint)


def test_a_hub_out_of_reach(hub, monkeypatch):
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    sf.hub.push(edits(), "me/refusal", **options)
    sf.hub.pull("me/refusal", **options)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits and tries again
    nowhere = {"token": TOKEN, "endpoint": "http://127.0.0.1:9"}
    assert repr(sf.hub.pull("me/refusal", **nowhere)) == repr(edits()), "it is in the cache"
    with pytest.raises(
        sf.errors.FileError, match=r"out of reach, and the file is not in the cache"
    ):
        sf.hub.pull("me/other", **nowhere)
    with pytest.raises(sf.errors.FileError, match="out of reach"):
        sf.hub.push(edits(), "me/refusal", **nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(sf.errors.FileError, match=r"HF_HUB_OFFLINE|out of reach"):
        sf.hub.push(edits(), "me/refusal", **options)


def test_a_hostile_file_on_the_hub(hub):
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    sf.hub.push(edits(), "me/refusal", **options)
    files = hub.store["me/refusal"]["main"]
    files[FILE] = files[FILE][:-1] + b"\x7f"
    hub.store["me/refusal"]["head"] = "f" * 40
    with pytest.raises(sf.errors.FileError, match=r"pull\('me/refusal'\).*hash"):
        sf.hub.pull("me/refusal", **options)


# ---------------------------------------------------------------- steering vectors


def adds() -> sf.Intervention:
    return (
        sf.Clamp(sf.Direction(unit(1), site="resid_post.2"), add=3.0)
        | sf.Clamp(make_sae("topk").latents([7, 3]), add=torch.tensor([0.5, -2.0]))
        | sf.Clamp(make_sae("gated").latents([9]), add=1.5, where=sf.Tokens.all())
        | sf.Clamp(make_sae("transcoder").latents([4]), add=0.7)
    )


def test_a_steering_vector_is_the_intervention():
    """Added by plain hooks to what the modules give, it moves the logits as the edits do."""
    model, nn = build("llama"), wrapped(build("llama"))
    vectors = steering_vector(adds())
    assert [str(site) for site in vectors] == ["mlp_out.1", "resid_post.1", "resid_post.2"]
    edited = sf.run(nn, RAGGED, adds()).logits
    blocks = model.model.layers
    places = {"mlp_out.1": blocks[1].mlp, "resid_post.1": blocks[1], "resid_post.2": blocks[2]}
    for site, vector in vectors.items():
        assert vector.dtype == torch.float32
        places[str(site)].register_forward_hook(lambda _, __, out, v=vector: out + v)
    steered = sf.run(wrapped(model), RAGGED).logits
    torch.testing.assert_close(steered, edited, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, sf.run(nn, RAGGED).logits, atol=1e-2)


def test_a_steering_vector_as_a_file(tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "steer.safetensors"
    vectors = sf.hub.steering_vector(adds(), path=path)
    found = load_file(path)
    assert {n: t.tolist() for n, t in found.items()} == {
        site.hook: vector.tolist() for site, vector in vectors.items()
    }
    with pytest.raises(sf.errors.FileError, match=r"\.safetensors"):
        sf.hub.steering_vector(adds(), path=tmp_path / "steer.pt")


V = sf.Direction(unit(1), site="resid_post.1")


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: sf.Ablate(V), "another verb"),
        (lambda: sf.Clamp(V, 2.0), "with value="),
        (lambda: sf.Clamp(V, scale=2.0), "with scale="),
        (lambda: sf.Clamp(V, low=2.0), "with low="),
        (lambda: sf.Clamp(V, add=2.0, high=3.0), "with high="),
        (lambda: sf.Clamp(V, add=2.0, active_only=True), "active_only="),
        (lambda: sf.Clamp(V, add=2.0, when=sf.When(V)), "with when="),
        (lambda: sf.Clamp(V, add=2.0, where=sf.Tokens.last(1)), r"where=Tokens\.last\(1\)"),
        (lambda: sf.Clamp(V, add=torch.ones(3, 1)), "differ by prompt"),
        (lambda: sf.Clamp(V, add=2.0) | sf.Probe(V), "another verb"),
        (lambda: sf.verbs.base.Chain(()), "no edit at all"),
        (lambda: sf.Clamp(make_sae(norm="layer_norm").latents([1]), add=1.0), "scale with"),
        (lambda: sf.Clamp(make_sae().error(), add=1.0), "scale with"),
        (lambda: sf.Clamp(make_sae(excluded=(2,)).latents([1]), add=1.0), "skips tokens"),
    ],
)
def test_what_is_no_steering_vector_is_refused(make, why):
    with pytest.raises(sf.errors.LatentError, match=why):
        sf.hub.steering_vector(make())


def test_a_loaded_intervention_is_a_steering_vector_too(tmp_path):
    loaded = sf.load(sf.save(adds(), tmp_path / "x.safetensors"))
    for a, b in zip(
        sf.hub.steering_vector(loaded).values(),
        sf.hub.steering_vector(adds()).values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert len(a) == D
