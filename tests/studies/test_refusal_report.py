"""The report: one file that asks no network for anything, and trusts no text."""

import re

import pytest

from saefeat.studies.refusal import plots, report
from saefeat.studies.refusal.stats import wilson

NASTY = "<script>alert('x')</script> & \"quoted\" https://example.org"


def row(method, value=None, complied=3):
    rate = wilson(complied, 6)._asdict()
    return {
        "method": method,
        "value": value,
        "layer": 0,
        "n": 6,
        "refused": 2,
        "complied": complied,
        "broken": 1,
        "jailbreak": rate,
        "refusal": rate,
        "examples": [{"request": NASTY, "outcome": "complied", "answer": f"{method} {NASTY}"}],
    }


@pytest.fixture
def results():
    table = {"title": NASTY, "caption": NASTY, "columns": ["a"], "rows": [[NASTY]]}
    population = {"n": 6, "rows": [row("base"), row("AS"), row("CosSim+AP")]}
    return {
        "title": NASTY,
        "tables": {name: [table] for name in ("layers", "suppression", "induction")},
        "data": {
            "layers": {"rows": [row("x")], "best": 0},
            "suppression": {"held-out": population},
            "induction": {
                "values": [1.0, 2.0],
                "reference": [row("base"), row("AS")],
                "rows": [row("CosSim", 1.0), row("CosSim", 2.0), row("AP", 1.0), row("AP", 2.0)],
            },
        },
        "notes": [NASTY],
        "warnings": [f"not calibrated {NASTY}"],
        "answers": "answers.jsonl",
        **{key: {"k": NASTY} for key in report.ORIGIN},
    }


def check_page(page):
    """What every report must hold, here and in the end-to-end test."""
    loaded = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]*)", page)
    assert all(target.startswith("data:") for target in loaded)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert page.startswith("<!doctype html>")


def test_everything_is_escaped_and_inline(results):
    page = report.report(results)
    check_page(page)
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
    assert "<td class='complied'>base &lt;script" in page
    assert "Read this first" in page and "not calibrated &lt;script" in page
    assert "whole, with its request, category and outcome: answers.jsonl" in page


def test_without_matplotlib_there_is_a_note_instead(results, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    page = report.report(results)
    check_page(page)
    assert "matplotlib is not installed" in page
    assert "data:image" not in page


def test_plots_are_png(results):
    for drawn in (
        plots.layer_plot(results["data"]["layers"]),
        plots.outcome_plot(results["data"]["suppression"]["held-out"]),
        plots.induction_plot(results["data"]["induction"]),
    ):
        assert drawn.startswith(b"\x89PNG")
