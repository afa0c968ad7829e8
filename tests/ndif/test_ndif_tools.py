"""What brings the released server up and ends it, without the server."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tools.ndif import redis
from tools.ndif.reaper import marked
from tools.ndif.relay import Relay
from tools.ndif.stack import Stack

from helpers import eventually

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("torch", "nnsight", "transformers", "tokenizers", "safetensors", "numpy", "accelerate")
SHARED += ("cloudpickle", "zstandard", "huggingface_hub")


def pins(file: Path) -> dict[str, str]:
    lines = [line.partition("==") for line in file.read_text().splitlines() if "==" in line]
    return {name.lower().replace("-", "_"): version for name, _, version in lines}


def test_both_sides_have_the_same_versions():
    """Of what a request or its result is made of."""
    here, there = pins(ROOT / "constraints.txt"), pins(ROOT / "tools/ndif/requirements.txt")
    shared = {name: here[name] for name in SHARED if name in here}
    assert len(shared) > 6 and {name: there[name] for name in shared} == shared


SLEEPS = "import time; time.sleep(600)"


def test_the_reaper_ends_what_has_the_mark_and_nothing_else(tmp_path):
    """By the environment, or by where it works: some write over their environment."""
    command = [sys.executable, "-c", SLEEPS]
    by_name = subprocess.Popen(command, env={"MARK": str(tmp_path)}, cwd=ROOT)
    by_place = subprocess.Popen(command, cwd=tmp_path)
    other = subprocess.Popen(command, cwd=ROOT)
    reaper = [sys.executable, str(ROOT / "tools/ndif/reaper.py"), str(tmp_path)]
    with subprocess.Popen(reaper, stdin=subprocess.PIPE, cwd=ROOT):
        assert eventually(lambda: len(marked(str(tmp_path))) >= 2)
        assert by_name.poll() is None and by_place.poll() is None
    assert by_name.wait(60) < 0 and by_place.wait(60) < 0
    assert other.poll() is None
    other.kill()
    other.wait()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"whole")

    def log_message(self, *_: object) -> None:
        pass


def test_a_relay_passes_on_and_breaks_off():
    with HTTPServer(("127.0.0.1", 0), Answers) as server, Relay() as relay:
        Thread(target=server.serve_forever, daemon=True).start()
        relay.start(server.server_port)
        with urllib.request.urlopen(relay.url, timeout=60) as answer:
            assert answer.read() == b"whole"
        relay.fault = lambda data: None
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(relay.url, timeout=60)
        server.shutdown()


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(redis.Missing, match=r"Try: make nowhere/\.stamp"):
        Stack(tmp_path, tmp_path / "nowhere")
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(redis.Missing, match="Try: install redis-server"):
        redis.server(tmp_path / "redis")
