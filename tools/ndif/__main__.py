"""The released NDIF server, up until Ctrl-C, with a model deployed in both isolations.

    python -m tools.ndif                               # the embedded tiny chat model, float32
    python -m tools.ndif --model FOLDER --dtype bfloat16

``make ndif-up`` makes the server's environment first. The API listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from .deployments import Deployment
from .redis import Missing
from .relay import Relay
from .space import isolate
from .stack import Failed, Stack

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "src" / "saefeat" / "studies" / "refusal" / "tiny" / "data" / "chat"


def options() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.ndif", None, __doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, default=TINY, help="a model's folder")
    parser.add_argument("--dtype", default="float32", help="of the weights on the server")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ndif", help="the server's")
    return parser.parse_args()


def serve(asked: argparse.Namespace, folder: Path) -> None:
    """Bring the stack up, tell how to reach it, and wait."""
    deployments = []
    for isolation in ("trusted", "sandbox"):
        model = folder / "models" / isolation
        shutil.copytree(asked.model, model)
        deployments.append(Deployment(model, asked.dtype, isolation))
    stack = Stack(folder / "s", asked.venv.absolute(), deployments)
    doors = [Relay(port) for port in stack.published]  # opened here, before we leave for elsewhere
    if isolate():
        for door in doors:
            door.start(door.port)
    else:
        for door in doors:
            door.close()
        say("no network namespace here (not root?): Ray listens on this machine's own address")
    with stack:
        say(f"up after {sum(stack.seconds.values()):.0f} s: {stack.url}")
        for one in deployments:
            say(f"{one.isolation:>8} {one.dtype}: {one.folder}")
        say(f"python examples/remote.py --remote {stack.url} --model {deployments[0].folder}")
        signal.pause()


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"ndif: {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until Ctrl-C, or a termination."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ndif-", ignore_cleanup_errors=True) as folder:
        try:
            serve(options(), Path(folder))
        except KeyboardInterrupt:
            say("down")
        except (Missing, Failed) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
