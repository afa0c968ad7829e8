"""Freeze the library's numbers: run fixed cases, and compare them with ``tools/frozen.json``.

A restructuring must not change what is computed. This runs verbs, attributions, checks, files,
requests and the study on tiny models, and says which numbers differ from those of the committed
file: to the bit, or beyond rounding. It ends with status 1 if any differs beyond rounding.

    python tools/freeze.py                     compare
    python tools/freeze.py --only attribution  only the cases with this in their names
    python tools/freeze.py --write             write the file anew

``freeze_names.py`` holds every name of the library that is used here.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FROZEN = HERE / "frozen.json"
os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled"
)
sys.path.insert(0, str(HERE.parent / "src"))  # the numbers of the tree that this file is in

import numpy  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from freeze_record import Record, compared, is_tensor, read, write  # noqa: E402

Case = Callable[[Record], None]


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write the file anew")
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases by regular expression")
    parser.add_argument("--list", action="store_true", help="print the cases' names, and stop")
    parser.add_argument("--times", action="store_true", help="print each case's seconds")
    return parser.parse_args(argv)


def all_cases() -> dict[str, Case]:
    """Name → case, in the order in which they run."""
    import freeze_runs
    import freeze_scores
    import freeze_study

    return {**freeze_runs.CASES, **freeze_scores.CASES, **freeze_study.CASES}


def seeded() -> None:
    """The same random state before every case: none may depend on another."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def run(cases: dict[str, Case], times: bool) -> tuple[dict[str, Record], dict[str, str]]:
    """What each case found, and what went wrong in those that did not end."""
    found: dict[str, Record] = {}
    failed: dict[str, str] = {}
    for name, case in cases.items():
        seeded()
        begun, record = time.perf_counter(), Record()
        try:
            case(record)
            found[name] = record
        except Exception:  # a case that cannot run is a difference, and the others go on
            failed[name] = traceback.format_exc(limit=-4)
        if times:
            print(f"{time.perf_counter() - begun:7.2f} s  {name}", flush=True)
    return found, failed


def differences(old: Record | None, new: Record) -> list[str]:
    """What of a case differs beyond rounding, one line each."""
    if old is None:
        return ["not in the file; --write puts it there"]
    lines = [f"{name}: no longer recorded" for name in old.values if name not in new.values]
    for name, entry in new.values.items():
        if name not in old.values:
            lines.append(f"{name}: not in the file")
        elif said := compared(old.values[name], entry).differs:
            lines.append(f"{name}: {said}")
    return lines


def bits(old: Record | None, new: Record) -> tuple[int, int]:
    """How many of a case's tensors are equal to the bit, and how many there are."""
    held = {} if old is None else old.values
    tensors = {name: entry for name, entry in new.values.items() if is_tensor(entry)}
    equal = [bool(name in held and compared(held[name], e).bits) for name, e in tensors.items()]
    return sum(equal), len(equal)


def changed_sizes(old: Record | None, new: Record) -> list[str]:
    """What changed of what may change; a request's size varies a little from process to process."""
    held = {} if old is None else old.sizes
    pairs = [(name, held.get(name), value) for name, value in new.sizes.items()]
    return [f"{name}: {was} → {now}" for name, was, now in pairs if not _about_equal(was, now)]


def _about_equal(old: object, new: object) -> bool:
    """Equal; whole numbers to one percent."""
    if isinstance(old, int) and isinstance(new, int):
        return abs(old - new) <= 0.01 * abs(old)
    return old == new


def shown(title: str, tables: dict[str, list[str]], most: int = 12) -> None:
    """Lines under their cases."""
    if not tables:
        return
    print(f"\n{title}")
    for name, lines in tables.items():
        print(f"  {name}")
        for line in lines[:most]:
            print(f"    {line}")
        if len(lines) > most:
            print(f"    ... {len(lines) - most} more")


def about() -> dict[str, str]:
    """What bits may depend on besides this library."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def compare(found: dict[str, Record], failed: dict[str, str], known: set[str]) -> int:
    """Print what differs from the file; the exit status."""
    if not FROZEN.exists():
        print(f"{FROZEN.name} is not there; --write makes it")
        return 1
    made, frozen = read(FROZEN)
    other = {name: f"{made.get(name)} → {now}" for name, now in about().items()}
    other = {name: text for name, text in other.items() if made.get(name) != about()[name]}
    if other:
        print("made elsewhere, so bits may differ:", other)
    far = {name: differences(frozen.get(name), record) for name, record in found.items()}
    far = {name: lines for name, lines in far.items() if lines}
    far |= {name: ["in the file, but no case any more"] for name in frozen if name not in known}
    far |= {name: said.splitlines() for name, said in failed.items()}
    sizes = {name: changed_sizes(frozen.get(name), record) for name, record in found.items()}
    shown(
        "sizes and bytes that changed, which is no failure:", {n: s for n, s in sizes.items() if s}
    )
    pairs = [(name, *bits(frozen.get(name), record)) for name, record in found.items()]
    unequal = {n: [f"{all_ - equal} of {all_} tensors"] for n, equal, all_ in pairs if equal < all_}
    shown("not equal to the bit:", {n: s for n, s in unequal.items() if n not in far})
    shown("DIFFERENT beyond rounding:", far, most=20)
    equal, total = sum(p[1] for p in pairs), sum(p[2] for p in pairs)
    entries = sum(len(record.values) for record in found.values())
    print(
        f"\n{len(found)} cases, {entries} entries; {equal} of {total} tensors equal to the bit; "
        f"{len(far)} cases differ"
    )
    return 1 if far else 0


def rewrite(found: dict[str, Record], failed: dict[str, str], whole: bool) -> int:
    """Write the file, or the cases that ran into it; the exit status."""
    shown("FAILED, so nothing is written:", {n: s.splitlines() for n, s in failed.items()}, 20)
    if failed:
        return 1
    kept = {} if whole or not FROZEN.exists() else read(FROZEN)[1]
    write(FROZEN, about(), {**kept, **found})
    entries = sum(len(record.values) for record in found.values())
    print(f"wrote {len(found)} cases, {entries} entries; {FROZEN.stat().st_size:,} bytes")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and compare or write."""
    options = options_of(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begun, cases = time.perf_counter(), all_cases()
    chosen = {name: case for name, case in cases.items() if re.search(options.only, name)}
    if options.list:
        print("\n".join(chosen))
        return 0
    found, failed = run(chosen, options.times)
    status = (
        rewrite(found, failed, not options.only)
        if options.write
        else compare(found, failed, set(cases))
    )
    print(f"{time.perf_counter() - begun:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
