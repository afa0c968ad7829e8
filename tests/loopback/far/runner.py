"""How a runner starts: the released one, without our packages, ending with the deployment.

It is run as a file, with the process id of the deployment and whether there shall be a skeleton of
the model before NDIF's own arguments. NDIF's runners look after their parent too; this one takes
its socket along.
"""

import os
import runpy
import sys
import threading
import time
from contextlib import suppress

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from start import Blocker


def ends_with(parent: int, socket: str) -> None:
    """End, and leave no socket behind, when the deployment has gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    with suppress(FileNotFoundError):
        os.unlink(socket)
    os._exit(1)


def build_skeletons() -> None:
    """Let nnsight build a model without weights from its files, as NDIF's runners want to.

    nnsight 0.8.1 asks the class of a pipeline whether it needs a tokenizer, and transformers 5.23
    gives that class's name in its place. A runner then has no modules at all, and goes on.
    """
    from nnsight import TransformersModel

    TransformersModel._loaded_preprocessors = lambda _: {"tokenizer"}


if __name__ == "__main__":
    parent, skeleton, _, module, socket = sys.argv[1:6]
    threading.Thread(target=ends_with, args=(int(parent), socket), daemon=True).start()
    sys.path.pop()
    sys.meta_path.insert(0, Blocker())
    os.environ["HF_HUB_OFFLINE"] = "1"  # the deployment has read the files before
    sys.argv[1:] = sys.argv[5:]
    if skeleton == "skeleton":
        build_skeletons()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
