"""Runs the documentation: README.md, docs/**/*.md and the examples in docstrings.

In a Markdown file every ```python block runs, in order, in one namespace per file and in a
temporary working directory. Two comments change that:

* ``<!-- no-run: reason -->`` before a block: it is compiled, and its ``sf.`` names are checked,
  but it does not run. The reason must not be empty.
* ``<!-- output -->`` before a ```text block that follows a ```python block: what that block
  printed must be the text, by the rules of tests/outputs.py: floats to a rounding, the rest equal,
  ``...`` for anything.

In docstrings, ``>>>`` examples run with ``sf``, ``torch`` and ``nnsight`` in scope, their outputs
are compared by the same rules, and ```python blocks are treated like the no-run blocks above.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io
import re
import textwrap
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import MISSING, SKIPS
from outputs import Checker, difference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {
    "docs/guide/remote-sizes.md",
    "docs/guide/remote.md",
    "saefeat.remote.jobs",
    "saefeat.remote.submit",
}
"""Pages and modules whose examples start servers or take minutes: they run with ``make slow``."""
LATER = [pytest.mark.slow, pytest.mark.skipif(SKIPS, reason=MISSING)]
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src" / "saefeat").rglob("*.py")
    if path.name != "__main__.py"
)
FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<text>.*?)\s*-->\s*$")
# Languages that look like Python and would not be run: refused, so that nothing is missed.
LOOKALIKES = {"py", "py3", "python3", "pycon", "ipython", "Python"}


class Block(NamedTuple):
    """A fenced block: its first line (from 1), its language, its text, the comment above it."""

    line: int
    language: str
    text: str
    comment: str


class BadMarkdown(Exception):
    """The page breaks a rule of this module's docstring."""


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = markdown.splitlines()
    comment, at = "", 0
    while at < len(lines):
        line, at = lines[at], at + 1
        if note := COMMENT.match(line):
            comment = note["text"]
        elif fence := FENCE.match(line):
            start = at
            closing = re.compile(rf"^[ \t]*{fence['ticks'][0]}{{{len(fence['ticks'])},}}[ \t]*$")
            while at < len(lines) and not closing.match(lines[at]):
                at += 1
            if at == len(lines):
                raise BadMarkdown(f"line {start}: this block is never closed")
            text = textwrap.dedent("\n".join(lines[start:at])) + "\n"
            info = fence["info"].split()
            found.append(Block(start + 1, info[0] if info else "", text, comment))
            comment, at = "", at + 1
        elif line.strip():
            if comment.startswith(("no-run", "output")):
                raise BadMarkdown(f"line {at - 1}: no block follows `<!-- {comment} -->`")
            comment = ""
    if comment.startswith(("no-run", "output")):
        raise BadMarkdown(f"no block follows the last `<!-- {comment} -->`")
    return found


def runs(block: Block) -> bool:
    """Whether a ```python block is to be run; its no-run reason must not be empty."""
    if not block.comment.startswith("no-run"):
        return True
    if not re.fullmatch(r"no-run:\s*\S.*", block.comment):
        raise BadMarkdown(f"line {block.line}: write the reason: <!-- no-run: reason -->")
    return False


def pair_outputs(page: list[Block]) -> list[tuple[Block, Block | None]]:
    """The ```python blocks, each with the block that shows what it prints."""
    pairs: list[tuple[Block, Block | None]] = []
    previous: Block | None = None
    for block in page:
        if block.language in LOOKALIKES or block.language.startswith("python{"):
            raise BadMarkdown(f"line {block.line}: write ```python, not ```{block.language}")
        if block.comment == "output":
            if block.language != "text" or previous is None or not runs(previous):
                raise BadMarkdown(
                    f"line {block.line}: `<!-- output -->` belongs between a ```python block "
                    "that runs and a ```text block"
                )
            pairs[-1] = (previous, block)
        elif block.language == "python":
            pairs.append((block, None))
        previous = block if block.language == "python" else None
    return pairs


