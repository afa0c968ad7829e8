"""The command line: ``python -m saefeat.studies.refusal`` or ``examples/refusal/reproduce.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import saefeat as sf

from .answers import FILE
from .constants import settled
from .errors import DataError, UsageError
from .experiments import study
from .lab import FILTERS, Lab
from .openings import HELP
from .report import report
from .setup import TINY, loading_silently, one_thread, real_lab, tiny_lab
from .stages import write_atomically


def parser() -> argparse.ArgumentParser:
    """All options; without any, the study runs on the embedded tiny model."""
    made = argparse.ArgumentParser(
        prog="python -m saefeat.studies.refusal",
        description="Find the few SAE latents that carry refusal, and check what they do. Without "
        "--model the embedded tiny model is used and nothing is downloaded.",
    )
    add = made.add_argument
    add("--output", type=Path, default=Path("demo-output"), help="folder for the results")
    add("--quiet", action="store_true", help="no progress bars; tables are still printed")
    add("--seed", type=int, default=0, help="samples of prompts, and bootstrap")
    add("--limit", type=_positive, help="at most so many prompts a split, behind the filter")
    add("--max-new-tokens", type=_positive, help="length of an answer")
    add("--batch-size", type=_positive, help="prompts a batch")
    add(
        "--filter",
        choices=FILTERS,
        help="how refused and answered fitting prompts are told apart: by the judge on a short "
        "greedy answer (answer, the default), or by the first token alone, as published",
    )
    add("--minimum", type=_positive, help="stop if the filter keeps fewer prompts of a split (8)")
    _constants(made)
    real = made.add_argument_group("real models").add_argument
    real("--model", help="a Hugging Face chat model, e.g. google/gemma-2-2b-it")
    real("--saes", help="a sae-lens release, or a folder of sae-lens native folders")
    real("--sae-ids", nargs="+", metavar="ID", help="the SAEs of a release to load, one a layer")
    real("--data", type=Path, help="folder of {harmful,harmless}_{train,val,test}.json")
    real("--device", help="where the model runs, e.g. cuda (default: cpu)")
    real("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16")
    real("--refusal-tokens", nargs="+", metavar="TEXT", help=f"{HELP} (default: I)")
    real("--answer-tokens", nargs="+", metavar="TEXT", help="the same of answers (default: Here)")
    return made


def _constants(made: argparse.ArgumentParser) -> None:
    """Options for the numbers that depend on the model."""
    add = made.add_argument_group(
        "constants",
        "The paper's for its two models; another model gets those of gemma-2-2b-it, and the study "
        "says so. Of several candidates, budgets or scales the val split chooses.",
    ).add_argument
    add("--candidates", nargs="+", type=_positive, metavar="K0", help="latents a layer by cosine")
    add("--budgets", nargs="+", type=_positive, metavar="K", help="K*, latents in a set")
    add("--scales", nargs="+", type=float, metavar="C", help="c in f <- c*f, which suppresses")
    add("--values", nargs="+", type=float, metavar="V", help="v in f <- v, which induces refusal")
    add("--steps", type=_positive, help="nodes of the integrated gradients")
    add("--layer", type=_count, help="the layer of V*; without, the val split chooses")
    add(
        "--skip",
        dest="skipped",
        type=_count,
        help="positions at the start of a prompt that are not read, scored or edited: 1 for "
        "gemma-2-2b-it, 26 for Llama-3.1-8B-Instruct, whose template opens with a system block",
    )


_REAL = ("saes", "sae_ids", "data", "device", "dtype", "refusal_tokens", "answer_tokens")
"""What the embedded model has of its own."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted at least 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; wanted at least 0")
    return number


def build(options: argparse.Namespace) -> Lab:
    """The lab the options describe.

    Raises:
        UsageError, DataError, SaefeatError: for options that cannot be met.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {options.output} cannot be made: {error}") from error
    if options.model is not None:
        return real_lab(options.output, options, say)
    given = [f"--{n.replace('_', '-')}" for n in _REAL if vars(options)[n]]
    if given:
        raise UsageError(f"{', '.join(given)} without --model; wanted --model, --saes and --data")
    return tiny_lab(options.output, settled(options, TINY), say, options.quiet)


def say(text: str) -> None:
    """A line, or a table, on standard output at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        0 when done, 2 for options or data that cannot be used, 130 when interrupted.
    """
    options = parser().parse_args(argv)
    stages = options.output / "stages"
    try:
        with one_thread() if options.model is None else nullcontext():
            with loading_silently(options.quiet):
                lab = build(options)
            say(f"finished work is kept in {stages}; an interrupted run goes on from there\n")
            results = study(lab, say)
    except (UsageError, DataError, sf.SaefeatError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted; finished tables are in {options.output / 'tables.txt'}, "
            "run again to go on\n"
        )
        return 130
    write_atomically(options.output / "results.json", json.dumps(results, indent=1))
    write_atomically(options.output / "report.html", report(results))
    made, reused = len(lab.stages.made), len(lab.stages.reused)
    seconds = results["timing"]["seconds in this run"]["total"]
    say(f"{made} stages computed, {reused} reused; {seconds:.0f} s")
    say(f"report: {options.output / 'report.html'}   data: {options.output / 'results.json'}")
    say(f"every answer, whole: {options.output / FILE}")
    return 0
