"""The command line: ``python -m saefeat.studies.refusal`` or ``examples/refusal/reproduce.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import saefeat as sf

from .data import DataError
from .experiments import study
from .lab import Lab, Settings
from .report import report
from .setup import TINY, UsageError, loading_silently, one_thread, real_lab, tiny_lab
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
    add("--limit", type=_positive, help="at most so many prompts a split")
    add("--max-new-tokens", type=_positive, help="length of an answer")
    add("--batch-size", type=_positive, help="prompts a batch")
    real = made.add_argument_group("real models").add_argument
    real("--model", help="a Hugging Face chat model, e.g. google/gemma-2-2b-it")
    real("--saes", help="a sae-lens release, or a folder of sae-lens native folders")
    real("--sae-ids", nargs="+", metavar="ID", help="the SAEs of a release to load, one a layer")
    real("--data", type=Path, help="folder of {harmful,harmless}_{train,val,test}.json")
    real("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    real("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    real("--refusal-tokens", nargs="+", default=["I"], help="first tokens of a refusal")
    real("--answer-tokens", nargs="+", default=["Here"], help="first tokens of an answer")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted at least 1")
    return number


def settings_of(options: argparse.Namespace) -> Settings:
    """The study's numbers: the paper's for a real model, scaled ones for the tiny model."""
    base = TINY if options.model is None else Settings()
    return replace(
        base,
        seed=options.seed,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens or base.max_new_tokens,
        batch_size=options.batch_size or base.batch_size,
    )


def build(options: argparse.Namespace) -> Lab:
    """The lab the options describe.

    Raises:
        UsageError, DataError, SaefeatError: for options that cannot be met.
    """
    settings = settings_of(options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {options.output} cannot be made: {error}") from error
    if options.model is not None:
        return real_lab(options.output, options, settings, say)
    given = [f"--{n.replace('_', '-')}" for n in ("saes", "sae_ids", "data") if vars(options)[n]]
    if given:
        raise UsageError(f"{', '.join(given)} without --model; wanted --model, --saes and --data")
    return tiny_lab(options.output, settings, say, options.quiet)


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
    return 0