def public() -> dict[str, list[str]]:
    """The public modules, and the names that each lists."""
    import saefeat

    rooms = [name for name, value in vars(saefeat).items() if inspect.ismodule(value)]
    listed = {name: list(getattr(getattr(saefeat, name), "__all__", [])) for name in rooms}
    return {"": list(saefeat.__all__), **{name: names for name, names in listed.items() if names}}


def check_names(code: str) -> None:
    """Every ``sf.name`` and ``sf.room.name`` is public: text that never runs invents nothing."""
    names = public()
    top = {*names[""], *names, "__version__", "studies"}
    unknown = []
    for node in ast.walk(ast.parse(code)):
        text = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if not text or text[0] not in {"sf", "saefeat"} or text[-1] == "__all__":
            continue
        if len(text) == 2 and text[1] not in top:
            unknown.append(".".join(text))
        if len(text) == 3 and text[1] in names and text[2] not in names[text[1]]:
            unknown.append(".".join(text))
    assert not unknown, f"not public: {', '.join(sorted(unknown))}"


def execute(markdown: str, script: Path) -> None:
    """Run a page. ``script`` gets its code, line for line where the page has it.

    nnsight reads a trace's source from the file of the running code, and a traceback then names
    the line of the page.
    """
    pairs = pair_outputs(blocks(markdown))
    lines = [""] * (len(markdown.splitlines()) + 1)
    for block, _ in pairs:
        if runs(block):
            code = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    namespace = {"__name__": "__main__", "__file__": str(script)}
    for block, output in pairs:
        check_names(block.text)
        code = compile("\n" * (block.line - 1) + block.text, str(script), "exec")
        if not runs(block):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        why = None if output is None else difference(printed.getvalue(), output.text)
        if output is not None and why is not None:
            pytest.fail(
                f"{why}\nline {block.line} printed:\n{printed.getvalue()}\n"
                f"line {output.line} shows:\n{output.text}",
                pytrace=False,
            )


def cases(values: Iterable[Any]) -> list[Any]:
    """Each value as a case of a test, by its path or its name; slow if that is in ``SLOW``."""
    named = {str(v.relative_to(ROOT)) if isinstance(v, Path) else v: v for v in values}
    marks = {name: LATER if name in SLOW else [] for name in named}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in named.items()]


@pytest.mark.parametrize("page", cases(PAGES))
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(page.read_text(encoding="utf-8"), tmp_path / f"{page.stem}.py")


# ------------------------------------------------------------------ docstrings


class Finder(doctest.DocTestFinder):
    """Finds decorated functions too.

    The standard finder compares globals, so a function wrapped by a decorator of another module
    (jaxtyping's, in the tests) belongs to nobody and its examples are left out silently.
    """

    def _from_module(self, module, object):
        return getattr(object, "__module__", module.__name__) == module.__name__


def documented(name: str) -> list[doctest.DocTest]:
    """All docstrings of a module: its own, its functions', its classes' and their methods'."""
    module = import_module(name)
    found = Finder(exclude_empty=False).find(module, name, module=module, globs={}, extraglobs={})
    return [test for test in found if test.docstring]


@pytest.mark.parametrize("name", cases(MODULES))
def test_docstrings(name, tmp_path, monkeypatch):
    import nnsight
    import torch

    import saefeat

    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report = io.StringIO()
    for test in documented(name):
        for block, _ in pair_outputs(blocks(inspect.cleandoc(test.docstring))):
            check_names(block.text)
            compile(block.text, f"{test.name}, block at line {block.line}", "exec")
        test.globs = {"sf": saefeat, "torch": torch, "nnsight": nnsight, "__name__": "__main__"}
        doctest.DocTestRunner(Checker(), optionflags=flags).run(test, out=report.write)
    if report.getvalue():
        pytest.fail(report.getvalue(), pytrace=False)


