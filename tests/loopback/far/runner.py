"""How a runner starts: the released one, without our packages, ending with the deployment.

It is run as a file, with the process id of the deployment and whether there shall be a skeleton of
the model before NDIF's own arguments. NDIF's runners look after their parent too; these take
their socket along.
"""

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from start import Blocker


def ends_with(parent: int) -> None:
    """End when the deployment has gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def without_socket(end: Callable[[int], NoReturn], socket: str, code: int) -> NoReturn:
    """How this process ends, by its own watch or by NDIF's: with its socket."""
    with suppress(FileNotFoundError):
        os.unlink(socket)
    end(code)


def build_skeletons() -> None:
    """Let nnsight build a model without weights from its files, as NDIF's runners want to.

    nnsight 0.8.1 asks the class of a pipeline whether it needs a tokenizer, and transformers 5.23
    gives that class's name in its place. A runner then has no modules at all, and goes on.
    """
    from nnsight import TransformersModel

    TransformersModel._loaded_preprocessors = lambda _: {"tokenizer"}


if __name__ == "__main__":
    parent, skeleton, _, module, socket = sys.argv[1:6]
    os._exit = partial(without_socket, os._exit, socket)
    threading.Thread(target=ends_with, args=(int(parent),), daemon=True).start()
    sys.path.pop()
    sys.meta_path.insert(0, Blocker())
    os.environ["HF_HUB_OFFLINE"] = "1"  # the deployment has read the files before
    sys.argv[1:] = sys.argv[5:]
    if skeleton == "skeleton":
        build_skeletons()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
