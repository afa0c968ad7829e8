"""How an isolated process begins: as which package, without which packages, and until when."""

from __future__ import annotations

import os
import select
import sys
import threading
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

NOT_THERE = ("saefeat", "sae_lens", "transformer_lens", "jaxtyping", "beartype")
"""Packages that the server's processes cannot import, whether installed or not."""

_FIRST_LINES = """
import importlib, importlib.util, sys
folder, module = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "loopback_far", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["loopback_far"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
importlib.import_module("loopback_far." + module).main()
"""


def command(module: str) -> list[str]:
    """The command line of a new interpreter that runs one of these modules.

    Isolated: no PYTHONPATH, no user's site-packages, no current folder on the path.
    """
    return [sys.executable, "-I", "-c", _FIRST_LINES, str(Path(__file__).parent), module]


class Blocker(MetaPathFinder):
    """Makes the packages of ``NOT_THERE`` look as if they were not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        root = fullname.partition(".")[0]
        if root in NOT_THERE:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)


def replies() -> int:
    """A descriptor for answers; what anything prints from now on goes to the standard error."""
    sink = os.dup(1)
    os.dup2(2, 1)
    return sink


def end_with(descriptor: int) -> None:
    """End this process when the other end of a pipe is gone, whatever it is doing then.

    A block may loop for ever, and who waited for it may have been killed.
    """
    if not hasattr(select, "poll"):  # Windows
        return
    watch = select.poll()
    watch.register(descriptor, 0)  # 0: a hang-up is told without being asked for

    def wait() -> None:
        watch.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
