"""The released server for the tests marked ``ndif``: started once, in a network of its own."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nnsight import CONFIG

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tools

from served import deployments  # noqa: E402
from table import Table  # noqa: E402
from tools.ndif.space import isolate  # noqa: E402
from tools.ndif.stack import Stack  # noqa: E402

from saefeat.remote import Server  # noqa: E402

VENV = ROOT / ".venv-ndif"
TABLE = pytest.StashKey[Table]()
STACK = pytest.StashKey[Stack]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


@pytest.fixture(scope="session")
def table(pytestconfig) -> Table:
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="session")
def served_models(tmp_path_factory):
    return deployments(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stack(pytestconfig, served_models) -> Iterator[Stack]:
    """The server. Its logs are in the reports of failures, and its folder goes with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown, CONFIG.APP.REMOTE_LOGGING = CONFIG.APP.REMOTE_LOGGING, False
    folder = Path(tempfile.mkdtemp(prefix="ndif-"))  # a short path: Ray's sockets lie in it
    isolate()
    try:
        with Stack(folder, VENV, served_models.values()) as running:
            pytestconfig.stash[STACK] = running
            pytestconfig.stash[TABLE].seconds = running.seconds
            yield running
    finally:
        CONFIG.APP.REMOTE_LOGGING = shown
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server(stack) -> Server:
    return Server(stack.url)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    running = item.config.stash.get(STACK, None)
    if report.failed and running is not None:
        report.sections.append(("the server's logs", running.logs(8)))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    text = config.stash[TABLE].text()
    if text:
        terminalreporter.section("verbs and ways on the released server")
        terminalreporter.write_line(text)
        (ROOT / "ndif-matrix.txt").write_text(text + "\n")
