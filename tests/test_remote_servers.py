"""Servers that are slow, broken or none: an error in time, which says so, and nothing lost."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, build, make_sae, wrapped
from saefeat.remote import Server
from saefeat.remote.polling import STRIKES
from saefeat.shipping.client import Client

METRIC = sf.logit_diff(3, 5)


@pytest.fixture(scope="module")
def model(silent):
    return wrapped(build("llama"))


def named(model):
    return sf.remote.named(wrapped(model._module), "somebody/model")


@contextmanager
def answering(answer):
    """A server on this machine; ``answer(handler)`` handles every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def mute(handler):
    time.sleep(60)


def page(handler):
    send(handler, 200, b"<html>please log in</html>", "text/html")


def other(handler):
    send(handler, 200, b'{"hello": 1}', "application/json")


def send(handler, code: int, data: bytes, kind: str = "application/json"):
    handler.send_response(code)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def edits() -> sf.Ablate:
    return sf.Ablate(make_sae("jumprelu", "resid_post.1").latents([3, 40]))


CALLS = {
    "run": lambda model, on: sf.run(model, RAGGED, edits(), on=on),
    "submit": lambda model, on: sf.remote.submit(model, RAGGED, edits(), on=on),
    "sweep": lambda model, on: sf.sweep(model, RAGGED, {1: edits(), 2: edits()}, on=on),
    "Attribute": lambda model, on: sf.Attribute(make_sae("jumprelu"), METRIC)(model, RAGGED, on=on),
}


FIRST = ("run", "Attribute")  # of the two ways to wait
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in CALLS if name not in FIRST]


@pytest.mark.parametrize("name", [*FIRST, *LATER])
def test_a_server_that_never_answers(name, model):
    with answering(mute) as url:
        begun = time.monotonic()
        with pytest.raises(sf.errors.RemoteError, match="1 s"):
            CALLS[name](named(model), Server(url, timeout=1))
        assert time.monotonic() - begun < 30  # nnsight alone waits ten minutes


@pytest.mark.parametrize("answer", [page, other])
@pytest.mark.parametrize("name", [*FIRST, *LATER])
def test_a_server_that_is_none(name, answer, model):
    with answering(answer) as url, pytest.raises(sf.errors.RemoteError, match=r"Try: "):
        CALLS[name](named(model), Server(url, timeout=20))


@pytest.mark.parametrize(
    "url",
    [*("ftp://x", "http://", "http://:80", "http://x:99999", "x.org", "http://[x", ""), 5],
)
def test_an_address_that_is_none(url):
    with pytest.raises(sf.errors.SaefeatError, match="Server"):
        Server(url)


def test_a_slash_behind_an_address_means_nothing():
    assert Server("http://127.0.0.1:8001/") == Server("http://127.0.0.1:8001")


NO_NAMES = ["a b", "http://x/y", "../x", "a/../b", "a/b/c", "~/x", "", "/" + 9000 * "x", "/a/../b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_none(name):
    with pytest.raises(sf.errors.RemoteError, match="`repository` is"):
        sf.remote.named(wrapped(build("llama")), name)


@pytest.mark.parametrize("name", ["gpt2", "a/b.c-d", "/tmp/my models/x/", "/srv/x"])
def test_a_name_of_a_model_or_a_folder(name):
    named = sf.remote.named(wrapped(build("llama")), name, "refs/pr/1")
    assert name in named.to_model_key()


# ---------------------------------------------------------------- a server that fails for a while


async def awaited(job):
    return await job


def submitted(model, on):
    return sf.remote.submit(model, RAGGED, edits(), on=on)


WAYS = {
    "run": lambda model, on: sf.run(model, RAGGED, edits(), batch_size=1, on=on),
    "await": lambda model, on: asyncio.run(awaited(submitted(model, on))),
    "wait": lambda model, on: submitted(model, on).wait(),
}


@pytest.fixture
def busy(monkeypatch):
    """The numbers of the polls that a proxy answers with 503, as while what is behind it starts."""
    plain, failing, count = Client.poll, set(), itertools.count()

    def poll(self, tracer=None):
        if next(count) in failing:
            request = httpx.Request("GET", f"{self.host}/response/x")
            answer = httpx.Response(503, request=request)
            raise httpx.HTTPStatusError("busy", request=request, response=answer)
        return plain(self, tracer)

    monkeypatch.setattr(Client, "poll", poll)
    return failing


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_busy_for_a_moment_costs_nothing(way, model, server, busy):
    busy |= {0, 1, 3}
    there = WAYS[way](model, Server(server.url))
    assert torch.allclose(sf.run(model, RAGGED, edits()).logits, there.logits, atol=1e-4)


def test_a_server_that_stays_away_is_given_up(model, server, busy, monkeypatch):
    busy |= set(range(STRIKES + 5))
    monkeypatch.setattr("saefeat.remote.jobs.pauses", lambda deadline: itertools.repeat(0.0))
    with pytest.raises(sf.errors.RemoteError, match="not answered"):
        sf.run(model, RAGGED, on=Server(server.url))
    assert min(busy - set(range(STRIKES))) == STRIKES


# ---------------------------------------------------------------- which server it was


def test_another_host_is_another_job(model, server, tmp_path, monkeypatch):
    """Without a url it is the host that nnsight is set to, whichever that is now."""
    options = {"on": Server(), "batch_size": 2, "checkpoint": tmp_path}
    attribute = sf.Attribute(make_sae("jumprelu"), METRIC)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
    attribute(model, RAGGED, **options)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(sf.errors.CheckpointError, match="another job"):
        attribute(model, RAGGED, **options)


def test_a_result_names_the_server_that_gave_it(model, server, tmp_path):
    file = tmp_path / "job.json"
    sf.remote.submit(model, RAGGED, on=Server(server.url), file=file).wait()
    later = sf.remote.Job.load(file, model, on=Server("http://127.0.0.1:9")).wait()
    assert later.provenance.server["url"] == server.url
