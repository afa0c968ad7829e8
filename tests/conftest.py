"""What test files share: one thread for tiny models, and a server to send jobs to."""

import pytest
import torch
from nnsight import CONFIG

import loopback
from helpers import MISSING, SKIPS


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny models' matrices are too small to be worth sharing."""
    before = torch.get_num_threads()
    if vars(request.module).keys() & {"build", "judge"}:  # of helpers, of differential
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# For the files that send jobs to a server, each of which has a ``model`` of its own.

if SKIPS:
    loopback.serve = lambda *_, **__: pytest.skip(MISSING)


@pytest.fixture(scope="module")
def silent():
    """Without the status lines that nnsight prints for every job."""
    before, CONFIG.APP.REMOTE_LOGGING = CONFIG.APP.REMOTE_LOGGING, False
    yield
    CONFIG.APP.REMOTE_LOGGING = before


@pytest.fixture(scope="module")
def server(model):
    with loopback.serve(model) as server:
        yield server


@pytest.fixture
def faulty(server):
    yield server.faults
    server.faults.clear()
