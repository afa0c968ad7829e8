"""Peak memory of a process, counted from a chosen moment."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path


def peak() -> float:
    """This process's peak resident memory, MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def settled() -> float:
    """Give back what building the inputs left free, forget the peak so far, and say what is held.

    Otherwise what comes next would be served from that, and seem to need less than it does.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak()
