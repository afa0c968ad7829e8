"""What ``import saefeat`` costs over ``import nnsight``: python benchmarks/imports.py [rounds]."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    found: dict[str, list[float]] = {"nnsight": [], "saefeat": []}
    for _ in range(rounds):
        for module, times in found.items():
            times.append(seconds(module))
    medians = {module: statistics.median(times) for module, times in found.items()}
    ratio = medians["saefeat"] / medians["nnsight"]
    print(f"import nnsight {medians['nnsight']:.2f} s, import saefeat {ratio:.2f} x")


if __name__ == "__main__":
    main()
