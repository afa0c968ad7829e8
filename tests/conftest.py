"""One thread for tests on tiny models: their matrices are too small to be worth sharing."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request):
    before = torch.get_num_threads()
    if hasattr(request.module, "build"):  # tests.helpers.build: a tiny model
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