def test_every_public_name_is_among_the_docstrings_that_run():
    """A name defined where the collector does not look would have examples nobody runs."""
    import saefeat

    found = {test.name for name in MODULES for test in documented(name)}
    missed = []
    for room, names in public().items():
        for name in names:
            value = getattr(getattr(saefeat, room) if room else saefeat, name)
            if callable(value) and hasattr(value, "__qualname__"):
                home = f"{value.__module__}.{value.__qualname__}"
                missed += [] if home in found else [f"{name} ({home})"]
    assert missed == []


# ------------------------------------------------------------------ this module's own rules


def page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def run(text: str) -> str:
    return f"```python\n{text}\n```"


SHOWN = "<!-- output -->\n```text\n{}\n```"


def test_a_page_is_one_namespace_and_its_output_is_compared(tmp_path):
    execute(
        page("# x", run("a = 2"), "text", run("print(a + 1)"), SHOWN.format("3")), tmp_path / "p.py"
    )
    execute(page(run("print('loss 0.123')"), SHOWN.format("loss ...")), tmp_path / "p.py")
    with pytest.raises(pytest.fail.Exception, match="printed"):
        execute(page(run("print(4)"), SHOWN.format("3")), tmp_path / "p.py")


def test_a_traceback_names_the_line_of_the_page(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        execute(page("# x", "text", run("a = 1\na / 0")), tmp_path / "p.py")
    assert caught.traceback[-1].lineno + 1 == 7


def test_indented_blocks_run(tmp_path):
    with pytest.raises(ZeroDivisionError):
        execute('=== "tab"\n\n    ```python\n    1 / 0\n    ```\n', tmp_path / "p.py")


def test_no_run_needs_a_reason_and_real_names(tmp_path):
    execute(page("<!-- no-run: needs a GPU -->\n" + run("1 / 0")), tmp_path / "p.py")
    with pytest.raises(SyntaxError):
        execute(page("<!-- no-run: needs a GPU -->\n" + run("1 /")), tmp_path / "p.py")
    with pytest.raises(AssertionError, match="no_such_name"):
        execute(
            page("<!-- no-run: needs a GPU -->\n" + run("sf.no_such_name()")), tmp_path / "p.py"
        )
    for comment in ("no-run", "no-run:", "no-run: "):
        with pytest.raises(BadMarkdown, match="reason"):
            execute(page(f"<!-- {comment} -->\n" + run("1 / 0")), tmp_path / "p.py")


@pytest.mark.parametrize(
    "text",
    [
        "```py\n1\n```",
        "```pycon\n>>> 1\n```",
        "```python\n1\n",
        "<!-- output -->\n```text\n1\n```",
        "<!-- no-run: reason -->\n\nno block here",
        "<!-- no-run: reason -->",
        run("print(1)") + "\n<!-- output -->\n```json\n1\n```",
        "<!-- no-run: reason -->\n" + run("print(1)") + "\n" + SHOWN.format("1"),
    ],
)
def test_nothing_is_left_out_silently(text, tmp_path):
    with pytest.raises(BadMarkdown):
        execute(text, tmp_path / "p.py")


def test_a_trace_in_a_page_finds_its_source(tmp_path):
    code = """
import torch, nnsight
model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
with model.trace(torch.ones(1, 2)):
    hidden = nnsight.save(model[0].output)
print(tuple(hidden.shape))
"""
    execute(
        page("It's text, with an apostrophe", run(code), SHOWN.format("(1, 2)")), tmp_path / "p.py"
    )


def test_decorated_functions_are_found():
    """The finder sees through the import hook of conftest.py."""
    for name in filter(lambda name: name.startswith("saefeat.kernel."), MODULES):
        module = import_module(name)
        own = {
            f"{name}.{key}"
            for key, value in vars(module).items()
            if inspect.isroutine(value) and value.__module__ == name and value.__doc__
        }
        assert own <= {test.name for test in documented(name)}
