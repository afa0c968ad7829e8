"""Ends a stack's processes when its standard input is closed: by the stack, or by its death.

    python -m tools.ndif.reaper MARK

The mark is the stack's own folder. Every process of a stack has it in its environment, or works
in it: Ray's daemons and the sandbox's runners inherit both, and those that write a title of their
own over their environment, redis and Ray's agents, keep the second. Being a process of its own,
which no Ctrl-C reaches, the reaper does its work after a SIGKILL of the tests as well.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def marked(mark: str) -> list[int]:
    """The processes with the mark in their environment or working in it, except the caller."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                inside = mark.encode() in file.read()
            inside = inside or (os.readlink(f"/proc/{name}/cwd") + "/").startswith(mark + "/")
            if inside and int(name) != os.getpid() and not ended(name):
                found.append(int(name))
        except OSError:  # gone, or somebody else's
            continue
    return found


def ended(name: str) -> bool:
    """Whether a process is one that nobody has waited for yet."""
    with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def end(mark: str, patience: float = 8.0) -> None:
    """Ask the marked processes to end, and kill those that have not after so many seconds."""
    deadline, number = time.monotonic() + patience, signal.SIGTERM
    while left := marked(mark):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(0.5)
        if time.monotonic() > deadline:
            number = signal.SIGKILL


def main() -> None:
    """Wait for the end of standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end(sys.argv[1])


if __name__ == "__main__":
    main()
