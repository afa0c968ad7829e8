"""Run by test_mutants.py: the package broken by hand in one place, and tests that must notice.

A mutant is a piece of source text and what stands there instead. The text is looked for in the
whole package and must occur once, so that the list stays in step with the code wherever a function
moves. The libraries are imported once; every mutant runs in a child of that process.

    python mutate.py FOLDER < mutants.json > results.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import beartype  # noqa: F401  (before nnsight)
import nnsight  # noqa: F401  (imported once, for all)
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "saefeat"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short"]
NO_STUDIES = shutil.ignore_patterns("studies", "__pycache__")


def broken(folder: Path, old: str, new: str) -> str | None:
    """Write the mutated package into the folder; say what is wrong with the mutant, if anything."""
    shutil.copytree(PACKAGE, folder / "saefeat", ignore=NO_STUDIES)
    if not old:
        return None
    files = sorted((folder / "saefeat").rglob("*.py"))
    places = [path for path in files for _ in range(path.read_text().count(old))]
    if len(places) != 1:
        return f"{old!r} is found {len(places)} times in the package: renew the mutant"
    places[0].write_text(places[0].read_text().replace(old, new))
    return None


def verdict(folder: Path, tests: list[str]) -> int:
    """pytest's exit code over the copy, in a child process: 0 passed, 1 failed, others are bad."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(ROOT)
    sys.path[:0] = [str(folder), str(ROOT / "tests")]
    code = 70  # pytest has none of this number
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # anyio's will not load after nnsight
    redirect = contextlib.ExitStack()
    with open(folder / "log.txt", "w") as log, redirect:
        redirect.enter_context(contextlib.redirect_stdout(log))
        redirect.enter_context(contextlib.redirect_stderr(log))
        try:
            import saefeat

            assert Path(saefeat.__file__).is_relative_to(folder), saefeat.__file__
            code = int(pytest.main([*tests, *OPTIONS]))
        except BaseException:
            traceback.print_exc(file=log)
    os._exit(code)


def main() -> None:
    results = {}
    for name, (old, new, tests) in json.load(sys.stdin).items():
        folder = Path(sys.argv[1]) / name.replace(" ", "-")
        folder.mkdir()
        wrong = broken(folder, old, new)
        code = None if wrong else verdict(folder, tests)
        log = folder / "log.txt"
        results[name] = {"wrong": wrong, "code": code, "log": log.read_text() if code else ""}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
